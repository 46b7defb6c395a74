"""How alike two rows of numbers are, by hand and by property."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.logprobs import log_softmax
from edge_lab.measure.divergence import cosine_similarity, kl_divergence

LOGITS = st.lists(st.floats(-500, 500, width=32), min_size=6, max_size=6)


def test_kl_by_hand():
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    assert kl_divergence(p, q) == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2)])


@settings(deadline=None, max_examples=100)
@given(LOGITS, LOGITS)
def test_kl_is_never_negative_and_zero_for_equals(a, b):
    p, q = log_softmax(np.array([a], np.float32)), log_softmax(np.array([b], np.float32))
    assert kl_divergence(p, q)[0] >= 0
    assert kl_divergence(p, p)[0] == 0
    assert np.exp(p).sum() == pytest.approx(1)


def test_cosine_by_hand():
    a = np.array([[3, 4], [1, 0], [0, 0], [0, 0], [np.nan, 1], [np.inf, 1]], np.float32)
    b = np.array([[4, 3], [-2, 0], [1, 1], [0, 0], [1, 1], [1, 1]], np.float32)
    expected = [24 / 25, -1, 0, 1, np.nan, np.nan]
    np.testing.assert_allclose(cosine_similarity(a, b), expected)

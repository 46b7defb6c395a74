"""Log-probabilities, by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import BackendError
from edge.logprobs import log_softmax, token_logprobs

LOGITS = st.lists(st.floats(-500, 500, width=32), min_size=6, max_size=6)


def test_logits_that_are_no_numbers_are_refused():
    logits = np.zeros((6, 2), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        logits[5, 1] = bad
        with pytest.raises(BackendError, match="NaN or infinite"):
            log_softmax(logits)
        with pytest.raises(BackendError, match="NaN or infinite"):
            token_logprobs(logits, np.zeros(6, np.int64))


@settings(deadline=None, max_examples=50)
@given(st.lists(LOGITS, min_size=1, max_size=11), st.data())
def test_one_token_of_each_row(rows, data):
    """Whatever the number of rows: they are walked a few at a time."""
    logits = np.array(rows, np.float32)
    ids = np.array([data.draw(st.integers(0, 5)) for _ in rows])
    np.testing.assert_array_equal(
        token_logprobs(logits, ids), log_softmax(logits)[np.arange(len(rows)), ids]
    )

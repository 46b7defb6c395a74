"""Scoring, on a backend that checks every step, and the figures of a generation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError, ContextLengthError, RequestError
from edge.runtime.generation import GenerationStats
from edge.runtime.scoring import score
from tests.edge.runtime.conftest import VOCAB
from tests.standins.scripted_backend import ScriptedBackend, random_logits


def test_derived_figures():
    stats = GenerationStats(
        prompt_tokens=6,
        cached_tokens=2,
        completion_tokens=4,
        queue_s=0.5,
        ttft_s=1.5,
        total_s=3.75,
        itl_s=[0.75] * 3,
        model_s=1.75,
    )
    assert stats.tpot_s == 0.75
    assert stats.prefill_tps == 4.0
    assert stats.decode_tps == pytest.approx(1 / 0.75)
    assert stats.own_s == 1.5
    plain = stats.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["total_s"] == 3.75


def test_stats_of_nothing_divide_by_nothing():
    assert GenerationStats().as_dict()["prefill_tps"] == 0
    assert GenerationStats(completion_tokens=1, ttft_s=1, total_s=1).decode_tps == 0


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=40), chunk=st.integers(1, 70))
def test_scores_are_log_softmax_whatever_the_chunks(
    table: EmbeddingTable, ids: list[int], chunk: int
):
    script = random_logits(VOCAB)
    backend = ScriptedBackend(table, script, max_step_tokens=chunk)
    scores = score(backend, table, ids)
    assert scores.dtype == np.float64
    expected = []
    for end in range(1, len(ids)):
        logits = np.asarray(script(tuple(ids[:end])), dtype=np.float64)
        expected.append(logits[ids[end]] - np.log(np.exp(logits).sum()))
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_scores_of_large_logits_do_not_overflow(table: EmbeddingTable):
    def script(seen: tuple[int, ...]) -> Any:
        logits = np.full(VOCAB, -3e4, np.float32)
        logits[[1, 2]] = 3e4
        return logits

    scores = score(ScriptedBackend(table, script), table, [0, 1, 3])
    np.testing.assert_allclose(scores, [-np.log(2), -6e4 - np.log(2)])


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], RequestError),
        ([1], RequestError),
        ([1, VOCAB], RequestError),
        ([1, -1], RequestError),
        ([1, -1, 1], RequestError),
        ([1] * 12, ContextLengthError),
    ],
)
def test_what_cannot_be_scored(table: EmbeddingTable, ids: list[int], error: type[Exception]):
    """The last token is only looked up in the logits, where -1 would be another token."""
    backend = ScriptedBackend(table, random_logits(VOCAB), capacity=10)
    with pytest.raises(error):
        score(backend, table, ids)
    assert backend.steps == []


def test_as_many_tokens_as_the_cache_holds_can_be_scored(table: EmbeddingTable):
    backend = ScriptedBackend(table, random_logits(VOCAB), capacity=10)
    assert score(backend, table, [1] * 10).shape == (9,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error(table: EmbeddingTable, bad: float):
    """Also where neither the scored token's logit nor the row's first ones are at fault."""

    def script(seen: tuple[int, ...]) -> Any:
        logits = np.zeros(VOCAB, np.float32)
        logits[VOCAB - 1] = bad if len(seen) == 7 else 0
        return logits

    backend = ScriptedBackend(table, script)
    assert np.isfinite(score(backend, table, [1] * 7)).all()
    with pytest.raises(BackendError, match="NaN or infinite"):
        score(backend, table, [1] * 8)

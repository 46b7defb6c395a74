"""A prompt whose logits are wanted is a sequence as any other, and they are those of `prefill`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.backends import Rows, Step
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import DeadlineError, EdgeError, RequestError
from edge.runtime.scheduler.pooling import NEUTRAL
from edge.runtime.scheduler.sequence import SequenceState
from edge.runtime.scheduler.steps import _MOST_LOGITS
from lab.quality.best_logits import best_of
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import GREEDY, Collected, Engine, make_request
from tests.standins.scripted_backend import ScriptedBackend, random_logits

SCRIPT = random_logits(VOCAB)


class Scored(Collected):
    """Keeps the logits of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[NDArray[np.float32]] = []
        self.chunks: list[int] = []

    def take(self, first: int, logits: NDArray[np.float32]) -> None:
        assert first == len(self.rows)
        self.chunks.append(len(logits))
        self.rows += list(logits.copy())

    def finish(self, reason: Any, stats: Any) -> None:
        self.last = reason


def score(
    engine: Engine, ids: list[int], take: Any = None, **options: Any
) -> tuple[SequenceState, Scored]:
    sink = Scored()
    request = make_request(ids, NEUTRAL, on_logits=take or sink.take, **options)
    return engine.submit(request, sink)[0], sink


def rows_alone(table: EmbeddingTable, ids: list[int]) -> list[NDArray[np.float32]]:
    backend = ScriptedBackend(table, SCRIPT, capacity=256, max_step_tokens=64)
    return [
        row
        for _, logits in prefill(backend, table, ids, wanted=all_tokens)
        for row in logits.copy()
    ]


@settings(deadline=None, max_examples=50)
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    answers=st.lists(st.integers(1, 20), max_size=4),
    slots=st.integers(1, 3),
    chunk=st.integers(1, 8),
    deterministic=st.booleans(),
    target=st.sampled_from([None, 1e-6]),
)
def test_logits_are_those_of_the_prompt_alone_whatever_runs_beside_it(
    table: EmbeddingTable,
    prompts: list[int],
    answers: list[int],
    slots: int,
    chunk: int,
    deterministic: bool,
    target: float | None,
):
    """Also of prompts whose rows are in the cache, and of those that were preempted."""
    chunk = max(chunk, 3) if deterministic else chunk
    engine = Engine(
        table,
        SCRIPT,
        num_slots=slots,
        max_step_tokens=chunk,
        prefill_chunk=chunk,
        deterministic=deterministic,
        target_itl_ms=target,
    )
    for number, tokens in enumerate(answers):
        params = replace(GREEDY, max_tokens=tokens)
        engine.submit(make_request([1, 2, 3], params, client=str(number)))
    known = []
    for number, size in enumerate(prompts):
        ids = [1 + i % 5 for i in range(size)]
        known.append((ids, score(engine, ids, client=f"scores {number}")[1]))
    while not engine.core.is_idle:
        engine.core.step()
        engine.check_books()
        for sequence in engine.core.roster.running[:1]:
            if len(engine.backend.steps) % 3 == 0:
                engine.core._preempt(sequence)
                engine.core.step()
    for ids, sink in known:
        assert sink.last == "length"
        assert sink.ids == []
        np.testing.assert_array_equal(sink.rows, rows_alone(table, ids))


def test_chunks_are_bounded_and_whole_rows_are_asked_for(table: EmbeddingTable):
    engine = Engine(table, SCRIPT, capacity=256, max_step_tokens=200)
    backend = engine.backend

    def forward_best(step: Step) -> Rows:
        return [[best_of(row, 8, row.copy) for row in each] for each in backend.forward(step)]

    backend.forward_best = forward_best
    ids = [7] * 150
    _, sink = score(engine, ids)
    engine.run()
    assert sink.chunks == [_MOST_LOGITS, _MOST_LOGITS, 150 - 2 * _MOST_LOGITS]
    np.testing.assert_array_equal(sink.rows, rows_alone(table, ids))
    assert engine.core.counts["completion"] == 0


def test_its_rows_are_a_prefix_for_the_answer_that_follows(table: EmbeddingTable):
    engine = Engine(table, SCRIPT)
    score(engine, [1, 2, 3, 4])
    engine.run()
    sequence, _ = engine.submit(make_request([1, 2, 3, 4, 5], replace(GREEDY, max_tokens=1)))
    engine.run()
    assert sequence.stats.cached_tokens == 4


def test_a_sequence_with_prompt_logits_ends_as_any_other(table: EmbeddingTable):
    now = 0.0
    engine = Engine(table, SCRIPT, clock=lambda: now)
    cancelled, sink = score(engine, [1] * 30)
    engine.core.step()
    cancelled.cancelled = True
    engine.core.step()
    assert (sink.last, sink.chunks) == ("cancelled", [8])
    _, late = score(engine, [2] * 30, deadline_s=1.0)
    engine.core.step()
    now = 2.0
    engine.core.step()
    assert isinstance(late.last, DeadlineError)


def fail(error: BaseException, first: int, logits: Any) -> None:
    raise error


@pytest.mark.parametrize("error", [RequestError("no more is wanted"), KeyError(3)])
def test_what_goes_wrong_with_logits_is_their_own_sequences_fault(
    table: EmbeddingTable, error: Exception
):
    engine = Engine(table, SCRIPT)
    _, sink = score(engine, [1] * 30, partial(fail, error))
    _, other = engine.submit(make_request([4], replace(GREEDY, max_tokens=3)))
    engine.run()
    assert isinstance(sink.last, EdgeError)
    assert ("no more is wanted" if isinstance(error, RequestError) else "KeyError(3)") in str(
        sink.last
    )
    assert other.reason == "length"


def test_a_nan_gives_no_figures_and_leaves_no_row(table: EmbeddingTable):
    def script(seen: tuple[int, ...]) -> Any:
        return np.full(VOCAB, np.nan, np.float32) if 9 in seen else SCRIPT(seen)

    engine = Engine(table, script)
    _, sink = score(engine, [1, 2, 9, *[3] * 20])
    engine.run()
    assert "non-finite" in str(sink.last)
    assert sink.rows == []
    assert engine.backend.rows_of(0, 8) == [0] * 8

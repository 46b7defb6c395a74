"""With `deterministic`, each row comes from a step of the kind that gives it in an empty engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.backends import Step
from edge.bundle.embeddings import EmbeddingTable
from edge.runtime.scheduler.core import even_chunk
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import GREEDY, Collected, Engine, make_request
from tests.fakes import ScriptedBackend, random_logits

LONE = 1000  # added to a token whose row another kernel computed
BLOCK = 32  # the fewest tokens that attention takes at once


class Uneven(ScriptedBackend):
    """A backend whose rows differ by the number of tokens that were computed together.

    So do its answers, as an engine's do that rounds a lone token otherwise.
    """

    def forward(self, step: Step) -> NDArray[np.float32]:
        super().forward(step)
        for slot, place in zip(step.slots, step.positions, strict=True):
            for at in range(step.seq):
                if step.seq % BLOCK == 1 and at == step.seq - 1:
                    self._cache[slot, place[at]] += LONE
        seen = zip(step.slots, step.positions, step.logits_indices, strict=True)
        return np.stack(
            [[self._logits(slot, int(place[i])) for i in indices] for slot, place, indices in seen]
        )


def uneven_engine(table: EmbeddingTable, chunk: int, slots: int, deterministic: bool) -> Engine:
    engine = Engine(
        table,
        random_logits(VOCAB),
        num_slots=slots,
        capacity=160,
        max_step_tokens=chunk,
        prefill_chunk=chunk,
        deterministic=deterministic,
    )
    backend = Uneven(
        table, random_logits(VOCAB), num_slots=slots, capacity=160, max_step_tokens=chunk
    )
    engine.backend = engine.core.backend = backend
    return engine


# Two tokens only, so that prompts share prefixes.
prompts = st.integers(1, 100).flatmap(
    lambda size: st.builds(
        lambda head, flip: [1 + (head >> (i % 3)) % 2 if i < flip else 1 for i in range(size)],
        st.integers(0, 3),
        st.integers(0, 100),
    )
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(prompts, st.integers(0, 4), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(3, 70),
    st.integers(1, 4),
)
def test_what_runs_beside_it_and_what_is_cached_change_no_answer(
    table: EmbeddingTable, requests: list[tuple[list[int], int, int]], chunk: int, slots: int
):
    engine = uneven_engine(table, chunk, slots, deterministic=True)
    sinks: list[Collected] = []
    for ids, rounds, tokens in requests:
        params = replace(GREEDY, max_tokens=tokens)
        sinks.append(engine.submit(make_request(ids, params))[1])
        for _ in range(rounds):
            engine.core.step()
    engine.run()
    for (ids, _, tokens), sink in zip(requests, sinks, strict=True):
        alone = uneven_engine(table, 70, 1, deterministic=True)
        params = replace(GREEDY, max_tokens=tokens)
        assert alone.answer(make_request(ids, params)) == (sink.ids, sink.reason)


def test_without_it_they_do(table: EmbeddingTable):
    request = make_request([1, 2] * 20, replace(GREEDY, max_tokens=12))
    engine = uneven_engine(table, 39, 2, deterministic=False)
    assert engine.answer(request) != uneven_engine(table, 40, 2, deterministic=False).answer(
        request
    )


@given(st.integers(2, 3000), st.integers(1, 600), st.integers(3, 600))
def test_chunks_leave_no_token_alone(pending: int, wish: int, most: int):
    sizes = []
    while pending:
        size = even_chunk(pending, min(wish, most))
        assert size <= max(most, 3)
        sizes.append(size)
        pending -= size
    assert all(size >= 2 for size in sizes)
    assert all(size % 2 == 0 or size < BLOCK for size in sizes)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_an_answer_are_used_again_only_without_it(
    table: EmbeddingTable, deterministic: bool
):
    engine = uneven_engine(table, 16, 2, deterministic)
    first = list(range(1, 11))
    answer, _ = engine.answer(make_request(first, replace(GREEDY, max_tokens=6)))
    engine.answer(make_request([*first, *answer, 5], replace(GREEDY, max_tokens=1)))
    cached = engine.core.counts["cached"]
    assert cached == (10 if deterministic else 15)

"""Each row of a prompt comes from a step of the kind that gives it in an empty engine.

That holds where an engine rounds activations, so that a last bit counts, and with `deterministic`,
where rows of an answer are not used again either.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.backends import Step
from edge.bundle.embeddings import EmbeddingTable
from edge.runtime.scheduler.steps import even_chunk
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import GREEDY, Collected, Engine, make_request
from tests.standins.scripted_backend import ScriptedBackend, random_logits

LONE = 1000  # added to a token whose row another kernel computed
ODD = 5000
BLOCK = 32  # the fewest tokens that attention takes at once


class Uneven(ScriptedBackend):
    """A backend whose rows differ by the number of tokens that were computed together.

    So do its answers, as an engine's do that rounds a token otherwise that is left alone, or that
    is the last of an odd number.
    """

    rounds_activations = True

    def forward(self, step: Step) -> NDArray[np.float32]:
        super().forward(step)
        last = step.seq - 1
        for slot, place in zip(step.slots, step.positions, strict=True):
            self._cache[slot, place[last]] += LONE * (step.seq % BLOCK == 1) + ODD * (step.seq % 2)
        seen = zip(step.slots, step.positions, step.logits_indices, strict=True)
        return np.stack(
            [[self._logits(slot, int(place[i])) for i in indices] for slot, place, indices in seen]
        )


class Exact(Uneven):
    """One that rounds nothing: differences are too small to matter."""

    rounds_activations = False


def no_prompt(seen: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits of answers without the tokens of prompts, so that no prompt goes on with an answer."""
    logits = np.array(random_logits(VOCAB)(seen), np.float32)
    logits[1:3] = -100
    return logits


def uneven_engine(
    table: EmbeddingTable,
    chunk: int,
    slots: int,
    deterministic: bool,
    backend_type: type[Uneven] = Uneven,
) -> Engine:
    return Engine(
        table,
        random_logits(VOCAB) if deterministic else no_prompt,
        num_slots=slots,
        capacity=160,
        max_step_tokens=chunk,
        prefill_chunk=chunk,
        deterministic=deterministic,
        backend_type=backend_type,
    )


# Two tokens only, so that prompts share prefixes.
prompts = st.integers(1, 100).flatmap(
    lambda size: st.builds(
        lambda head, flip: [1 + (head >> (i % 3)) % 2 if i < flip else 1 for i in range(size)],
        st.integers(0, 3),
        st.integers(0, 100),
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(prompts, st.integers(0, 4), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(3, 70),
    st.integers(1, 4),
)
def test_what_runs_beside_it_and_what_is_cached_change_no_answer(
    table: EmbeddingTable,
    deterministic: bool,
    requests: list[tuple[list[int], int, int]],
    chunk: int,
    slots: int,
):
    engine = uneven_engine(table, chunk, slots, deterministic)
    sinks: list[Collected] = []
    for ids, rounds, tokens in requests:
        params = replace(GREEDY, max_tokens=tokens)
        sinks.append(engine.submit(make_request(ids, params))[1])
        for _ in range(rounds):
            engine.core.step()
    engine.run()
    for (ids, _, tokens), sink in zip(requests, sinks, strict=True):
        alone = uneven_engine(table, 70, 1, deterministic)
        params = replace(GREEDY, max_tokens=tokens)
        assert alone.answer(make_request(ids, params)) == (sink.ids, sink.reason)


@pytest.mark.parametrize(("chunk", "backend_type"), [(40, Exact), (2, Uneven)])
def test_without_it_they_do(table: EmbeddingTable, chunk: int, backend_type: type[Uneven]):
    request = make_request([1, 2] * 20, replace(GREEDY, max_tokens=12))
    engine = uneven_engine(table, chunk, 2, False, backend_type)
    assert engine.answer(request) != engine.answer(request)


@given(st.integers(2, 3000), st.integers(1, 600), st.integers(3, 600), st.sampled_from([2, 32]))
def test_chunks_leave_no_token_alone(pending: int, wish: int, most: int, blocks: int):
    sizes = []
    while pending:
        size = even_chunk(pending, min(wish, most), blocks)
        assert size <= max(most, 3)
        sizes.append(size)
        pending -= size
    assert all(size >= 2 for size in sizes)
    assert all(size % blocks != 1 or size < BLOCK for size in sizes)
    assert all(size % 2 == 0 for size in sizes[:-1])  # so the same tokens are the odd last ones


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_an_answer_are_used_again_only_without_it(
    table: EmbeddingTable, deterministic: bool
):
    engine = uneven_engine(table, 16, 2, deterministic)
    first = list(range(1, 11))
    answer, _ = engine.answer(make_request(first, replace(GREEDY, max_tokens=6)))
    engine.answer(make_request([*first, *answer, 5], replace(GREEDY, max_tokens=1)))
    cached = engine.core.counts["cached"]
    assert cached == (10 if deterministic else 14)


@pytest.mark.parametrize(("size", "steps"), [(3, 1), (31, 1), (33, 2), (49, 1), (63, 1), (65, 2)])
def test_a_prompt_that_fits_a_step_takes_one_unless_that_leaves_a_token_alone(
    table: EmbeddingTable, size: int, steps: int
):
    engine = uneven_engine(table, 70, 1, deterministic=False)
    engine.answer(make_request([2] * size, replace(GREEDY, max_tokens=1)))
    assert engine.core.times.steps == steps

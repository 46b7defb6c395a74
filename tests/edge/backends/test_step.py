"""A step's own rules, and the loop that runs a prompt in steps."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from edge.backends.step import Step, all_tokens, last_token, prefill, step_after
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError
from tests.standins.scripted_backend import ScriptedBackend, random_logits, write_table

VOCAB = 40


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingTable:
    return EmbeddingTable(write_table(tmp_path_factory.mktemp("table") / "table", VOCAB))


def make_step(**changes: Any) -> Step:
    """Two sequences of three tokens after 4 and 2 rows, changed."""
    fields = {
        "slots": [3, 1],
        "embeds": np.zeros((2, 3, 2), np.float16),
        "positions": np.array([[4, 5, 6], [2, 3, 4]]),
        "kv_len": 7,
        "logits_indices": np.array([[2], [0]]),
    }
    return Step(**{**fields, **changes})


def test_a_step_knows_its_sizes_and_does_not_change() -> None:
    step = make_step()
    assert (step.batch, step.seq, step.num_logits, step.starts, step.end) == (2, 3, 1, [4, 2], 7)
    with pytest.raises(FrozenInstanceError):
        step.kv_len = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": [3]}, "1 slots do not match 2 rows"),
        ({"slots": [3, 3]}, r"slots \[3, 3\] are not distinct"),
        ({"positions": np.array([4, 5, 6])}, "are not .batch, tokens."),
        ({"positions": np.zeros((2, 0), np.int64)}, "are not .batch, tokens."),
        ({"embeds": np.zeros((2, 2, 2), np.float16)}, "do not match positions"),
        ({"logits_indices": np.array([[2]])}, "do not match positions"),
        ({"positions": np.array([[4, 5, 6], [-1, 0, 1]])}, r"positions -1\.\.6 does not fit"),
        ({"positions": np.array([[4, 5, 6], [2, 2, 4]])}, "not consecutive"),
        ({"positions": np.array([[4, 5, 6], [4, 3, 2]])}, "not consecutive"),
        ({"kv_len": 6}, "does not fit a cache that is read up to row 6"),
        ({"logits_indices": np.array([[2], [3]])}, "of 3 tokens per sequence"),
        ({"logits_indices": np.array([[-1], [0]])}, "of 3 tokens per sequence"),
    ],
)
def test_malformed_steps_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        make_step(**changes)


def test_a_decode_step_has_logits_of_its_one_token_only() -> None:
    embeds = np.zeros((1, 1, 2), np.float16)
    assert step_after([0], [5], embeds, np.array([[0]])).kv_len == 6
    for index in (1, -1):
        with pytest.raises(BackendError, match="of 1 tokens per sequence"):
            step_after([0], [5], embeds, np.array([[index]]))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_slots": 3}, r"slots \[3, 1\] are not slots of the 3"),
        ({"capacity": 6}, r"positions 2\.\.6 does not fit a cache of 6 rows"),
        ({"capacity": 7}, "reads 8 rows exceeds the cache of 7"),
        ({"max_step_tokens": 2}, "3 tokens exceeds max_step_tokens 2"),
    ],
)
def test_steps_that_a_backend_cannot_run_are_refused(
    limits: dict[str, Any], message: str, table: EmbeddingTable
) -> None:
    step = make_step(kv_len=8)
    fits: dict[str, Any] = {"num_slots": 4, "capacity": 8, "max_step_tokens": 3}
    backend = ScriptedBackend(table, random_logits(VOCAB), **fits)
    step.check(backend)
    with pytest.raises(BackendError, match=message):
        step.check(ScriptedBackend(table, random_logits(VOCAB), **{**fits, **limits}))
    backend.close()
    with pytest.raises(BackendError, match="the backend is closed; load the bundle again"):
        step.check(backend)


@given(
    past=st.integers(0, 20),
    count=st.integers(0, 40),
    steps=st.integers(1, 9),
    most=st.none() | st.integers(1, 12),
)
def test_a_prompt_in_chunks_has_the_logits_of_one_step(
    table: EmbeddingTable, past: int, count: int, steps: int, most: int | None
) -> None:
    ids = np.random.default_rng(count).integers(0, VOCAB, past + count)
    script = random_logits(VOCAB)
    backend = ScriptedBackend(table, script, num_slots=2, max_step_tokens=steps)
    for _ in prefill(backend, table, ids[:past], slot=1):
        pass
    backend.steps.clear()
    ran = list(
        prefill(backend, table, ids[past:], slot=1, past=past, max_tokens=most, wanted=all_tokens)
    )
    assert [i for part, _ in ran for i in range(part.start, part.stop)] == list(range(count))
    assert all(seq <= min(steps, most or steps) for _, seq in backend.steps)
    assert backend.rows_of(1, past + count) == ids.tolist()
    assert -1 in backend.rows_of(0, 1)
    for part, logits in ran:
        expected = [script(tuple(ids[: past + i + 1])) for i in range(part.start, part.stop)]
        assert_array_equal(logits, expected)


def test_a_chunk_runs_when_it_is_asked_for(tmp_path: Path, table: EmbeddingTable) -> None:
    backend = ScriptedBackend(table, random_logits(VOCAB), max_step_tokens=2)
    chunks = prefill(backend, table, [1, 2, 3], wanted=last_token)
    assert not backend.steps
    part, logits = next(chunks)
    assert (part, logits.shape, backend.steps) == (slice(0, 2), (1, VOCAB), [(0, 2)])

"""A backend and its table, with the bookkeeping that a test needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.backends.ort.cpu import OrtBackend
from edge.backends.step import step_after
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.io_spec import EMBEDDINGS_NAME
from edge.bundle.manifest import read_manifest
from tests.conftest import TINY_KV_CAPACITY
from tests.standins.slot_rows import stacked


class Runner:
    """Runs token ids and keeps the length of every slot; all options go to `OrtBackend`."""

    def __init__(self, bundle: Path, *, num_slots: int = 4, **options: Any) -> None:
        self.manifest = read_manifest(bundle)
        options = {"num_threads": 1, **options}
        self.backend = OrtBackend(bundle, self.manifest, num_slots=num_slots, **options)
        self.table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
        self.lengths = [0] * num_slots

    def step(
        self, ids: Sequence[Sequence[int]] | NDArray[np.int64], slots: Sequence[int] = (0,)
    ) -> NDArray[np.float32]:
        """Logits ``[b, s, vocab]`` of the next tokens of each slot."""
        ids = np.asarray(ids)
        starts = [self.lengths[slot] for slot in slots]
        indices = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        logits = self.backend.forward(step_after(slots, starts, self.table[ids], indices))
        for slot in slots:
            self.lengths[slot] += ids.shape[1]
        return np.array(logits)

    def cache(self, slot: int) -> NDArray[Any]:
        """What the slot's valid rows hold."""
        return stacked(self.backend.read_slot(slot, self.lengths[slot]))

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.backend.close()
        self.table.close()


def random_ids(*shape: int, seed: int = 0) -> NDArray[np.int64]:
    """Ordinary tokens of the tiny models."""
    return np.random.default_rng(seed).integers(0, 300, shape)


def history(runner: Runner) -> list[NDArray[Any]]:
    """Logits and caches of everything that a cache is put through."""
    found = [
        runner.step(random_ids(2, 17), [0, 1]),  # batched prefill
        runner.step(random_ids(1, 9, seed=1), [0]),  # a chunk behind a past
        runner.step(random_ids(2, 1, seed=2), [0, 1]),  # decode at unequal lengths
        runner.step(random_ids(3, 4, seed=3), [3, 0, 1]),  # scattered, one of them new
        runner.step(random_ids(3, 1, seed=4), [1, 3, 0]),
    ]
    runner.lengths[0] = 5  # go back, as a prompt does that shares a prefix
    found += [runner.step(random_ids(1, 3, seed=5), [0]), runner.step(random_ids(1, 1), [0])]
    return found + [runner.cache(slot).astype(np.float32) for slot in range(4)]


def check_slots_apart(runner: Runner) -> None:
    """What runs in some slots changes nothing in another."""
    runner.step(random_ids(1, 20, seed=1), [1])
    before = stacked(runner.backend.read_slot(1, TINY_KV_CAPACITY))
    alone = runner.step(random_ids(1, 1, seed=2), [1])
    runner.lengths[1] -= 1
    for slot in (0, 2):
        runner.step(random_ids(1, 30, seed=3), [slot])
        runner.step(random_ids(1, 1, seed=4), [slot])
    runner.step(random_ids(2, 9, seed=5), [2, 0])
    assert_array_equal(runner.step(random_ids(1, 1, seed=2), [1]), alone)
    assert_array_equal(stacked(runner.backend.read_slot(1, 20)), before[:, :, :20])
    assert not stacked(runner.backend.read_slot(3, TINY_KV_CAPACITY)).any()


def greedy(runner: Runner, ids: NDArray[np.int64], count: int) -> tuple[list[int], float]:
    """Greedy tokens, and the least distance of the two best logits on the way."""
    tokens, margin = [], np.inf
    logits = runner.step(ids)[0, -1]
    for _ in range(count):
        best = np.sort(logits)[-2:]
        margin = min(margin, float(best[1] - best[0]))
        tokens.append(int(logits.argmax()))
        logits = runner.step(np.array([[tokens[-1]]]))[0, -1]
    return tokens, margin


def check_greedy_tokens(ours: Runner, theirs: Runner, atol: float) -> None:
    """Where logits may differ by this much, the greedy tokens of prompts are the same."""
    compared = 0
    for seed in range(6):
        ours.lengths[0] = theirs.lengths[0] = 0
        ids = random_ids(1, 11, seed=seed)
        expected, margin = greedy(theirs, ids, 12)
        found, _ = greedy(ours, ids, 12)
        if margin > 2 * atol:  # else rounding may choose
            assert found == expected
            compared += 1
    assert compared

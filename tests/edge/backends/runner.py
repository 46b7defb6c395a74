"""A backend and its table, with the bookkeeping that a test needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort.cpu import OrtBackend
from edge.backends.step import step_after
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.io_spec import EMBEDDINGS_NAME
from edge.bundle.manifest import read_manifest


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
        return self.backend.read_slot(slot, self.lengths[slot])

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

"""Adapters of random numbers as backends take them, and the model that each makes when merged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.adapters.graph_inputs import adapted_linears
from edge.adapters.weights import AdapterWeights
from edge.model.spec import ModelSpec
from export.sources.checkpoint import Checkpoint, Transformed


def random_adapter(
    model: ModelSpec, rank: int, *, seed: int = 0, size: float = 0.1, only: str = ""
) -> AdapterWeights:
    """An adapter of all linears, or of those whose names have ``only``."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in adapted_linears(model):
        if only not in layer.name:
            continue
        parts, (width, out) = len(layer.rows), layer.shape
        a = size * random.standard_normal((parts * rank, width), np.float32)
        b, first = np.zeros((out, parts * rank), np.float32), 0
        for part, rows in enumerate(layer.rows):
            own = b[first : first + rows, part * rank : (part + 1) * rank]
            own[...] = size * random.standard_normal(own.shape, np.float32)
            first += rows
        tensors[layer.name] = (a, b)
    return AdapterWeights(f"random-{seed}", f"{seed}-{rank}-{size}-{only}", rank, tensors)


class MergedCheckpoint(Transformed):
    """A model with such an adapter in its weights."""

    def __init__(self, checkpoint: Checkpoint, adapter: AdapterWeights) -> None:
        super().__init__(checkpoint)
        self._deltas: dict[str, NDArray[np.float32]] = {}
        for layer in adapted_linears(checkpoint.spec):
            if layer.name not in adapter.tensors:
                continue
            a, b = adapter.tensors[layer.name]
            parts = np.split((b @ a).astype(np.float32), np.cumsum(layer.rows)[:-1])
            self._deltas |= dict(zip(layer.weights, parts, strict=True))

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor; see `Checkpoint.tensor`."""
        tensor = super().tensor(name)
        delta = self._deltas.get(name)
        return tensor if delta is None else tensor.astype(np.float32) + delta

"""Defines one small protocol for inference engines, which `edge.runtime` drives.

Here: the engines themselves (ONNX Runtime on the CPU and on CUDA, TensorRT), the choice among them,
their memory, and the steps that they take. A backend computes steps and holds the KV cache. It
knows no requests, texts or sampling; those are in `edge.runtime`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from .best import BestLogits
from .step import Floats, Ints, RunsSteps, Step

if TYPE_CHECKING:
    from edge.adapters.weights import AdapterWeights
    from edge.bundle.kv_scales import Scales

__all__ = ["Backend", "BestLogits", "Floats", "Ints", "Rows", "Step"]

Rows = NDArray[np.float32] | list[list[BestLogits]]
"""The result of a step: for ``B`` sequences ``N`` rows of logits each, or the best of each row."""


class Backend(RunsSteps, Protocol):
    """A decoder with a fixed-size KV cache of ``num_slots`` sequences.

    A slot is one sequence's rows of the cache. A row's index is its token's position. The caller
    keeps track of the valid rows of each slot; a backend only computes.

    Attributes:
        name: ``ort-cpu``, ``ort-cuda`` or ``tensorrt``.
        rounds_activations: whether activations are rounded to int8, so that the rows of its cache
            differ from those of an engine that computes in float.
        kv_scales: scales of the cache tensors in 8 bits (`edge.bundle.kv_scales`); empty if rows
            are floats. Such rows are read and written as float32, without loss.
        hidden_states: float32 ``[B, S, width]`` of the newest step's tokens, valid until the next
            step; None if the graph has no such output or nobody asked for it.
        meanwhile: called in every step, in the step's thread, once the device has all its work, so
            that the CPU does something instead of waiting. It must not raise, nor use the backend.
            None if steps keep the CPU itself busy.
        adapter_rank: the largest rank of an adapter that `set_adapter` takes; 0 if it takes none,
            as with bundles that were exported without ``--adapters``.
    """

    name: str
    rounds_activations: bool
    kv_scales: Scales
    meanwhile: Callable[[], None] | None
    adapter_rank: int

    @property
    def hidden_states(self) -> NDArray[np.float32] | None:
        """Return the attribute that the class describes."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Return the memory of the cache, in bytes."""
        ...

    @property
    def forward_best(self) -> Callable[[Step], Rows] | None:
        """As `forward`, with the rows left where they were computed; None if they are here anyway.

        Rows come whole if one run cannot hold them all. The best of a row, and what it fetches, are
        valid until the next call of `forward` or `forward_best`.
        """
        ...

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` rows of one slot to another."""
        ...

    def set_adapter(self, slot: int, weights: AdapterWeights | None) -> None:
        """Give the sequence of a slot an adapter, or none, as slots have at first.

        Nothing is copied if the slot had the same adapter last.

        Raises:
            BackendError: ``adapter_rank`` is 0, or the adapter does not fit the bundle.
            ResourceError: there is no memory for the first adapter.
        """
        ...

    def close(self) -> None:
        """Free everything; calling it twice is harmless."""
        ...

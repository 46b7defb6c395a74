"""Inference engines behind one small protocol; everything above it is plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


class Backend(Protocol):
    """A decoder with a fixed-size KV cache of ``num_slots`` sequences.

    A slot is one sequence's rows of the cache. A row's index is its token's position. The caller
    keeps the books (which rows of a slot are valid); a backend only computes.

    Attributes:
        name: ``ort-cpu``, ``ort-cuda`` or ``tensorrt``.
        num_slots: sequences that the cache holds.
        capacity: tokens that a slot holds.
        max_step_tokens: the most tokens per sequence that one `forward` takes.
        rounds_activations: activations are rounded to int8, so the rows of its cache are not those
            of an engine that computes in float.
    """

    name: str
    num_slots: int
    capacity: int
    max_step_tokens: int
    rounds_activations: bool

    @property
    def failed(self) -> str | None:
        """Why no step can succeed any more (closed, or the device is lost); None while it works."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        ...

    def forward(
        self,
        slots: Sequence[int],
        embeds: Floats,
        positions: Ints,
        kv_len: int,
        logits_indices: Ints,
    ) -> NDArray[np.float32]:
        """Run one step (a prefill chunk or a decode step) and write its rows into the cache.

        Args:
            slots: ``B`` distinct slots.
            embeds: ``[B, S, hidden]`` rows of the token table.
            positions: ``[B, S]``, consecutive in each row; row ``b`` writes cache rows
                ``positions[b, 0] .. positions[b, 0] + S - 1`` of its slot.
            kv_len: rows that attention must see at least: ``positions.max() + 1``.
            logits_indices: ``[B, N]`` indices into ``S``.

        Returns:
            Logits ``[B, N, vocab]`` in float32, valid until the next call.

        Raises:
            BackendError: the engine failed, or a write would pass the capacity.
        """
        ...

    def read_slot(self, slot: int, length: int) -> Floats:
        """Copy the first ``length`` rows: ``[2 * layers, kv_heads, length, head_dim]``.

        Entry ``2 * i`` holds the keys of layer ``i``, entry ``2 * i + 1`` its values.
        """
        ...

    def write_slot(self, slot: int, rows: Floats) -> None:
        """Overwrite the first rows of a slot with what `read_slot` returned."""
        ...

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` rows of one slot to another."""
        ...

    def close(self) -> None:
        """Free everything; calling it twice is harmless."""
        ...

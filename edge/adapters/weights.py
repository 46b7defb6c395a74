"""Holds the tensors of one adapter, as a backend takes them into a slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One LoRA, ready for the linears of a bundle's graph.

    ``(x @ a.T) @ b.T`` is added to a linear's output. The adapter's scale is already in ``b``.

    Attributes:
        name: name by which requests choose it.
        digest: SHA-256 of the files it was read from, in hex; equal digests mean the same adapter.
        rank: the largest ``r`` of its modules.
        tensors: ``(a, b)`` by the linear's name in `edge.bundle.linears`, e.g. ``layers.0.qkv``;
            float16 or float32. With ``p`` modules joined in the linear they are ``a``
            ``[p * rank, in]`` and ``b`` ``[out, p * rank]``, block-diagonal: columns ``i * rank``
            to ``(i + 1) * rank`` belong to module ``i``. They are zeros for a module that the
            adapter does not change, and past the module's own ``r``. A linear that the adapter
            does not change at all is absent.
    """

    name: str
    digest: str
    rank: int
    tensors: Mapping[str, tuple[Floats, Floats]]

    @property
    def num_bytes(self) -> int:
        """Return how many bytes the tensors take."""
        return sum(each.nbytes for pair in self.tensors.values() for each in pair)

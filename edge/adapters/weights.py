"""The tensors of one adapter, as a backend takes them into a slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One LoRA, ready for the linears of a bundle's graph.

    A linear's output gets ``(x @ a.T) @ b.T`` added. What is scaled is scaled already, in ``b``.

    Attributes:
        name: by which requests choose it.
        digest: SHA-256 of what it was read from, in hex; two adapters with one digest are the same.
        rank: the largest ``r`` of its modules.
        tensors: ``(a, b)`` by the linear's name in `edge.bundle.linears`, e.g. ``layers.0.qkv``;
            float16 or float32. With ``p`` modules joined in the linear they are ``a``
            ``[p * rank, in]`` and ``b`` ``[out, p * rank]``, block-diagonal: columns ``i * rank``
            to ``(i + 1) * rank`` belong to module ``i``, and those of a module that the adapter
            leaves alone, or whose own ``r`` is lower, are zeros. A linear that it leaves alone
            altogether is absent.
    """

    name: str
    digest: str
    rank: int
    tensors: Mapping[str, tuple[Floats, Floats]]

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(each.nbytes for pair in self.tensors.values() for each in pair)

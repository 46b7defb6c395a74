"""Rotates the inputs of a linear in blocks, in the graph, so that no channel is far the loudest.

A few input channels of some linears are 10 to 200 times louder than all others. Those of down are
the worst, and most so at the first token of a text (Sun et al., arXiv 2402.17762). An INT8 range
that holds them leaves a handful of integers to the others. A Hadamard matrix spreads each channel
evenly over its block. The weights are rotated, too, so the product stays the same (QuaRot, arXiv
2404.00456). Values that are loud in one token alone are left to a scale per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# Powers of four: every float type holds the entries of their Hadamard matrices exactly. Blocks of
# 256 would lose half as much, for four times the products.
_SIZES = (64, 16, 4)


def block_size(width: int) -> int:
    """Return the largest block that divides a width; 0 if there is none."""
    return next((size for size in _SIZES if width % size == 0), 0)


def hadamard(size: int) -> Array:
    """Make the symmetric orthogonal ``[size, size]`` matrix, for a power of two."""
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(np.float32(size))
    return matrix


def rotate_blocks(values: NDArray[Any], size: int) -> Array:
    """Rotate the last axis of ``[n, width]`` in blocks; with size 0 only convert it to float32."""
    values = values.astype(np.float32)
    if not size:
        return values
    rotated: Array = values.reshape(-1, size) @ hadamard(size)
    return rotated.reshape(values.shape)

"""Packs weights in the order in which `w4_gemv` reads them.

ONNX stores a weight ``[depth, columns]`` row by row, two columns in a byte. A thread of the kernel
owns columns and walks down the depth. So here 32 weights of one column are adjacent: 16 bytes that
the thread reads at once, followed by those of the next column, which its neighbour reads. Within
the four words of such a line, bits ``4 * j`` to ``4 * j + 3`` of word ``q`` are the weight
``4 * j + q``; the four inputs that one shift of all words needs are then neighbours, too. A nibble
is stored as ``v + 8``, which saves the kernel the sign. The size does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.backends.tensorrt.launch_rules import BLOCK
from edge.errors import ConfigError


def pack_weights(planes: Sequence[NDArray[np.int8]]) -> NDArray[np.int32]:
    """Pack weights in the kernel's order.

    Args:
        planes: one array [depth, columns] of -8 to 7, or two: the low and the high plane of
            weights ``16 * high + low`` (docs/quantization.md).

    Returns:
        Words [depth / 32, planes, columns, 4].

    Raises:
        ConfigError: the depth is no multiple of 32, there are not one or two planes, or the planes
            have different shapes.
    """
    shapes = {plane.shape for plane in planes}
    if len(planes) not in (1, 2) or len(shapes) != 1:
        raise ConfigError(
            f"w4_gemv takes one plane of weights or two of the same shape, not {len(planes)} "
            f"of shapes {sorted(shapes)}"
        )
    depth, columns = planes[0].shape
    if depth % BLOCK:
        raise ConfigError(
            f"w4_gemv takes a depth that is a multiple of {BLOCK}, not {depth}; "
            "leave this layer to TensorRT"
        )
    blocks = depth // BLOCK
    packed = np.zeros((blocks, len(planes), columns, 4), np.uint32)
    for number, plane in enumerate(planes):
        nibbles = (plane + np.int8(8)).view(np.uint8).astype(np.uint32)
        lines = nibbles.reshape(blocks, 8, 4, columns).transpose(0, 3, 1, 2)
        for place in range(8):
            packed[:, number] |= lines[:, :, place] << np.uint32(4 * place)
    return packed.view(np.int32)


def unpack_weights(packed: NDArray[np.int32]) -> list[NDArray[np.int8]]:
    """Undo `pack_weights`."""
    blocks, planes, columns, _ = packed.shape
    places = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (packed.view(np.uint32)[..., None] >> places) & np.uint32(15)
    whole = nibbles.astype(np.int8) - np.int8(8)  # [blocks, planes, columns, 4, 8]
    return [
        whole[:, plane].transpose(0, 3, 2, 1).reshape(blocks * BLOCK, columns)
        for plane in range(planes)
    ]

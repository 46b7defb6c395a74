"""Packs INT4 as ONNX stores it: two's complement, two elements a byte, first in the low nibble.

Source: onnx.proto3, ``TensorProto.raw_data`` for INT4 (flattened row-major order; an odd count
leaves the last high nibble 0).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.bundle.schemes import HIGH_PLANE


def pack_int4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack int8 values in -8..7 of any shape into ``ceil(size / 2)`` bytes."""
    flat = values.reshape(-1).view(np.uint8)
    packed: NDArray[np.uint8] = flat[0::2] & np.uint8(0x0F)
    packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return packed


def split_planes(values: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pack integers as the low and the high plane: ``16 * high + low``.

    Args:
        values: int8, -136 to 119 stored modulo 256.
    """
    high = (values + np.int8(HIGH_PLANE // 2)) >> 4
    return pack_int4(values), pack_int4(high)  # the low nibble of a weight is its low plane


def unpack_int4(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Unpack what `pack_int4` packed, into int8 of this shape."""
    nibbles = np.empty(packed.size * 2, dtype=np.int8)
    nibbles[0::2] = (packed << np.uint8(4)).view(np.int8) >> 4
    nibbles[1::2] = packed.view(np.int8) >> 4
    return nibbles[: int(np.prod(shape))].reshape(shape)

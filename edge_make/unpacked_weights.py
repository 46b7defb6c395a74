"""Counts the bytes that TensorRT moves because it unpacks weights in every step."""

from __future__ import annotations

import math

from edge.bundle.sizes import ENGINE_FLOAT_BYTES
from edge.bundle.weights import Linear


def linear_unpacked_bytes(linear: Linear) -> int:
    """Return how many bytes TensorRT moves in every step because it unpacks the weight.

    It does so with INT8 weights whose inputs are floats (rule ``int8-weight-only``): the copy
    in floats is written, and the product reads it.
    """
    if linear.scheme.kind != "int8" or linear.scheme.planes:
        return 0
    return unpacked_bytes(math.prod(linear.shape))


def unpacked_bytes(weights: int) -> int:
    """Return bytes written and read again if this many weights are unpacked in a step."""
    return 2 * ENGINE_FLOAT_BYTES * weights

"""Holds floats of a graph in NumPy: bf16, which NumPy lacks, as its bits in uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.step import Floats
from edge.bundle.manifest import FloatType


def storage_dtype(float_type: FloatType) -> np.dtype[Any]:
    """Return the NumPy type that holds the bits of a float type."""
    return np.dtype({"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[float_type])


def to_storage(values: Floats, float_type: FloatType) -> NDArray[Any]:
    """Return the bits of values in a float type; bf16 is rounded to nearest even, as uint16."""
    if float_type != "bf16":
        return values.astype(storage_dtype(float_type), copy=False)
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    # Rounding could carry a NaN's payload into infinity, so it must stay a NaN.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_storage(bits: NDArray[Any], float_type: FloatType) -> Floats:
    """Return floats from bits of `to_storage`; bf16 becomes float32."""
    if float_type != "bf16":
        return bits
    return (bits.astype(np.uint32) << 16).view(np.float32)

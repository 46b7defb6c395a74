"""Computes the statistics of a linear layer's inputs that calibration keeps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_CHUNK_ELEMENTS = 1 << 22


def mean_square(x: Array) -> Array:
    """Compute the mean of ``x ** 2`` per channel, float32 ``[width]``, of ``[tokens, width]``."""
    total = sum(np.square(chunk).sum(axis=0, dtype=np.float64) for chunk in _chunks(x))
    result: Array = np.asarray(total / len(x), dtype=np.float32)
    return result


def second_moment(x: Array) -> Array:
    """Compute ``E[x x^T]``, float32 ``[width, width]``.

    It is half the Hessian of a linear's squared output error with respect to a row of its weight.
    """
    result: Array = x.T @ x
    result /= np.float32(len(x))
    return result


def spread(length: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` indices, evenly spread."""
    return np.linspace(0, length - 1, min(length, most)).astype(np.int64)


def _chunks(x: Array) -> Iterable[Array]:
    step = max(1, _CHUNK_ELEMENTS // x.shape[1])
    return (x[start : start + step] for start in range(0, len(x), step))

"""Finds AWQ's factor per input channel, so that channels with large inputs are rounded more finely.

Source: Lin et al., arXiv 2306.00978. A factor is ``mean|x| ** alpha``; alpha is searched on the
layer's output error. The factors are folded into the layer before (`scaled_checkpoint`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme

from .rtn import NearestRows, dequantize_rows, round_tiles
from .statistics import mean_square, spread

Array = NDArray[np.float32]
_MAX_ROWS = 64
_MAX_TOKENS = 1024


def awq_factors(
    weights: Array,
    x: Array,
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    shared: NDArray[np.int64] | None = None,
) -> Array:
    """Find factors for a linear's input channels, float32 ``[in]``, around 1.

    Args:
        weights: float32 ``[out, in]``; some of the rows are enough.
        x: the layer's inputs, float32 ``[tokens, in]``.
        scheme: how the layer will be stored.
        scale_type: type in which its scales will be stored, float16 or bfloat16.
        shared: int64 ``[in]``; channels with the same number must have the same factor. None lets
            every channel have its own.
    """
    x = x[spread(len(x), _MAX_TOKENS)]
    magnitude = np.abs(x).mean(axis=0)
    if shared is not None:
        counts = np.bincount(shared)
        magnitude = (np.bincount(shared, magnitude) / counts)[shared].astype(np.float32)
    if not magnitude.any():
        return np.ones_like(magnitude)
    magnitude = np.maximum(magnitude, np.float32(1e-5) * magnitude.max())
    importance = mean_square(x)
    rows = weights[spread(len(weights), _MAX_ROWS)]

    def factors_of(tenths: int) -> Array:
        factors: Array = magnitude ** np.float32(tenths / 10)
        factors /= np.sqrt(factors.max() * factors.min())
        return factors

    def error_of(tenths: int) -> float:
        factors = factors_of(tenths)
        nearest = NearestRows(scheme, "mse", scale_type, importance / factors / factors)
        change = dequantize_rows(round_tiles(rows * factors, nearest))
        change /= factors
        change -= rows
        return float(np.square(change @ x.T).sum(dtype=np.float64))

    errors = {tenths: error_of(tenths) for tenths in range(0, 11, 2)}
    best = min(errors, key=errors.__getitem__)
    errors |= {tenths: error_of(tenths) for tenths in (best - 1, best + 1) if 0 < tenths < 10}
    return factors_of(min(errors, key=errors.__getitem__))

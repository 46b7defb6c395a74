"""Prepares static INT8 activations: factors that move outliers into the weights, and the range.

SmoothQuant (arXiv 2211.10438): an input channel is divided by ``max|x|^alpha / max|w|^(1-alpha)``
and its weights are multiplied by it (see `scaled_checkpoint`). Here alpha is searched for each
linear on the error of its output with activations and weights both rounded to INT8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme

from .rtn import dequantize_rows, quantize_rows, storable_scales

Array = NDArray[np.float32]
ALPHAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
# Fractions of the largest |x| that the range of the activations may end at.
_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_MAX_ROWS = 768
_MAX_TOKENS = 512
_LEVELS = np.float32(127.0)


def smoothing_factors(
    weights: Array,
    x: Array,
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    shared: NDArray[np.int64] | None = None,
) -> Array | None:
    """Find factors to multiply a linear's input channels with, float32 ``[in]``; None if all harm.

    Args:
        weights: float32 ``[out, in]``.
        x: the layer's inputs, float32 ``[tokens, in]``.
        scheme: ``w8a8``.
        scale_type: type in which the scales will be stored, float16 or bfloat16.
        shared: int64 ``[in]``; channels with the same number must have the same factor.
    """
    channel_peaks = np.abs(x).max(axis=0)
    peak, weight_peak = channel_peaks, np.abs(weights).max(axis=0)
    if shared is not None:
        peak, weight_peak = _shared_max(peak, shared), _shared_max(weight_peak, shared)
    floor = np.float32(1e-5)
    peak = np.maximum(peak, floor * peak.max(initial=1e-30))
    weight_peak = np.maximum(weight_peak, floor * weight_peak.max(initial=1e-30))
    tokens = np.sort(np.abs(x).max(axis=1).argsort(kind="stable")[_spread(len(x), _MAX_TOKENS)])
    sample, rows = x[tokens], weights[_spread(len(weights), _MAX_ROWS)]
    wanted = sample @ rows.T
    # Every token counts alike: the first one of a text is far louder than the others
    # and would decide alone.
    size = np.square(wanted).sum(axis=1) + np.float32(1e-30)

    def error(factors: Array) -> float:
        largest = (channel_peaks / factors).max(keepdims=True)
        scale = storable_scales(largest / _LEVELS, scale_type)
        found = (
            _round(sample / factors, scale)
            @ dequantize_rows(quantize_rows(rows * factors, scheme, "absmax", scale_type)).T
        )
        return float((np.square(found - wanted).sum(axis=1) / size).mean())

    best, least = None, error(np.ones_like(peak))
    for alpha in ALPHAS:
        factors: Array = peak ** np.float32(alpha) / weight_peak ** np.float32(1 - alpha)
        factors /= np.exp(np.log(factors).mean())
        if (found := error(factors)) < least:
            best, least = factors, found
    return best


def activation_scale(x: Array, scale_type: np.dtype[np.generic]) -> float:
    """Choose the scale of a static INT8 range for ``[tokens, in]`` inputs, by least squared error.

    The error is absolute, not relative to each token: a loud token that is cut off takes the whole
    text's attention with it.
    """
    peaks = np.abs(x).max(axis=1)
    loud = np.argsort(peaks)[-64:]
    sample = x[np.union1d(loud, _spread(len(x), 1024))]
    top = peaks.max() / _LEVELS
    candidates = np.array([top * fraction for fraction in _FRACTIONS], dtype=np.float32)
    scales = storable_scales(candidates, scale_type)
    errors = [float(np.square(_round(sample, scale) - sample).sum()) for scale in scales]
    return float(scales[int(np.argmin(errors))])


def _round(x: Array, scale: np.float32 | Array) -> Array:
    result: Array = np.clip(np.rint(x / scale), -128, 127) * scale
    return result


def _shared_max(values: Array, shared: NDArray[np.int64]) -> Array:
    largest = np.zeros(int(shared.max()) + 1, dtype=np.float32)
    np.maximum.at(largest, shared, values)
    return largest[shared]


def _spread(length: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` indices, evenly spread."""
    return np.linspace(0, length - 1, min(length, most)).astype(np.int64)

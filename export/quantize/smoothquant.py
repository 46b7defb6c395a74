"""Prepares static INT8 activations: factors that move outliers into the weights, and the range.

SmoothQuant (arXiv 2211.10438): an input channel is divided by ``max|x|^alpha / max|w|^(1-alpha)``
and its weights are multiplied by it (see `scaled_checkpoint`). Here alpha is searched for each
linear on the error of its output with activations and weights both rounded to INT8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme

from .float_channels import TOLERATED, loud_channels
from .rtn import dequantize_rows, quantize_rows, storable_scales

Array = NDArray[np.float32]
ALPHAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
# Fractions of the largest |x| that the range of the activations may end at.
_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_MAX_ROWS = 768
_MAX_TOKENS = 512
_LEVELS = np.float32(127.0)


@dataclass(frozen=True)
class Smoothing:
    """How a W8A8 linear's inputs are prepared.

    Attributes:
        float_channels: channels that are not rounded, ascending.
        factors: to multiply the input channels with, float32 ``[in]``, 1 for float channels (and
            all that share their number); None if all harm.
        error: mean over tokens of the share of the squared output that rounding takes.
    """

    float_channels: tuple[int, ...]
    factors: Array | None
    error: float


def smoothing(
    weights: Array,
    x: Array,
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    shared: NDArray[np.int64] | None = None,
    *,
    foldable: bool = True,
) -> Smoothing:
    """Find what brings the error under `float_channels.TOLERATED` with the fewest float channels.

    If nothing does, it is what has the least error.

    Args:
        weights: float32 ``[out, in]``.
        x: the layer's inputs, float32 ``[tokens, in]``.
        scheme: ``w8a8``.
        scale_type: type in which the scales will be stored, float16 or bfloat16.
        shared: int64 ``[in]``; channels with the same number must have the same factor.
        foldable: whether something before the linear can take factors.
    """
    peaks = np.abs(x).max(axis=0)
    sample = _Sample.of(weights, x)
    best: Smoothing | None = None
    for channels in loud_channels(peaks):
        peaks[channels] = 0
        sample.leave_out(channels)
        factors, error = _search(sample, peaks, scheme, scale_type, shared, foldable)
        if factors is not None:
            # Zeros say nothing about a float channel's factor; in o it belongs to a KV channel.
            factors[channels if shared is None else np.isin(shared, shared[channels])] = 1
        if best is None or error < best.error:
            best = Smoothing(tuple(channels.tolist()), factors, error)
        if error <= TOLERATED:
            break
    assert best is not None
    return best


@dataclass(frozen=True)
class _Sample:
    """Some tokens and some rows of the weight, and what the one gives by the other.

    Attributes:
        tokens: float32 ``[tokens, in]``.
        rows: float32 ``[rows, in]``.
        wanted: the products, float32 ``[tokens, rows]``.
        size: of each token's products with all channels, squared, float32 ``[tokens]``.
    """

    tokens: Array
    rows: Array
    wanted: Array
    size: Array

    @classmethod
    def of(cls, weights: Array, x: Array) -> _Sample:
        spread = np.abs(x).max(axis=1).argsort(kind="stable")[_spread(len(x), _MAX_TOKENS)]
        tokens, rows = x[np.sort(spread)], weights[_spread(len(weights), _MAX_ROWS)]
        wanted = tokens @ rows.T
        return cls(tokens, rows, wanted, np.square(wanted).sum(axis=1) + np.float32(1e-30))

    def leave_out(self, channels: NDArray[np.int64]) -> None:
        self.wanted[:] -= self.tokens[:, channels] @ self.rows[:, channels].T
        self.tokens[:, channels] = self.rows[:, channels] = 0

    def error(
        self, factors: Array, range_: Array, scheme: TensorScheme, scale_type: np.dtype[np.generic]
    ) -> float:
        """What rounding takes of a token's output, as `Smoothing.error`.

        Every token counts alike: the first one of a text is far louder than the others and would
        decide alone.
        """
        scale = storable_scales(range_ / _LEVELS, scale_type)
        rows = dequantize_rows(quantize_rows(self.rows * factors, scheme, "absmax", scale_type))
        lost = _round(self.tokens / factors, scale) @ rows.T - self.wanted
        return float((np.square(lost).sum(axis=1) / self.size).mean())


def _search(
    sample: _Sample,
    peaks: Array,
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    shared: NDArray[np.int64] | None,
    foldable: bool,
) -> tuple[Array | None, float]:
    """The factors of the best alpha, if any is better than none, and the error with them."""
    peak, weight_peak = peaks, np.abs(sample.rows).max(axis=0)
    if shared is not None:
        peak, weight_peak = _shared_max(peak, shared), _shared_max(weight_peak, shared)
    floor = np.float32(1e-5)
    peak = np.maximum(peak, floor * peak.max(initial=1e-30))
    weight_peak = np.maximum(weight_peak, floor * weight_peak.max(initial=1e-30))
    best = None
    least = sample.error(np.ones_like(peak), peaks.max(keepdims=True), scheme, scale_type)
    for alpha in ALPHAS if foldable else ():
        factors: Array = peak ** np.float32(alpha) / weight_peak ** np.float32(1 - alpha)
        factors /= np.exp(np.log(factors).mean())
        range_ = (peaks / factors).max(keepdims=True)
        if (found := sample.error(factors, range_, scheme, scale_type)) < least:
            best, least = factors, found
    return best, least


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

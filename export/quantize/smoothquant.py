"""Prepares INT8 activations: factors that move outliers into the weights, and the range.

SmoothQuant (arXiv 2211.10438): an input channel is divided by ``max|x|^alpha / max|w|^(1-alpha)``
and its weights are multiplied by it (`scaled_checkpoint`). Here alpha is searched for each linear
on the error of its output with activations and weights both rounded to INT8. If one range for all
tokens loses too much, each token gets its own. If that loses too much as well, as in down, the
graph rotates the inputs before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from export.graph.block_rotation import block_size, rotate_blocks

from .rtn import dequantize_rows, quantize_rows, storable_scales
from .statistics import spread

Array = NDArray[np.float32]
TOLERATED = 0.0005
"""Share of a linear's squared output that rounding may take, if something else would take less."""
ALPHAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
# Fractions of the largest |x| at which the range of the activations may end.
_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_MAX_ROWS = 768
_MAX_TOKENS = 512
_LEVELS = np.float32(127.0)


@dataclass(frozen=True)
class Smoothing:
    """How a W8A8 linear's inputs are prepared.

    Attributes:
        factors: factors on the input channels, float32 ``[in]``; None if all harm.
        error: mean over tokens of the share of the squared output that rounding takes.
        per_token: whether each token has its own range.
        rotation_block: block size for `graph.block_rotation.rotate_blocks`; 0 without rotation.
    """

    factors: Array | None
    error: float
    per_token: bool = False
    rotation_block: int = 0


def smoothing(
    weights: Array,
    x: Array,
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    shared: NDArray[np.int64] | None = None,
    *,
    foldable: bool = True,
) -> Smoothing:
    """Choose between one range, one for each token, and rotated inputs as well.

    The first of them whose error is at most `TOLERATED` is taken, else the one with least error.

    Args:
        weights: float32 ``[out, in]``.
        x: the layer's inputs, float32 ``[tokens, in]``.
        scheme: ``w8a8``.
        scale_type: type in which the scales will be stored, float16 or bfloat16.
        shared: int64 ``[in]``; channels with the same number must have the same factor.
        foldable: whether something before the linear can take factors.
    """
    sample = _Sample.of(weights, x)
    one_range = Smoothing(
        *_search(sample, np.abs(x).max(axis=0), scheme, scale_type, shared, foldable)
    )
    found = [one_range]
    for block in (0, block_size(x.shape[1])):
        if found[-1].error <= TOLERATED:
            return found[-1]
        error = sample.rotated(block).error(None, None, scheme, scale_type)
        found.append(Smoothing(None, error, per_token=True, rotation_block=block))
    return min(found, key=lambda each: each.error)


@dataclass(frozen=True)
class _Sample:
    """Some tokens, some rows of the weight, and their products.

    Attributes:
        tokens: float32 ``[tokens, in]``.
        rows: float32 ``[rows, in]``.
        wanted: the products, float32 ``[tokens, rows]``.
        size: sum of squares of each token's products, float32 ``[tokens]``.
    """

    tokens: Array
    rows: Array
    wanted: Array
    size: Array

    @classmethod
    def of(cls, weights: Array, x: Array) -> _Sample:
        places = np.abs(x).max(axis=1).argsort(kind="stable")[spread(len(x), _MAX_TOKENS)]
        tokens, rows = x[np.sort(places)], weights[spread(len(weights), _MAX_ROWS)]
        wanted = tokens @ rows.T
        return cls(tokens, rows, wanted, np.square(wanted).sum(axis=1) + np.float32(1e-30))

    def rotated(self, block: int) -> _Sample:
        tokens, rows = rotate_blocks(self.tokens, block), rotate_blocks(self.rows, block)
        return _Sample(tokens, rows, self.wanted, self.size)

    def error(
        self,
        factors: Array | None,
        range_: Array | None,
        scheme: TensorScheme,
        scale_type: np.dtype[np.generic],
    ) -> float:
        """Compute the share of the output that rounding takes, as `Smoothing.error`.

        Every token counts the same: the first one of a text is far louder than the others and would
        decide alone.

        Args:
            factors: factors on the input channels, or None.
            range_: range of all tokens, float32 ``[1]``; None gives each token its own.
            scheme: ``w8a8``.
            scale_type: type in which the scales will be stored.
        """
        tokens, rows = self.tokens, self.rows
        if factors is not None:
            tokens, rows = tokens / factors, rows * factors
        if range_ is None:
            scale = np.maximum(np.abs(tokens).max(axis=1, keepdims=True), 1e-30) / _LEVELS
        else:
            scale = storable_scales(range_ / _LEVELS, scale_type)
        rows = dequantize_rows(quantize_rows(rows, scheme, "absmax", scale_type))
        lost = _round(tokens, scale) @ rows.T - self.wanted
        return float((np.square(lost).sum(axis=1) / self.size).mean())


def _search(
    sample: _Sample,
    peaks: Array,
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    shared: NDArray[np.int64] | None,
    foldable: bool,
) -> tuple[Array | None, float]:
    """Return the factors of the best alpha, or None if none helps, and the error with them."""
    peak, weight_peak = peaks, np.abs(sample.rows).max(axis=0)
    if shared is not None:
        peak, weight_peak = _shared_max(peak, shared), _shared_max(weight_peak, shared)
    floor = np.float32(1e-5)
    peak = np.maximum(peak, floor * peak.max(initial=1e-30))
    weight_peak = np.maximum(weight_peak, floor * weight_peak.max(initial=1e-30))
    best = None
    least = sample.error(None, peaks.max(keepdims=True), scheme, scale_type)
    for alpha in ALPHAS if foldable else ():
        factors: Array = peak ** np.float32(alpha) / weight_peak ** np.float32(1 - alpha)
        factors /= np.exp(np.log(factors).mean())
        range_ = (peaks / factors).max(keepdims=True)
        if (found := sample.error(factors, range_, scheme, scale_type)) < least:
            best, least = factors, found
    return best, least


def activation_scale(x: Array, scale_type: np.dtype[np.generic]) -> float:
    """Choose the scale of a static INT8 range for ``[tokens, in]`` inputs, by least squared error.

    The error is absolute, not relative to each token: a loud token that is clipped spoils the
    attention of the whole text.
    """
    peaks = np.abs(x).max(axis=1)
    loud = np.argsort(peaks)[-64:]
    sample = x[np.union1d(loud, spread(len(x), 1024))]
    top = peaks.max() / _LEVELS
    candidates = np.array([top * fraction for fraction in _FRACTIONS], dtype=np.float32)
    scales = storable_scales(candidates, scale_type)
    errors = [float(np.square(_round(sample, scale) - sample).sum()) for scale in scales]
    return float(scales[int(np.argmin(errors))])


def token_scale(scale_type: np.dtype[np.generic], levels: float = 127.0) -> float:
    """Return the scale of a token's inputs after division by their largest magnitude."""
    return float(storable_scales(np.array([1 / levels], dtype=np.float32), scale_type)[0])


def _round(x: Array, scale: np.float32 | Array) -> Array:
    result: Array = np.clip(np.rint(x / scale), -128, 127) * scale
    return result


def _shared_max(values: Array, shared: NDArray[np.int64]) -> Array:
    largest = np.zeros(int(shared.max()) + 1, dtype=np.float32)
    np.maximum.at(largest, shared, values)
    return largest[shared]

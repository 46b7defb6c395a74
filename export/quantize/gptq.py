"""Rounds by GPTQ: column by column, where later columns make up for each rounding error.

Source: Frantar et al., arXiv 2210.17323, with act-order (columns of large inputs first) and static
groups (scales are fixed before, so that the order costs nothing at run time). With the damped
second moments H = R R^T, R upper triangular, the loss of a row's errors e is ``|e R|^2``. Element j
of e R depends on e_0 to e_j only, so each column is rounded to make its element smallest. That
gives the same integers as the published steps, without the inverse of H.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme

from .rtn import QuantizedRows, integer_range, row_scales
from .triangular import damp, factor_upper

Array = NDArray[np.float32]
DAMPING = 0.3
"""Share of the mean diagonal of the second moments that is added to the diagonal. It is more than
fits the calibration text best, since a few thousand tokens say little about the rest."""
_TILE_ELEMENTS = 1 << 22  # each tile takes all columns: more rows, better matrix products
_BLOCK = 128
_ROWS = 1024  # a block of columns of this many rows stays in the CPU's cache


@dataclass(frozen=True)
class GptqFactor:
    """A layer's second moments, ready for `gptq_rows`.

    Attributes:
        order: the columns, most important first.
        upper: float32 ``[width, width]``, upper triangular R with ``R R^T`` the damped and
            reordered second moments.
        importance: diagonal of the second moments in the original order, for the choice of scales.
    """

    order: NDArray[np.int64]
    upper: Array
    importance: Array


@dataclass(frozen=True)
class GptqRows:
    """A `rtn.RowQuantizer` by GPTQ; its attributes are arguments of `gptq_rows`."""

    scheme: TensorScheme
    factor: GptqFactor
    scale_type: np.dtype[np.generic]
    tile_elements: int = _TILE_ELEMENTS

    def __call__(self, rows: Array) -> QuantizedRows:
        """Round rows; see `rtn.RowQuantizer`."""
        return gptq_rows(rows, self.scheme, self.factor, self.scale_type)


def gptq_factor(moments: Array, damping: float = DAMPING) -> GptqFactor:
    """Factor the second moments of a layer's inputs.

    Args:
        moments: float32 ``[width, width]``.
        damping: added to the diagonal, as a fraction of its mean.
    """
    importance = np.diagonal(moments).copy()
    order = np.argsort(-importance, kind="stable")
    upper = moments[np.ix_(order, order)]
    damp(upper, damping)
    factor_upper(upper)
    return GptqFactor(order, upper, importance)


def gptq_rows(
    weights: Array,
    scheme: TensorScheme,
    factor: GptqFactor,
    scale_type: np.dtype[np.generic],
) -> QuantizedRows:
    """Quantize ``[rows, in]`` weights; scales are those of `rtn.row_scales` with importance.

    Args:
        weights: finite float32.
        scheme: int8 or int4.
        factor: factor of the second moments of the layer's inputs.
        scale_type: type in which the scales will be stored, float16 or bfloat16.
    """
    scales = row_scales(weights, scheme, "mse", scale_type, factor.importance)
    values = np.empty(weights.shape, dtype=np.int8)
    for at in range(0, len(weights), _ROWS):
        rows = slice(at, at + _ROWS)
        values[rows] = _round_rows(weights[rows], scales[rows], scheme, factor)
    return QuantizedRows(values, scales)


def _round_rows(
    weights: Array, scales: Array, scheme: TensorScheme, factor: GptqFactor
) -> NDArray[np.int8]:
    low, high = integer_range(scheme)
    rows, width = weights.shape
    size = scheme.group_size or width
    # Columns become rows: each is contiguous.
    exact = weights.T[factor.order]
    column_scales = scales.T[factor.order // size]
    values = np.empty((width, rows), dtype=np.int8)
    errors = np.empty_like(exact)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        upper = factor.upper[:stop, start:stop] / np.diagonal(factor.upper)[start:stop]
        targets = upper[:start].T @ errors[:start]
        targets += exact[start:stop]
        for j in range(start, stop):
            target = targets[j - start]
            target += upper[start:j, j - start] @ errors[start:j]
            target /= column_scales[j]
            np.rint(target, out=target)
            np.maximum(target, low, out=target)
            np.minimum(target, high, out=target)
            values[factor.order[j]] = target
            target *= column_scales[j]
            np.subtract(exact[j], target, out=errors[j])
    return np.ascontiguousarray(values.T)

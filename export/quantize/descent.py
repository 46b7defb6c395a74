"""Lowers the output error of a linear that is rounded already, by coordinate descent.

GPTQ decides a column once, for what the columns before it lost. Here each integer is decided again
for what all others lose, and each group's scale for its integers. No step makes the error larger.
The steps of integers are those of QuantEase (Behdin et al., arXiv 2309.01885).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme

from .gptq import GptqRows
from .rtn import QuantizedRows, integer_range, storable_scales

Array = NDArray[np.float32]
_ROWS = 1024  # whose integers, gradient and temporaries of one group stay in the CPU's cache


@dataclass(frozen=True)
class DescentRows:
    """A `rtn.RowQuantizer` that rounds by GPTQ first.

    Attributes:
        gptq: rounds them.
        moments: see `descend`, as for ``sweeps``.
        sweeps: see there.
    """

    gptq: GptqRows
    moments: Array
    sweeps: int

    @property
    def tile_elements(self) -> int:
        """See `rtn.RowQuantizer.tile_elements`."""
        return self.gptq.tile_elements

    def __call__(self, rows: Array) -> QuantizedRows:
        """Round rows; see `rtn.RowQuantizer`."""
        scheme, scale_type = self.gptq.scheme, self.gptq.scale_type
        return descend(rows, self.gptq(rows), scheme, self.moments, scale_type, self.sweeps)


def descend(
    weights: Array,
    start: QuantizedRows,
    scheme: TensorScheme,
    moments: Array,
    scale_type: np.dtype[np.generic],
    sweeps: int,
) -> QuantizedRows:
    """Improve integers and scales of ``[rows, in]`` weights, group after group.

    The error is ``trace(E H E^T)`` with E the difference from ``weights``.

    Args:
        weights: finite float32.
        start: the same, rounded.
        scheme: int8 or int4; group size 0 is one group per row.
        moments: H, the damped second moments of the inputs, float32 ``[in, in]``.
        scale_type: type in which the scales will be stored, float16 or bfloat16.
        sweeps: how often all groups are gone through.
    """
    values, scales = np.empty_like(start.values), np.empty_like(start.scales)
    for at in range(0, len(weights), _ROWS):
        rows = slice(at, at + _ROWS)
        tile = _Tile(weights[rows], start.values[rows], start.scales[rows], scheme, moments)
        for _ in range(sweeps):
            for group in range(scales.shape[1]):
                tile.improve(group, scale_type)
        values[rows], scales[rows] = tile.values.T, tile.scales.T
    return QuantizedRows(values, scales)


class _Tile:
    """Some rows, transposed: a group's columns are adjacent, and each of them is contiguous."""

    def __init__(
        self,
        weights: Array,
        values: NDArray[np.int8],
        scales: Array,
        scheme: TensorScheme,
        moments: Array,
    ) -> None:
        self.low, self.high = integer_range(scheme)
        self.moments = moments
        self.values = values.T.astype(np.float32)
        self.scales = scales.T.copy()
        self.size = len(self.values) // len(self.scales)
        self.exact = weights.T
        self.lost = self.exact - self.values * np.repeat(self.scales, self.size, axis=0)

    def improve(self, group: int, scale_type: np.dtype[np.generic]) -> None:
        """Decide a group's integers one by one, then its scale, for what all else loses."""
        columns = slice(group * self.size, (group + 1) * self.size)
        block = self.moments[columns, columns]
        values, scale = self.values[columns], self.scales[group]
        gradient = self.moments[columns] @ self.lost
        for j in range(self.size):
            step = gradient[j] / (block[j, j] * scale)
            step += values[j]
            np.rint(step, out=step)
            np.clip(step, self.low, self.high, out=step)
            gradient -= np.outer(block[:, j], (step - values[j]) * scale)
            values[j] = step
        # Along the scale the error is a parabola with this slope and curvature, so of all scales
        # that can be stored the one next to its bottom is best.
        slope = np.einsum("jr,jr->r", values, gradient)
        curvature = np.einsum("jr,jr->r", values, block @ values)
        best = scale + slope / np.maximum(curvature, np.finfo(np.float32).tiny)
        scale[:] = storable_scales(np.where(curvature > 0, best, scale), scale_type)
        self.lost[columns] = self.exact[columns] - values * scale

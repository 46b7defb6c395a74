"""Rounds to nearest with one symmetric scale per group of weights.

TensorRT accepts scales that are positive and normal numbers of the graph's float type. Integers are
computed with the stored scale, so that the rounding of the scale adds no second error.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from edge.bundle.schemes import PLANES_RANGE

# Fractions of the absmax scale that the MSE search tries; below 0.6 nothing ever wins on
# bell-shaped weights. 0.875 is the scale that uses -8 for the largest INT4 weight.
_MSE_FRACTIONS = (1.0, 0.96, 0.92, 0.875, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
# Clipping never pays with 8 bits, but a slightly larger scale may happen to fit the weights better:
# 6 % less squared error on bell-shaped groups of 64, so 119 loses nothing against 127.
_PLANES_FRACTIONS = tuple(1.0 + 0.004 * step for step in range(11))

LEAST_SCALE = np.float32(2.0**-14)
"""float16's smallest normal number; TensorRT takes no smaller scale."""
THREADS = 2
"""Threads that round tiles of rows; numpy releases the GIL."""
TILE_ELEMENTS = 1 << 18
"""Weights of a tile: 1 MiB of float32, so that it and its temporaries stay near the L2 cache."""
_SEARCHED_ELEMENTS = 1 << 17  # elements of the search for a scale, which passes over them 11 times


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a weight matrix as integers.

    Attributes:
        values: int8 ``[rows, in]``.
        scales: float32 ``[rows, groups]``, each exactly representable in the graph's float type.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]


class RowQuantizer(Protocol):
    """Rounds rows of a weight matrix."""

    @property
    def tile_elements(self) -> int:
        """Number of weights that it should get at a time."""
        ...

    def __call__(self, rows: NDArray[np.float32]) -> QuantizedRows:
        """Round finite float32 ``[rows, in]``, any number of rows."""
        ...


@dataclass(frozen=True)
class NearestRows:
    """A `RowQuantizer` that rounds to nearest; its attributes are arguments of `quantize_rows`."""

    scheme: TensorScheme
    clip: Literal["absmax", "mse"]
    scale_type: np.dtype[np.generic]
    importance: NDArray[np.float32] | None = None
    tile_elements: int = TILE_ELEMENTS

    def __call__(self, rows: NDArray[np.float32]) -> QuantizedRows:
        """Round rows, as `RowQuantizer` describes."""
        return quantize_rows(rows, self.scheme, self.clip, self.scale_type, self.importance)


def round_tiles(weights: NDArray[np.float32], quantize: RowQuantizer) -> QuantizedRows:
    """Round the rows of a whole matrix, tile by tile."""
    step = max(1, quantize.tile_elements // weights.shape[1])
    tiles = [weights[start : start + step] for start in range(0, len(weights), step)]
    with ThreadPoolExecutor(THREADS) as pool:
        done = list(pool.map(quantize, tiles))
    values, scales = ([getattr(rows, name) for rows in done] for name in ("values", "scales"))
    return QuantizedRows(np.concatenate(values), np.concatenate(scales))


def quantize_rows(
    weights: NDArray[np.float32],
    scheme: TensorScheme,
    clip: Literal["absmax", "mse"],
    scale_type: np.dtype[np.generic],
    importance: NDArray[np.float32] | None = None,
) -> QuantizedRows:
    """Quantize ``[rows, in]`` weights, each row cut into groups along ``in``.

    All arguments are those of `row_scales`.
    """
    low, high = integer_range(scheme)
    rows, width = weights.shape
    scales = row_scales(weights, scheme, clip, scale_type, importance)
    quantized = weights.reshape(*scales.shape, -1) * (np.float32(1.0) / scales)[..., None]
    np.rint(quantized, out=quantized)
    np.clip(quantized, low, high, out=quantized)
    return QuantizedRows(quantized.astype(np.int8).reshape(rows, width), scales)


def row_scales(
    weights: NDArray[np.float32],
    scheme: TensorScheme,
    clip: Literal["absmax", "mse"],
    scale_type: np.dtype[np.generic],
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Choose the scales of ``[rows, in]`` weights, ``[rows, groups]``.

    Args:
        weights: finite float32.
        scheme: int8 or int4; group size 0 is one group per row.
        clip: ``absmax`` maps a group's largest magnitude to the largest integer; ``mse`` tries
            smaller scales, for planes larger ones, and keeps the one with the least squared error.
        scale_type: type in which the scales will be stored, float16 or bfloat16.
        importance: float32 ``[in]``, weight of each column's squared error for ``mse``: with the
            mean square of its input this is the error of the output. None weighs all alike.
    """
    rows, width = weights.shape
    size = scheme.group_size or width
    groups = weights.reshape(rows, width // size, size)
    scales = storable_scales(_reaching_scales(groups, scheme), scale_type)
    if clip == "mse":
        weight = None if importance is None else importance.reshape(-1, size)
        scales = _least_squares_scales(groups, scales, scheme, scale_type, weight)
    return scales


def _reaching_scales(groups: NDArray[np.float32], scheme: TensorScheme) -> NDArray[np.float32]:
    """Return the least scales that clip no weight of either sign, ``[rows, groups]``."""
    low, high = integer_range(scheme)
    above = groups.max(axis=-1) / np.float32(high)
    # The search decides about -128 or -8 of a symmetric scheme.
    below = groups.min(axis=-1) / np.float32(low if scheme.planes else -high)
    scales: NDArray[np.float32] = np.maximum(above, below)
    return scales


def integer_range(scheme: TensorScheme) -> tuple[int, int]:
    """Return the least and the largest integer of a scheme."""
    if scheme.planes:
        return PLANES_RANGE
    return (-8, 7) if scheme.kind == "int4" else (-128, 127)


def dequantize_rows(rows: QuantizedRows) -> NDArray[np.float32]:
    """Compute the weights that the graph uses: ``values * scale``, float32 ``[rows, in]``."""
    num_rows, width = rows.values.shape
    groups = rows.values.reshape(num_rows, rows.scales.shape[1], -1).astype(np.float32)
    return (groups * rows.scales[..., None]).reshape(num_rows, width)


def storable_scales(
    scales: NDArray[np.float32], scale_type: np.dtype[np.generic]
) -> NDArray[np.float32]:
    """Round to the stored type, never below its smallest normal number (2**-14 for float16).

    bfloat16 shares float16's floor: its own (2**-126) would overflow the reciprocal's products.
    """
    rounded = scales.astype(scale_type).astype(np.float32)
    result: NDArray[np.float32] = np.maximum(rounded, LEAST_SCALE)
    return result


def _least_squares_scales(
    groups: NDArray[np.float32],
    scales: NDArray[np.float32],
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    weight: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    best = np.empty_like(scales)
    step = max(1, _SEARCHED_ELEMENTS // groups[0].size)
    # The square of an error times the root of its weight is the weighted square. NumPy sums it
    # twice as fast as a product of three.
    root = None if weight is None else np.sqrt(weight)
    for start in range(0, len(groups), step):
        rows = slice(start, start + step)
        best[rows] = _search_scales(groups[rows], scales[rows], scheme, scale_type, root)
    return best


def _search_scales(
    groups: NDArray[np.float32],
    scales: NDArray[np.float32],
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    root: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    low, high = integer_range(scheme)
    best = scales
    least: NDArray[np.float32] | None = None
    rounded = np.empty_like(groups)
    scaled = np.empty_like(groups)
    for fraction in _PLANES_FRACTIONS if scheme.planes else _MSE_FRACTIONS:
        candidate = storable_scales(scales * np.float32(fraction), scale_type)
        np.multiply(groups, (np.float32(1.0) / candidate)[..., None], out=scaled)
        np.rint(scaled, out=rounded)
        np.clip(rounded, low, high, out=rounded)
        np.subtract(rounded, scaled, out=rounded)
        if root is not None:
            np.multiply(rounded, root, out=rounded)
        # Errors are relative to the largest scale, whose square may be beyond float32.
        error = np.einsum("rgk,rgk->rg", rounded, rounded)
        error *= np.square(candidate / scales)
        if least is None:
            best, least = candidate, error
        else:
            better = error < least
            best = np.where(better, candidate, best)
            least = np.where(better, error, least)
    return best

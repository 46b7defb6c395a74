"""Computes in NumPy and FP64 what the kernels must compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def w4_gemv(
    x: NDArray[np.float16],
    planes: Sequence[NDArray[np.int8]],
    scales: NDArray[np.float16],
    bias: NDArray[np.float16] | None,
) -> tuple[Floats, Floats]:
    """Compute ``x @ (planes * scales) + bias``.

    Args:
        x: inputs [rows, depth].
        planes: planes of the weights, as in `layout.pack_weights`.
        scales: scales [groups, columns]; with two planes, those of the low one.
        bias: [columns], or None.

    Returns:
        The product [rows, columns], and a bound on its error from rounding sums to FP32 and the
        result to FP16.
    """
    # The kernel sums each nibble 24 too large and subtracts that; the bound includes both.
    exact, size = _product(x, planes, scales, bias, 24.0 * sum(16**n for n in range(len(planes))))
    # A thread adds at most 8 products per block, then blocks, warps and planes: 64 roundings and
    # one per 8 blocks bound all of them.
    return exact, _bound(exact, size, 64 + x.shape[1] / 256)


def w4_gemm(
    x: NDArray[np.float16],
    planes: Sequence[NDArray[np.int8]],
    scales: NDArray[np.float16],
    bias: NDArray[np.float16] | None,
) -> tuple[Floats, Floats]:
    """Compute as `w4_gemv` does, with the error bound of the tensor cores.

    Args:
        x: inputs [rows, depth].
        planes: planes of the weights, as in `layout.pack_weights`.
        scales: scales [groups, columns]; with two planes, those of the low one.
        bias: [columns], or None.
    """
    exact, size = _product(x, planes, scales, bias, 0.0)
    # FP16 times an integer of 8 bits is exact in FP32. A block of 32 is two tensor operations, each
    # of which adds 16 products to its sum: 34 additions, which may cut bits off instead of rounding
    # them, 2 ** -23 each. Then the scale, the running sum of all blocks, and the bias.
    return exact, _bound(exact, size, 2 * 34 + 2 + x.shape[1] / 32)


def _product(
    x: NDArray[np.float16],
    planes: Sequence[NDArray[np.int8]],
    scales: NDArray[np.float16],
    bias: NDArray[np.float16] | None,
    excess: float,
) -> tuple[Floats, Floats]:
    """Return the product, and the sum of the sizes of all terms, each weight `excess` larger."""
    weights = sum(plane.astype(np.float64) * 16**n for n, plane in enumerate(planes))
    wide = np.repeat(scales.astype(np.float64), x.shape[1] // len(scales), axis=0)
    exact = x.astype(np.float64) @ (weights * wide)
    size = np.abs(x.astype(np.float64)) @ ((np.abs(weights) + excess) * np.abs(wide))
    if bias is not None:
        exact = exact + bias.astype(np.float64)
        size = size + np.abs(bias.astype(np.float64))
    return exact, size


def _bound(exact: Floats, size: Floats, roundings: float) -> Floats:
    return size * 2.0**-24 * roundings + np.abs(exact) * 2.0**-11 + 2.0**-24


def attention(
    query: NDArray[np.float16],
    keys: NDArray[np.float16],
    values: NDArray[np.float16],
    new_keys: NDArray[np.float16],
    new_values: NDArray[np.float16],
    positions: NDArray[np.int32],
) -> Floats:
    """Compute attention of a step's tokens over the cache before them and over one another.

    Args:
        query: [batch, groups * heads of a group, tokens, width].
        keys: [batch, groups, capacity, width]; only rows before a sequence's first position count.
        values: shaped like `keys`.
        new_keys: [batch, groups, tokens, width].
        new_values: shaped like `new_keys`.
        positions: [batch, tokens], rising by one.

    Returns:
        [batch, tokens, groups * heads of a group * width].
    """
    batch, all_heads, tokens, width = query.shape
    groups = keys.shape[1]
    found = np.zeros((batch, tokens, all_heads, width))
    for sequence, group in np.ndindex(batch, groups):
        past = min(max(int(positions[sequence, 0]), 0), keys.shape[2])
        rows = [
            np.concatenate((old[sequence, group, :past], new[sequence, group])).astype(np.float64)
            for old, new in ((keys, new_keys), (values, new_values))
        ]
        heads = slice(group * all_heads // groups, (group + 1) * all_heads // groups)
        scores = query[sequence, heads].astype(np.float64) @ rows[0].T / np.sqrt(width)
        seen = np.arange(past + tokens) <= past + np.arange(tokens)[:, None]
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights @ rows[1] / weights.sum(-1, keepdims=True)
        found[sequence, :, heads] = mixed.transpose(1, 0, 2)
    return found.reshape(batch, tokens, all_heads * width)


def top_k(
    logits: NDArray[np.float16], keep: int
) -> tuple[NDArray[np.float16], NDArray[np.int64], Floats]:
    """Find the largest logits of each row in falling order; among equals the first place leads.

    Args:
        logits: [rows, columns]; a NaN is greater than infinity, and equal to any other NaN.
        keep: number of logits to keep, at most the columns.

    Returns:
        Values [rows, keep] without negative zeros, places [rows, keep], and the sums of
        ``exp(x - greatest)`` over all others [rows], NaN if the greatest is not finite.
    """
    ordered = np.where(np.isnan(logits), np.inf, logits.astype(np.float64))
    order = np.lexsort((-ordered, ~np.isnan(logits)))
    values = np.take_along_axis(logits, order[:, :keep], 1) + np.float16(0)
    others = np.take_along_axis(logits, order[:, keep:], 1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        rest = np.exp(others - values[:, :1]).sum(axis=1)
    return values, order[:, :keep], np.where(np.isfinite(values[:, 0]), rest, np.nan)


def top_k_error() -> float:
    """Bound the relative error of the sums that the kernels of `top_k` make.

    The kernels use CUDA's fast exponential. It is wrong by 2 units in the last place, and one for
    each 0.85 of its argument (CUDA C++ Programming Guide, "Intrinsic Functions"), which is rounded
    first. Below 2**-126 it is 0, so arguments beyond 88 count for nothing. A part's sum is
    multiplied by a second exponential, whose argument makes up for the first one's: together 2
    units more, and the product's rounding. A number passes through at most 48 additions: 15 in a
    thread, 5 in a warp and 3 between them for a part, 6 for all parts; or 32 from block to block,
    and 15 in a block; and 1.
    """
    units = 4 + 88 / 0.85
    return (2 * units + 88 + 1 + 48) * 2.0**-24

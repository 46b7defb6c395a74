"""Carries the integers of a quantized checkpoint into the graph's form, code for code.

The graph has no zero points and no negative scales, since TensorRT takes neither. Besides its codes
a group needs an offset ``o``: with ``w = s * (q - z)`` and ``c + o = q - z``,

    x @ w = x @ (s * c)  +  (sum of the group's x) @ (s * o)

where ``c`` is stored and ``o`` is 0 wherever ``q - z`` itself fits. So AWQ's zero points and
AutoRound's negative scales keep their four bits; two planes would take eight. In the same way two
planes hold the whole range of INT8, which reaches 8 beyond them (`edge.bundle.schemes`). A group is
rounded anew if the graph's type cannot hold its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from edge.bundle.schemes import PLANES_LEAST, SCHEMES
from export.sources.quantized_weight import QuantizedWeight

from .rtn import LEAST_SCALE, integer_range, quantize_rows, storable_scales


@dataclass(frozen=True)
class CarriedRows:
    """Rows of a weight as the graph stores them.

    Attributes:
        values: int8 ``[rows, in]``; planes hold -136 and up, so they are stored modulo 256.
        scales: float32 ``[rows, groups]``, each exactly representable in the graph's float type.
        offsets: float32 ``[rows, groups]``: ``s * o``.
        changed_groups: groups that were rounded anew.
        squared_error: summed squared difference from the source's weights.
        squared_norm: summed square of the source's weights.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32]
    changed_groups: int
    squared_error: float
    squared_norm: float


def carry_rows(
    weight: QuantizedWeight,
    rows: slice,
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    order: NDArray[np.int64] | None = None,
) -> CarriedRows:
    """Bring rows of a quantized weight into the form of a scheme.

    Args:
        weight: the source's integers; its groups are a multiple of the scheme's.
        rows: the outputs to carry.
        scheme: int4, int8 in planes, or w8a8; only the last holds no offsets, so its weights must
            be symmetric.
        scale_type: type in which the scales will be stored, float16 or bfloat16.
        order: order in which the graph takes the input channels; None keeps theirs.
    """
    codes = weight.codes[rows] if order is None else weight.codes[rows][:, order]
    num_rows, width = codes.shape
    size = scheme.group_size or width
    repeats = width // weight.scales.shape[1] // size
    scales = np.repeat(weight.scales[rows], repeats, axis=1)
    zeros = np.repeat(weight.zeros[rows], repeats, axis=1)
    groups = codes.reshape(num_rows, -1, size).astype(np.int16)
    groups -= zeros[..., None]
    groups *= np.sign(scales).astype(np.int16)[..., None]
    scales = np.abs(scales)
    wanted = groups.astype(np.float32)
    energy = np.einsum("rgk,rgk->rg", wanted, wanted).astype(np.float64)

    low, high = integer_range(scheme)
    least, most = groups.min(axis=-1), groups.max(axis=-1)
    offsets = np.where((least < low) | (most > high), most - high, 0)
    if SCHEMES[scheme.kind].int8_inputs:
        offsets[:] = 0  # they multiply sums of inputs that are not rounded
    reach = PLANES_LEAST if scheme.planes else low
    groups -= offsets[..., None].astype(np.int16)
    stored = storable_scales(scales, scale_type)
    # The scale of a group of zeros does not matter.
    unfit = (
        (most - offsets > high)
        | (least - offsets < reach)
        | ((scales < LEAST_SCALE) & (energy > 0))
    )
    errors = energy * np.square(np.where(energy > 0, stored - scales, 0).astype(np.float64))
    if unfit.any():
        exact = wanted[unfit] * scales[unfit][:, None]
        anew = quantize_rows(
            exact, msgspec.structs.replace(scheme, group_size=size), "mse", scale_type
        )
        groups[unfit] = anew.values
        stored[unfit] = anew.scales[:, 0]
        offsets = np.where(unfit, 0, offsets)
        difference = anew.values * anew.scales - exact
        errors[unfit] = np.einsum("nk,nk->n", difference, difference)
    return CarriedRows(
        groups.astype(np.int8).reshape(num_rows, width),
        stored,
        (offsets * stored).astype(np.float32),
        int(np.count_nonzero(unfit)),
        float(errors.sum()),
        float((energy * np.square(scales.astype(np.float64))).sum()),
    )

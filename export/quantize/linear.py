"""Converts a linear layer as a stream: checkpoint rows in, the graph's ``[in, out]`` tensors out.

A layer is converted in row tiles small enough for the CPU's cache, on two threads (numpy releases
the GIL). So memory stays at the packed result plus a few tiles, whatever the layer's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from export.graph.float_range import check_range
from export.sources.quantized_weight import QuantizedWeight

from .kept import carry_rows
from .packing import pack_int4, split_planes
from .plan import LinearPlan
from .rtn import THREADS, TILE_ELEMENTS, RowQuantizer, dequantize_rows


@dataclass(frozen=True)
class LinearTensors:
    """A layer's tensors in graph order.

    Attributes:
        weight: float16/bfloat16 ``[in, out]``, int8 ``[in, out]``, or packed int4 bytes; the low
            plane if there are two.
        scale: float32 ``[groups, out]``, or ``[out]`` with one scale per channel; None for float.
        high_weight: packed int4 bytes of the high plane, or None if there are no planes.
        bias: float32 ``[out]``, or None.
        offset: factors on the sums of each group's inputs, float32 ``[groups, out]``, or None.
        num_groups: groups with a scale of their own; 0 for float.
        changed_groups: number of groups whose integers are not the source's.
        relative_error: error of the weights against a quantized source, as in
            `manifest.FromSource`.
    """

    weight: NDArray[np.generic]
    scale: NDArray[np.float32] | None
    high_weight: NDArray[np.uint8] | None = None
    bias: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None
    num_groups: int = 0
    changed_groups: int = 0
    relative_error: float = 0.0


def convert(
    plan: LinearPlan, float_type: np.dtype[np.generic], progress: Callable[[int], None]
) -> LinearTensors:
    """Read a linear's weights and biases and convert them as planned.

    Args:
        plan: what to read and how to round.
        float_type: the graph's float type.
        progress: called with the number of weights done.

    Raises:
        CheckpointError: a weight is not finite, or too large for the graph's float type.
    """
    layer, bias = plan.layer, None
    if layer.biases:
        bias = _stack([plan.checkpoint.tensor(name) for name in layer.biases])
    if plan.kept is not None:
        order = np.array(plan.input_order, dtype=np.int64) if plan.input_order else None
        kept = convert_kept(plan.kept, plan.scheme, float_type, order, progress)
        return replace(kept, bias=bias)
    parts = [plan.checkpoint.tensor(name) for name in layer.weights]
    tensors = convert_linear(
        parts,
        layer.weights,
        plan.scheme,
        plan.quantize,
        float_type,
        progress,
        measure=plan.treatment == "requantized",
    )
    return replace(tensors, bias=bias)


def convert_linear(
    parts: Sequence[NDArray[np.generic]],
    names: Sequence[str],
    scheme: TensorScheme,
    quantize: RowQuantizer | None,
    float_type: np.dtype[np.generic],
    progress: Callable[[int], None],
    *,
    measure: bool = False,
) -> LinearTensors:
    """Stack ``[out, in]`` parts, transpose to ``[in, out]`` and store them as the scheme says.

    Args:
        parts: matrices of any float type, usually memory-mapped.
        names: their checkpoint names, for errors.
        scheme: how to store them.
        quantize: how to round a tile of rows; None for a scheme of float weights.
        float_type: the graph's float type.
        progress: called with the number of weights done.
        measure: whether to compute the changes that rounding made.

    Returns:
        The weight and its scale.

    Raises:
        CheckpointError: a weight is not finite, or too large for the graph's float type.
    """

    def convert_rows(part: int, rows: slice) -> _Rows:
        floats = parts[part][rows].astype(np.float32)
        # Also for quantized layers: the graph computes with weights of its own float type.
        check_range(floats, names[part], float_type)
        if quantize is None:
            return _Rows(floats.astype(float_type))
        result = quantize(floats)
        if not measure:
            return _Rows(result.values, result.scales)
        difference = dequantize_rows(result) - floats
        return _Rows(
            result.values,
            result.scales,
            changed_groups=result.scales.size,
            squared_error=float(np.einsum("ri,ri->", difference, difference)),
            squared_norm=float(np.einsum("ri,ri->", floats, floats)),
        )

    elements = TILE_ELEMENTS if quantize is None else quantize.tile_elements
    dtype = float_type if scheme.kind == "float" else np.dtype(np.int8)
    shapes = [part.shape for part in parts]
    return _convert(shapes, scheme, dtype, convert_rows, elements, progress)


def convert_kept(
    parts: Sequence[QuantizedWeight],
    scheme: TensorScheme,
    scale_type: np.dtype[np.generic],
    order: NDArray[np.int64] | None,
    progress: Callable[[int], None],
) -> LinearTensors:
    """Stack the integers of a quantized checkpoint and store them as the scheme says.

    Args:
        parts: the parts' integers, as for `kept.carry_rows`.
        scheme: how to store them.
        scale_type: the graph's float type.
        order: order in which the graph takes the input channels; None keeps theirs.
        progress: called with the number of weights done.
    """

    def carry(part: int, rows: slice) -> _Rows:
        done = carry_rows(parts[part], rows, scheme, scale_type, order)
        return _Rows(
            done.values,
            done.scales,
            done.offsets,
            done.changed_groups,
            done.squared_error,
            done.squared_norm,
        )

    shapes = [part.codes.shape for part in parts]
    return _convert(shapes, scheme, np.dtype(np.int8), carry, TILE_ELEMENTS, progress)


@dataclass(frozen=True)
class _Rows:
    """A tile of stored rows: ``values`` is ``[rows, in]``, the others are ``[rows, groups]``."""

    values: NDArray[np.generic]
    scales: NDArray[np.float32] | None = None
    offsets: NDArray[np.float32] | None = None
    changed_groups: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0


def _convert(
    shapes: Sequence[tuple[int, ...]],
    scheme: TensorScheme,
    dtype: np.dtype[np.generic],
    convert_rows: Callable[[int, slice], _Rows],
    elements: int,
    progress: Callable[[int], None],
) -> LinearTensors:
    """Convert parts of a matrix in tiles and transpose them to ``[in, out]``."""
    width = shapes[0][1]
    out = sum(shape[0] for shape in shapes)
    size = scheme.group_size or width
    pack = _packer(scheme)
    streams = pack is not None and all(shape[0] % 2 == 0 for shape in shapes)
    stored: list[NDArray[Any]]
    if streams:
        planes = 2 if scheme.planes else 1
        stored = [np.empty((width, out // 2), dtype=np.uint8) for _ in range(planes)]
    else:
        stored = [np.empty((width, out), dtype=dtype)]
    scale = offset = None
    if scheme.kind != "float":
        scale = np.empty((width // size, out), dtype=np.float32)
        offset = np.zeros_like(scale)

    def convert_tile(tile: _Tile) -> _Rows:
        rows = convert_rows(tile.part, slice(tile.start, tile.stop))
        first, last = tile.column, tile.column + len(rows.values)
        if scale is not None and rows.scales is not None:
            scale[:, first:last] = rows.scales.T
        if offset is not None and rows.offsets is not None:
            offset[:, first:last] = rows.offsets.T
        if pack is not None and streams:
            packed = pack(np.ascontiguousarray(rows.values.T))
            for target, plane in zip(stored, packed, strict=True):
                target[:, first // 2 : last // 2] = plane.reshape(width, -1)
        else:
            stored[0][:, first:last] = rows.values.T
        # A copy, since a view would keep the tile in memory.
        return replace(rows, values=rows.values[:, :0].copy(), scales=None, offsets=None)

    done, lengths = [], [shape[0] for shape in shapes]
    with ThreadPoolExecutor(THREADS) as pool:
        for rows in pool.map(convert_tile, _tiles(lengths, width, elements)):
            done.append(rows)
            progress(len(rows.values) * width)
    if pack is not None and not streams:
        stored = list(pack(stored[0]))
    num_groups = 0 if scale is None else scale.size
    if scale is not None and scheme.group_size == 0:
        scale = scale[0]
    norm = sum(rows.squared_norm for rows in done)
    error = sum(rows.squared_error for rows in done)
    return LinearTensors(
        stored[0],
        scale,
        stored[1] if len(stored) > 1 else None,
        offset=offset if offset is not None and offset.any() else None,
        num_groups=num_groups,
        changed_groups=sum(rows.changed_groups for rows in done),
        relative_error=math.sqrt(error / norm) if norm else 0.0,
    )


def _packer(
    scheme: TensorScheme,
) -> Callable[[NDArray[np.int8]], tuple[NDArray[np.uint8], ...]] | None:
    """Return the packer of an INT4 or a planes scheme; None for others."""
    if scheme.planes:
        return split_planes
    return (lambda values: (pack_int4(values),)) if scheme.kind == "int4" else None


def _stack(parts: Sequence[NDArray[np.generic]]) -> NDArray[np.float32]:
    return np.concatenate([part.astype(np.float32) for part in parts])


@dataclass(frozen=True)
class _Tile:
    part: int
    start: int
    stop: int
    column: int  # first column in the fused matrix


def _tiles(lengths: Sequence[int], width: int, elements: int) -> Iterator[_Tile]:
    """Yield row tiles; all but a part's last have an even number of rows, as packing needs."""
    step = max(elements // width, 2) // 2 * 2
    column = 0
    for part, length in enumerate(lengths):
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield _Tile(part, start, stop, column + start)
        column += length

"""Converts a linear layer as a stream: checkpoint rows in, the graph's ``[in, out]`` tensors out.

A layer is converted in row tiles small enough for the CPU's cache, on two threads (numpy releases
the GIL), so memory stays at the packed result plus a few tiles whatever the layer's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from edge.errors import CheckpointError

from .packing import pack_int4, split_planes
from .plan import LinearPlan
from .rtn import TILE_ELEMENTS, RowQuantizer

_THREADS = 2


@dataclass(frozen=True)
class LinearTensors:
    """A layer's tensors in graph order.

    Attributes:
        weight: float16/bfloat16 ``[in, out]``, int8 ``[in, out]``, or packed int4 bytes; of two
            planes the low one.
        scale: float32 ``[groups, out]``, or ``[out]`` with one scale per channel; None for float.
        high_weight: packed int4 bytes of the high plane, or None if there are no planes.
        bias: float32 ``[out]``, or None.
        float_weight: weights of the float channels, float32 ``[channels, out]``, or None.
    """

    weight: NDArray[np.generic]
    scale: NDArray[np.float32] | None
    high_weight: NDArray[np.uint8] | None = None
    bias: NDArray[np.float32] | None = None
    float_weight: NDArray[np.float32] | None = None


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
    layer, channels = plan.layer, list(plan.float_channels)
    parts = [plan.checkpoint.tensor(name) for name in layer.weights]
    tensors = convert_linear(
        parts, layer.weights, plan.scheme, plan.quantize, float_type, progress, channels
    )
    bias = float_weight = None
    if layer.biases:
        bias = _stack([plan.checkpoint.tensor(name) for name in layer.biases])
    if channels:
        float_weight = _stack([part[:, channels] for part in parts]).T
    return replace(tensors, bias=bias, float_weight=float_weight)


def convert_linear(
    parts: Sequence[NDArray[np.generic]],
    names: Sequence[str],
    scheme: TensorScheme,
    quantize: RowQuantizer | None,
    float_type: np.dtype[np.generic],
    progress: Callable[[int], None],
    zeroed: Sequence[int] = (),
) -> LinearTensors:
    """Stack ``[out, in]`` parts, transpose to ``[in, out]`` and store them as the scheme says.

    Args:
        parts: matrices of any float type, usually memory-mapped.
        names: their checkpoint names, for errors.
        scheme: how to store them.
        quantize: how to round a tile of rows; None for a scheme of float weights.
        float_type: the graph's float type.
        progress: called with the number of weights done.
        zeroed: input channels whose weights are stored as zero.

    Returns:
        The weight and its scale.

    Raises:
        CheckpointError: a weight is not finite, or too large for the graph's float type.
    """
    width = parts[0].shape[1]
    out = sum(part.shape[0] for part in parts)
    size = scheme.group_size or width
    pack = _packer(scheme)
    streams = pack is not None and all(len(part) % 2 == 0 for part in parts)
    stored: list[NDArray[Any]]
    if streams:
        planes = 2 if scheme.planes else 1
        stored = [np.empty((width, out // 2), dtype=np.uint8) for _ in range(planes)]
    else:
        stored = [np.empty((width, out), dtype=float_type if scheme.kind == "float" else np.int8)]
    scale = None
    if scheme.kind != "float":
        scale = np.empty((width // size, out), dtype=np.float32)

    def convert_tile(tile: _Tile) -> int:
        rows = parts[tile.part][tile.start : tile.stop].astype(np.float32)
        _check_range(rows, names[tile.part], float_type)
        rows[:, list(zeroed)] = 0
        first, last = tile.column, tile.column + len(rows)
        if scale is None or quantize is None:
            stored[0][:, first:last] = rows.T.astype(float_type)
            return rows.size
        result = quantize(rows)
        scale[:, first:last] = result.scales.T
        if pack is not None and streams:
            packed = pack(np.ascontiguousarray(result.values.T))
            for target, plane in zip(stored, packed, strict=True):
                target[:, first // 2 : last // 2] = plane.reshape(width, -1)
        else:
            stored[0][:, first:last] = result.values.T
        return rows.size

    elements = TILE_ELEMENTS if quantize is None else quantize.tile_elements
    with ThreadPoolExecutor(_THREADS) as pool:
        for count in pool.map(convert_tile, _tiles([len(part) for part in parts], width, elements)):
            progress(count)
    if pack is not None and not streams:
        stored = list(pack(stored[0]))
    if scale is not None and scheme.group_size == 0:
        scale = scale[0]
    return LinearTensors(stored[0], scale, *stored[1:])


def _packer(
    scheme: TensorScheme,
) -> Callable[[NDArray[np.int8]], tuple[NDArray[np.uint8], ...]] | None:
    """What packs a matrix of an INT4 or a planes scheme; None for others."""
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
    column: int  # of the fused matrix


def _tiles(lengths: Sequence[int], width: int, elements: int) -> Iterator[_Tile]:
    """Yield row tiles; all but a part's last have an even number of rows, as packing needs."""
    step = max(elements // width, 2) // 2 * 2
    column = 0
    for part, length in enumerate(lengths):
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield _Tile(part, start, stop, column + start)
        column += length


def _check_range(rows: NDArray[np.float32], name: str, float_type: np.dtype[np.generic]) -> None:
    largest = float(np.abs(rows).max(initial=0.0))
    if not np.isfinite(largest):
        raise CheckpointError(
            f"{name} holds NaN or infinite weights; the checkpoint is damaged: download it again"
        )
    # Also for quantized layers: the graph computes with weights of its own float type.
    if float_type == np.float16 and largest > 65504.0:
        raise CheckpointError(
            f"{name} holds a weight of magnitude {largest:.4g}, FP16 ends at 65504; "
            "export with --dtype bf16"
        )

"""The scales of an 8-bit KV cache, and what rows are with and without them.

A row of the cache holds ``round(x / scale)``, at most 127 and at least -128, with one scale per
head and channel; the scales are constants of the graph (`io_spec.key_scale`, `io_spec.value_scale`)
and do not change while it runs. Floats of such a row, rounded again with the same scale, give the
same integers: a row may be read as floats and written back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError, BundleError

from . import io_spec
from .manifest import Manifest
from .onnx_file import OnnxFile
from .onnx_values import Constants

Scales = Mapping[int, NDArray[np.float32]]
"""Of each INT8 tensor of the cache, by its number: twice the layer, and one more for values.
Each ``[kv_heads, 1, head_dim]``."""


def read_scales(graph: OnnxFile, manifest: Manifest, path: Path) -> dict[int, NDArray[np.float32]]:
    """The scales that a decoder's constants hold.

    Args:
        graph: the decoder.
        manifest: of its bundle.
        path: of the decoder, for messages.

    Raises:
        BundleError: one is missing, or has another shape, or is not above zero.
    """
    model = manifest.model
    shape = (model.num_kv_heads, 1, model.head_dim)
    if not manifest.int8_layers:
        return {}
    constants = Constants(graph)
    scales: dict[int, NDArray[np.float32]] = {}
    for layer in manifest.int8_layers:
        for entry, name in enumerate((io_spec.key_scale(layer), io_spec.value_scale(layer))):
            constant = constants.get(name)
            values = None if constant is None else constants.values(name)
            if constant is None or values is None or constant.shape != shape:
                found = "missing" if constant is None else f"of shape {list(constant.shape)}"
                raise BundleError(
                    f"{path}: the KV cache's scales {name} are {found}, {list(shape)} is expected; "
                    "export the bundle again with --kv-cache int8"
                )
            wide = values.astype(np.float32).reshape(shape)
            if not (np.isfinite(wide) & (wide > 0)).all():
                raise BundleError(
                    f"{path}: of the KV cache's scales {name} one is not above zero; "
                    "export the bundle again with --kv-cache int8"
                )
            scales[2 * layer + entry] = wide
    return scales


def scales_sha256(scales: Scales) -> str:
    """SHA-256 of scales and the numbers of their tensors; empty without any."""
    digest = hashlib.sha256()
    for number in sorted(scales):
        digest.update(number.to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(scales[number], "<f4").data)
    return digest.hexdigest() if scales else ""


def quantize_rows(rows: NDArray[np.floating], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """The integers of rows ``[kv_heads, length, head_dim]``.

    Raises:
        BackendError: a value is not finite, which 8 bits cannot say.
    """
    steps = rows.astype(np.float32) / scale
    if not np.isfinite(steps).all():
        raise BackendError("rows with values that are not finite do not fit an 8-bit KV cache")
    codes: NDArray[np.int8] = np.rint(steps).clip(-128, 127).astype(np.int8)
    return codes


def dequantize_rows(codes: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The floats of rows ``[kv_heads, length, head_dim]``."""
    return codes * scale


def pack_rows(rows: NDArray[np.floating], scales: Scales) -> NDArray[np.uint8]:
    """The bytes of rows, plane after plane: INT8 where there are scales, else as they are.

    Args:
        rows: ``[2 * layers, kv_heads, length, head_dim]``.
        scales: of the planes in INT8.
    """
    parts: list[NDArray[Any]] = [
        quantize_rows(plane, scales[number]) if number in scales else plane
        for number, plane in enumerate(rows)
    ]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])


def unpack_rows(
    data: NDArray[np.uint8],
    shape: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    scales: Scales,
) -> NDArray[np.floating]:
    """The inverse of `pack_rows`: rows of ``shape`` and ``dtype``."""
    rows: NDArray[np.floating] = np.empty(shape, dtype)
    at = 0
    for number, plane in enumerate(rows):
        if number in scales:
            codes = data[at : at + plane.size].view(np.int8).reshape(plane.shape)
            plane[...] = dequantize_rows(codes, scales[number])
            at += plane.size
        else:
            plane[...] = data[at : at + plane.nbytes].view(dtype).reshape(plane.shape)
            at += plane.nbytes
    return rows


def packed_bytes(shape: tuple[int, int, int, int], dtype: np.dtype[Any], num_int8: int) -> int:
    """Length of what `pack_rows` gives, with that many planes in INT8."""
    planes, heads, length, dim = shape
    return heads * length * dim * (num_int8 + (planes - num_int8) * dtype.itemsize)

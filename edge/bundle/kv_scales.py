"""Converts rows of an 8-bit KV cache, and reads their scales.

A row of the cache holds ``round(x / scale)``, at most 127 and at least -128, with one scale per
head and channel. The scales are constants of the graph (`io_spec.key_scale`, `io_spec.value_scale`)
and do not change while it runs. The manifest repeats them in its section ``kv_scales``, so that no
runtime parses the graph for them. Converting a row to floats and back with the same scales gives
the same integers, so a row may be read as floats and written back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError, BundleError

from .extras import read_extra
from .manifest import Manifest

SECTION = "kv_scales"
"""Names the manifest's section, which `read_scales` reads."""
Scales = Mapping[int, NDArray[np.float32]]
"""Maps each INT8 tensor of the cache to its scales, ``[kv_heads, 1, head_dim]``. A tensor's number
is twice its layer, and one more for values."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest's section.

    Attributes:
        float32: the scales of one INT8 tensor after the other, little-endian; base64 in JSON.
    """

    float32: bytes


def read_scales(bundle: Path, manifest: Manifest, graph: str) -> Scales:
    """Read the scales of a bundle's cache; empty if the cache is in floats.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest, which has the scales unless an older edge-llm wrote it.
        graph: file name of the graph, which has them, too.

    Raises:
        BundleError: they do not fit the model, or one is not above zero.
        IntegrityError: the graph of an older bundle is damaged.
    """
    if not manifest.int8_layers:
        return {}
    stored = read_extra(manifest, SECTION, _Section)
    if stored is None:
        from .graph_scales import read_graph_scales

        return read_graph_scales(bundle, manifest, graph)
    numbers = [2 * layer + entry for layer in manifest.int8_layers for entry in (0, 1)]
    shape = (len(numbers), manifest.model.num_kv_heads, 1, manifest.model.head_dim)
    whole = len(stored.float32) == 4 * math.prod(shape)
    scales = np.frombuffer(stored.float32 if whole else b"", "<f4").astype(np.float32)
    if not whole or not (np.isfinite(scales) & (scales > 0)).all():
        raise BundleError(
            f"{bundle}: the manifest's section {SECTION} has not {math.prod(shape)} scales above "
            "zero; export the bundle again with --kv-cache int8"
        )
    return dict(zip(numbers, scales.reshape(shape), strict=True))


def scales_section(scales: Scales) -> dict[str, Any]:
    """Make the manifest's section from which `read_scales` reads these scales."""
    ordered = [scales[number].astype("<f4").tobytes() for number in sorted(scales)]
    section: dict[str, Any] = msgspec.to_builtins(_Section(b"".join(ordered)))
    return section


def scales_sha256(scales: Scales) -> str:
    """Return the SHA-256 of scales and the numbers of their tensors; empty without scales."""
    digest = hashlib.sha256()
    for number in sorted(scales):
        digest.update(number.to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(scales[number], "<f4").data)
    return digest.hexdigest() if scales else ""


def quantize_rows(rows: NDArray[np.floating], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """Round rows ``[kv_heads, length, head_dim]`` to integers.

    Raises:
        BackendError: a value is not finite, which 8 bits cannot express.
    """
    steps = rows.astype(np.float32) / scale
    if not np.isfinite(steps).all():
        raise BackendError("rows with values that are not finite do not fit an 8-bit KV cache")
    codes: NDArray[np.int8] = np.rint(steps).clip(-128, 127).astype(np.int8)
    return codes


def dequantize_rows(codes: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows ``[kv_heads, length, head_dim]`` as floats."""
    return codes * scale


def pack_rows(rows: NDArray[np.floating], scales: Scales) -> NDArray[np.uint8]:
    """Return the bytes of rows, plane after plane: INT8 where there are scales, else unchanged.

    Args:
        rows: ``[2 * layers, kv_heads, length, head_dim]``.
        scales: scales of the planes in INT8.
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
    """Return rows of ``shape`` and ``dtype`` from bytes of `pack_rows`, whose inverse it is."""
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
    """Return the length of the bytes of `pack_rows`, with ``num_int8`` planes in INT8."""
    planes, heads, length, dim = shape
    return heads * length * dim * (num_int8 + (planes - num_int8) * dtype.itemsize)

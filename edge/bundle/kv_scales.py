"""Converts rows of an 8-bit KV cache, and reads their scales.

A row of the cache holds ``round(x / scale)``, at most 127 and at least -128, with one scale per
head and channel. The scales are constants of the graph (`io_spec.cache_scale`) and
do not change while it runs. The manifest repeats them in its section ``kv_scales``, so that no
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
from edge.model.cache import CacheSpec, cache_tensors
from edge.model.slot_rows import SlotRows

from .extras import read_extra
from .manifest import Manifest

SECTION = "kv_scales"
"""Names the manifest's section, which `read_scales` reads."""
Scales = Mapping[str, NDArray[np.float32]]
"""Maps each INT8 tensor of the cache (`edge.model.cache`) to its scales, ``[kv_heads, 1, dim]``, in
graph order."""


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
    shapes = scale_shapes(manifest)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    whole = len(stored.float32) == 4 * ends[-1]
    scales = np.frombuffer(stored.float32 if whole else b"", "<f4").astype(np.float32)
    if not whole or not (np.isfinite(scales) & (scales > 0)).all():
        raise BundleError(
            f"{bundle}: the manifest's section {SECTION} has not {ends[-1]} scales above "
            "zero; export the bundle again with --kv-cache int8"
        )
    parts = zip(shapes.items(), np.split(scales, ends[:-1]), strict=True)
    return {name: part.reshape(shape) for (name, shape), part in parts}


def scale_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shape of the scales of each INT8 tensor of the cache, ``[kv_heads, 1, dim]``."""
    tensors = cache_tensors(manifest.model, manifest.dtype, manifest.int8_layers)
    return {name: spec.shape(1, 1)[1:] for name, spec in tensors.items() if spec.type == "int8"}


def scales_section(scales: Scales) -> dict[str, Any]:
    """Make the manifest's section from which `read_scales` reads these scales."""
    ordered = [scale.astype("<f4").tobytes() for scale in scales.values()]
    section: dict[str, Any] = msgspec.to_builtins(_Section(b"".join(ordered)))
    return section


def scales_sha256(scales: Scales) -> str:
    """Return the SHA-256 of scales and the names of their tensors; empty without scales."""
    digest = hashlib.sha256()
    for name, scale in scales.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(scale, "<f4").data)
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


def pack_rows(rows: SlotRows, scales: Scales) -> NDArray[np.uint8]:
    """Return the bytes of rows, tensor after tensor: INT8 where there are scales, else unchanged.

    Args:
        rows: the rows.
        scales: scales of the tensors in INT8.
    """
    parts: list[NDArray[Any]] = [
        quantize_rows(array, scales[name]) if name in scales else array
        for name, array in rows.items()
    ]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])


def unpack_rows(
    data: NDArray[np.uint8], tensors: Mapping[str, CacheSpec], length: int, scales: Scales
) -> SlotRows:
    """Return ``length`` rows from bytes of `pack_rows`, whose inverse it is.

    Args:
        data: the bytes.
        tensors: the cache tensors as they are in ``data``.
        length: number of rows.
        scales: scales of the tensors in INT8.
    """
    rows, at = SlotRows(), 0
    for name, spec in tensors.items():
        end = at + spec.row_bytes * length
        part = data[at:end].view(spec.type.replace("fp", "float"))
        array = part.reshape(spec.shape(1, length)[1:])
        rows[name] = dequantize_rows(array, scales[name]) if name in scales else array
        at = end
    return rows

"""Reads the scales of an 8-bit KV cache from a graph, for bundles whose manifest lacks them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.errors import BundleError

from . import io_spec
from .kv_scales import Scales, scale_shapes
from .manifest import Manifest
from .onnx_file import OnnxFile
from .onnx_values import Constants
from .verified_files import verify_files


def read_graph_scales(bundle: Path, manifest: Manifest, name: str) -> Scales:
    """Read the scales that a graph of a bundle holds.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.
        name: file name of the graph; its hash is checked first.

    Raises:
        IntegrityError: the graph is damaged.
        BundleError: `graph_scales` finds a scale missing or wrong.
    """
    verify_files(bundle, manifest, [name])
    path = bundle / name
    return graph_scales(OnnxFile(path.read_bytes()), manifest, path)


def graph_scales(graph: OnnxFile, manifest: Manifest, path: Path) -> Scales:
    """Return the scales that a decoder's constants hold.

    Args:
        graph: the decoder.
        manifest: the bundle's manifest.
        path: path of the decoder's file, for messages.

    Raises:
        BundleError: one is missing, or has another shape, or is not above zero.
    """
    if not manifest.int8_layers:
        return {}
    constants = Constants(graph)
    scales: dict[str, NDArray[np.float32]] = {}
    for tensor, shape in scale_shapes(manifest).items():
        name = io_spec.cache_scale(tensor)
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
        scales[tensor] = wide
    return scales

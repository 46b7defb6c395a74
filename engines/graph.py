"""Adapts the bundle's graph to the engine: another capacity, another way to read the cache.

Only the small ``decoder.onnx`` is edited, in memory; its weights stay where they are.
"""

from __future__ import annotations

import os
from pathlib import Path

from edge.bundle import io_spec
from edge.bundle.engine_file import KvRead
from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import OnnxFile
from edge.errors import BundleError

from .build_plan import BuildPlan
from .config import BuildShapes


def prepare_graph(data: bytes, shapes: BuildShapes, kv_read: KvRead) -> bytes:
    """Re-shape a decoder.

    Args:
        data: bytes of ``decoder.onnx``.
        shapes: the capacity wanted.
        kv_read: ``slice`` keeps the graph; ``full`` and ``lengths`` let attention read the cache
            itself instead of a slice of it.

    Raises:
        BundleError: the graph has no slices of the cache to remove.
    """
    graph = OnnxFile(data)
    names = [value.name for value in [*graph.inputs, *graph.outputs]]
    caches = [name for name in names if name.startswith(("past_key_values.", "present."))]
    graph.set_dimension(caches, 2, shapes.capacity)
    if kv_read != "slice":
        _remove_slices(graph, set(caches))
        graph.set_dimension([io_spec.KV_POSITIONS], 0, shapes.capacity)
    return graph.serialize()


def write_graph(build: BuildPlan, directory: Path) -> Path:
    """Write the graph of a build as a file, for a reader that takes nothing else.

    Readers look for the weights beside the graph, so a symbolic link to them is put there. A hard
    link would save nothing, and the ``onnx`` package refuses weights with several hard links as an
    attack.

    Args:
        build: the bundle, whose files the caller has verified, and the shapes.
        directory: where the files go; made if missing. Files of the same names are replaced.

    Returns:
        The path of the graph.
    """
    graph, weights = graph_files(build.manifest)
    bundle = build.config.bundle.resolve()
    data = prepare_graph((bundle / graph).read_bytes(), build.shapes, build.kv_read)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / graph
    path.write_bytes(data)
    link = directory / weights
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(bundle / weights, directory.resolve()))
    return path


def graph_files(manifest: Manifest) -> tuple[str, str]:
    """The files that an engine is built from: the graph and its weights."""
    return manifest.graphs.decoder, f"{manifest.graphs.decoder}.data"


def _remove_slices(graph: OnnxFile, caches: set[str]) -> None:
    whole = {
        node.outputs[0]: node.inputs[0]
        for node in graph.nodes
        if node.op_type == "Slice" and node.inputs[0] in caches
    }
    if not whole:
        raise BundleError(
            "the graph reads no slices of its cache, so --kv-read cannot change how it reads; "
            "export the bundle again"
        )
    for node in graph.nodes:
        node.inputs = [whole.get(name, name) for name in node.inputs]

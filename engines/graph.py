"""The bundle's graph as the engine wants it: another capacity, another way to read the cache.

Only the small ``decoder.onnx`` is edited, in memory; its weights stay where they are.
"""

from __future__ import annotations

from edge import io_spec
from edge.errors import BundleError
from edge.onnx_file import OnnxFile

from .config import BuildShapes, KvRead


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

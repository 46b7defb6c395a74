"""Puts edge-llm's own search for the best logits into a graph: two plugin nodes for twenty.

They replace standard operators (`engines.graph.adapt`). The plugins sum the mass of the other
logits directly, where the graph subtracts that of the best from that of all. So they round less
(`edge.bundle.io_spec.sum_error`, `engines.kernels.reference.top_k_error`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge.backends.tensorrt.launch_rules import TOP_K_MERGE, TOP_K_PARTS
from edge.bundle import io_spec
from edge.bundle.engine_file import Plugins
from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.bundle.onnx_values import Constants, node_attributes
from edge_make.graph_edits import add_floats
from engines.kernels.top_k import MOST_COLUMNS

from .plugin_nodes import MisfitError, plugin_node

TOP_K = "top_k"
"""Name of the search for people and in `OwnGraph.left`; its nodes' names begin with it."""
KEYS, STATS = f"{TOP_K}.keys", f"{TOP_K}.stats"
"""Tensors that the first plugin hands to the second."""
_KEEP = f"{TOP_K}.keep"
_PLACES = {"axis": -1, "largest": 1, "sorted": 1}


def use_own_top_k(graph: OnnxFile, manifest: Manifest, plugins: Plugins) -> tuple[int, str]:
    """Replace the search; unused nodes go when the graph is serialized.

    Args:
        graph: graph from `engines.graph.adapt.graph_of`, with the outputs of
        `io_spec.best_outputs`; it
            is changed.
        manifest: the bundle's manifest.
        plugins: kind of plugin that the engine has.

    Returns:
        How many logits of each row the plugins keep, and an empty text; or 0, and why TensorRT
        keeps the search.

    Raises:
        BundleError: the graph is not valid.
    """
    try:
        keep = _find(graph, manifest)
    except MisfitError as reason:
        return 0, str(reason)
    add_floats(graph, _KEEP, [keep], np.zeros(keep, np.float32))
    best = [io_spec.BEST_VALUES, io_spec.BEST_IDS, io_spec.BEST_REST]
    graph.nodes = [node for node in graph.nodes if not set(node.outputs) & set(best)]
    graph.nodes += [
        plugin_node(rule, inputs, outputs, TOP_K, plugins, keep)
        for rule, inputs, outputs in (
            (TOP_K_PARTS, [io_spec.LOGITS, _KEEP], [KEYS, STATS]),
            (TOP_K_MERGE, [KEYS, STATS], best),
        )
    ]
    return keep, ""


def _find(graph: OnnxFile, manifest: Manifest) -> int:
    """Return how many logits of each row the graph keeps.

    Raises:
        MisfitError: the kernels cannot compute this search.
    """
    vocab_size = manifest.model.vocab_size
    if manifest.dtype != "fp16":
        raise MisfitError(f"its floats are {manifest.dtype}, and the kernels take FP16")
    if vocab_size > MOST_COLUMNS:
        raise MisfitError(
            f"its rows have {vocab_size:,} logits, and the kernels take up to {MOST_COLUMNS:,}"
        )
    makers = {name: node for node in graph.nodes for name in node.outputs}
    constants = Constants(graph)

    def source(name: str, *op_types: str) -> Node:
        """Follow a chain of nodes backwards through their first inputs; return its start."""
        first, *others = op_types
        node = makers.get(name)
        if node is None or node.op_type != first or node.domain:
            raise _strange(name)
        return source(node.inputs[0], *others) if others else node

    def numbers(names: Sequence[str]) -> list[int]:
        values = [constants.values(name) if constants.get(name) else None for name in names]
        return [int(value) for each in values if each is not None for value in each]

    search = source(io_spec.BEST_VALUES, "Cast", "TopK")
    row, best = search.inputs[0], search.outputs[0]
    if source(row, "Cast").inputs[0] != io_spec.LOGITS or node_attributes(search) != _PLACES:
        raise _strange(best)
    if source(io_spec.BEST_IDS, "Cast").inputs[0] != search.outputs[1]:
        raise _strange(io_spec.BEST_IDS)
    kept = numbers(search.inputs[1:])
    if len(kept) != 1:
        raise _strange(best)
    rest = source(io_spec.BEST_REST, "Sub")
    for name, summed, levels in (
        (rest.inputs[0], row, ("ReduceSum", "ReduceSum", "Reshape")),
        (rest.inputs[1], best, ("ReduceSum",)),
    ):
        shifted = source(name, *levels, "Exp", "Sub")
        greatest = source(shifted.inputs[1], "Slice")
        first = numbers(greatest.inputs[1:])
        if (shifted.inputs[0], greatest.inputs[0], first) != (summed, best, [0, 1, -1]):
            raise _strange(name)
    return kept[0]


def _strange(name: str) -> MisfitError:
    return MisfitError(f"the nodes around {name} are not those of engines.graph.adapt")

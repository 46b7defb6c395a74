"""A plugin's node in a graph, as the parser's import of plugins reads it, and what it replaces."""

from __future__ import annotations

from collections.abc import Sequence

from edge.backends.tensorrt.launch_rules import NAMESPACE, PluginRule
from edge.backends.tensorrt.plugins import VERSION as PYTHON_VERSION
from edge.bundle.engine_file import Plugins
from edge.bundle.onnx_file import Node, OnnxFile, attribute

from .kernels.plugin import VERSION


class MisfitError(Exception):
    """Why something is left to TensorRT."""


def strange(name: str) -> MisfitError:
    """The error of nodes around a tensor that no export of ours makes."""
    return MisfitError(f"the nodes around {name} are not those of this edge-llm's export")


def makers_and_readers(graph: OnnxFile) -> tuple[dict[str, Node], dict[str, list[Node]]]:
    """The node that makes each tensor of a graph, and those that read it."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    return makers, readers


def plugin_node(
    rule: PluginRule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    layer: str,
    plugins: Plugins,
    value: int,
) -> Node:
    """Make a node.

    Its attributes are those that FallbackPluginImporter of onnx-tensorrt reads (10.1-GA): it takes
    inputs and outputs of any number and type, and an input of INT32 as a tensor like the others
    unless ``tensorrt_plugin_shape_input_indices`` names it.

    Args:
        rule: of the plugin.
        inputs: names of tensors.
        outputs: names of tensors.
        layer: which the node is for; the node's name begins with it.
        plugins: which kind the engine has, see `edge.bundle.engine_file.EngineInfo`.
        value: of the rule's attribute.
    """
    if plugins == "compiled":
        # `aot` asks for the compiled kind and no other (createPlugin, from 10.13 on).
        own = [attribute("plugin_version", VERSION), attribute("aot", 1)]
    else:
        own = [attribute("plugin_version", PYTHON_VERSION), attribute(rule.attribute, value)]
    attributes = [attribute("plugin_namespace", NAMESPACE), *own]
    name = f"{layer}/{rule.name}"
    return Node(rule.name, list(inputs), list(outputs), name, NAMESPACE, attributes)

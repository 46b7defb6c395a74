"""Makes a plugin's node as the parser's plugin importer reads it, and finds nodes to replace."""

from __future__ import annotations

from collections.abc import Sequence

from edge.backends.tensorrt.launch_rules import NAMESPACE, PluginRule
from edge.backends.tensorrt.plugins import VERSION as PYTHON_VERSION
from edge.bundle.engine_file import Plugins
from edge.bundle.onnx_file import Node, OnnxFile, attribute
from engines.kernels.plugin import VERSION


class MisfitError(Exception):
    """Own kernels cannot compute a part of the graph, and TensorRT keeps it; says why."""


def strange(name: str) -> MisfitError:
    """Make the error for nodes around a tensor that none of our exports makes."""
    return MisfitError(f"the nodes around {name} are not those of this edge-llm's export")


def makers_and_readers(graph: OnnxFile) -> tuple[dict[str, Node], dict[str, list[Node]]]:
    """Map each tensor of a graph to the node that makes it, and to those that read it."""
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
    """Make a plugin's node.

    It has the attributes that FallbackPluginImporter of onnx-tensorrt reads (10.1-GA). That takes
    inputs and outputs of any number and type; an INT32 input is a tensor like the others unless
    ``tensorrt_plugin_shape_input_indices`` names it.

    Args:
        rule: the plugin's rule.
        inputs: names of the input tensors.
        outputs: names of the output tensors.
        layer: layer that the node is for; the node's name begins with it.
        plugins: kind of plugin that the engine has (`edge.bundle.engine_file.EngineInfo`).
        value: value of the rule's attribute.
    """
    if plugins == "compiled":
        # `aot` demands the compiled kind and takes no other (createPlugin, from 10.13 on).
        own = [attribute("plugin_version", VERSION), attribute("aot", 1)]
    else:
        own = [attribute("plugin_version", PYTHON_VERSION), attribute(rule.attribute, value)]
    attributes = [attribute("plugin_namespace", NAMESPACE), *own]
    name = f"{layer}/{rule.name}"
    return Node(rule.name, list(inputs), list(outputs), name, NAMESPACE, attributes)

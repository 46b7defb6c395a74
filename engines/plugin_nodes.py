"""A plugin's node in a graph, as the parser's import of plugins reads it."""

from __future__ import annotations

from collections.abc import Sequence

from edge.backends.tensorrt.launch_rules import NAMESPACE, PluginRule
from edge.backends.tensorrt.plugins import VERSION as PYTHON_VERSION
from edge.bundle.engine_file import Plugins
from edge.bundle.onnx_file import Node, attribute

from .kernels.plugin import VERSION


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

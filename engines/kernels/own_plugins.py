"""The plugins that an engine can have, each with its kernels: what both kinds are made of.

Another one is a rule in `edge.backends.tensorrt.launch_rules` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge.backends.tensorrt.launch_rules import JOIN, PARTS, PRODUCT, PluginRule
from edge.bundle.io_spec import ElementType

from .attention import join_tactics, part_tactics
from .launch import Tactic, w4_tactics
from .variants import HEAD_WIDTHS


@dataclass(frozen=True)
class OwnPlugin:
    """A plugin.

    Attributes:
        rule: what it takes and gives, and how it is launched.
        values: that its attribute may have.
        tactics: its kernels by the value of its attribute. TensorRT's number of one is its place
            plus one.
    """

    rule: PluginRule
    values: tuple[int, ...]
    tactics: Callable[[int], tuple[Tactic, ...]]


OWN_PLUGINS = (
    OwnPlugin(PRODUCT, (1, 2), w4_tactics),
    OwnPlugin(PARTS, HEAD_WIDTHS, part_tactics),
    OwnPlugin(JOIN, HEAD_WIDTHS, join_tactics),
)


def element_types(trt: Any) -> dict[ElementType, Any]:
    """TensorRT's names of what plugins take and give.

    Args:
        trt: the module ``tensorrt``.
    """
    return {"fp16": trt.DataType.HALF, "fp32": trt.DataType.FLOAT, "int32": trt.DataType.INT32}

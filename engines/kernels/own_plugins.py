"""The plugins that an engine can have, each with its kernels: what both kinds are made of.

Another one is a rule in `edge.backends.tensorrt.launch_rules` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge.backends.tensorrt.launch_rules import (
    JOIN,
    PARTS,
    PRODUCT,
    TOP_K_MERGE,
    TOP_K_PARTS,
    PluginRule,
)
from edge.bundle.io_spec import ElementType

from .attention import join_tactics, part_tactics
from .launch import Tactic, w4_tactics
from .top_k import top_k_merge_tactics, top_k_parts_tactics

TACTICS: dict[PluginRule, Callable[[int], tuple[Tactic, ...]]] = {
    PRODUCT: w4_tactics,
    PARTS: part_tactics,
    JOIN: join_tactics,
    TOP_K_PARTS: top_k_parts_tactics,
    TOP_K_MERGE: top_k_merge_tactics,
}
"""The kernels of each plugin by the value of its attribute, which raise ConfigError if there are
none for that. TensorRT's number of a tactic is its place plus one."""


def element_types(trt: Any) -> dict[ElementType, Any]:
    """TensorRT's names of what plugins take and give.

    Args:
        trt: the module ``tensorrt``.
    """
    return {"fp16": trt.DataType.HALF, "fp32": trt.DataType.FLOAT, "int32": trt.DataType.INT32}

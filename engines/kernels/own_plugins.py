"""Lists the plugins that an engine can have with the kernels of each; both kinds are made of them.

To add one, write a rule in `edge.backends.tensorrt.launch_rules` and add a line here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from edge.backends.tensorrt.launch_rules import (
    JOIN,
    PARTS,
    PRODUCT,
    TOP_K_MERGE,
    TOP_K_PARTS,
    PluginRule,
    Shape,
)
from edge.bundle.io_spec import ElementType

from .attention import join_place, join_tactics, part_place, part_tactics
from .launch import Tactic, w4_places, w4_tactics
from .top_k import top_k_merge_tactics, top_k_parts_tactics

TACTICS: dict[PluginRule, Callable[[int], tuple[Tactic, ...]]] = {
    PRODUCT: w4_tactics,
    PARTS: part_tactics,
    JOIN: join_tactics,
    TOP_K_PARTS: top_k_parts_tactics,
    TOP_K_MERGE: top_k_merge_tactics,
}
"""The kernels of each plugin by the value of its attribute. A function raises ConfigError if there
are no kernels for a value. TensorRT numbers a tactic by its place plus one."""
_Shapes = Sequence[Shape]
_PLACES: dict[PluginRule, Callable[[_Shapes, _Shapes], tuple[int, ...]]] = {
    PRODUCT: lambda usual, largest: w4_places(math.prod(usual[0][:-1]), math.prod(largest[0][:-1])),
    PARTS: lambda usual, _: (part_place(usual[0][1] // usual[1][1] * usual[0][2]),),
    JOIN: lambda usual, _: (join_place(math.prod(usual[3][:3])),),
    TOP_K_PARTS: lambda *_: (0,),
    TOP_K_MERGE: lambda *_: (0,),
}


def fitting_tactics(rule: PluginRule, usual: _Shapes, largest: _Shapes) -> tuple[int, ...]:
    """Return the numbers of the one or two tactics worth timing in an optimization profile.

    Every tactic is right for any shapes. But timing them all picks one at random where a launch
    takes as long as the kernel, or where clocks move: the one for 128 rows to do one, or the one
    for one row to do 512.

    Args:
        rule: the plugin's rule.
        usual: input shapes that the profile is tuned for.
        largest: largest input shapes of the profile.
    """
    return tuple(place + 1 for place in _PLACES[rule](usual, largest))


def element_types(trt: Any) -> dict[ElementType, Any]:
    """Map the element types that plugins take and return to TensorRT's.

    Args:
        trt: the module ``tensorrt``.
    """
    return {"fp16": trt.DataType.HALF, "fp32": trt.DataType.FLOAT, "int32": trt.DataType.INT32}

"""Rounds a step's keys and values for an 8-bit cache, and reads them back, in plain ONNX.

TensorRT takes scales per channel for constants only. So `QuantizeLinear` and `DequantizeLinear`
have the scale 1 here, and the real scales are ordinary factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle import io_spec

from .graph_builder import ONNX_TYPE, GraphBuilder


@dataclass(frozen=True)
class KvScales:
    """The scales of a layer's cache.

    Attributes:
        keys, values: float32 ``[kv_heads, head_dim]``, exact in the type of every graph.
        wide: the scale 1 of quantization is FP32 in graphs of 16 bits, too (rule
            ``int8-half-scale``).
    """

    keys: NDArray[np.float32]
    values: NDArray[np.float32]
    wide: bool = False


def key_factor(g: GraphBuilder, layer: int, scales: KvScales) -> str:
    """Add the scales of a layer's keys, ``[kv_heads, 1, head_dim]``."""
    return g.small_floats(io_spec.cache_scale(f"{layer}.key"), scales.keys[:, None])


def value_factor(g: GraphBuilder, layer: int, scales: KvScales) -> str:
    """Add the scales of a layer's values, ``[kv_heads, 1, head_dim]``."""
    return g.small_floats(io_spec.cache_scale(f"{layer}.value"), scales.values[:, None])


def rounded_rows(g: GraphBuilder, rows: str, factor: str, output: str, scales: KvScales) -> str:
    """Round ``[B, kv_heads, S, head_dim]`` to INT8 multiples of ``factor``."""
    steps = g.node("Div", [rows, factor], f"{output}.steps")
    if _is_wide(g, scales):
        steps = g.node("Cast", [steps], f"{output}.steps.wide", to=ONNX_TYPE["fp32"])
    return g.node("QuantizeLinear", [steps, *_grid(g, scales)], output)


def dequantized_rows(g: GraphBuilder, rows: str, scales: KvScales) -> str:
    """Convert rows in INT8 to floats, without multiplying by their scales."""
    integers = g.node("DequantizeLinear", [rows, *_grid(g, scales)], f"{rows}.integers")
    if _is_wide(g, scales):
        integers = g.node("Cast", [integers], f"{integers}.narrow", to=ONNX_TYPE[g.float_type])
    return integers


def _grid(g: GraphBuilder, scales: KvScales) -> list[str]:
    kind = "fp32" if _is_wide(g, scales) else g.float_type
    return [g.scalar("kv_cache.one", 1.0, kind), g.int8_zero("zero_point")]


def _is_wide(g: GraphBuilder, scales: KvScales) -> bool:
    return scales.wide and g.float_type != "fp32"

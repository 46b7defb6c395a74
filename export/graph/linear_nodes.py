"""Adds linear layers to a graph: weights as floats or integers with scales, inputs in INT8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.bundle.io_spec import TensorSpec
from edge.bundle.linears import ROTATION
from edge.bundle.manifest import TensorScheme

from .adapters import adapter_sum
from .block_rotation import hadamard
from .data_file import StoredTensor
from .graph_builder import ONNX_TYPE, GraphBuilder


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer's tensors on disk, as one graph reads them.

    Attributes:
        scheme: how the weight is stored.
        weight: ``[in, out]``; the low one of two planes.
        scale: ``[groups, out]`` or ``[out]`` in the type of ``input_scale``, else in the graph's
            float type; None for float weights.
        bias: ``[out]`` or None.
        input_scale: scalar in the graph's float type or in FP32, for inputs rounded to INT8, or
            None. The input is cast to the type of its scale and back.
        per_token: whether a token's inputs are divided by the largest magnitude among them before
            they are rounded, and its products multiplied with it.
        rotation_block: input channels that are rotated together first (`block_rotation`); 0 for
            none.
        high_weight, high_scale: the high plane, like ``weight`` and ``scale``; None if there are no
            planes.
        offset: ``[groups, out]`` in the graph's float type: factors on the sum of a group's inputs
            (`export.quantize.kept`); None without offsets.
        input_order: the order in which the weight's rows take the input channels; empty if they are
            taken in order.
    """

    scheme: TensorScheme
    weight: StoredTensor
    scale: StoredTensor | None
    bias: StoredTensor | None
    input_scale: StoredTensor | None = None
    per_token: bool = False
    rotation_block: int = 0
    high_weight: StoredTensor | None = None
    high_scale: StoredTensor | None = None
    offset: StoredTensor | None = None
    input_order: tuple[int, ...] = ()


class LinearNodes:
    """Adds linear layers to a graph.

    Args:
        graph: the graph.
        linears: how its layers are stored, by name.

    Attributes:
        adapters: the graph's inputs with A and B of the layers that take adapters, by name.
    """

    def __init__(self, graph: GraphBuilder, linears: Mapping[str, StoredLinear]) -> None:
        self.g = graph
        self.linears = linears
        self.adapters: Mapping[str, tuple[TensorSpec, TensorSpec]] = {}

    def linear(self, x: str, name: str, output: str | None = None) -> str:
        """Add a layer to ``[batch, rows, in]``; return ``[batch, rows, out]``."""
        g, stored = self.g, self.linears[name]
        addends, divisor, adapters = [], None, []
        if name in self.adapters:
            adapters = [adapter_sum(g, x, name, *self.adapters[name])]
        if stored.input_order:
            order = g.constant(f"{name}.input_order", stored.input_order)
            x = g.node("Gather", [x, order], f"{name}.input.ordered", axis=-1)
        if stored.offset is not None:
            groups = stored.offset.dims[0]
            shape = g.constant(f"shape.groups.{groups}", [0, 0, groups, -1])
            grouped = g.node("Reshape", [x, shape], f"{name}.input.grouped")
            axes = g.constant("axes.last", [-1])
            sums = g.node("ReduceSum", [grouped, axes], f"{name}.input.sums", keepdims=0)
            addends.append(
                g.node("MatMul", [sums, g.floats(stored.offset)], f"{name}.offset_product")
            )
        if stored.bias is not None:
            addends.append(g.floats(stored.bias))
        # If it comes before the bias, TensorRT adds it in the kernel that adds bias and residual
        # stream. ONNX Runtime's product takes a bias that follows it directly and must not lose it:
        # the sum would differ in its last bits from that of a graph without adapters.
        addends = [*addends, *adapters] if g.float_type == "fp32" else [*adapters, *addends]
        if stored.rotation_block:
            x = self.rotated(x, stored.rotation_block, f"{name}.input")
        if stored.per_token:
            x, divisor = self.shares(x, f"{name}.input")
        if stored.input_scale is not None:
            # TensorRT's explicit quantization: symmetric, the zero point only states the type.
            grid = [g.external(stored.input_scale), g.int8_zero("zero_point")]
            own, scale = ONNX_TYPE[g.float_type], stored.input_scale.onnx_type
            if scale != own:
                x = g.node("Cast", [x], f"{name}.input.wide", to=scale)
            x = g.node("QuantizeLinear", [x, *grid], f"{name}.input.quantized")
            x = g.node("DequantizeLinear", [x, *grid], f"{name}.input.dequantized")
            if scale != own:
                x = g.node("Cast", [x], f"{name}.input.narrow", to=own)
        if stored.scale is None:
            weight = g.floats(stored.weight)
        else:
            weight = self.dequantized(
                stored.weight, stored.scale, stored.scheme.group_size, f"{name}.dequantized"
            )
            if stored.scale.onnx_type != ONNX_TYPE[g.float_type]:
                weight = g.node("Cast", [weight], f"{name}.narrow", to=ONNX_TYPE[g.float_type])
        if stored.high_weight is not None and stored.high_scale is not None:
            high = self.dequantized(
                stored.high_weight,
                stored.high_scale,
                stored.scheme.group_size,
                f"{name}.high_dequantized",
            )
            addends.insert(0, g.node("MatMul", [x, high], f"{name}.high_product"))
        output = output or f"{name}.out"
        if not addends and divisor is None:
            return g.node("MatMul", [x, weight], output)
        total = g.node("MatMul", [x, weight], f"{name}.product")
        if divisor is not None:
            scaled = f"{name}.product.scaled" if addends else output
            total = g.node("Mul", [total, divisor], scaled)
            if not addends:
                return total
        for addend in addends[:-1]:
            total = g.node("Add", [total, addend], f"{addend}.added")
        return g.node("Add", [total, addends[-1]], output)

    def rotated(self, x: str, block: int, name: str) -> str:
        """Rotate blocks of channels, as `block_rotation` explains."""
        g = self.g
        shape = g.constant(f"shape.blocks.{block}", [0, 0, -1, block])
        x = g.node("Reshape", [x, shape], f"{name}.blocks")
        matrix = g.small_floats(f"{ROTATION}.{block}", hadamard(block))
        x = g.node("MatMul", [x, matrix], f"{name}.blocks.rotated")
        return g.node("Reshape", [x, g.constant("shape.joined", [0, 0, -1])], f"{name}.rotated")

    def shares(self, x: str, name: str) -> tuple[str, str]:
        """Divide each token's values by their largest magnitude; return quotients and divisors."""
        g = self.g
        sizes = g.node("Abs", [x], f"{name}.sizes")
        largest = g.node(
            "ReduceMax", [sizes, g.constant("axes.last", [-1])], f"{name}.largest", keepdims=1
        )
        # FP16 divides by nothing smaller without a loss; smaller values matter in no model.
        divisor = g.node("Max", [largest, g.scalar("least_token", 2.0**-14)], f"{name}.divisor")
        return g.node("Div", [x, divisor], f"{name}.shares"), divisor

    def dequantized(
        self, weight: StoredTensor, scale: StoredTensor, group_size: int, output: str
    ) -> str:
        """Add a weight as floats: a scale per group of rows or, with group size 0, per column."""
        grouping: dict[str, Any] = (
            {"axis": 0, "block_size": group_size} if group_size else {"axis": 1}
        )
        inputs = [self.g.external(weight), self.g.external(scale)]
        if not group_size:
            # Without it ONNX Runtime 1.23 aborts in its exact mode. That mode replaces it, so each
            # weight has a zero point of its own.
            zeros = np.zeros(scale.dims[0], np.int8)
            inputs.append(self.g.constant(f"{output}.zero_point", zeros))
        return self.g.node("DequantizeLinear", inputs, output, **grouping)

"""Reads a graph for the rules: which node makes a tensor, its type, its rank, its values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.tensorrt.launch_rules import NAMESPACE
from edge.bundle.onnx_file import ELEMENT_TYPES, Node, OnnxFile, ValueInfo
from edge.bundle.onnx_values import Constant, Constants, node_attributes
from edge.errors import BundleError

QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_COMPARISONS = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not")
_ELEMENTWISE = (*_COMPARISONS, "Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Pow", "Xor")
_SAME_RANK = (
    *("Cast", *QUANTIZING, "Softmax", "Sigmoid", "Sqrt", "Slice", "Split", "LayerNormalization"),
    *("Concat", "Transpose", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Attention"),
    "w4_linear",  # our plugin (edge.backends.tensorrt.launch_rules)
    *("Identity", "Abs", "Neg", "Reciprocal", "Swish", "Tanh", "Exp", "Log", "Erf", "TopK"),
)
# Their output has the type of their first input.
_FIRST_INPUTS_TYPE = (
    *(*_ELEMENTWISE, *_SAME_RANK),
    *("MatMul", "Gemm", "Reshape", "Unsqueeze", "Squeeze", "Gather", "GatherND", "ReduceMean"),
    *("ReduceSum", "ReduceMax", "Expand", "Tile", "Pad", "ScatterND"),
)
# Our plugins of attention: type and rank of their outputs.
_OWN_ATTENTION = {"attention_parts": ("fp32", 2), "attention_join": ("fp16", 3)}
# Our plugins of the best logits: types of their outputs, and by how much an output's rank exceeds
# that of the first input.
_OWN_TOP_K = {
    "top_k_parts": (("int32", "fp32"), 1),
    "top_k_merge": (("fp16", "int32", "fp32"), -1),
}
_COUNTS = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")


def _all_usable(values: NDArray[Any]) -> bool:
    """Whether all values are positive and finite; FP16 by its bits, in one pass."""
    if values.dtype == np.float16:
        return bool((values.view(np.uint16) - np.uint16(1) < np.uint16(0x7BFF)).all())
    return bool((np.isfinite(values) & (values > 0)).all())


@dataclass(frozen=True)
class FactNode:
    """A node with its attributes as values and a readable name."""

    node: Node
    attributes: dict[str, Any]

    @property
    def name(self) -> str:
        """The node's name, or that of its first output if it has none."""
        return self.node.name or (self.node.outputs[0] if self.node.outputs else "without a name")

    @property
    def op_type(self) -> str:
        """The operator."""
        return self.node.op_type

    @property
    def plugin(self) -> str:
        """Name of our plugin that the node is; empty if it is none."""
        return self.op_type if self.node.domain == NAMESPACE else ""

    def input(self, index: int) -> str:
        """Name the tensor of an input; empty if the input is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else ""


@dataclass(frozen=True)
class QuantNode:
    """A ``QuantizeLinear`` or ``DequantizeLinear``.

    Attributes:
        dtype: type of the quantized side; None if unknown.
        data_shape: shape of quantized data that are constant; None elsewhere.
        scale_shape: shape of a constant scale; None elsewhere.
        blocked: whether the scale has a number for each block of weights.
    """

    node: FactNode
    dtype: str | None
    data: str
    scale: str
    zero_point: str
    data_shape: tuple[int, ...] | None
    scale_shape: tuple[int, ...] | None
    blocked: bool

    @property
    def dequantizes(self) -> bool:
        """Whether it turns the quantized type into floats."""
        return self.node.op_type == "DequantizeLinear"

    @property
    def axis(self) -> int:
        """The attribute ``axis``; ONNX's default is 1."""
        axis = self.node.attributes.get("axis", 1)
        return axis if isinstance(axis, int) else 1

    @property
    def block_size(self) -> int | None:
        """Weights per block, by the attribute, else by the shapes; None if unknown."""
        size = self.node.attributes.get("block_size")
        if isinstance(size, int) and size:
            return size
        if self.data_shape and self.scale_shape and len(self.data_shape) == len(self.scale_shape):
            for whole, blocks in zip(self.data_shape, self.scale_shape, strict=True):
                if blocks and whole != blocks:
                    return whole // blocks
        return None


class GraphFacts:
    """Types, ranks and constants of a graph, as far as they are known.

    Args:
        graph: the graph.
        directory: directory of the graph's file and its weights.

    Raises:
        BundleError: the graph is not valid: two nodes make one tensor, or a node reads a tensor
            before any node makes it, as in a cycle.
    """

    def __init__(self, graph: OnnxFile, directory: Path | None = None) -> None:
        self.opset = graph.opsets.get("", 0)
        self.inputs = {info.name: info for info in graph.inputs}
        self.outputs = {info.name: info for info in graph.outputs}
        self.constants = Constants(graph, directory)
        self.nodes = [FactNode(node, node_attributes(node)) for node in graph.nodes]
        self._types: dict[str, str | None] = {}
        self._ranks: dict[str, int | None] = {}
        self._scale_faults: dict[str, str | None] = {}
        known = {"", *self.inputs, *self.constants.initializers}
        for node in self.nodes:
            self._add(node, known)

    def _add(self, node: FactNode, known: set[str]) -> None:
        for name in node.node.inputs:
            if name not in known:
                raise BundleError(
                    f"not a valid graph: {node.name} reads {name!r} before anything makes it"
                )
        for name in node.node.outputs:
            if name and name in known:
                raise BundleError(f"not a valid graph: {name!r} is made twice, by {node.name} too")
            known.add(name)
        dtype, rank = self._type_of(node), self._rank_of(node)
        own, _ = _OWN_TOP_K.get(node.plugin, ((), 0))
        outputs = len(node.node.outputs)
        types = own if len(own) == outputs else (dtype,) * outputs
        for name, kind in zip(node.node.outputs, types, strict=True):
            self._types[name], self._ranks[name] = kind, rank

    def dtype(self, name: str) -> str | None:
        """Return the element type of a tensor; None if unknown."""
        if name in self.inputs:
            return self.inputs[name].dtype
        constant = self.constants.get(name)
        return constant.dtype if constant is not None else self._types.get(name)

    def rank(self, name: str) -> int | None:
        """Return the number of dimensions of a tensor; None if unknown."""
        if name in self.inputs:
            return len(self.inputs[name].shape)
        constant = self.constants.get(name)
        return len(constant.shape) if constant is not None else self._ranks.get(name)

    def constant(self, name: str) -> Constant | None:
        """Return a constant; None if a node makes the tensor."""
        return self.constants.get(name)

    def scale_fault(self, name: str) -> str | None:
        """Say what is wrong with the values of a constant scale; None if nothing, or unknown."""
        if name not in self._scale_faults:
            self._scale_faults[name] = self._find_scale_fault(name)
        return self._scale_faults[name]

    def _find_scale_fault(self, name: str) -> str | None:
        constant = self.constants.get(name)
        if constant is None or constant.dtype not in ("fp32", "fp16", "bf16"):
            return None
        values = self.constants.values(name)
        if values is None or _all_usable(values):
            return None
        for fault, where in (
            ("not a number", np.isnan(values)),
            ("infinite", np.isinf(values)),
            ("negative", values < 0),
            ("zero", values == 0),
        ):
            if where.any():
                at = int(np.argmax(where))
                return f"{int(where.sum())} of {values.size} are {fault}, the first at {at}"
        return None

    def all_zero(self, name: str) -> bool | None:
        """Whether a constant is all zeros; None if it cannot be read as numbers."""
        constant = self.constants.get(name)
        if constant is None:
            return None
        if constant.raw is not None:
            return not any(constant.raw)
        values = self.constants.values(name)
        return None if values is None else not values.any()

    @cached_property
    def quant_nodes(self) -> list[QuantNode]:
        """List every node that quantizes or dequantizes, in the graph's order."""
        return [self._quant_node(node) for node in self.nodes if node.op_type in QUANTIZING]

    def weight_only_products(self, types: tuple[str, ...]) -> Iterator[tuple[FactNode, QuantNode]]:
        """Find products of a block-free weight in one of these types with an input in none.

        Args:
            types: quantized types.

        Yields:
            The product and the node that dequantizes its weight.
        """
        weights: dict[str, QuantNode] = {}
        inputs: set[str] = set()
        for quant in self.quant_nodes:
            if not quant.dequantizes or quant.blocked or quant.dtype not in types:
                continue
            if quant.data_shape is None:
                inputs.update(quant.node.node.outputs)
            else:
                weights.update(dict.fromkeys(quant.node.node.outputs, quant))
        for node in self.nodes:
            left, right = node.input(0), node.input(1)
            if node.op_type == "Cast":
                if left in weights:
                    weights.update(dict.fromkeys(node.node.outputs, weights[left]))
                inputs.update(node.node.outputs if left in inputs else ())
            if node.op_type == "MatMul" and right in weights and left not in inputs:
                yield node, weights[right]

    def _quant_node(self, node: FactNode) -> QuantNode:
        data, scale, zero = node.input(0), node.input(1), node.input(2)
        if node.op_type == "DequantizeLinear":
            dtype = self.dtype(data)
        else:
            dtype = self._quantized_type(node)
        data_rank, scale_rank = self.rank(data), self.rank(scale)
        whole, scales = self.constant(data), self.constant(scale)
        has_blocks = node.attributes.get("block_size") not in (None, 0)
        has_matrix = scale_rank is not None and scale_rank > 1
        return QuantNode(
            node,
            dtype,
            data,
            scale,
            zero,
            whole.shape if whole is not None else None,
            scales.shape if scales is not None else None,
            has_blocks or (has_matrix and (data_rank is None or data_rank == scale_rank)),
        )

    def _quantized_type(self, node: FactNode) -> str | None:
        """Return the output type of a ``QuantizeLinear``; ONNX's default is UINT8."""
        if node.input(2):
            return self.dtype(node.input(2))
        stated = node.attributes.get("output_dtype", 0)
        return ELEMENT_TYPES.get(stated) if stated else "uint8"

    def _type_of(self, node: FactNode) -> str | None:
        kind = node.op_type
        if kind in _COMPARISONS:
            return "bool"
        if kind in _COUNTS:
            return "int64"
        if kind == "Cast":
            return ELEMENT_TYPES.get(node.attributes.get("to", 0))
        if kind == "QuantizeLinear":
            return self._quantized_type(node)
        if kind == "DequantizeLinear":
            stated = node.attributes.get("output_dtype", 0)
            return ELEMENT_TYPES.get(stated) if stated else self.dtype(node.input(1))
        if kind == "Where":
            return self.dtype(node.input(1))
        if node.plugin in _OWN_ATTENTION:
            return _OWN_ATTENTION[kind][0]
        return self.dtype(node.input(0)) if kind in _FIRST_INPUTS_TYPE else None

    def _rank_of(self, node: FactNode) -> int | None:
        kind = node.op_type
        if kind in _ELEMENTWISE:
            ranks = [self.rank(name) for name in node.node.inputs]
            known = [rank for rank in ranks if rank is not None]
            return max(known) if known and len(known) == len(ranks) else None
        if kind in _SAME_RANK:
            return self.rank(node.input(0))
        if kind == "MatMul":
            left, right = self.rank(node.input(0)), self.rank(node.input(1))
            return max(left, right) if left and right and min(left, right) > 1 else None
        if node.plugin in _OWN_ATTENTION:
            return _OWN_ATTENTION[kind][1]
        if node.plugin in _OWN_TOP_K:
            rank = self.rank(node.input(0))
            return None if rank is None else rank + _OWN_TOP_K[kind][1]
        if kind == "Shape":
            return 1
        if kind == "Reshape":
            shape = self.constant(node.input(1))
            return shape.shape[0] if shape is not None and len(shape.shape) == 1 else None
        if kind in ("Unsqueeze", "Squeeze"):
            rank, axes = self.rank(node.input(0)), self.constant(node.input(1))
            if rank is None or axes is None:
                return None
            return rank + axes.volume if kind == "Unsqueeze" else rank - axes.volume
        if kind == "Gather":
            rank, index = self.rank(node.input(0)), self.rank(node.input(1))
            return None if rank is None or index is None else rank + index - 1
        return None

    def infos(self) -> Iterator[tuple[str, ValueInfo]]:
        """Yield inputs and outputs, each with ``input`` or ``output``."""
        for info in self.inputs.values():
            yield "input", info
        for info in self.outputs.values():
            yield "output", info

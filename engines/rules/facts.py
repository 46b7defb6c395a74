"""A graph as the rules look at it: who makes a tensor, its type, its rank, its values."""

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
# Our plugins of attention: type and rank of what they put out.
_OWN_ATTENTION = {"attention_parts": ("fp32", 2), "attention_join": ("fp16", 3)}
# Our plugins of the best logits: types of what they put out, and by how much its rank is above that
# of their first input.
_OWN_TOP_K = {
    "top_k_parts": (("int32", "fp32"), 1),
    "top_k_merge": (("fp16", "int32", "fp32"), -1),
}
_COUNTS = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")


def _all_usable(values: NDArray[Any]) -> bool:
    """Whether all are above zero and finite; FP16 by its bits, in one pass."""
    if values.dtype == np.float16:
        return bool((values.view(np.uint16) - np.uint16(1) < np.uint16(0x7BFF)).all())
    return bool((np.isfinite(values) & (values > 0)).all())


@dataclass(frozen=True)
class FactNode:
    """A node with its attributes as values, and a name that people know it by."""

    node: Node
    attributes: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name, else that of its first output."""
        return self.node.name or (self.node.outputs[0] if self.node.outputs else "without a name")

    @property
    def op_type(self) -> str:
        """The operator."""
        return self.node.op_type

    @property
    def plugin(self) -> str:
        """Which of our plugins it is; an empty string if it is none."""
        return self.op_type if self.node.domain == NAMESPACE else ""

    def input(self, index: int) -> str:
        """An input's tensor, or an empty string where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else ""


@dataclass(frozen=True)
class QuantNode:
    """A ``QuantizeLinear`` or ``DequantizeLinear``.

    Attributes:
        dtype: of the quantized side; None if unknown.
        data_shape: of a constant; None elsewhere.
        scale_shape: likewise, of the scale.
        blocked: whether the scale has a number per block of weights.
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
        """Whether it goes from the quantized type to floats."""
        return self.node.op_type == "DequantizeLinear"

    @property
    def axis(self) -> int:
        """The attribute, which ONNX has as 1 where it is left out."""
        axis = self.node.attributes.get("axis", 1)
        return axis if isinstance(axis, int) else 1

    @property
    def block_size(self) -> int | None:
        """Weights per block, by the attribute or else by the shapes; None if unknown."""
        size = self.node.attributes.get("block_size")
        if isinstance(size, int) and size:
            return size
        if self.data_shape and self.scale_shape and len(self.data_shape) == len(self.scale_shape):
            for whole, blocks in zip(self.data_shape, self.scale_shape, strict=True):
                if blocks and whole != blocks:
                    return whole // blocks
        return None


class GraphFacts:
    """What is known of a graph.

    Args:
        graph: the graph.
        directory: of the graph's file, where its weights are.

    Raises:
        BundleError: no valid graph: a tensor that two nodes make, or that a node reads before
            anything makes it, as in a circle.
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
        """Element type of a tensor; None if unknown."""
        if name in self.inputs:
            return self.inputs[name].dtype
        constant = self.constants.get(name)
        return constant.dtype if constant is not None else self._types.get(name)

    def rank(self, name: str) -> int | None:
        """Number of dimensions of a tensor; None if unknown."""
        if name in self.inputs:
            return len(self.inputs[name].shape)
        constant = self.constants.get(name)
        return len(constant.shape) if constant is not None else self._ranks.get(name)

    def constant(self, name: str) -> Constant | None:
        """A constant; None if something makes the tensor."""
        return self.constants.get(name)

    def scale_fault(self, name: str) -> str | None:
        """What is wrong with the values of a constant scale; None if nothing, or unknown."""
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
        """Whether a constant holds zeros only; None if it cannot be read as numbers."""
        constant = self.constants.get(name)
        if constant is None:
            return None
        if constant.raw is not None:
            return not any(constant.raw)
        values = self.constants.values(name)
        return None if values is None else not values.any()

    @cached_property
    def quant_nodes(self) -> list[QuantNode]:
        """Every node that quantizes or dequantizes, in the graph's order."""
        return [self._quant_node(node) for node in self.nodes if node.op_type in QUANTIZING]

    def weight_only_products(self, types: tuple[str, ...]) -> Iterator[tuple[FactNode, QuantNode]]:
        """Every product of a weight in one of these types, without blocks, and an input in none.

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
        """The output type of a ``QuantizeLinear``, by ONNX: UINT8 where nothing states another."""
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
        """Inputs and outputs, each with ``input`` or ``output``."""
        for info in self.inputs.values():
            yield "input", info
        for info in self.outputs.values():
            yield "output", info

"""A stand-in for the network of ``tensorrt``: an ONNX graph, which the product may edit.

It has the layers that the product looks at and edits, no others, and types as the product's own
table has them (`engines.rules.facts`). That a network is built proves neither that TensorRT infers
the same types nor that it finds a kernel for each layer.
"""

from __future__ import annotations

import enum
import math
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge.bundle.engine_file import Flavour
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Message, Node, OnnxFile, attribute
from edge.bundle.onnx_values import read_constant
from engines.compiler.support import parse_release
from engines.rules.check import Finding
from engines.rules.facts import GraphFacts
from engines.rules.table import Version, version_of

from .cuda import RuleError

Release = tuple[int, int]
Shape = tuple[int, ...]
NAMES = (
    *("NetworkDefinitionCreationFlag", "MemoryPoolType", "ProfilingVerbosity", "LayerType"),
    *("ErrorCode", "IProgressMonitor", "ElementWiseOperation"),
)
"""What a module of every version has of these."""


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4, FP4 = range(11)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class FirstLogger:
    """The first that TensorRT was given, which it calls until no builder and no runtime is left.

    It does not keep it alive (NVIDIA/TensorRT#1475, #4134); the bindings keep each as long as what
    it was given to.
    """

    def __init__(self) -> None:
        self._first: Callable[[], ILogger | None] = lambda: None
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def give(self, user: Any, logger: ILogger) -> None:
        if not self._users:
            self._first = weakref.ref(logger)
        self._users.add(user)
        user.given = logger
        self.log(Severity.VERBOSE, f"a new {type(user).__name__}")

    def log(self, severity: Severity, msg: str) -> None:
        first = self._first()
        if first is None:
            raise RuleError("TensorRT calls a logger that Python has freed")
        first.log(severity, msg)


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class ErrorCode(enum.Enum):
    SUCCESS = 0
    MODEL_DESERIALIZE_FAILED = 3
    INVALID_NODE = 6
    UNSUPPORTED_NODE = 8


class ElementWiseOperation(enum.Enum):
    SUM, PROD = range(2)


class AttentionNormalizationOp(enum.Enum):
    NONE, SOFTMAX = range(2)


class CausalMaskKind(enum.Enum):
    NONE, UPPER_LEFT, LOWER_RIGHT = range(3)


_OPERATORS = {
    "MATRIX_MULTIPLY": "MatMul",
    "DEQUANTIZE": "DequantizeLinear",
    "QUANTIZE": "QuantizeLinear",
    "ELEMENTWISE": "Add Sub Mul Div Pow Max Less LessOrEqual Greater GreaterOrEqual Equal And Or",
    "CAST": "Cast",
    "SLICE": "Slice Split",
    "CONCATENATION": "Concat",
    "GATHER": "Gather GatherND",
    "SHAPE": "Shape",
    "REDUCE": "ReduceMean ReduceSum ReduceMax",
    "UNARY": "Abs Sqrt Neg Reciprocal Not Exp Log",
    "TOPK": "TopK",
    "ACTIVATION": "Sigmoid Tanh",
    "SOFTMAX": "Softmax",
    "SHUFFLE": "Reshape Transpose Unsqueeze Squeeze Expand",
    "SELECT": "Where",
    "IDENTITY": "Identity",
    "NORMALIZATION": "RMSNormalization LayerNormalization",
    "ROTARY_EMBEDDING": "RotaryEmbedding",
    "KV_CACHE_UPDATE": "TensorScatter",
}
LayerType = enum.Enum(  # type: ignore[misc]
    "LayerType", ["CONSTANT", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "PLUGIN_V3", *_OPERATORS]
)
_KINDS = {op: LayerType[kind] for kind, ops in _OPERATORS.items() for op in ops.split()}
DTYPES = {
    "fp32": DataType.FLOAT,
    "fp16": DataType.HALF,
    **{each.name.lower(): each for each in DataType if each.name not in ("FLOAT", "HALF")},
}
_ONNX_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planted:
    """What a stand-in does otherwise than a good TensorRT.

    Attributes:
        no_fused: why no kernel does an attention at once; None: one does.
        unpacks: linear layers whose weights each step writes as floats.
        scratch_bytes: of every profile, instead of what the graph needs.
    """

    no_fused: str | None = None
    unpacks: tuple[str, ...] = ()
    scratch_bytes: int | None = None


@dataclass(frozen=True)
class Pretended:
    """The TensorRT and the GPU that a stand-in stands for."""

    version: str = "10.16.2.10"
    flavour: Flavour = "tensorrt"
    compute_capability: str = "8.7"
    planted: Planted = field(default_factory=Planted)
    logger: FirstLogger = field(default_factory=FirstLogger)

    @property
    def release(self) -> Release:
        """RTX has what TensorRT 11 has."""
        return (11, 0) if self.flavour == "tensorrt-rtx" else parse_release(self.version)

    @property
    def column(self) -> Version:
        return version_of(self.flavour, parse_release(self.version))


class Tensor:
    """``ITensor``."""

    def __init__(self, network: Network, name: str) -> None:
        self._network, self.name = network, name

    @property
    def dtype(self) -> DataType:
        return DTYPES[self._network.types[self.name]]

    @property
    def shape(self) -> Shape:
        found = self._network.shapes.get(self.name)
        if found is None:
            raise ValueError("its rank is not known")
        return found


class Layer:
    """``ILayer``; ``inputs`` is a node's own list, so that an edit reaches the graph."""

    _attention: Attention | None = None

    def __init__(
        self, network: Network, kind: Any, name: str, inputs: list[str], outputs: list[str]
    ) -> None:
        self._network, self.type, self.name = network, kind, name
        self._inputs, self._outputs = inputs, outputs

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> Tensor | None:
        return Tensor(self._network, self._inputs[index]) if self._inputs[index] else None

    def get_output(self, index: int) -> Tensor:
        return Tensor(self._network, self._outputs[index])

    def set_input(self, index: int, tensor: Tensor) -> None:
        self._inputs[index] = tensor.name


class AttentionOutputLayer(Layer):
    """``IAttentionOutputLayer``."""

    @property
    def attention(self) -> Attention:
        assert self._attention is not None
        return self._attention


class Attention:
    """``IAttention`` of TensorRT 10: products without a scale, one mask."""

    causal = False
    decomposable = False

    def __init__(self, network: Network, node: Node) -> None:
        self._network, self._node = network, node

    @property
    def name(self) -> str:
        return self._node.name

    @name.setter
    def name(self, name: str) -> None:
        self._node.name = name

    @property
    def mask(self) -> Tensor | None:
        return Tensor(self._network, self._node.inputs[3]) if self._node.inputs[3:] else None

    def get_input(self, index: int) -> Tensor:
        return Tensor(self._network, self._node.inputs[index])

    def get_output(self, index: int) -> Tensor:
        return Tensor(self._network, self._node.outputs[index])


class Attention11(Attention):
    """``IAttention`` of TensorRT 11."""

    def __init__(
        self, network: Network, node: Node, causal_kind: CausalMaskKind = CausalMaskKind.NONE
    ) -> None:
        super().__init__(network, node)
        self.causal_kind = causal_kind
        self.key_value_lengths: Tensor | None = None

    @property
    def causal(self) -> bool:  # type: ignore[override]
        raise AttributeError("causal: TensorRT 11 has causal_kind")


class Network:
    """``INetworkDefinition``."""

    def __init__(self, pretended: Pretended) -> None:
        self.pretended = pretended
        self.graph: OnnxFile | None = None
        self.directory: Path | None = None
        self.refused: list[Finding] = []  # by the builder, once it is asked
        self.types: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self.attentions: list[Attention] = []
        self.plugins: dict[str, Any] = {}  # of Python, by their nodes
        self._layers: list[Layer] = []

    def _take(self, graph: OnnxFile, facts: GraphFacts, directory: Path | None) -> None:
        """Become a parsed graph."""
        self.graph, self.directory = graph, directory
        for info in [*graph.inputs, *graph.outputs]:
            self.types[info.name] = info.dtype
            self.shapes[info.name] = tuple(d if isinstance(d, int) else -1 for d in info.shape)
        used = {name for node in graph.nodes for name in node.inputs}
        for constant in map(read_constant, graph.initializers):
            self.types[constant.name] = constant.dtype
            self.shapes[constant.name] = constant.shape
            if constant.name in used:
                self._add(LayerType["CONSTANT"], constant.name, [], [constant.name])
        old, graph.nodes = graph.nodes, []
        for node in old:
            for name in node.outputs:
                self.types.setdefault(name, facts.dtype(name) or "int64")
                rank = facts.rank(name)
                if rank is not None:
                    self.shapes.setdefault(name, (-1,) * rank)
            if node.op_type == "Attention":
                self._take_attention(node)
            else:
                graph.nodes.append(node)
                kind = LayerType["PLUGIN_V3"] if node.domain else _KINDS.get(node.op_type)
                if kind is None:
                    raise RuleError(f"the stand-in has no layer for {node.op_type}")
                self._add(kind, node.name or node.outputs[0], node.inputs, node.outputs)

    def _take_attention(self, node: Node) -> None:
        """As the parser: half of the scale on the queries, half on the keys."""
        scales = [a for a in node.attributes if Message.parse(a).text(1) == "scale"]
        for each in scales:
            (number,) = (value for n, _, value in Message.parse(each).fields if n == 2)
            assert isinstance(number, bytes)
            factor = self._factor(node, math.sqrt(struct.unpack("<f", number)[0]))
            for place in (0, 1):
                tensor = Tensor(self, node.inputs[place])
                scaled = self.add_elementwise(tensor, factor, ElementWiseOperation.PROD)
                node.inputs[place] = scaled.get_output(0).name
            node.attributes = [a for a in node.attributes if a != each] + [attribute("scale", 1.0)]
        version_11 = self.pretended.release >= (11, 0)
        self._attend(node, (Attention11 if version_11 else Attention)(self, node))

    def _factor(self, node: Node, value: float) -> Tensor:
        name, dtype = f"{node.outputs[0]}.factor", self.types[node.inputs[0]]
        single = np.float32(value)
        raw = {
            "fp16": np.float16(value).tobytes(),
            "bf16": single.tobytes()[2:],
            "fp32": single.tobytes(),
        }[dtype]
        self._constant(name, dtype, (1, 1, 1, 1), raw)
        return Tensor(self, name)

    def _constant(self, name: str, dtype: str, shape: Shape, raw: bytes) -> None:
        assert self.graph is not None
        tensor = Message()
        for size in shape:
            tensor.add(1, size)
        tensor.add(2, ELEMENT_NUMBERS[dtype]).add(8, name).add(9, raw)
        self.graph.proto.add(5, tensor)
        self.types[name], self.shapes[name] = dtype, shape
        self._add(LayerType["CONSTANT"], name, [], [name])

    def _attend(self, node: Node, attention: Attention) -> None:
        assert self.graph is not None
        self.graph.nodes.append(node)
        between = f"{node.name}_AttentionInput_output"
        self.types[between] = self.types[node.inputs[0]]
        kind = LayerType["ATTENTION_INPUT"]
        self._add(kind, f"{node.name}_AttentionInput", node.inputs, [between])
        kind = LayerType["ATTENTION_OUTPUT"]
        last = self._add(kind, f"{node.name}_AttentionOutput", [between], node.outputs)
        last._attention = attention
        self.attentions.append(attention)

    def _add(self, kind: Any, name: str, inputs: list[str], outputs: list[str]) -> Layer:
        self._layers.append(Layer(self, kind, name, inputs, outputs))
        return self._layers[-1]

    def _insert(self, op: str, inputs: list[str], dtype: str, *attributes: bytes) -> Layer:
        """A node of the product's."""
        assert self.graph is not None
        name = f"(Unnamed Layer* {len(self._layers)}) [{op}]"
        node = Node(op, inputs, [f"{name}_output"], name, attributes=list(attributes))
        self.graph.nodes.append(node)
        self.types[node.outputs[0]] = dtype
        return self._add(_KINDS[op], name, node.inputs, node.outputs)

    # What the product asks and edits

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]

    @property
    def num_inputs(self) -> int:
        assert self.graph is not None
        return len(self.graph.inputs)

    def get_input(self, index: int) -> Tensor:
        assert self.graph is not None
        return Tensor(self, self.graph.inputs[index].name)

    @property
    def num_outputs(self) -> int:
        assert self.graph is not None
        return len(self.graph.outputs)

    def get_output(self, index: int) -> Tensor:
        assert self.graph is not None
        return Tensor(self, self.graph.outputs[index].name)

    def add_shape(self, input: Tensor) -> Layer:
        return self._insert("Shape", [input.name], "int64")

    def add_slice(self, input: Tensor, start: Shape, shape: Shape, stride: Shape) -> Layer:
        assert len(start) == 1
        ends = (start[0] + shape[0] * stride[0],)
        names = [input.name]
        for what, numbers in (("start", start), ("end", ends), ("axis", (0,)), ("step", stride)):
            name = f"slice.{len(self._layers)}.{what}"
            self._constant(name, "int64", (1,), struct.pack("<q", *numbers))
            names.append(name)
        return self._insert("Slice", names, self.types[input.name])

    def add_elementwise(self, input1: Tensor, input2: Tensor, op: ElementWiseOperation) -> Layer:
        kind = {ElementWiseOperation.SUM: "Add", ElementWiseOperation.PROD: "Mul"}[op]
        return self._insert(kind, [input1.name, input2.name], self.types[input1.name])

    def add_cast(self, input: Tensor, to_type: DataType) -> Layer:
        dtype = _ONNX_NAMES[to_type]
        to = attribute("to", ELEMENT_NUMBERS[dtype])
        return self._insert("Cast", [input.name], dtype, to)

    def add_attention_v2(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        norm_op: AttentionNormalizationOp,
        causal_kind: CausalMaskKind,
    ) -> Attention11:
        assert norm_op is AttentionNormalizationOp.SOFTMAX
        name = f"(Unnamed Layer* {len(self._layers)}) [Attention]"
        inputs = [query.name, key.name, value.name]
        plain = [attribute("scale", 1.0)]
        node = Node("Attention", inputs, [f"{name}_output"], name, attributes=plain)
        self.types[node.outputs[0]] = self.types[query.name]
        attention = Attention11(self, node, causal_kind)
        self._attend(node, attention)
        return attention

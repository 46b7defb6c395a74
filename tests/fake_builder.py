"""A stand-in for the builder and the ONNX parser of ``tensorrt``.

It takes a graph by the project's own table (`engines.rules`), for the version that it stands for:
what is illegal there is refused here, by the parser or by the builder as the rule's source has it,
whether or not the product asked the table first. What TensorRT takes and answers wrong is a
`RuleError`. A network is the ONNX graph, which the product may edit; a plan holds the graph with
its weights, so it runs wherever the bundle has gone.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge.bundle.engine_file import Flavour
from edge.bundle.manifest import MANIFEST_NAME
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Message, Node, OnnxFile, attribute
from edge.bundle.onnx_values import Constant, Constants, node_attributes, read_constant
from edge.errors import BundleError
from engines.compat import parse_release
from engines.kernels.layout import unpack_weights
from engines.rules.check import Finding, check_facts
from engines.rules.facts import GraphFacts
from engines.rules.table import RULES, Version, version_of
from tests import fake_plugin_v3
from tests.fake_cuda import RuleError
from tests.fake_plugin import PLUGINS, TensorDesc

Release = tuple[int, int]
Shape = tuple[int, ...]
PLAN_MAGIC = b"FAKE PLAN "
_ALIGNMENT = 256
NAMES = (
    *("NetworkDefinitionCreationFlag", "MemoryPoolType", "ProfilingVerbosity", "LayerType"),
    *("ErrorCode", "IProgressMonitor", "ElementWiseOperation", "OnnxParser"),
)
"""What a module of every version has."""


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4, FP4 = range(11)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


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
    "ELEMENTWISE": "Add Sub Mul Div Pow Less LessOrEqual Greater GreaterOrEqual Equal And Or",
    "CAST": "Cast",
    "SLICE": "Slice Split",
    "CONCATENATION": "Concat",
    "GATHER": "Gather GatherND",
    "SHAPE": "Shape",
    "REDUCE": "ReduceMean ReduceSum ReduceMax",
    "UNARY": "Sqrt Neg Reciprocal Not Exp Log",
    "TOPK": "TopK",
    "ACTIVATION": "Sigmoid Tanh",
    "SOFTMAX": "Softmax",
    "SHUFFLE": "Reshape Transpose Unsqueeze Squeeze Expand",
    "SELECT": "Where",
    "IDENTITY": "Identity",
    "NORMALIZATION": "RMSNormalization",
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
# Operands whose values say how large a tensor is.
_SHAPE_OPERANDS = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "TopK": (1,),
    "Slice": (1, 2, 3, 4), "Range": (0, 1, 2), "Pad": (1,), "Split": (1,),
}  # fmt: skip
# Operators of one type, in a strongly typed network.
_ONE_TYPE = ("MatMul", "Add", "Sub", "Mul", "Div", "Less", "LessOrEqual", "Greater", "Equal")
# Rules whose breach gives no error and wrong answers, and what this stand-in cannot compute.
SILENT_RULES = {"attention-causal", "subgraph"}
_OF_THE_PARSER = ("onnxOpImporters.cpp", "operators.md", "elease notes", "Changelog.md")


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
        self.graph._graph.add(5, tensor)
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


class ParserError:
    """``ParserError``."""

    def __init__(self, node: str, operator: str, desc: str, code: ErrorCode, line: int) -> None:
        self._values = node, operator, desc, code, line

    def node_name(self) -> str:
        return self._values[0]

    def node_operator(self) -> str:
        return self._values[1]

    def desc(self) -> str:
        return self._values[2]

    def code(self) -> ErrorCode:
        return self._values[3]

    def file(self) -> str:
        return "onnxOpImporters.cpp"

    def line(self) -> int:
        return self._values[4]


class OnnxParser:
    """``OnnxParser``."""

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        directory = Path(path).parent if path else None
        try:
            graph = OnnxFile(model)
            facts = GraphFacts(graph, directory)
            for each in map(read_constant, graph.initializers):
                file = (directory or Path()) / (each.location or "")
                if each.location is None:
                    continue
                if not file.is_file() or file.stat().st_size < each.offset + each.num_bytes:
                    raise BundleError(f"Failed to open file {file} for {each.name}")
            verdict = check_facts(facts, self._network.pretended.column)
        except BundleError as error:
            code = ErrorCode.MODEL_DESERIALIZE_FAILED
            return self._refuse(ParserError("", "", str(error), code, 0))
        plugins = set(self._find_plugins(graph))
        if self._errors:
            return False
        operators = {node.name: node.op_type for node in facts.nodes}
        lines = {rule.name: line for line, rule in enumerate(RULES, 1)}
        for finding in verdict.refusals:
            if finding.rule == "domain" and plugins.issuperset(finding.nodes):
                continue
            lost = "nonpad_kv_seqlen" in finding.found and "past" not in finding.found
            if finding.rule in SILENT_RULES or lost:
                raise RuleError(f"TensorRT would take this and answer wrong: {finding}")
            if not any(source in finding.source for source in _OF_THE_PARSER):
                self._network.refused.append(finding)
                continue
            node = finding.nodes[0]
            unknown = finding.rule in ("operators", "domain", "opset")
            code = ErrorCode.UNSUPPORTED_NODE if unknown else ErrorCode.INVALID_NODE
            self._refuse(
                ParserError(node, operators.get(node, ""), str(finding), code, lines[finding.rule])
            )
        if self._errors:
            return False
        self._network._take(graph, facts, directory)
        return True

    def _find_plugins(self, graph: OnnxFile) -> Iterator[str]:
        """Names of nodes that are plugins, as FallbackPluginImporter in onnx-tensorrt has it."""
        for node in graph.nodes:
            attributes = node_attributes(node)
            if not node.domain or "plugin_namespace" not in attributes:
                continue  # the table refuses it
            yield node.name
            key = node.op_type, attributes["plugin_version"], attributes["plugin_namespace"]
            if "aot" in attributes:
                found: Any = f"{key[2]}::{key[0]}" in PLUGINS.known and key[1] == "1"
            else:
                try:
                    found = fake_plugin_v3.create(*key, attributes)
                except fake_plugin_v3.FailedError:
                    found = None
                self._network.plugins[node.name] = found
            if not found:
                text = "Plugin not found, are the plugin name, version, and namespace correct?"
                code = ErrorCode.INVALID_NODE
                self._refuse(ParserError(node.name, node.op_type, text, code, 1))

    def _refuse(self, error: ParserError) -> bool:
        self._errors.append(error)
        text = f"ModelImporter.cpp: {error.desc()}"
        self._logger.log(Severity.ERROR, text)
        return False


class OptimizationProfile:
    """``IOptimizationProfile``."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
        self.values: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        self.shapes[input] = self._checked(min, opt, max)

    def set_shape_input(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        self.values[input] = self._checked(min, opt, max)

    @staticmethod
    def _checked(*three: Sequence[int]) -> tuple[Shape, Shape, Shape]:
        least, usual, most = (tuple(each) for each in three)
        ordered = all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        if not ordered or min(least, default=1) < 0:
            raise ValueError("Shape provided is inconsistent with other shapes.")
        return least, usual, most


class TimingCache:
    """``ITimingCache``: of one TensorRT on one GPU."""

    _MAGIC = b"FAKE TIMINGS "

    def __init__(self, owner: str, entries: int = 0) -> None:
        self.owner, self.entries = owner, entries

    def serialize(self) -> bytes:
        return self._MAGIC + json.dumps([self.owner, self.entries]).encode()

    @classmethod
    def read(cls, data: bytes) -> TimingCache | None:
        if not data.startswith(cls._MAGIC):
            return None
        return cls(*json.loads(data[len(cls._MAGIC) :]))


class BuilderConfig:
    """``IBuilderConfig``."""

    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor: Any = None

    def __init__(self, pretended: Pretended, logger: ILogger) -> None:
        self._logger = logger
        self._owner = f"{pretended.version} {pretended.compute_capability}"
        self.profiles: list[OptimizationProfile] = []
        self.workspace_bytes = 0
        self.timings: TimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool is MemoryPoolType.WORKSPACE
        self.workspace_bytes = pool_size

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        found = TimingCache.read(bytes(serialized_timing_cache))
        if found is None and serialized_timing_cache:  # as TensorRT for RTX 1.7.1 does
            text = "Failed to deserialize timing cache. Returning an empty timing cache."
            self._logger.log(Severity.WARNING, text)
        return found or TimingCache(self._owner)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, TimingCache):
            raise TypeError("set_timing_cache(): incompatible function arguments")  # of pybind11
        if cache.owner != self._owner and not ignore_mismatch:
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timings


class Builder:
    """``Builder``."""

    def __init__(self, pretended: Pretended, logger: ILogger) -> None:
        self._pretended, self._logger = pretended, logger

    def create_network(self, flags: int = 0) -> Network:
        typed = flags >> NetworkDefinitionCreationFlag.STRONGLY_TYPED & 1
        if self._pretended.release < (11, 0) and not typed:
            raise RuleError("INT4 and BF16 need a strongly typed network")
        return Network(self._pretended)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig(self._pretended, self._logger)

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> Any:
        monitor, phase = config.progress_monitor, "Building engine"
        if monitor is not None:
            monitor.phase_start(phase, None, 2)
            if not monitor.step_complete(phase, 0):
                return None
        try:
            plan = self._build(network, config)
        except _RefusedError as reason:
            self._logger.log(Severity.ERROR, str(reason))
            return None
        if config.timings is not None:
            config.timings.entries += 1
        if monitor is not None:
            if not monitor.step_complete(phase, 1):
                return None
            monitor.phase_finish(phase)
        return np.frombuffer(plan, np.uint8)

    def _build(self, network: Network, config: BuilderConfig) -> bytes:
        planted, pretended = self._pretended.planted, self._pretended
        if network.refused:
            found = "; ".join(map(str, network.refused))
            raise _RefusedError(f"Error Code 4: API Usage Error ({found})")
        _check_types(network)
        no_fused = planted.no_fused
        for attention in network.attentions:
            if no_fused is not None and not attention.decomposable:
                raise _RefusedError(f"Error Code 10: Internal Error ({attention.name}: {no_fused})")
        try:
            own, plugins = _ask_plugins(network, config.profiles)
        except fake_plugin_v3.FailedError as error:
            raise _RefusedError(f"Error Code 2: Internal Error ({error})") from None
        model = _make_model(network)
        hosts = shape_inputs(OnnxFile(model))
        ranges = [_check_profile(OnnxFile(model), profile, hosts) for profile in config.profiles]
        if not ranges:
            raise _RefusedError(
                "Error Code 4: Network has dynamic inputs, but no optimization profile"
            )
        unpacked = sum(
            math.prod(network.shapes[node.inputs[0]])
            for node in OnnxFile(model).nodes
            if node.op_type == "DequantizeLinear"
            and node.outputs[0].removesuffix(".dequantized") in planted.unpacks
        )
        scratch = []
        for each, profile in zip(ranges, config.profiles, strict=True):
            largest = tuple((name, shapes[2]) for name, shapes in each.items())
            values = tuple((name, profile.values[name][2]) for name in sorted(hosts))
            size = live_bytes(model, largest, values) + 2 * unpacked
            scratch.append(size if planted.scratch_bytes is None else planted.scratch_bytes)
            if size > config.workspace_bytes > 0:
                raise _RefusedError(f"Error Code 2: OutOfMemory (Requested size was {size} bytes.)")
            text = f"Max Scratch Memory: {scratch[-1]} bytes"
            self._logger.log(Severity.INFO, text)
        directory = network.directory
        if directory is not None and own:  # the weights are a link into the bundle
            directory = (directory / "decoder.onnx.data").resolve().parent
        has_bundle = directory is not None and (directory / MANIFEST_NAME).is_file()
        head = {
            "version": pretended.version,
            "flavour": pretended.flavour,
            "compute_capability": pretended.compute_capability,
            "profiles": ranges,
            "scratch": scratch,
            "fused": planted.no_fused is None,
            "unpacks": planted.unpacks,
            "bundle": str(directory) if has_bundle else None,
            "own": own,
            "plugins": plugins,
        }
        return PLAN_MAGIC + json.dumps(head).encode() + b"\n" + model


def _ask_plugins(
    network: Network, profiles: list[OptimizationProfile]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Every plugin, as the builder asks it for each profile.

    Returns:
        Their layers, and what a plan has of those of Python.
    """
    assert network.graph is not None
    own: dict[str, None] = {}
    serialized: dict[str, dict[str, Any]] = {}
    if not any(node.domain for node in network.graph.nodes):
        return [], []
    for profile in profiles:
        for batch, seq in profile.shapes["position_ids"]:
            made: dict[str, TensorDesc] = {}
            for node in network.graph.nodes:
                if not node.domain:
                    continue
                own[node.name.removesuffix(f"/{node.op_type}")] = None
                inputs = [
                    made.get(name) or _described(network, node, name, batch, seq)
                    for name in node.inputs
                ]
                python = network.plugins.get(node.name)
                if python is None:
                    outputs = PLUGINS.ask(f"{node.domain}::{node.op_type}", inputs)
                else:
                    if node.name not in serialized:
                        shapes = [_symbols(network, node, name, made) for name in node.inputs]
                        serialized[node.name] = fake_plugin_v3.serialize(python, shapes)
                    sizes, kinds = zip(*((each.shape, each.dtype) for each in inputs), strict=True)
                    asked = fake_plugin_v3.ask(python, sizes, kinds)
                    outputs = tuple(TensorDesc(each.dims, each.type) for each in asked)
                made.update(zip(node.outputs, outputs, strict=True))
    return list(own), list(serialized.values())


def _symbols(
    network: Network, node: Node, name: str, made: dict[str, TensorDesc]
) -> tuple[int | str, ...]:
    """The shape of a plugin's input in steps of any size, see `fake_plugin_v3.serialize`."""
    if name in made:
        moving = ("room",) if node.op_type == "attention_join" else ("batch", "seq")
        return (*moving, *made[name].shape[len(moving) :])
    symbols: Any = _described(network, node, name, *("batch", "seq"))  # type: ignore[arg-type]
    shape: tuple[int | str, ...] = symbols.shape
    return shape


def _described(network: Network, node: Node, name: str, batch: int, seq: int) -> TensorDesc:
    """A plugin's input that no plugin makes, in a step of so many sequences and tokens."""
    dtype = DTYPES[network.types[name]]
    shape = network.shapes.get(name, ())
    if node.op_type == "w4_linear":
        depth = network.shapes[node.inputs[1]][0] * 32
        return TensorDesc((batch, seq, depth) if name == node.inputs[0] else shape, dtype)
    if node.op_type == "top_k_parts":
        return TensorDesc((batch, seq, shape[-1]) if name == node.inputs[0] else shape, dtype)
    if name == node.inputs[-1] and node.op_type == "attention_parts":
        return TensorDesc((batch, seq), dtype)
    if name == node.inputs[2] and node.op_type == "attention_join":
        return TensorDesc((batch, seq), dtype)
    cache = network.shapes["past_key_values.0.key"]
    rows = (batch, cache[1], seq, cache[3])
    if node.op_type == "attention_parts" and name in node.inputs[1:5]:
        return TensorDesc((batch, *cache[1:]) if name in node.inputs[1:3] else rows, dtype)
    return TensorDesc((batch, _heads(network), seq, cache[3]), dtype)


def _heads(network: Network) -> int:
    """Query heads, by the exporter's constants."""
    prefix = "shape.heads."
    return max(int(name.removeprefix(prefix)) for name in network.shapes if name.startswith(prefix))


class _RefusedError(Exception):
    """An error of the builder."""


def _check_types(network: Network) -> None:
    """A strongly typed network converts nothing by itself."""
    assert network.graph is not None
    for node in network.graph.nodes:
        types = [network.types[name] for name in node.inputs if name]
        if node.op_type in _ONE_TYPE and len(set(types)) > 1:
            raise _RefusedError(
                f"Error Code 4: API Usage Error ({node.name}: {node.op_type} must have same input "
                f"types. But they are of types {' and '.join(types)})"
            )


def _check_profile(
    graph: OnnxFile, profile: OptimizationProfile, hosts: frozenset[str]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Shapes of all inputs; those of a static input may be left out."""
    found = {}
    for info in graph.inputs:
        if info.name in hosts and info.name not in profile.values:
            raise _RefusedError(
                f"Error Code 4: {info.name} is a shape tensor without values in profile"
            )
        static = tuple(size for size in info.shape if isinstance(size, int))
        if info.name not in profile.shapes:
            if len(static) != len(info.shape):
                raise _RefusedError(
                    f"Error Code 4: {info.name}: dynamic input is missing dimensions in profile"
                )
            found[info.name] = (static, static, static)
            continue
        ranges = profile.shapes[info.name]
        for shape in ranges:
            fits = len(shape) == len(info.shape) and all(
                not isinstance(wanted, int) or wanted == size
                for wanted, size in zip(info.shape, shape, strict=True)
            )
            if not fits:
                raise _RefusedError(
                    f"Error Code 4: for input {info.name}, profile has {shape} for {info.shape}"
                )
        found[info.name] = ranges
    return found


def shape_inputs(graph: OnnxFile) -> frozenset[str]:
    """Inputs whose values say how large a tensor is, which TensorRT wants on the host."""
    inputs = {info.name: info for info in graph.inputs}
    makers = {name: node for node in graph.nodes for name in node.outputs}
    todo = [
        node.inputs[place]
        for node in graph.nodes
        for place in _SHAPE_OPERANDS.get(node.op_type, ())
        if place < len(node.inputs)
    ]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        maker = makers.get(name)
        if name in seen:
            continue
        seen.add(name)
        if maker is not None and maker.op_type not in ("Shape", "Size"):
            todo += maker.inputs
    return frozenset(seen & set(inputs))


def _make_model(network: Network) -> bytes:
    """The network's live part as ONNX, with its weights in it."""
    assert network.graph is not None
    graph = network.graph
    for attention in network.attentions:
        if isinstance(attention, Attention11):
            _mask_by_lengths(network, attention)
    graph.nodes = [part for node in graph.nodes for part in _without_plugin(network, node)]
    graph.nodes = list(_in_order(graph))
    model = Message.parse(graph.serialize())
    content = model.child(7)
    used = {name for node in graph.nodes for name in node.inputs}
    # TensorRT drops an input that nothing reads.
    content.replace(11, [i for i in content.all_bytes(11) if Message.parse(i).text(1) in used])
    content.replace(5, [_embed(data, network.directory) for data in content.all_bytes(5)])
    model.replace(7, [content.serialize()])
    return model.serialize()


def _without_plugin(network: Network, node: Node) -> list[Node]:
    """What a plugin computes, in operators: one product in FP32."""
    if not node.domain:
        return [node]
    if node.op_type in ("attention_parts", "top_k_parts"):
        return []
    if node.op_type == "attention_join":
        return _attended(network, node)
    if node.op_type == "top_k_merge":
        return _best(network, node)
    assert network.graph is not None
    constants = Constants(network.graph, network.directory)
    (x, packed, scale_name, bias_name), name = node.inputs, node.name
    words = constants.values(packed)
    scales, bias = constants.values(scale_name), constants.values(bias_name)
    assert words is not None
    assert scales is not None
    assert bias is not None
    planes = unpack_weights(words.reshape(network.shapes[packed]).astype(np.int32))
    depth, columns = planes[0].shape
    groups = network.shapes[scale_name][0]
    wide = np.repeat(scales.reshape(groups, columns).astype(np.float32), depth // groups, axis=0)
    whole = sum(plane.astype(np.float32) * 16**place for place, plane in enumerate(planes)) * wide
    for part, values in (("weights", whole), ("bias", bias.astype(np.float32))):
        network.graph.add_floats(f"{name}.{part}", values.shape, values)
    steps: tuple[tuple[str, list[str], str, list[bytes]], ...] = (
        ("Cast", [x], f"{name}.x", [attribute("to", ELEMENT_NUMBERS["fp32"])]),
        ("MatMul", [f"{name}.x", f"{name}.weights"], f"{name}.product", []),
        ("Add", [f"{name}.product", f"{name}.bias"], f"{name}.sum", []),
        ("Cast", [f"{name}.sum"], node.outputs[0], [attribute("to", ELEMENT_NUMBERS["fp16"])]),
    )
    return [Node(op, inputs, [out], out, attributes=more) for op, inputs, out, more in steps]


def _attended(network: Network, join: Node) -> list[Node]:
    """The attention of two plugins in operators: all rows in FP32, under a mask of positions."""
    graph = network.graph
    assert graph is not None
    (parts,) = (node for node in graph.nodes if node.outputs[:1] == join.inputs[:1])
    _, groups, capacity, width = network.shapes["past_key_values.0.key"]
    query, keys, values, new_keys, new_values, positions = parts.inputs
    heads, made = _heads(network), join.name
    for name, numbers in (
        ("rows", range(capacity)),
        ("never", [1 << 30]),
        ("zero", [0]),
        ("one", [1]),
        ("two", [2]),
        ("row_axes", [1, 2, 3]),
        ("token_axes", [1, 2, 4]),
        ("grouped", [0, groups, heads // groups, -1, width]),
        ("ungrouped", [0, heads, -1, width]),
        ("merged", [0, 0, heads * width]),
    ):
        graph.add_int64(f"{made}.{name}", list(numbers))
    graph.add_floats(f"{made}.scale", [], np.array(1 / math.sqrt(width), np.float32))
    graph.add_floats(f"{made}.keep", [], np.array(0, np.float32))
    graph.add_floats(f"{made}.drop", [], np.array(-1e30, np.float32))
    wide, whole, half = (
        attribute("to", ELEMENT_NUMBERS[dtype]) for dtype in ("fp32", "int64", "fp16")
    )
    steps: list[tuple[str, list[str], str, list[bytes]]] = [
        ("Cast", [positions], ".positions", [whole]),
        ("Slice", [".positions", ".zero", ".one", ".one"], ".past", []),
        ("Less", [".rows", ".past"], ".valid", []),
        ("Where", [".valid", ".rows", ".never"], ".old", []),
        ("Concat", [".old", ".positions"], ".all", [attribute("axis", 1)]),
        ("Unsqueeze", [".all", ".row_axes"], ".all_rows", []),
        ("Unsqueeze", [".positions", ".token_axes"], ".tokens", []),
        ("LessOrEqual", [".all_rows", ".tokens"], ".seen", []),
        ("Where", [".seen", ".keep", ".drop"], ".mask", []),
        ("Concat", [keys, new_keys], ".keys.half", [attribute("axis", 2)]),
        ("Concat", [values, new_values], ".values.half", [attribute("axis", 2)]),
        ("Cast", [".keys.half"], ".keys.wide", [wide]),
        ("Cast", [".values.half"], ".values.wide", [wide]),
        ("Unsqueeze", [".keys.wide", ".two"], ".keys", []),
        ("Unsqueeze", [".values.wide", ".two"], ".values", []),
        ("Transpose", [".keys"], ".keys.t", [attribute("perm", [0, 1, 2, 4, 3])]),
        ("Cast", [query], ".query.wide", [wide]),
        ("Reshape", [".query.wide", ".grouped"], ".query", []),
        ("MatMul", [".query", ".keys.t"], ".products", []),
        ("Mul", [".products", ".scale"], ".scores", []),
        ("Add", [".scores", ".mask"], ".masked", []),
        ("Softmax", [".masked"], ".weights", [attribute("axis", -1)]),
        ("MatMul", [".weights", ".values"], ".mixed", []),
        ("Reshape", [".mixed", ".ungrouped"], ".heads", []),
        ("Transpose", [".heads"], ".turned", [attribute("perm", [0, 2, 1, 3])]),
        ("Reshape", [".turned", ".merged"], ".wide", []),
        ("Cast", [".wide"], join.outputs[0], [half]),
    ]

    def full(name: str) -> str:
        return f"{made}{name}" if name.startswith(".") else name

    return [
        Node(op, [full(each) for each in inputs], [full(out)], full(out), attributes=more)
        for op, inputs, out, more in steps
    ]


def _best(network: Network, merge: Node) -> list[Node]:
    """The search of two plugins in operators."""
    graph, made = network.graph, merge.name
    assert graph is not None
    (parts,) = (node for node in graph.nodes if node.outputs[:1] == merge.inputs[:1])
    logits, keep = parts.inputs
    values, places, rest = merge.outputs
    for name, number in (("zero", 0), ("one", 1), ("last", -1), ("k", network.shapes[keep][0])):
        graph.add_int64(f"{made}.{name}", [number])
    wide, whole, half = (
        [attribute("to", ELEMENT_NUMBERS[dtype])] for dtype in ("fp32", "int32", "fp16")
    )
    steps: list[tuple[str, list[str], list[str], list[bytes]]] = [
        ("Cast", [logits], [".row"], wide),
        ("TopK", [".row", ".k"], [".best", ".places"], []),
        ("Cast", [".best"], [values], half),
        ("Cast", [".places"], [places], whole),
        ("Slice", [".best", ".zero", ".one", ".last"], [".greatest"], []),
    ]
    for name in (".row", ".best"):
        steps += [
            ("Sub", [name, ".greatest"], [f"{name}.shifted"], []),
            ("Exp", [f"{name}.shifted"], [f"{name}.exp"], []),
            ("ReduceSum", [f"{name}.exp", ".last"], [f"{name}.sum"], []),
        ]
    steps.append(("Sub", [".row.sum", ".best.sum"], [rest], []))

    def full(names: list[str]) -> list[str]:
        return [f"{made}{name}" if name.startswith(".") else name for name in names]

    return [
        Node(op, full(inputs), full(outs), full(outs)[0], attributes=more)
        for op, inputs, outs, more in steps
    ]


def _in_order(graph: OnnxFile) -> Iterator[Node]:
    """The nodes, each after those that it reads."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    done: set[int] = set()

    def visit(node: Node) -> Iterator[Node]:
        if id(node) in done:
            return
        done.add(id(node))
        for name in node.inputs:
            if name in makers:
                yield from visit(makers[name])
        yield node

    for node in graph.nodes:
        yield from visit(node)


def _mask_by_lengths(network: Network, attention: Attention11) -> None:
    """Query ``i`` of ``S`` sees the rows before ``length - S + i + 1``."""
    if attention.key_value_lengths is None:
        return
    assert attention.causal_kind is CausalMaskKind.LOWER_RIGHT
    assert attention.key_value_lengths.dtype is DataType.INT32
    assert network.graph is not None
    made = f"{attention.name}.made"
    numbers = {"zero": 0, "one": 1, "two": 2}
    for name, value in numbers.items():
        network._constant(f"{made}.{name}", "int64", (), struct.pack("<q", value))
    network._constant(f"{made}.axis", "int64", (1,), struct.pack("<q", 1))
    network._constant(f"{made}.axes", "int64", (2,), struct.pack("<2q", 1, 3))
    int64 = attribute("to", ELEMENT_NUMBERS["int64"])
    first, last = attribute("axis", 0), attribute("axis", 0)
    query, key = attention._node.inputs[:2]
    steps: list[tuple[str, list[str], str, list[bytes]]] = [
        ("Shape", [query], "q.shape", []),
        ("Gather", ["q.shape", "two"], "seq", [first]),
        ("Shape", [key], "k.shape", []),
        ("Gather", ["k.shape", "two"], "rows", [last]),
        ("Range", ["zero", "rows", "one"], "row", []),
        ("Range", ["zero", "seq", "one"], "place", []),
        ("Cast", [attention.key_value_lengths.name], "lengths", [int64]),
        ("Sub", ["lengths", "seq"], "starts", []),
        ("Unsqueeze", ["starts", "axis"], "column", []),
        ("Add", ["column", "place"], "ends", []),
        ("Unsqueeze", ["ends", "axes"], "last", []),
        ("LessOrEqual", ["row", "last"], "mask", []),
    ]
    own = {f"{output}" for _, _, output, _ in steps} | {*numbers, "axis", "axes"}
    for op, inputs, output, attributes in steps:
        names = [f"{made}.{name}" if name in own else name for name in inputs]
        node = Node(op, names, [f"{made}.{output}"], f"{made}.{output}", attributes=attributes)
        network.graph.nodes.append(node)
        network.types[f"{made}.{output}"] = "bool" if output == "mask" else "int64"
    attention._node.inputs.append(f"{made}.mask")


def _embed(data: bytes, directory: Path | None) -> bytes:
    """A TensorProto with its bytes in it."""
    constant: Constant = read_constant(data)
    if constant.location is None:
        return data
    assert directory is not None
    with (directory / constant.location).open("rb") as file:
        file.seek(constant.offset)
        raw = file.read(constant.num_bytes)
    tensor = Message.parse(data)
    tensor.fields = [each for each in tensor.fields if each[0] not in (9, 13, 14)]
    return tensor.add(9, raw).serialize()


@functools.cache
def live_bytes(
    model: bytes,
    sizes: tuple[tuple[str, Shape], ...],
    values: tuple[tuple[str, Shape], ...] = (),
) -> int:
    """The most bytes of intermediate tensors that a run has at once, each in a place of its own.

    Weights, what is computed of weights alone, and the engine's inputs and outputs are elsewhere.

    Args:
        model: ONNX with its weights in it.
        sizes: the shape of every input.
        values: of shape tensors.
    """
    inferred = _inferred(model, dict(sizes), dict(values))
    found = {
        name: -(-math.prod(shape) * itemsize // _ALIGNMENT) * _ALIGNMENT
        for name, (shape, itemsize) in _known_shapes(inferred).items()
    }
    last = {name: place for place, node in enumerate(inferred.node) for name in node.input}
    elsewhere = {each.name for each in [*inferred.output, *inferred.input]}
    fixed = {each.name for each in inferred.initializer}
    alive: dict[str, int] = {}
    most = 0
    for place, node in enumerate(inferred.node):
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)
            continue
        alive.update({name: found[name] for name in node.output if name not in elsewhere})
        most = max(most, sum(alive.values()))
        for name in node.input:
            if last[name] == place:
                alive.pop(name, None)
    return most


def _inferred(model: bytes, sizes: dict[str, Shape], values: dict[str, Shape]) -> Any:
    """The GraphProto with the shapes of all tensors; what follows of shapes alone is constant."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = onnx.load_from_string(model)
    graph = proto.graph
    symbols: dict[str, int] = {}
    for value in graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes[value.name], strict=True):
            if dim.dim_param:
                symbols[dim.dim_param] = size
            dim.dim_value = size
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = symbols.get(dim.dim_param, dim.dim_value)
    numbers = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in graph.initializer
        if each.data_type == onnx.TensorProto.INT64
    }
    numbers.update({name: np.array(value, np.int64) for name, value in values.items()})
    graph.initializer.extend(onnx.numpy_helper.from_array(numbers[name], name) for name in values)
    for each in graph.initializer:
        if each.name not in numbers:
            each.ClearField("raw_data")  # shapes do not depend on it
    folded, inferred, shapes = 1, graph, {}
    while folded:
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        shapes, folded = _known_shapes(inferred), 0
        for node in list(graph.node):
            if node.op_type == "Shape" and node.input[0] in shapes:
                window = {each.name: each.i for each in node.attribute}
                dims = shapes[node.input[0]][0][window.get("start", 0) : window.get("end")]
                result = np.array(dims, np.int64)
            elif node.op_type != "Constant" and all(name in numbers for name in node.input):
                (result,) = ReferenceEvaluator(node).run(
                    None, {name: numbers[name] for name in node.input}
                )
            else:
                continue
            numbers[node.output[0]] = result
            graph.initializer.append(onnx.numpy_helper.from_array(result, node.output[0]))
            graph.node.remove(node)
            folded += 1
    for node in graph.node:
        if any(name not in shapes for name in node.output):
            raise RuleError(f"the shape of {node.output[0]} is not known")
    return inferred


def _known_shapes(graph: Any) -> dict[str, tuple[Shape, int]]:
    """Shape and bytes of an element of the tensors of a GraphProto that have both."""
    import onnx

    found = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        tensor = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shape = tuple(dim.dim_value for dim in tensor.shape.dim)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            found[value.name] = shape, dtype.itemsize
    return found

"""The exported graphs, node by node: what TensorRT and ONNX Runtime are promised."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge.bundle import io_spec
from edge.bundle.io_spec import TensorSpec
from edge.bundle.linears import linear_layers
from edge.bundle.manifest import FloatType, Manifest, read_manifest
from edge.bundle.schemes import HIGH_PLANE
from edge.errors import CheckpointError
from edge.model.parts import Attention, Rope
from edge.model.spec import LayerRun
from export.graph.decoder import DecoderTensors, build_decoder
from export.graph.graph_builder import ONNX_TYPE
from export.sources.opening import open_checkpoint
from tests.conftest import TINY_KV_CAPACITY, Bundles, Checkpoints
from tests.makers.dense import dense
from tests.makers.manifests import make_model
from tests.makers.tiny_models import KINDS

IR_VERSION = {"native": 12, "portable": 10}  # the oldest that may hold opset 24 and opset 21
INTEGERS = (TensorProto.INT4, TensorProto.INT8)
# All in opset 21 and in TensorRT 10.0's parser.
PRIMITIVE = {
    "Add", "Cast", "Concat", "DequantizeLinear", "Div", "Gather", "GatherND", "Less",
    "LessOrEqual", "MatMul", "Mul", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax",
    "Split", "Sqrt", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
FUSED = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}


@dataclass(repr=False)
class Graph:
    """One ONNX file and what is looked up in it again and again."""

    path: Path
    float_type: FloatType
    model: onnx.ModelProto = field(init=False)
    producers: dict[str, onnx.NodeProto] = field(init=False)
    initializers: dict[str, onnx.TensorProto] = field(init=False)

    def __post_init__(self) -> None:
        self.model = onnx.load(str(self.path), load_external_data=False)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def external(self) -> dict[str, tuple[str, int, int]]:
        """File, offset and length of every tensor outside the model file."""
        result = {}
        for name, tensor in self.initializers.items():
            if tensor.data_location == TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                assert set(entry) == {"location", "offset", "length"}
                result[name] = entry["location"], int(entry["offset"]), int(entry["length"])
        return result


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


@dataclass
class Case:
    bundle: Path
    manifest: Manifest
    decoder: Graph
    twin: Graph

    @property
    def graphs(self) -> tuple[Graph, Graph]:
        return self.decoder, self.twin


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8", "int4"])
def quant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["native", "portable"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def case(kind: Any, dialect: str, quant: str, tiny_bundles: Bundles) -> Case:
    bundle = tiny_bundles(kind, dialect, quant)
    manifest = read_manifest(bundle)
    return Case(
        bundle,
        manifest,
        Graph(bundle / manifest.graphs.decoder, manifest.dtype),
        Graph(bundle / manifest.graphs.cpu, "fp32"),
    )


def test_plain_onnx_of_the_stated_version(case: Case, dialect: str):
    for graph in case.graphs:
        versions = [(item.domain, item.version) for item in graph.model.opset_import]
        assert versions == [("", {"native": 24, "portable": 21}[dialect])]
        assert graph.model.ir_version == IR_VERSION[dialect]
        assert not graph.model.functions
        assert {node.domain for node in graph.nodes} == {""}
        allowed = PRIMITIVE | FUSED if dialect == "native" else PRIMITIVE
        assert {node.op_type for node in graph.nodes} <= allowed
        names = [node.name for node in graph.nodes]
        assert all(names)
        assert len(set(names)) == len(names)


def test_inputs_and_outputs_are_the_contract(case: Case, dialect: Any):
    for graph in case.graphs:
        spec = (case.manifest.model, dialect, graph.float_type, TINY_KV_CAPACITY)
        inputs, outputs = io_spec.decoder_inputs(*spec), io_spec.decoder_outputs(*spec)
        assert [as_spec(value) for value in graph.model.graph.input] == inputs
        assert [as_spec(value) for value in graph.model.graph.output] == outputs


def test_the_checker_passes_and_infers_the_contract(case: Case, dialect: Any):
    """Shapes of the outputs follow from nothing but the inputs: by name, and for one step."""
    step: dict[int | str, int | str] = {
        io_spec.BATCH: 2,
        io_spec.SEQ: 5,
        io_spec.NUM_LOGITS: 3,
        io_spec.KV: 11,
    }
    for graph in case.graphs:
        onnx.checker.check_model(str(graph.path), full_check=True)
        spec = (case.manifest.model, dialect, graph.float_type, TINY_KV_CAPACITY)
        outputs = io_spec.decoder_outputs(*spec)
        unstated = onnx.ModelProto()
        unstated.CopyFrom(graph.model)
        for value in unstated.graph.output:
            value.type.Clear()
        if dialect == "native":  # onnx loses names where Reshape has to divide (portable)
            assert infer_outputs(unstated) == outputs
        for value in unstated.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_value = int(step[dim.dim_param])
        shapes = [tuple(step.get(size, size) for size in output.shape) for output in outputs]
        found = infer_outputs(unstated)
        assert [output.shape for output in found] == shapes
        assert [output.dtype for output in found] == [output.dtype for output in outputs]


def infer_outputs(model: onnx.ModelProto) -> list[TensorSpec]:
    inferred = onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )
    return [as_spec(value) for value in inferred.graph.output]


def test_every_linear_is_the_scheme_of_the_manifest(case: Case):
    """DequantizeLinear -> MatMul as TensorRT's and ONNX Runtime's fusions want it."""
    linears = case.manifest.quantization.linears
    for graph in case.graphs:
        for name, info in linears.items():
            weight = graph.initializers[f"{name}.weight"]
            (reader,) = graph.consumers(weight.name)
            assert tuple(weight.dims) == info.shape
            if info.scheme.kind == "float":
                assert weight.data_type == ONNX_TYPE[case.manifest.dtype]
                if graph is case.twin:
                    assert reader.op_type == "Cast"
                    (reader,) = graph.consumers(reader.output[0])
            else:
                check_dequantize(graph, reader, case.manifest, name)
                (reader,) = graph.consumers(reader.output[0])
            assert reader.op_type == "MatMul"
            assert graph.producers.get(reader.input[0]) is not None
            (after,) = graph.consumers(reader.output[0]) or [None]
            if info.scheme.planes:
                assert after is not None
                check_high_plane(graph, case.manifest, name, reader, after)
                (after,) = graph.consumers(after.output[0]) or [None]
            if f"{name}.bias" in graph.initializers:
                assert after is not None
                assert after.op_type == "Add"
                assert f"{name}.bias" in after.input
        quantized = [node for node in graph.nodes if node.op_type == "DequantizeLinear"]
        integers = [t for t in graph.initializers.values() if t.data_type in INTEGERS]
        schemes = [info.scheme for info in linears.values() if info.scheme.kind != "float"]
        expected = len(schemes) + sum(scheme.planes for scheme in schemes)
        assert len(quantized) == len(integers) == expected
    biases = {name for name in case.decoder.initializers if name.endswith(".bias")}
    layers = range(case.manifest.model.num_layers)
    qkv = {f"layers.{i}.qkv.bias" for i in layers} if dense(case.manifest.model).qkv_bias else set()
    assert biases == qkv


def check_high_plane(
    graph: Graph, manifest: Manifest, name: str, low: onnx.NodeProto, total: onnx.NodeProto
) -> None:
    """A product like the low plane's, of the same input, and added to it."""
    (reader,) = graph.consumers(f"{name}.high_weight")
    check_dequantize(graph, reader, manifest, name, "high_")
    (product,) = graph.consumers(reader.output[0])
    assert (product.op_type, product.input[0]) == ("MatMul", low.input[0])
    assert total.op_type == "Add"
    assert list(total.input) == [low.output[0], product.output[0]]
    scales = [load(graph, f"{name}.{plane}scale") for plane in ("", "high_")]
    np.testing.assert_array_equal(HIGH_PLANE * scales[0], scales[1])


def check_dequantize(
    graph: Graph, node: onnx.NodeProto, manifest: Manifest, name: str, plane: str = ""
) -> None:
    """TensorRT takes groups of INT4 only."""
    info = manifest.quantization.linears[name]
    assert node.op_type == "DequantizeLinear"
    # No zero point: symmetric.
    assert list(node.input) == [f"{name}.{plane}weight", f"{name}.{plane}scale"]
    weight = graph.initializers[f"{name}.{plane}weight"]
    assert weight.data_type == TensorProto.INT4
    assert tuple(weight.dims) == info.shape
    scale = graph.initializers[f"{name}.{plane}scale"]
    assert scale.data_type == ONNX_TYPE[graph.float_type]
    width, out = info.shape
    assert info.scheme.group_size == 32
    assert attributes(node) == {"axis": 0, "block_size": 32}
    assert tuple(scale.dims) == (width // 32, out)
    assert len(graph.consumers(scale.name)) == 1


def test_the_head_of_an_int4_bundle_is_int8(case: Case, quant: str):
    linears = case.manifest.quantization.linears
    kinds = {name: info.scheme.kind for name, info in linears.items()}
    layer, head = {"int4": ("int4", "int8"), "int8": ("int8", "int8")}.get(quant, ("float",) * 2)
    assert kinds.pop("lm_head") == head
    assert set(kinds.values()) == {layer}


def test_every_attention_has_the_mask_and_no_causality_of_its_own(case: Case, dialect: str):
    """TensorRT reads `is_causal` as upper-left: a decode step would see the first key only."""
    model = case.manifest.model
    for graph in case.graphs:
        attentions = [node for node in graph.nodes if node.op_type == "Attention"]
        if dialect == "portable":
            assert not attentions
            softmaxes = [node for node in graph.nodes if node.op_type == "Softmax"]
            assert len(softmaxes) == model.num_layers
            for node in softmaxes:
                joined = graph.producers[node.input[0]]
                masked = [graph.producers[name] for name in joined.input]
                assert [node.op_type for node in masked] == ["Add", "Add"]
                assert [node.input[1] for node in masked] == ["mask.past", "mask.new"]
            continue
        assert len(attentions) == model.num_layers
        for node in attentions:
            query, key, value, mask = node.input  # neither past nor nonpad_kv_seqlen behind it
            assert all((query, key, value))
            producer = graph.producers[mask]
            assert producer.op_type == "LessOrEqual"
            assert producer.input[0] == io_spec.KV_POSITIONS
            positions = graph.producers[producer.input[1]]
            assert positions.input[0] == io_spec.POSITION_IDS
            assert set(attributes(node)) == {"scale"}
            scale = attributes(node)["scale"]
            assert scale == pytest.approx(model.attentions()[0].factor, rel=1e-6)


def test_the_native_cache_is_written_in_place_before_it_is_read(case: Case, dialect: str):
    if dialect == "portable":
        assert not any(node.op_type == "TensorScatter" for node in case.decoder.nodes)
        return
    for graph in case.graphs:
        for i in range(case.manifest.model.num_layers):
            for past, present in (
                (io_spec.past_key(i), io_spec.present_key(i)),
                (io_spec.past_value(i), io_spec.present_value(i)),
            ):
                (scatter,) = graph.consumers(past)  # nobody else reads the old rows
                assert scatter.op_type == "TensorScatter"
                assert list(scatter.output) == [present]
                assert scatter.input[2] == io_spec.WRITE_INDICES
                assert attributes(scatter) == {"axis": 2}
                (read,) = graph.consumers(present)
                assert read.op_type == "Slice"


def test_norms_and_softmax_are_fp32_inside(case: Case, dialect: str):
    for graph in case.graphs:
        for node in graph.nodes:
            if node.op_type == "RMSNormalization":
                assert attributes(node)["stash_type"] == TensorProto.FLOAT
        if dialect == "native":
            continue
        inferred = onnx.shape_inference.infer_shapes(graph.model, strict_mode=True)
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        wide = [node for node in graph.nodes if node.op_type in ("Softmax", "ReduceMean", "Sqrt")]
        assert wide
        assert {types[node.input[0]] for node in wide} == {TensorProto.FLOAT}


def test_the_twin_shares_the_weights(case: Case):
    decoder, twin = case.decoder.external(), case.twin.external()
    assert decoder.keys() == twin.keys()
    shared = {name for name, (file, *_) in twin.items() if file == f"{case.decoder.path.name}.data"}
    linears = case.manifest.quantization.linears
    planes = {f"{name}.high_weight" for name in linears if linears[name].scheme.planes}
    assert shared == planes | {f"{name}.weight" for name in linears}
    for name in decoder:
        one, other = case.decoder.initializers[name], case.twin.initializers[name]
        assert list(one.dims) == list(other.dims)
        if name in shared:
            assert decoder[name] == twin[name]
            assert one.data_type == other.data_type
        else:
            assert twin[name][0] == f"{case.twin.path.name}.data"
            assert other.data_type == TensorProto.FLOAT
            assert one.data_type == ONNX_TYPE[case.manifest.dtype]
    roles = {name.rpartition(".")[2] for name in twin.keys() - shared}
    assert roles <= {"scale", "high_scale", "bias", "weight", "cos_table", "sin_table"}
    own = [name for name in twin.keys() - shared if name.endswith(".weight")]
    assert all(name.endswith("norm.weight") for name in own)


def test_external_data_is_aligned_inside_and_apart(case: Case):
    ranges: dict[str, set[tuple[int, int]]] = {}
    for graph in case.graphs:
        for name, (file, offset, length) in graph.external().items():
            assert offset % 4096 == 0, name
            tensor = graph.initializers[name]
            bits = {TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.FLOAT: 32}
            size = math.prod(tensor.dims) * bits.get(tensor.data_type, 16)
            assert length * 8 == size, name
            ranges.setdefault(file, set()).add((offset, length))
    assert sorted(ranges) == sorted(f"{graph.path.name}.data" for graph in case.graphs)
    for file, parts in ranges.items():
        end = 0
        for offset, length in sorted(parts):
            assert end <= offset < end + 4096, f"{file}: a hole or an overlap at {offset}"
            end = offset + length
        assert end == (case.bundle / file).stat().st_size


def test_nothing_is_stored_in_vain(case: Case):
    for graph in case.graphs:
        read = {name for node in graph.nodes for name in node.input}
        outputs = {value.name for value in graph.model.graph.output}
        assert graph.initializers.keys() <= read
        assert {value.name for value in graph.model.graph.input} <= read
        unread = {name for name in graph.producers if name not in read | outputs}
        assert not unread
        inside = [t for t in graph.initializers.values() if t.data_location != TensorProto.EXTERNAL]
        assert sum(len(t.raw_data) for t in inside) < 1024


def test_the_stored_weights_are_those_of_the_checkpoint(
    case: Case, kind: Any, tiny_checkpoints: Checkpoints
):
    """Read back by onnx: transposed, stacked in q-k-v and gate-up order, rounded, in both files."""
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        for layer in linear_layers(checkpoint.spec):
            parts = [checkpoint.tensor(name).astype(np.float32) for name in layer.weights]
            expected = np.concatenate(parts).T
            scheme = case.manifest.quantization.linears[layer.name].scheme
            for graph in case.graphs:
                stored = load(graph, f"{layer.name}.weight")
                if scheme.kind == "float":
                    np.testing.assert_array_equal(stored, expected)
                    continue
                if scheme.planes:
                    stored += HIGH_PLANE * load(graph, f"{layer.name}.high_weight")
                scale = load(graph, f"{layer.name}.scale")
                assert (scale >= 2.0**-14).all()
                found = stored * np.repeat(scale, scheme.group_size, axis=0)
                error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                # Uniform rounding of bell-shaped groups of 32; measured 0.079 and 0.0046.
                assert error < {"int4": 0.09, "int8": 0.006}[scheme.kind], layer.name
            if layer.biases:
                bias = np.concatenate([checkpoint.tensor(name) for name in layer.biases])
                for graph in case.graphs:
                    found = load(graph, f"{layer.name}.bias")
                    np.testing.assert_array_equal(found, bias.astype(np.float32))


def load(graph: Graph, name: str) -> NDArray[np.float32]:
    tensor = TensorProto()
    tensor.CopyFrom(graph.initializers[name])
    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(graph.path.parent))
    tensor.ClearField("data_location")
    values: NDArray[np.float32] = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    return values


def as_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    types = {number: name for name, number in ONNX_TYPE.items()}
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    dtype: Any = types[tensor.elem_type]
    return TensorSpec(value.name, shape, dtype)


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_heads_of_which_a_part_turns_are_refused(dialect: Any):
    run = LayerRun(1, (Rope(8), Attention(4, 2, 16)))
    model = msgspec.structs.replace(make_model(), layers=(run,))
    with pytest.raises(CheckpointError, match=r"layers\.0: RoPE of 8 of 16 dimensions"):
        build_decoder(model, dialect, "fp32", DecoderTensors({}, {}, []), 64)

"""TensorRT for RTX parses real graphs with planted faults; the audit must name each."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from edge.bundle import io_spec
from edge.bundle.engine_file import KvRead
from edge.bundle.manifest import FileInfo, Manifest, read_manifest
from edge.bundle.onnx_file import Message, Node, OnnxFile, attribute
from edge.errors import BuildError
from engines.builder.audit import Audit, audit_network, check_plan_bytes
from engines.compiler import compat
from engines.config import BuildConfig, resolve
from engines.graph.adapt import prepare_graph
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import Bundles
from tests.export.quantize.loud_checkpoint import loud_by_token, write_loud_checkpoint
from tests.makers.quantized_golden import QuantizedGolden

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2", "native", "int4")


def parse(bundle: Path, data: bytes, manifest: Manifest, kv_read: KvRead = "slice") -> Audit:
    compiler = compat.Compiler(compat.load("tensorrt-rtx"), lambda _severity, _text: None)
    shapes = resolve(BuildConfig(bundle, max_prefill=32, kv_read=kv_read), manifest)
    graph = prepare_graph(data, shapes, kv_read)
    network = compiler.parse(graph, bundle / "decoder.onnx", kv_read)
    return audit_network(network, manifest, shapes, kv_read)


def damaged(bundle: Path, change: Callable[[OnnxFile], None]) -> Audit:
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    change(graph)
    return parse(bundle, graph.serialize(), read_manifest(bundle))


def nodes(graph: OnnxFile, op_type: str) -> list[Node]:
    found = [node for node in graph.nodes if node.op_type == op_type]
    assert found
    return found


@pytest.mark.parametrize("kv_read", ["slice", "full", "lengths"])
def test_the_exported_graph_passes(bundle: Path, kv_read: KvRead) -> None:
    data, manifest = (bundle / "decoder.onnx").read_bytes(), read_manifest(bundle)
    audit = parse(bundle, data, manifest, kv_read)
    assert audit.problems == ()
    assert audit.attentions == manifest.model.num_layers
    stored = {weight.dtype: (weight.count, weight.num_bytes) for weight in audit.weights}
    linears = manifest.quantization.linears.values()
    planes = [2 if linear.scheme.planes else 1 for linear in linears]
    assert sum(planes) == len(linears) + 1  # those of the lm_head
    weights = [linear.shape[0] * linear.shape[1] for linear in linears]
    packed = sum(n * size for n, size in zip(planes, weights, strict=True)) // 2
    assert stored == {"int4": (sum(planes), packed)}
    counts = {(layer.kind, layer.dtype): layer.count for layer in audit.layers}
    assert counts["kv_cache_update", "fp16"] == 2 * manifest.model.num_layers


def test_a_causal_attention_is_found(bundle: Path) -> None:
    def change(graph: OnnxFile) -> None:
        node = nodes(graph, "Attention")[1]
        node.inputs = node.inputs[:3]
        node.attributes.append(attribute("is_causal", 1))

    problems = damaged(bundle, change).problems
    assert any("layers.1.attended" in p and "is causal (upper_left)" in p for p in problems)


def test_a_missing_mask_is_found(bundle: Path) -> None:
    def change(graph: OnnxFile) -> None:
        node = nodes(graph, "Attention")[0]
        node.inputs = node.inputs[:3]

    (problem,) = damaged(bundle, change).problems
    assert "layers.0.attended" in problem
    assert "no mask" in problem


def test_a_mask_of_something_else_is_found(bundle: Path) -> None:
    def change(graph: OnnxFile) -> None:
        (node,) = nodes(graph, "LessOrEqual")
        node.inputs[1] = node.inputs[0]  # always true: everything is seen

    problems = damaged(bundle, change).problems
    assert problems
    assert all("does not depend on position_ids" in problem for problem in problems)


def test_a_cache_that_is_not_updated_in_place_is_found(bundle: Path) -> None:
    def change(graph: OnnxFile) -> None:
        node = nodes(graph, "TensorScatter")[0]
        node.op_type, node.attributes = "Identity", []
        node.inputs = node.inputs[:1]

    assert "present.0.key comes from a layer of kind" in damaged(bundle, change).problems[0]


def test_keys_in_the_wrong_cache_are_found(bundle: Path) -> None:
    def change(graph: OnnxFile) -> None:
        first, second = nodes(graph, "TensorScatter")[:2]
        first.inputs[0], second.inputs[0] = second.inputs[0], first.inputs[0]

    problems = damaged(bundle, change).problems
    assert "present.0.key updates past_key_values.0.value, not past_key_values.0.key" in problems


def test_an_unpacked_weight_is_found(bundle: Path) -> None:
    """The product reads a float constant of the same shape instead of the packed INT4."""

    def change(graph: OnnxFile) -> None:
        (node,) = (n for n in graph.nodes if n.outputs == ["layers.0.down.dequantized"])
        # ConstantOfShape is what a folded DequantizeLinear comes to: a constant in fp16.
        tensor = Message().add(1, 1).add(2, 10).add(9, b"\x00\x3c")
        value = Message().add(1, "value").add(5, tensor).add(20, 4)
        node.op_type, node.attributes = "ConstantOfShape", [value.serialize()]
        node.inputs = [graph.add_int64("folded.shape", [128, 64])]

    audit = damaged(bundle, change)
    assert len(audit.problems) == 1
    assert audit.problems[0].startswith("layers.0.down: ")


def test_a_scheme_that_differs_from_the_manifest_is_found(
    bundle: Path, tiny_bundles: Bundles
) -> None:
    other = tiny_bundles("qwen2", "native", "int8")
    audit = parse(other, (other / "decoder.onnx").read_bytes(), read_manifest(bundle))
    assert "layers.0.qkv: its weights are in two planes, the bundle says int4" in audit.problems


def test_a_missing_plane_is_found(tiny_bundles: Bundles) -> None:
    """A bundle of INT4 under a manifest that promises INT8."""
    other, int4 = (tiny_bundles("qwen2", "native", quant) for quant in ("int8", "int4"))
    audit = parse(int4, (int4 / "decoder.onnx").read_bytes(), read_manifest(other))
    assert "layers.0.qkv.high_product: no matrix product with stored weights" in audit.problems


@pytest.fixture(scope="module")
def whole_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of INT8 inputs, whose layers.1.down has a range per token."""
    root = tmp_path_factory.mktemp("loud")
    source = write_loud_checkpoint(root / "model", "qwen2", layers=(1,))
    config = ExportConfig(
        source=str(source),
        output=root / "bundle",
        quant="int8-w8a8",
        keep=(("*", "w8a8"),),
        kv_capacity=64,
        calibration_tokens=256,
    )
    with loud_by_token():
        export_checkpoint(config)
    return root / "bundle"


def test_ranges_per_token_pass(whole_int8: Path) -> None:
    audit = damaged(whole_int8, lambda _: None)
    assert audit.problems == ()
    linears = read_manifest(whole_int8).quantization.linears
    assert [name for name, each in linears.items() if each.per_token] == ["layers.1.down"]
    assert {weight.dtype: weight.count for weight in audit.weights}["int8"] == len(linears)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("layers.1.down.out", "1 layers use each token's range, the bundle says 2"),
        ("layers.1.down.input.shares", "1 layers use each token's range, the bundle says 2"),
        (
            "layers.1.down.input.blocks.rotated",
            "its inputs are rotated by 0 numbers, the bundle says 64 x 64",
        ),
    ],
)
def test_missing_parts_of_per_token_ranges_are_found(
    whole_int8: Path, output: str, problem: str
) -> None:
    """Each would answer, and answer wrong."""

    def change(graph: OnnxFile) -> None:
        (node,) = (n for n in graph.nodes if n.outputs == [output])
        node.op_type, node.inputs = "Identity", node.inputs[:1]

    assert damaged(whole_int8, change).problems == (f"layers.1.down: {problem}",)


def add_float_channels(data: bytes) -> bytes:
    """Give layers.0.down four channels in float, as bundles of schema version 6 had them."""
    model = onnx.load_from_string(data)
    at, product = next(
        (at, node)
        for at, node in enumerate(model.graph.node)
        if node.output[0] == "layers.0.down.out"
    )
    product.output[0] = "layers.0.down.product"
    name = "layers.0.down.float"
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(values, f"{name}_{part}")
        for part, values in (
            ("indices", np.arange(4)),
            ("weight", np.ones((4, 64), np.float16)),
        )
    )
    make = onnx.helper.make_node
    for node in (
        make("Add", ["layers.0.down.product", f"{name}_product"], ["layers.0.down.out"]),
        make("MatMul", [f"{name}_inputs", f"{name}_weight"], [f"{name}_product"]),
        make("Gather", ["layers.0.gated", f"{name}_indices"], [f"{name}_inputs"], axis=-1),
    ):
        model.graph.node.insert(at + 1, node)
    return bytes(model.SerializeToString())


def with_channels(manifest: Manifest, channels: tuple[int, ...]) -> Manifest:
    linears = dict(manifest.quantization.linears)
    linears["layers.0.down"] = replace(linears["layers.0.down"], float_channels=channels)
    return replace(manifest, quantization=replace(manifest.quantization, linears=linears))


@pytest.mark.parametrize(
    ("stored", "promised", "problem"),
    [
        (True, 4, None),
        (True, 2, "256 weights of channels in float, the bundle says 2 x 64"),
        (False, 4, "0 weights of channels in float, the bundle says 4 x 64"),
    ],
)
def test_float_channels_are_accounted_for(
    whole_int8: Path, stored: bool, promised: int, problem: str | None
) -> None:
    graph = (whole_int8 / "decoder.onnx").read_bytes()
    if stored:
        graph = add_float_channels(graph)
    manifest = with_channels(read_manifest(whole_int8), tuple(range(promised)))
    audit = parse(whole_int8, graph, manifest)
    assert audit.problems == (() if problem is None else (f"layers.0.down: {problem}",))
    weights = {weight.dtype: weight.num_bytes for weight in audit.weights}
    assert weights.get("fp16", 0) == 2 * 4 * 64 * stored


@pytest.fixture(scope="module")
def offset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of GPTQ's integers with zero points and act-order."""
    root = tmp_path_factory.mktemp("offset")
    source = QuantizedGolden.load("gptq-asym-act-order").write(root / "model")
    export_checkpoint(ExportConfig(source=str(source), output=root / "bundle", kv_capacity=64))
    return root / "bundle"


def test_offsets_of_groups_are_accounted_for(offset: Path) -> None:
    audit = damaged(offset, lambda _: None)
    assert audit.problems == ()
    assert {weight.dtype for weight in audit.weights} == {"int4", "fp16"}


def test_lost_offsets_are_found(offset: Path) -> None:
    def change(graph: OnnxFile) -> None:
        (node,) = (n for n in graph.nodes if "layers.0.down.offset_product" in n.inputs)
        node.op_type, node.inputs = "Identity", node.inputs[:1]

    (problem,) = damaged(offset, change).problems
    assert problem == "layers.0.down: 0 offsets of groups, the bundle says 2 x 64"


def test_offsets_that_the_manifest_does_not_know_are_found(offset: Path) -> None:
    manifest = read_manifest(offset)
    linears = dict(manifest.quantization.linears)
    linears["layers.0.down"] = replace(linears["layers.0.down"], offsets=False)
    changed = replace(manifest, quantization=replace(manifest.quantization, linears=linears))
    (problem,) = parse(offset, (offset / "decoder.onnx").read_bytes(), changed).problems
    assert problem == "layers.0.down: 128 offsets of groups, the bundle says 0 x 64"


def test_a_plan_with_unpacked_weights_is_too_large(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    weights = manifest.files["decoder.onnx.data"].num_bytes
    assert check_plan_bytes(weights + 4_000_000, manifest, 2) == []
    assert "unpacked" in check_plan_bytes(weights + 100_000_000, manifest, 2)[0]
    assert "less than" in check_plan_bytes(1000, manifest, 2)[0]
    # Of a large model nothing but the weights counts: INT4 stored as INT8 is twice as much.
    info = FileInfo(num_bytes=1_000_000_000, sha256="0" * 64)
    large = replace(manifest, files={**manifest.files, "decoder.onnx.data": info})
    assert check_plan_bytes(1_020_000_000, large, 2) == []
    assert "unpacked" in check_plan_bytes(1_900_000_000, large, 2)[0]
    # A further profile brings its own kernels.
    assert "unpacked" in check_plan_bytes(weights + 25_000_000, manifest, 2)[0]
    assert check_plan_bytes(weights + 25_000_000, manifest, 3) == []


def test_inputs_and_outputs_of_other_shapes_are_found(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    compiler = compat.Compiler(compat.load("tensorrt-rtx"), lambda _severity, _text: None)
    built, wanted = (
        resolve(BuildConfig(bundle, max_prefill=32, kv_capacity=rows), manifest)
        for rows in (128, 64)
    )
    graph = prepare_graph((bundle / "decoder.onnx").read_bytes(), built, "slice")
    network = compiler.parse(graph, bundle / "decoder.onnx", "slice")
    assert audit_network(network, manifest, built).problems == ()
    problems = audit_network(network, manifest, wanted).problems
    names = [io_spec.past_key(0), io_spec.past_value(0), io_spec.past_key(1), io_spec.past_value(1)]
    for name in names:
        assert sum(f"the input {name} is" in problem for problem in problems) == 1
    assert "[-1, 2, 128, 16], not fp16 [-1, 2, 64, 16]" in problems[0]
    # One dimension less is another shape, too.
    first, *others = network.inputs
    fewer = dataclasses.replace(first, shape=first.shape[:-1])
    flat = dataclasses.replace(network, inputs=(fewer, *others))
    (problem,) = audit_network(flat, manifest, built).problems
    assert problem.startswith(f"the input {first.name} is")


def test_a_refused_operator_is_one_sentence_with_node_and_advice(bundle: Path) -> None:
    def change(graph: OnnxFile) -> None:
        for node in nodes(graph, "Sigmoid"):
            node.op_type = "Sigmoide"

    with pytest.raises(BuildError) as refused:
        damaged(bundle, change)
    text = str(refused.value)
    assert "\n" not in text
    for part in ("layers.0.gate.sigmoid/Sigmoid", "operator Sigmoide", "1 more", "export"):
        assert part in text


def test_garbage_is_refused(bundle: Path) -> None:
    compiler = compat.Compiler(compat.load("tensorrt-rtx"), lambda _severity, _text: None)
    with pytest.raises(BuildError, match=r"decoder\.onnx"):
        compiler.parse(b"garbage", bundle / "decoder.onnx", "slice")


def test_missing_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(bundle / "decoder.onnx", tmp_path)
    compiler = compat.Compiler(compat.load("tensorrt-rtx"), lambda _severity, _text: None)
    data = (bundle / "decoder.onnx").read_bytes()
    with pytest.raises(BuildError, match="cannot parse"):
        compiler.parse(data, tmp_path / "decoder.onnx", "slice")

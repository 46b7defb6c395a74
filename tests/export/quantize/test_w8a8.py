"""The recipe int8-w8a8: its graph, its integers, its kernels on the CPU and in TensorRT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from edge.backends.ort.session import session_options
from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError
from edge_lab.cli.inspect import inspect
from export.graph.block_rotation import block_size, rotate_blocks
from export.pipeline import ExportConfig, export_checkpoint
from export.quantize.rotation import RotatedCheckpoint
from export.quantize.smoothquant import Smoothing
from export.sources.opening import open_checkpoint
from tests.conftest import require_kernels
from tests.export.quantize.loud_checkpoint import loud_by_token, write_loud_checkpoint
from tests.makers.tiny_models import write_checkpoint

TEXT = "hello world, what is the thing on the mat and the cat in a hat? " * 100


@pytest.fixture(scope="module", params=["native", "portable"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("w8a8")
    (root / "text.txt").write_text(TEXT)
    config = ExportConfig(
        source=str(write_loud_checkpoint(root / "model", "qwen2", layers=(0, 1))),
        output=root / "bundle",
        quant="int8-w8a8",
        group_size=32,
        keep=(("layers.0.down", "int8"),),
        dialect=request.param,
        kv_capacity=64,
        calibration=root / "text.txt",
        calibration_tokens=512,
    )
    with loud_by_token():
        export_checkpoint(config)
    return root / "bundle"


def load(path: Path, data: bool = False) -> Any:
    return onnx.load(str(path), load_external_data=data)


def test_the_manifest_tells_what_was_done(bundle: Path):
    quantization = read_manifest(bundle).quantization
    assert (quantization.smoothed, quantization.rotated) == (True, True)
    assert quantization.calibration is not None
    kinds = {name: linear.scheme.kind for name, linear in quantization.linears.items()}
    assert kinds["layers.0.down"] == kinds["lm_head"] == "int8"
    assert Counter(kinds.values()) == {"w8a8": 7, "int8": 2}
    for linear in quantization.linears.values():
        assert (linear.activation_scale is not None) == (linear.scheme.kind == "w8a8")


def test_only_the_loud_linear_has_ranges_per_token(bundle: Path):
    linears = read_manifest(bundle).quantization.linears
    found = {name: (linear.per_token, linear.rotation_block) for name, linear in linears.items()}
    assert found.pop("layers.1.down") == (True, 64)
    assert set(found.values()) == {
        (False, 0)
    }  # layers.0.down is as loud, but its inputs stay float
    width, out = linears["layers.1.down"].shape
    assert linears["layers.1.down"].num_bytes == width * out + 2 * out


def test_inspect_shows_them(bundle: Path):
    result = CliRunner().invoke(inspect, [str(bundle), "--layers"], catch_exceptions=False)
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert [line for line in lines if "per token" in line] == [
        line
        for line in lines
        if line.startswith("layers.1.down w8a8, a range per token, blocks of 64 rotated 1 ")
    ]
    assert "a range per token" in result.output


def run_down(bundle: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``layers.1.down`` alone."""
    model = load(bundle / "decoder.cpu.onnx", data=True)
    for name in ("layers.1.gated", "layers.1.down.out"):
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, [1, 5, None]))
    part = onnx.utils.Extractor(model).extract_model(["layers.1.gated"], ["layers.1.down.out"])
    session = onnxruntime.InferenceSession(
        part.SerializeToString(),
        session_options(onnxruntime, bundle, read_manifest(bundle)),
        providers=["CPUExecutionProvider"],
    )
    (found,) = session.run(None, {"layers.1.gated": x})
    return np.asarray(found)


def test_each_token_has_its_own_range(bundle: Path):
    """Also beside a token a million times louder, one of zeros and one that is next to nothing."""
    require_kernels(read_manifest(bundle).dialect)
    model = load(bundle / "decoder.cpu.onnx", data=True)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    info = read_manifest(bundle).quantization.linears["layers.1.down"]
    sizes = np.array([1, 1e6, 0, 3e-5, 2e-3], np.float32)[:, None]
    x = np.random.RandomState(0).randn(1, 5, info.shape[0]).astype(np.float32) * sizes
    found = run_down(bundle, x)[0]
    weight = constants["layers.1.down.weight"] * constants["layers.1.down.scale"]
    rotated = rotate_blocks(x[0], info.rotation_block)
    largest = np.maximum(np.abs(rotated).max(axis=1, keepdims=True), 2.0**-14)
    assert info.activation_scale is not None
    grid = np.float32(info.activation_scale)
    wanted = np.clip(np.rint(rotated / largest / grid), -128, 127) * grid @ weight * largest
    tolerance = 1e-4 * np.abs(wanted).max(axis=1)
    assert (np.abs(found - wanted).max(axis=1) <= tolerance).all()
    with open_checkpoint(str(bundle.parent / "model")) as checkpoint:
        exact = RotatedCheckpoint(checkpoint).tensor("model.layers.1.mlp.down_proj.weight")
    products = x[0] @ exact.T
    norms = np.linalg.norm(products, axis=1)
    assert (np.linalg.norm(found - products, axis=1)[[0, 1, 4]] < 0.02 * norms[[0, 1, 4]]).all()


@pytest.mark.parametrize("file", ["decoder.onnx", "decoder.cpu.onnx"])
def test_inputs_are_rounded_before_each_product(bundle: Path, file: str):
    onnx.checker.check_model(str(bundle / file))
    model = load(bundle / file, data=True)
    assert {node.domain for node in model.graph.node} == {""}
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, linear in read_manifest(bundle).quantization.linears.items():
        weight = producers[f"{name}.dequantized"]
        (product,) = [n for n in model.graph.node if f"{name}.dequantized" in n.input]
        assert product.op_type == "MatMul"
        values = producers.get(product.input[0])
        assert values is not None
        assert linear.per_token == (f"{name}.input.shares" in producers)
        if linear.scheme.kind == "int8":
            assert values.op_type != "DequantizeLinear"
            continue
        assert values.op_type == "DequantizeLinear"
        rounding = producers[values.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        assert values.input[1:] == rounding.input[1:]
        scale, zero = (constants[i] for i in values.input[1:])
        assert scale.shape == zero.shape == ()
        assert (zero.dtype, int(zero)) == (np.int8, 0)
        assert float(scale) == linear.activation_scale
        assert [(a.name, a.i) for a in weight.attribute] == [("axis", 1)]


def test_the_cpu_multiplies_integers(bundle: Path, tmp_path: Path):
    require_kernels(read_manifest(bundle).dialect)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(bundle / "decoder.cpu.onnx"), options, providers=["CPUExecutionProvider"]
    )
    operators = Counter(node.op_type for node in load(tmp_path / "optimized.onnx").graph.node)
    integer = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger")
    assert sum(operators[name] for name in integer) == 7, operators


def test_onnx_runtime_computes_what_the_integers_say(bundle: Path):
    random = np.random.RandomState(0)
    x = random.randn(5, 32).astype(np.float32) * 3
    weight = random.randint(-127, 128, (32, 16)).astype(np.int8)
    scale = (random.rand(16) * 0.01 + 0.001).astype(np.float32)
    grid = np.float32(0.03)
    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            make("QuantizeLinear", ["x", "grid", "zero"], ["q"]),
            make("DequantizeLinear", ["q", "grid", "zero"], ["d"]),
            make("DequantizeLinear", ["weight", "scale", "zeros"], ["w"], axis=1),
            make("MatMul", ["d", "w"], ["y"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [5, 32])],
        [onnx.helper.make_tensor_value_info("y", 1, [5, 16])],
        [
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in (
                ("grid", grid), ("zero", np.int8(0)), ("weight", weight), ("scale", scale),
                ("zeros", np.zeros(16, np.int8)),
            )
        ],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    options = session_options(onnxruntime, bundle, read_manifest(bundle))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rounded = np.clip(np.rint(x / grid), -128, 127).astype(np.int64)
    wanted = (rounded @ weight.astype(np.int64)) * (grid * scale)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tensorrt_compiles_it(bundle: Path):
    pytest.importorskip("tensorrt_rtx")
    from engines.check.check import check_bundle
    from engines.config import BuildConfig

    report = check_bundle(BuildConfig(bundle, max_batch=2, max_prefill=32))
    assert not report.problems


@pytest.mark.slow
def test_every_linear_may_have_ranges_per_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one with a bias (qkv) and the one whose output is the logits."""
    pytest.importorskip("tensorrt_rtx")
    from engines.check.check import check_bundle
    from engines.config import BuildConfig

    def rotated(_: Any, x: NDArray[np.float32], *rest: Any, **named: Any) -> Smoothing:
        return Smoothing(None, 0.0, per_token=True, rotation_block=block_size(x.shape[1]))

    monkeypatch.setattr("export.quantize.calibrated.smoothing", rotated)
    source = str(write_checkpoint(tmp_path / "model", "qwen2"))
    export_checkpoint(
        ExportConfig(
            source=source,
            output=tmp_path / "bundle",
            quant="int8-w8a8",
            keep=(("*", "w8a8"),),
            kv_capacity=64,
            calibration_tokens=256,
        )
    )
    linears = read_manifest(tmp_path / "bundle").quantization.linears
    assert all(linear.per_token and linear.rotation_block == 64 for linear in linears.values())
    graph = load(tmp_path / "bundle" / "decoder.onnx").graph
    producers = {name: node for node in graph.node for name in node.output}
    for name in linears:
        output = "logits" if name == "lm_head" else f"{name}.out"
        last = producers[output]
        if last.op_type == "Add":  # a bias belongs to the model's own outputs
            last = producers[last.input[0]]
        assert last.op_type == "Mul"
        assert list(last.input) == [f"{name}.product", f"{name}.input.divisor"]
    assert not check_bundle(BuildConfig(tmp_path / "bundle", max_batch=2, max_prefill=32)).problems


def test_rotation_unties_the_head(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True)
    manifest = export_checkpoint(
        ExportConfig(source=str(source), output=tmp_path / "b", quant="fp16", rotate=True)
    )
    assert manifest.quantization.rotated
    assert not manifest.model.tied_embeddings


def test_options_without_effect_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no layer is INT4"):
        ExportConfig(source="model", output=tmp_path / "b", quant="int8-w8a8", method="awq")

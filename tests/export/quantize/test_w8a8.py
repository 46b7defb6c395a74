"""The recipe int8-w8a8: its graph, its integers, its kernels on the CPU and in TensorRT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from edge.backends.ort.session import session_options
from edge.bundle.manifest import read_manifest
from edge.cli.inspect import inspect
from edge.errors import ConfigError
from export.pipeline import ExportConfig, estimated_bytes, export_checkpoint
from export.quantize.rotation import RotatedCheckpoint
from export.sources.opening import open_checkpoint
from tests.conftest import require_kernels
from tests.export.quantize.loud_checkpoint import LOUD, loud_stay_float, write_loud_checkpoint
from tests.tiny_models import write_checkpoint

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
        keep=(("layers.1.down", "w8a8"),),
        dialect=request.param,
        kv_capacity=64,
        calibration=root / "text.txt",
        calibration_tokens=512,
    )
    with loud_stay_float():
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


def test_only_the_loud_linear_has_float_channels(bundle: Path):
    linears = read_manifest(bundle).quantization.linears
    channels = {name: linear.float_channels for name, linear in linears.items()}
    down = channels.pop("layers.1.down")
    assert set(LOUD) < set(down)
    assert (len(down), list(down)) == (4, sorted(down))
    assert set(channels.values()) == {()}  # layers.0.down is as loud, but its inputs stay float
    width, out = linears["layers.1.down"].shape
    assert linears["layers.1.down"].num_bytes == width * out + 2 * out + 2 * 4 * out


def test_inspect_shows_them(bundle: Path):
    result = CliRunner().invoke(inspect, [str(bundle), "--layers"], catch_exceptions=False)
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert [line for line in lines if "channels float" in line] == [
        line for line in lines if line.startswith("layers.1.down w8a8, 4 channels float 1 ")
    ]
    assert "layers.1.down w8a8, 4 channels float" in " ".join(lines)


@pytest.mark.parametrize("file", ["decoder.onnx", "decoder.cpu.onnx"])
def test_float_channels_are_stored_once(bundle: Path, file: str):
    """Zero in the INT8 weight, as they were in the checkpoint beside it."""
    model = load(bundle / file, data=True)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    channels = list(read_manifest(bundle).quantization.linears["layers.1.down"].float_channels)
    assert constants["layers.1.down.float_indices"].tolist() == channels
    integers = constants["layers.1.down.weight"]
    assert not integers[channels].any()
    assert np.delete(integers, channels, axis=0).any(axis=1).all()
    with open_checkpoint(str(bundle.parent / "model")) as checkpoint:
        weight = RotatedCheckpoint(checkpoint).tensor("model.layers.1.mlp.down_proj.weight")
    stored = constants["layers.1.down.float_weight"]
    np.testing.assert_array_equal(stored, weight[:, channels].T.astype(np.float16))


def test_the_graph_adds_the_float_channels(bundle: Path):
    """``down`` alone, on an input whose loud channels are far beyond the INT8 range."""
    require_kernels(read_manifest(bundle).dialect)
    model = load(bundle / "decoder.cpu.onnx", data=True)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    info = read_manifest(bundle).quantization.linears["layers.1.down"]
    assert info.activation_scale is not None
    grid = np.float32(info.activation_scale)
    channels = list(info.float_channels)
    x = np.random.RandomState(0).uniform(-100, 100, (1, 5, info.shape[0])).astype(np.float32) * grid
    x[..., channels] *= 1000
    for name in ("layers.1.gated", "layers.1.down.out"):
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, [1, 5, None]))
    part = onnx.utils.Extractor(model).extract_model(["layers.1.gated"], ["layers.1.down.out"])
    session = onnxruntime.InferenceSession(
        part.SerializeToString(),
        session_options(onnxruntime, bundle, read_manifest(bundle)),
        providers=["CPUExecutionProvider"],
    )
    (found,) = session.run(None, {"layers.1.gated": x})
    weight = constants["layers.1.down.weight"] * constants["layers.1.down.scale"]
    rounded = np.clip(np.rint(x / grid), -128, 127) * grid
    wanted = rounded @ weight
    wanted += x[..., channels] @ constants["layers.1.down.float_weight"].astype(np.float32)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(wanted - rounded @ weight).max() > 0.1 * np.abs(wanted).max()


def test_the_estimate_covers_the_float_channels(bundle: Path):
    manifest = read_manifest(bundle)
    schemes = {name: info.scheme for name, info in manifest.quantization.linears.items()}
    without = {
        name: msgspec.structs.replace(scheme, kind="int8" if scheme.kind == "w8a8" else scheme.kind)
        for name, scheme in schemes.items()
    }
    more = estimated_bytes(manifest.model, schemes, 64) - estimated_bytes(
        manifest.model, without, 64
    )
    info = manifest.quantization.linears["layers.1.down"]
    assert more >= 2 * len(info.float_channels) * info.shape[1]


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


def test_tensorrt_compiles_it(bundle: Path):
    pytest.importorskip("tensorrt_rtx")
    from engines.check import check_bundle
    from engines.config import BuildConfig

    report = check_bundle(BuildConfig(bundle, max_batch=2, max_prefill=32))
    assert not report.problems


def test_every_linear_may_have_float_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one with a bias (qkv) and the one whose output is the logits."""
    pytest.importorskip("tensorrt_rtx")
    from engines.check import check_bundle
    from engines.config import BuildConfig

    monkeypatch.setattr("export.quantize.smoothquant.loud_channels", lambda _: [np.arange(4)])
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
    assert all(linear.float_channels == (0, 1, 2, 3) for linear in linears.values())
    graph = load(tmp_path / "bundle" / "decoder.onnx").graph
    producers = {name: node for node in graph.node for name in node.output}
    outputs = {name: "logits" if name == "lm_head" else f"{name}.out" for name in linears}
    for name, output in outputs.items():
        added = {name for node in graph.node if node.op_type == "Add" for name in node.input}
        assert {f"{name}.product", f"{name}.float_product"} <= added
        assert producers[output].op_type == "Add"
    assert not check_bundle(BuildConfig(tmp_path / "bundle", max_batch=2, max_prefill=32)).problems


def test_rotation_unties_the_head(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True)
    manifest = export_checkpoint(
        ExportConfig(source=str(source), output=tmp_path / "b", quant="fp16", rotate=True)
    )
    assert manifest.quantization.rotated
    assert not manifest.model.tied_embeddings


def test_options_without_effect_are_refused(tmp_path: Path):
    source = str(write_checkpoint(tmp_path / "model", "llama"))
    config = ExportConfig(source=source, output=tmp_path / "b", quant="int8-w8a8", method="awq")
    with pytest.raises(ConfigError, match="no layer is INT4"):
        export_checkpoint(config)

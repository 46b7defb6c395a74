"""The recipe int8-w8a8: its graph, its integers, its kernels on the CPU and in TensorRT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edge.errors import ConfigError
from edge.manifest import read_manifest
from export.pipeline import ExportConfig, export_checkpoint
from tests.tiny_models import write_checkpoint

TEXT = "hello world, what is the thing on the mat and the cat in a hat? " * 100


@pytest.fixture(scope="module", params=["native", "portable"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("w8a8")
    (root / "text.txt").write_text(TEXT)
    export_checkpoint(
        ExportConfig(
            source=str(write_checkpoint(root / "model", "qwen2")),
            output=root / "bundle",
            quant="int8-w8a8",
            group_size=32,
            keep=(("layers.1.down", "w8a8"),),
            dialect=request.param,
            kv_capacity=64,
            calibration=root / "text.txt",
            calibration_tokens=512,
        )
    )
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
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(bundle / "decoder.cpu.onnx"), options, providers=["CPUExecutionProvider"]
    )
    operators = Counter(node.op_type for node in load(tmp_path / "optimized.onnx").graph.node)
    integer = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger")
    assert sum(operators[name] for name in integer) == 7, operators


def test_onnx_runtime_computes_what_the_integers_say():
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
            make("DequantizeLinear", ["weight", "scale"], ["w"], axis=1),
            make("MatMul", ["d", "w"], ["y"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [5, 32])],
        [onnx.helper.make_tensor_value_info("y", 1, [5, 16])],
        [
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in (
                ("grid", grid), ("zero", np.int8(0)), ("weight", weight), ("scale", scale)
            )
        ],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
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

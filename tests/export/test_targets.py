"""``export --target``: dialect, types of scales, and no bundle that its TensorRT does not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import Constants
from edge.errors import ConfigError
from edge_lab.cli.inspect import inspect
from engines.rules.bundle import check_bundle_rules
from engines.rules.table import VERSIONS
from export.cli import export
from export.pipeline import ExportConfig, export_checkpoint
from export.targets import TARGETS
from tests.conftest import FEW_TOKENS, Checkpoints

# Without any layer of INT8 blocks, whatever the recipe's own rule for these layers is.
W8A8: dict[str, Any] = {
    "quant": "int8-w8a8",
    "keep": (("*.down", "float"), ("lm_head", "float")),
    "calibration_tokens": FEW_TOKENS,
}


def write(checkpoints: Checkpoints, output: Path, **options: Any) -> Path:
    config = ExportConfig(
        source=str(checkpoints("qwen2")), output=output, kv_capacity=64, **options
    )
    export_checkpoint(config)
    return output


def input_scale_types(bundle: Path, graph: str) -> set[str]:
    data = OnnxFile((bundle / graph).read_bytes())
    constants = Constants(data, bundle)
    found = set()
    for node in data.nodes:
        if node.op_type == "QuantizeLinear":
            constant = constants.get(node.inputs[1])
            assert constant is not None
            found.add(constant.dtype)
    return found


@pytest.mark.parametrize(
    ("target", "dialect"),
    [("jetpack6", "portable"), ("jetpack7", "native"), ("trt11", "native"), ("cpu", "native")],
)
def test_the_target_chooses_the_dialect(
    tiny_checkpoints: Checkpoints, tmp_path: Path, target: str, dialect: str
) -> None:
    bundle = write(tiny_checkpoints, tmp_path / target, quant="fp16", target=target)
    manifest = read_manifest(bundle)
    assert manifest.dialect == dialect
    assert manifest.tensorrt is not None
    assert set(TARGETS[target].versions) <= set(manifest.tensorrt)


def test_every_target_names_versions_of_the_table() -> None:
    names = {version.name for version in VERSIONS}
    assert all(set(target.versions) <= names for target in TARGETS.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "jetpack6", "dialect": "native"}, "jetpack6 contradicts --dialect native"),
        ({"target": "jetpack5"}, "--target jetpack5 is unknown; use jetpack6"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig(source="missing", output=tmp_path, **options)


def test_a_dialect_that_the_target_takes_too_is_written(tmp_path: Path) -> None:
    config = ExportConfig(source="m", output=tmp_path, target="jetpack7", dialect="portable")
    assert config.dialect_with("float") == "portable"
    assert ExportConfig(source="m", output=tmp_path).dialect_with("float") == "native"


@pytest.mark.parametrize(
    ("target", "types", "legal"),
    [("jetpack6", {"fp16"}, "10.3"), ("jetpack7", {"fp32"}, "10.16"), ("trt11", {"fp16"}, "11.4")],
)
def test_scales_of_inputs_have_the_type_that_the_target_needs(
    tiny_checkpoints: Checkpoints, tmp_path: Path, target: str, types: set[str], legal: str
) -> None:
    bundle = write(tiny_checkpoints, tmp_path / "bundle", target=target, **W8A8)
    assert input_scale_types(bundle, "decoder.onnx") == types
    assert input_scale_types(bundle, "decoder.cpu.onnx") == {"fp32"}
    assert legal in (read_manifest(bundle).tensorrt or ())


def test_wide_scales_compute_the_same(tiny_checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Both graphs in ONNX's own reference; where FP16 rounds a quotient, an integer may differ."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    outputs = []
    for target in ("jetpack6", "jetpack7"):
        bundle = write(
            tiny_checkpoints, tmp_path / target, target=target, dialect="portable", **W8A8
        )
        model = onnx.load(str(bundle / "decoder.onnx"))
        session = reference.ReferenceEvaluator(model)
        outputs.append(session.run(["logits"], feeds(model))[0])
    narrow, wide = (output.astype(np.float32) for output in outputs)
    assert np.isfinite(narrow).all()
    assert np.linalg.norm(narrow - wide) < 0.03 * np.linalg.norm(wide)


def feeds(model: Any) -> dict[str, Any]:
    sizes = {"batch": 1, "seq": 2, "num_logits": 2, "kv": 1}
    rng = np.random.default_rng(0)
    made = {}
    for info in model.graph.input:
        dims = info.type.tensor_type.shape.dim
        shape = [sizes.get(dim.dim_param, dim.dim_value) for dim in dims]
        made[info.name] = (rng.standard_normal(shape) * 0.1).astype(np.float16)
    made["position_ids"] = made["logits_indices"] = np.array([[0, 1]])
    made["past_lengths"] = made["kv_positions"] = np.array([0])
    return made


def test_a_recipe_that_the_target_does_not_take_leaves_what_it_calibrated(
    tiny_checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W8A8 with the narrow scales of another target is what 10.16 may not build."""
    monkeypatch.setitem(TARGETS, "jetpack7", TARGETS["jetpack7"].__class__(("native",), ("10.16",)))
    with pytest.raises(ConfigError, match=r"--target jetpack7: TensorRT 10\.16.*int8-half-scale"):
        write(tiny_checkpoints, tmp_path / "bundle", target="jetpack7", **W8A8)
    # Another target goes on with it.
    assert [path.name for path in tmp_path.iterdir()] == [".bundle.edge-llm-calibration"]


def test_the_manifest_says_what_the_rules_say(
    tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    bundle = write(tiny_checkpoints, tmp_path / "bundle", quant="fp16", dialect="native")
    verdicts = check_bundle_rules(bundle, list(VERSIONS))
    legal = tuple(verdict.version.name for verdict in verdicts if verdict.legal)
    assert read_manifest(bundle).tensorrt == legal
    assert "10.3" not in legal


def test_export_and_inspect_tell_it(tiny_checkpoints: Checkpoints, tmp_path: Path) -> None:
    arguments = [str(tiny_checkpoints("qwen2")), "--quant", "fp16", "--target", "jetpack6"]
    bundle = tmp_path / "bundle"
    told = CliRunner().invoke(export, [*arguments, "-o", str(bundle)], catch_exceptions=False)
    assert "TensorRT: legal for 10.3, 10.7, 10.13, 10.16, 11.1, 11.4, rtx" in told.stdout
    shown = CliRunner().invoke(inspect, [str(bundle)], catch_exceptions=False).stdout
    assert "legal for 10.3" in shown
    summary = CliRunner().invoke(inspect, [str(bundle), "--json"], catch_exceptions=False).stdout
    assert json.loads(summary)["tensorrt"][0] == "10.3"
    again = [*arguments, "-o", str(bundle), "--force", "--json"]
    result = CliRunner().invoke(export, again, catch_exceptions=False)
    assert json.loads(result.stdout)["dialect"] == "portable"


@pytest.mark.slow
def test_wide_scales_compile_to_int8_products(
    tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from engines.check.check import check_bundle
    from engines.config import BuildConfig

    bundle = write(tiny_checkpoints, tmp_path / "bundle", target="jetpack7", **W8A8)
    report = check_bundle(BuildConfig(bundle, max_prefill=32))
    assert report.problems == ()
    assert {weight.dtype: weight.count for weight in report.weights}["int8"] == 6

"""Scales of INT8 inputs in FP32: made at build time, the same answers, legal, a rung of a build."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from edge.bundle import io_spec
from edge.bundle.engine_file import read_engine_info
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.errors import BuildError, IntegrityError
from edge_lab.cli.inspect import inspect
from engines.build_plan import plan_build
from engines.builder import build as build_module
from engines.builder.build import build_engine
from engines.builder.fallbacks import make_rungs
from engines.builder.target import Target
from engines.cli import build
from engines.compiler import compat
from engines.compiler.compat import Compiler, TensorRT
from engines.config import BuildConfig
from engines.graph.adapt import has_half_scales, widen_scales
from engines.rules.check import check_graph
from engines.rules.facts import QUANTIZING, GraphFacts
from engines.rules.table import VERSIONS
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import Bundles, Checkpoints

REASON = "no INT8 with half scales (planted)"
DIALECTS = ("native", "portable")


def graph_of(bundle: Path) -> bytes:
    return (bundle / "decoder.onnx").read_bytes()


def logits(bundle: Path, data: bytes, path: Path) -> NDArray[np.float16]:
    """What ONNX Runtime computes of a graph whose weights are in a bundle."""
    manifest = read_manifest(bundle)
    path.mkdir()
    (path / "decoder.onnx").write_bytes(data)
    shutil.copy(bundle / "decoder.onnx.data", path)  # ONNX Runtime follows no links
    plain = ort.SessionOptions()  # as it stands: fused kernels differ by the types around them
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path / "decoder.onnx", plain, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    sizes = {io_spec.BATCH: 1, io_spec.SEQ: 24, io_spec.NUM_LOGITS: 24, io_spec.KV: 64}
    feed: dict[str, Any] = {}
    for spec in io_spec.decoder_inputs(manifest.model, manifest.dialect, "fp16", 64):
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        feed[spec.name] = (random.standard_normal(shape) / 4).astype(np.float16)
    for name in (io_spec.POSITION_IDS, io_spec.LOGITS_INDICES):
        feed[name] = np.arange(24)[None]
    feed[io_spec.KV_POSITIONS] = np.arange(64)
    feed[io_spec.PAST_LENGTHS] = np.zeros(1, np.int64)
    found: NDArray[np.float16] = session.run([io_spec.LOGITS], feed)[0]
    return found


def export(source: Path, output: Path, **options: Any) -> Path:
    config = {"quant": "int8-w8a8", "kv_capacity": 64, "calibration_tokens": 256, **options}
    export_checkpoint(ExportConfig(source=str(source), output=output, **config))
    return output


def test_the_answers_are_those_of_an_export_with_wide_scales(
    tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = tiny_checkpoints("qwen2")
    stored = export(source, tmp_path / "stored", dialect="portable")
    wide = export(source, tmp_path / "wide", target="jetpack7", dialect="portable")
    widened = widen_scales(graph_of(stored), stored)
    found = logits(stored, widened, tmp_path / "a")
    assert np.array_equal(found, logits(wide, graph_of(wide), tmp_path / "b"))
    before = logits(stored, graph_of(stored), tmp_path / "c").astype(np.float32)
    # Divided in FP16, a value often lies just between two integers, and then goes to the even one:
    # some inputs differ by one step of INT8.
    a, b = found.astype(np.float32)[0], before[0]
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_version_that_has_the_operators_takes_it(dialect: str, tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", dialect, "int8-w8a8")
    data = graph_of(bundle)
    widened = widen_scales(data, bundle)
    before, after = (check_graph(each, bundle, VERSIONS) for each in (data, widened))
    refusals = {
        verdict.version.name: {finding.rule for finding in verdict.refusals} for verdict in before
    }
    assert "int8-half-scale" in refusals["10.16"]
    for verdict in after:
        left = refusals[verdict.version.name] - {"int8-half-scale"}
        assert {finding.rule for finding in verdict.refusals} == left


@pytest.mark.parametrize("dialect", DIALECTS)
def test_only_what_is_int8_is_widened(dialect: str, tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", dialect, "int8-w8a8")
    data = graph_of(bundle)
    facts = GraphFacts(OnnxFile(widen_scales(data, bundle)), bundle)
    for quant in facts.quant_nodes:
        assert facts.dtype(quant.scale) == ("fp16" if quant.dtype == "int4" else "fp32")
        if quant.dequantizes and quant.data_shape and quant.dtype == "int8":
            original = GraphFacts(OnnxFile(data), bundle).constants
            stored = original.values(quant.scale.removesuffix(".fp32"))
            values = facts.constants.values(quant.scale)
            assert stored is not None
            assert values is not None
            assert np.array_equal(values, stored.astype(np.float32))
    products = [node for node in facts.nodes if node.op_type == "MatMul" and node.input(1)]
    assert {facts.dtype(node.input(1)) for node in products} == {"fp16"}
    again = widen_scales(widen_scales(data, bundle), bundle)
    assert not has_half_scales(again)
    assert again == widen_scales(data, bundle)


def test_a_quantizing_node_without_a_scale_is_left_to_the_rules(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int8-w8a8")
    graph = OnnxFile(graph_of(bundle))
    for node in graph.nodes:
        if node.op_type in QUANTIZING:
            del node.inputs[1:]
    data = graph.serialize()
    assert not has_half_scales(data)
    assert OnnxFile(widen_scales(data, bundle)).nodes == graph.nodes


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no graph")])
def test_a_graph_that_is_missing_or_damaged_is_no_rung(
    damage: Callable[[Path], object], tiny_bundles: Bundles, tmp_path: Path
) -> None:
    kept = tiny_bundles("qwen2", "portable", "int8-w8a8")
    bundle = Path(shutil.copytree(kept, tmp_path / "bundle"))
    damage(bundle / "decoder.onnx")
    asked = plan_build(BuildConfig(bundle, max_prefill=32), read_manifest(bundle))
    with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
        make_rungs(asked, TensorRT(None, "tensorrt", "10.3"))


def test_the_rungs_of_a_build(
    tiny_bundles: Bundles, tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    def names(bundle: Path) -> list[str]:
        plan = plan_build(BuildConfig(bundle, max_prefill=32), read_manifest(bundle))
        rungs = make_rungs(plan, TensorRT(None, "tensorrt", "10.16"))
        return [f"{rung.scales} {rung.attention}" for rung in rungs]

    stored = ["stored decomposed"]
    assert names(tiny_bundles("qwen2", "native", "int4")) == stored
    assert names(tiny_bundles("qwen2", "native", "int8-w8a8")) == [
        *stored,
        "fp32 decomposed",
    ]
    wide = export(tiny_checkpoints("qwen2"), tmp_path / "wide", target="jetpack7")
    assert names(wide) == stored


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Target:
    """TensorRT for RTX with one fault more: it takes INT8 with FP32 scales only."""
    pytest.importorskip("tensorrt_rtx")
    original = Compiler.parse

    def refuse(self: Compiler, graph: bytes, *args: Any, **kwargs: Any) -> Any:
        if has_half_scales(graph):
            raise BuildError(REASON)
        return original(self, graph, *args, **kwargs)

    monkeypatch.setattr(Compiler, "parse", refuse)
    target = Target(compat.load("tensorrt-rtx"), None, "8.6")
    monkeypatch.setattr(build_module, "find_target", lambda **_options: target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_build_goes_on_with_wide_scales(
    dialect: str, tiny_bundles: Bundles, tmp_path: Path, refusing: Target
) -> None:
    source = tiny_bundles("qwen2", dialect, "int8-w8a8")
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    arguments = [str(bundle), "--max-prefill", "32", "--json"]
    result = json.loads(CliRunner().invoke(build, arguments, catch_exceptions=False).stdout)
    assert result["scales"] == "fp32"
    assert {each["reason"] for each in result["refused"]} == {REASON}
    assert {each["scales"] for each in result["refused"]} == {"stored"}
    directory = Path(result["engine"])
    info = read_engine_info(directory)
    assert info.scales == "fp32"
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "widened to FP32" in " ".join(shown.split())
    assert "scales in FP32" in (directory / "build.log").read_text()
    assert not build_engine(BuildConfig(bundle, max_prefill=32), target=refusing).built
    assert graph_of(bundle) == graph_of(source)


# Takes INT8 with FP32 scales only; ``{always}`` makes it refuse those too.
TRTEXEC = """\
#!{python}
import pathlib, sys

from engines.graph.adapt import has_half_scales

given = dict(word.partition("=")[::2] for word in sys.argv[1:])
graph = pathlib.Path(given["--onnx"])
print("&&&& RUNNING TensorRT.trtexec [TensorRT v101601] # trtexec")
if has_half_scales(graph.read_bytes()) or {always}:
    print("[E] {reason}")
    sys.exit("&&&& FAILED TensorRT.trtexec")
weights = graph.with_name("decoder.onnx.data").stat().st_size
pathlib.Path(given["--saveEngine"]).write_bytes(bytes(weights))
print("&&&& PASSED TensorRT.trtexec [TensorRT v101601] # trtexec")
"""


@pytest.fixture
def by_trtexec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(bundle: Path, version: str, *, always: bool = False) -> Any:
        binary = tmp_path / "trtexec"
        binary.write_text(
            TRTEXEC.format(python=sys.executable, always=always, reason=REASON), "utf-8"
        )
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        target = Target(TensorRT(None, "tensorrt", version), None, "8.7")
        return build_engine(BuildConfig(bundle, max_prefill=32), target=target, via="trtexec")

    return run


@pytest.mark.parametrize(
    ("version", "reason", "runs"),
    [("10.13", REASON, 2), ("10.16", "does not take", 1)],  # its rules refuse them before it runs
)
def test_trtexec_goes_on_with_wide_scales(
    version: str, reason: str, runs: int, tiny_bundles: Bundles, tmp_path: Path, by_trtexec: Any
) -> None:
    source = tiny_bundles("qwen2", "portable", "int8-w8a8")
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    result = by_trtexec(bundle, version)
    assert result.info.scales == "fp32"
    (refused,) = result.info.refused
    assert reason in refused.reason
    assert refused.scales == "stored"
    log = (result.directory / "build.log").read_text()
    assert [log.count(word) for word in ("--saveEngine=", "PASSED")] == [runs, 1]
    assert not by_trtexec(bundle, version).built
    assert not list(bundle.glob("engines/.trtexec-*"))


def test_trtexec_that_takes_neither_says_why(
    tiny_bundles: Bundles, tmp_path: Path, by_trtexec: Any
) -> None:
    for quant, runs in (("int4", 1), ("int8-w8a8", 2)):
        source = tiny_bundles("qwen2", "portable", quant)
        bundle = Path(shutil.copytree(source, tmp_path / quant))
        with pytest.raises(BuildError, match="planted"):
            by_trtexec(bundle, "10.13", always=True)
        (log,) = bundle.glob("engines/*/build.log")
        assert log.read_text().count("--saveEngine=") == runs

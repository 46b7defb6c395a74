"""A bundle's vision encoder becomes a plan beside the decoder's, whatever builds engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from edge.bundle.engine_file import ENGINE_JSON, check_engine, open_plan, read_engine_info
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.errors import BuildError, BundleError
from edge.vision.plan import vision_plan
from edge.vision.section import read_vision
from engines.build_plan import plan_build
from engines.builder import encoder
from engines.builder.build import build_engine
from engines.builder.encoder import encoder_command, encoder_profile
from engines.builder.target import Target
from engines.check.check import check_bundle
from engines.cli import build as build_verb
from engines.compiler import compat
from engines.config import BuildConfig
from engines.rules.bundle import check_bundle_rules
from engines.rules.table import VERSIONS
from engines.trtexec.command import TrtexecResult
from export.pipeline import ExportConfig, export_checkpoint
from tests.makers.manifests import replace_file
from tests.makers.tiny_internvl import write_internvl_checkpoint
from tests.makers.tiny_vision import write_vision_checkpoint

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vision")
    checkpoint = write_vision_checkpoint(directory / "checkpoint")
    output = directory / "bundle"
    config = ExportConfig(
        str(checkpoint), output=output, quant="fp16", vision_quant="int8", dialect="portable"
    )
    export_checkpoint(config)
    return output


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def config(bundle: Path) -> BuildConfig:
    return BuildConfig(bundle, max_prefill=32)


def target() -> Target:
    return Target(compat.load("tensorrt-rtx"), None, "8.6")


@pytest.mark.slow
def test_both_graphs_are_compiled_and_audited(exported: Path, monkeypatch: pytest.MonkeyPatch):
    report = check_bundle(config(exported))
    assert report.problems == ()
    assert report.encoder_plan_bytes is not None
    assert report.encoder_plan_bytes > 100_000

    def other(manifest: Any) -> Any:
        section = read_vision(manifest)
        assert section is not None
        return msgspec.structs.replace(section, rows_per_tile=9)

    monkeypatch.setattr(encoder, "read_vision", other)
    (problem,) = check_bundle(config(exported)).problems
    assert "the encoder's outputs are [('image_rows', 'fp16', (-1, 4, 64))], expected" in problem


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp16", "int8"])
def test_an_internvl_compiles_and_is_legal_for_every_version(tmp_path: Path, quant: str):
    checkpoint = write_internvl_checkpoint(tmp_path / "checkpoint", "qwen3", mean_pooling=False)
    bundle = tmp_path / "bundle"
    options: Any = {"quant": "fp16", "vision_quant": quant, "dialect": "portable"}
    export_checkpoint(ExportConfig(str(checkpoint), output=bundle, **options))
    assert check_bundle(config(bundle)).problems == ()
    assert all(verdict.legal for verdict in check_bundle_rules(bundle, list(VERSIONS)))


@pytest.mark.slow
def test_the_encoders_plan_is_beside_the_decoders_and_in_its_record(bundle: Path):
    result = build_engine(config(bundle), target=target())
    assert result.built
    info = read_engine_info(result.directory)
    own = vision_plan(result.directory, info)
    with open_plan(result.directory, own) as plan:
        assert len(plan) == own.plan_bytes
    assert own.plan != info.plan
    assert {"vision.onnx", "vision.onnx.data", "decoder.onnx"} < info.sources.keys()
    names = {path.name for path in result.directory.iterdir()}
    assert names == {info.plan, own.plan, "engine.json", "build.log"}
    assert not build_engine(config(bundle), target=target()).built

    (result.directory / own.plan).write_bytes(b"damaged")
    assert build_engine(config(bundle), target=target()).built
    with open_plan(result.directory, vision_plan(result.directory, result.info)):
        pass


@pytest.mark.slow
def test_an_engine_of_another_encoder_does_not_fit(bundle: Path):
    result = build_engine(config(bundle), target=target())
    manifest = read_manifest(bundle)
    fits = {
        "flavour": "tensorrt-rtx",
        "tensorrt_version": result.info.tensorrt_version,
        "compute_capability": "8.6",
    }
    check_engine(result.directory, result.info, manifest, **fits)  # type: ignore[arg-type]
    replace_file(bundle, "vision.onnx.data", b"another")
    with pytest.raises(BundleError, match=r"another vision.onnx.data"):
        check_engine(
            result.directory,
            result.info,
            read_manifest(bundle),
            **fits,  # type: ignore[arg-type]
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "said"),
    [
        (None, "has no vision encoder; build it again with: edge-llm build"),
        ({"plan": "../x.plan"}, "names a file outside its directory"),
        ({"plan_bytes": 0}, "engine.json is damaged"),
    ],
)
def test_a_record_that_cannot_be_used_says_how_to_mend_it(
    bundle: Path, section: dict[str, Any] | None, said: str
):
    result = build_engine(config(bundle), target=target())
    path = result.directory / ENGINE_JSON
    record = json.loads(path.read_text())
    found = record["extras"].pop("vision")
    if section is not None:
        record["extras"]["vision"] = {**found, **section}
    path.write_text(json.dumps(record))
    with pytest.raises(BundleError, match=said):
        vision_plan(result.directory, read_engine_info(result.directory))


@pytest.mark.slow
def test_both_graphs_are_checked_by_the_rules(bundle: Path):
    assert all(verdict.legal for verdict in check_bundle_rules(bundle, list(VERSIONS)))
    graph = OnnxFile((bundle / "vision.onnx").read_bytes())
    (tanh, *_) = [node for node in graph.nodes if node.op_type == "Tanh"]
    tanh.op_type = "Swish"
    replace_file(bundle, "vision.onnx", graph.serialize())
    legal = {
        str(each.version.name): each.legal for each in check_bundle_rules(bundle, list(VERSIONS))
    }
    assert legal == {
        **dict.fromkeys(("10.3", "10.7", "10.13", "10.16", "rtx"), False),
        **dict.fromkeys(("11.1", "11.4"), True),
    }
    with pytest.raises(BuildError, match=r"does not take .*Swish"):
        build_engine(config(bundle), target=target())
    assert not list((bundle / "engines").glob("*/engine.json"))


def test_trtexec_builds_it_by_a_line_of_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[list[str]] = []

    def run(argv: list[str], on_line: Any) -> TrtexecResult:
        lines.append(argv)
        (plan,) = (word.partition("=")[2] for word in argv if word.startswith("--saveEngine="))
        Path(plan).write_bytes(f"plan {len(lines)}".encode() * 100_000)
        on_line("&&&& PASSED")
        return TrtexecResult(1.0)

    monkeypatch.setattr("engines.builder.by_trtexec.run_trtexec", run)
    monkeypatch.setattr("engines.builder.encoder.run_trtexec", run)
    rt = compat.TensorRT(None, "tensorrt", "10.16")
    result = build_engine(config(bundle), target=Target(rt, None, "8.6"), via="trtexec")
    own = vision_plan(result.directory, result.info)
    assert (result.directory / own.plan).read_bytes() == b"plan 2" * 100_000
    decoder, second = lines
    assert decoder[1].endswith("decoder.onnx")
    assert second[1] == f"--onnx={bundle / 'vision.onnx'}"
    shapes = [word for word in second if "Shapes=" in word]
    assert shapes == [
        "--minShapes=pixel_values:1x3x32x32",
        "--optShapes=pixel_values:1x3x32x32",
        "--maxShapes=pixel_values:17x3x32x32",
    ]
    assert not list((bundle / "engines").glob(".trtexec-*"))


def test_both_lines_are_printed(bundle: Path):
    options = [str(bundle), "--print-trtexec", "--trt", "10.16", "--json"]
    result = CliRunner().invoke(build_verb, options, catch_exceptions=False)
    printed = json.loads(result.stdout)
    manifest = read_manifest(bundle)
    section = read_vision(manifest)
    assert section is not None
    wanted = encoder_command(plan_build(BuildConfig(bundle), manifest), section, (10, 16))
    assert printed["trtexec_vision"] == wanted
    assert "--saveEngine=vision.plan" in wanted
    assert encoder_profile(section).inputs["pixel_values"].max == (17, 3, 32, 32)

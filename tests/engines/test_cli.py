from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from edge.bundle.engine_file import ENGINE_JSON, WeightBytes
from edge.bundle.manifest import read_manifest
from edge.device.gpu import Gpu
from edge.errors import ConfigError
from edge_lab.cli.inspect import inspect
from engines.builder import build as build_module
from engines.builder import variant
from engines.builder.audit import Audit
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.check import check
from engines.cli import build
from engines.cli import check as check_verb
from engines.compiler import compat
from engines.config import BuildConfig
from tests.conftest import Bundles
from tests.standins.inspector import inspector_json

pytest.importorskip("tensorrt_rtx")
SIZE = ["--max-prefill", "32"]


@pytest.fixture(scope="module")
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2", "native", "int4")


def run(command, *arguments: str):
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False)


@pytest.mark.slow
def test_check_reports_as_json_and_as_a_table(bundle: Path) -> None:
    result = run(check_verb, str(bundle), *SIZE, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["attentions"] == 2
    assert {weight["dtype"] for weight in report["weights"]} == {"int4"}
    table = run(check_verb, str(bundle), *SIZE, "--sm", "120").stdout
    assert "sm 12.0" in table
    assert table.rstrip().endswith("passed")


@pytest.mark.slow
@pytest.mark.usefixtures("slow_clock")
def test_check_prints_lines_without_a_terminal(bundle: Path) -> None:
    result = run(check_verb, str(bundle), *SIZE, "--json")
    lines = result.stderr.splitlines()
    for step in ("hash", "parse", "build"):
        assert any(line.startswith(f"{step}: 100 %") for line in lines), lines
    assert any(" so far, about " in line for line in lines)
    assert len(result.stdout.splitlines()) == 1


def test_a_fault_is_printed_and_is_an_exit_code(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = ("layers.0.attended has no mask",)
    monkeypatch.setattr(variant, "audit_network", lambda *_args: Audit(faults, (), (), 0))
    result = run(check_verb, str(bundle), *SIZE)
    assert result.exit_code == 65
    assert "FAULT: layers.0.attended has no mask" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workspace", "lots"], "512M"),
        (["--kv-buckets", "1,two"], "512,1024,4096"),
        (["--trt", "10.3"], "--print-trtexec"),
        (["--timing-cache", "/no/such/t.cache"], "t.cache cannot be written: /no/such is no dir"),
    ],
)
def test_options_that_make_no_sense(bundle: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(build, str(bundle), *SIZE, *arguments)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1G", 1 << 30), ("512M", 512 << 20), ("2 GiB", 2 << 30), ("1048576", 1 << 20)],
)
def test_sizes(bundle: Path, text: str, num_bytes: int) -> None:
    context = build.make_context("build", [str(bundle), "--workspace", text])
    assert context.params["workspace_bytes"] == num_bytes


def test_the_trtexec_line_is_printed_without_tensorrt(bundle: Path) -> None:
    result = run(build, str(bundle), *SIZE, "--print-trtexec", "--trt", "10.16", "--json")
    line = json.loads(result.stdout)["trtexec"]
    assert line[0] == "trtexec"
    assert f"--onnx={bundle / 'decoder.onnx'}" in line


def test_build_and_inspect(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    target = Target(compat.load("tensorrt-rtx"), None, "8.6")
    monkeypatch.setattr(build_module, "find_target", lambda **_options: target)
    built = json.loads(run(build, str(copy), *SIZE, "--json").stdout)
    assert built["built"] is True
    assert "is up to date" in run(build, str(copy), *SIZE).stdout
    directory = built["engine"]
    shown = json.loads(run(inspect, directory, "--json").stdout)
    assert shown["weights_as_exported"] is True
    assert shown["verified"] is True
    assert shown["compiled"] == []
    table = run(inspect, directory, "--layers").stdout
    assert "int4 weights" in table
    assert "kv_cache_update" in table
    assert "Layers of the engine: not known: it was compiled without a GPU" in table
    assert f"edge-llm build {copy}" in table


@pytest.mark.slow
def test_inspect_shows_the_layers_that_the_build_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    gpu = Gpu("a GPU", "8.6")
    target = Target(compat.load("tensorrt-rtx"), gpu, "8.6")
    text = inspector_json(read_manifest(copy), unpacked=("lm_head",))
    monkeypatch.setattr(compat, "inspect_plan", lambda *_arguments: [text])
    result = build_engine(BuildConfig(copy, max_prefill=32, force=True), target=target)
    prefill, decode = result.info.compiled
    assert (prefill.profile, decode.profile) == ("prefill", "decode")
    assert decode.products == {"fp16": 1, "int4": 8}
    assert decode.unpacking == 1
    shown = json.loads(run(inspect, str(result.directory), "--layers", "--json").stdout)
    assert shown["layer_table"]["profiles"] == ["prefill", "decode"]
    assert len(shown["layer_table"]["layers"]) == 2 * decode.layers
    assert "layer_table" not in json.loads(run(inspect, str(result.directory), "--json").stdout)
    table = run(inspect, str(result.directory), "--layers").stdout
    assert "8 int4" in table
    assert "1 layers UNPACK weights" in " ".join(table.split())
    assert "gemv_w4a16_sm80" in table
    again = build_engine(
        BuildConfig(copy, max_prefill=24, force=True),
        target=dataclasses.replace(target, gpu=dataclasses.replace(gpu)),
    )
    assert again.directory == result.directory
    names = sorted(path.name for path in again.directory.iterdir())
    assert [name for name in names if name.endswith((".plan", ".layers.json"))] == [
        again.info.plan.replace(".plan", ".layers.json"),
        again.info.plan,
    ]  # those of the replaced engine are gone


def test_a_plan_that_cannot_be_opened_is_built_and_says_why(bundle: Path, tmp_path: Path) -> None:
    """TensorRT for RTX needs a driver to open a plan, and here is none."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    target = Target(compat.load("tensorrt-rtx"), Gpu("a GPU", "8.6"), "8.6")
    result = build_engine(BuildConfig(copy, max_prefill=32, force=True), target=target)
    assert result.info.compiled == ()
    assert "CUDA" in (result.info.compiled_unknown or "")
    assert "not known: " in run(inspect, str(result.directory), "--layers").stdout


def test_inspect_says_when_int4_is_not_int4(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    target = Target(compat.load("tensorrt-rtx"), None, "8.6")
    result = build_engine(BuildConfig(copy, max_prefill=32), target=target)
    unpacked = msgspec.structs.replace(
        result.info, weights=(WeightBytes("fp16", 9, 100), *result.info.weights[1:])
    )
    (result.directory / ENGINE_JSON).write_bytes(msgspec.json.encode(unpacked))
    shown = json.loads(run(inspect, str(result.directory), "--json").stdout)
    assert shown["weights_as_exported"] is False
    assert "NO: build the engine again" in run(inspect, str(result.directory)).stdout


@pytest.mark.slow
def test_check_needs_no_write_access(bundle: Path) -> None:
    check.check_bundle(BuildConfig(bundle, max_prefill=32))
    assert not (bundle / "engines").exists()


def test_the_orin_cannot_be_compiled_for_here_and_the_refusal_says_what_can():
    with pytest.raises(ConfigError) as caught:
        run(check_verb, ".", "--sm", "87")
    for word in ("the Orin's", "has 80, 86, 89, 120", "--sm 86 is closest", "--trt 10.3"):
        assert word in str(caught.value)
    assert "'88' is not one of '80', '86'" in run(check_verb, ".", "--sm", "88").output

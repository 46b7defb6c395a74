"""``export --verify``: a bundle that is not good enough never takes its place."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge.bundle.manifest import read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DependencyError,
    EdgeError,
    GateError,
    ResourceError,
)
from edge_make.target import beside
from export import bundle as bundle_writer
from export import pipeline, verify
from export.cli import export as export_verb
from export.pipeline import ExportConfig, export_checkpoint
from export.sources import opening, vocabulary
from tests.conftest import RUNNABLE
from tests.makers.tiny_adapters import write_adapter
from tests.makers.tiny_models import write_checkpoint

# int4 of white noise is far from float, int8 is near: measured KL 0.4 and 0.004.
LOOSE, STRICT = {"kl_mean": 1.5}, {"kl_mean": 0.05, "top1_agreement": 0.999}
INT4 = ("--quant", "int4", "--method", "rtn")  # a calibration takes longer than all the rest


@pytest.fixture(autouse=True)
def _fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "VERIFY_TOKENS", 300)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-R1", "qwen2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def gate_file(folder: Path, thresholds: dict[str, float]) -> Path:
    path = folder / "gate.json"
    path.write_text(json.dumps(thresholds))
    return path


def invoke(source: Path, output: Path, *arguments: object) -> Result:
    fixed = [str(source), "-o", str(output), "--kv-capacity", "64", "--verify"]
    fixed += ["--dialect", RUNNABLE]
    return CliRunner().invoke(export_verb, [*fixed, *map(str, arguments)])


@pytest.mark.slow
def test_a_bundle_that_passes_carries_its_figures(source: Path, place: Path, tmp_path: Path):
    gate = gate_file(tmp_path, LOOSE)
    result = invoke(source, place / "bundle", "--quant", "int8", "--gate", gate)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(place / "bundle")
    verify_files(place / "bundle", manifest)
    assert manifest.quality is not None
    text = manifest.quality["text"]
    assert 0 < text["kl_mean"] < 0.05
    assert text["tokens"] > 200
    assert text["gate"] == {"name": str(gate), "missed": []}
    assert text["reference"]["quantization"] == "fp16"
    assert f"verified as the CPU serves it: KL {text['kl_mean']:.4f}, top-1 " in result.stdout
    assert [path.name for path in place.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_a_missed_gate_leaves_no_bundle_and_code_3(source: Path, place: Path, tmp_path: Path):
    gate = gate_file(tmp_path, STRICT)
    result = invoke(source, place / "bundle", *INT4, "--gate", gate)
    assert result.exit_code == 3
    assert not result.stdout
    assert f"gate {gate} missed (kl_mean 0." in result.stderr
    assert "is above 0.05; top1_agreement 0." in result.stderr
    assert f"so {place / 'bundle'} was not written" in result.stderr
    assert not list(place.iterdir())


@pytest.mark.slow
def test_a_missed_gate_leaves_the_old_bundle(source: Path, place: Path, tmp_path: Path):
    output = place / "bundle"
    old = export_checkpoint(ExportConfig(source=str(source), output=output, quant="int8"))
    gate = gate_file(tmp_path, STRICT)
    assert invoke(source, output, *INT4, "--gate", gate, "--force").exit_code == 3
    assert read_manifest(output) == old
    verify_files(output, old)
    assert [path.name for path in place.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_the_figures_are_those_of_eval(source: Path, place: Path, tmp_path: Path):
    from edge_lab.cli.eval import evaluate

    gate = gate_file(tmp_path, LOOSE)
    assert invoke(source, place / "bundle", *INT4, "--gate", gate).exit_code == 0
    options: dict[str, Any] = {"source": str(source), "kv_capacity": 64, "dialect": RUNNABLE}
    export_checkpoint(ExportConfig(output=place / "float", quant="fp16", **options))
    arguments = [str(place / "bundle"), "--against", str(place / "float"), "--json"]
    arguments += ["--tokens", "300", "--window", "256"]
    result = CliRunner().invoke(evaluate, arguments)
    assert result.exit_code == 0, result.output
    stored = (read_manifest(place / "bundle").quality or {})["text"]
    found = json.loads(result.stdout)
    for name in ("kl_mean", "perplexity", "top1_agreement", "tokens"):
        assert found[name] == pytest.approx(stored[name], rel=1e-3), name


@pytest.mark.slow
def test_the_reference_has_the_same_adapter_and_vocabulary(
    source: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Against the plain model the tokens would differ, and the adapter would count as loss."""
    monkeypatch.setattr(vocabulary, "MULTIPLE", 4)
    adapter = write_adapter(tmp_path / "tuned", source, {"target_modules": ["q_proj", "up_proj"]})
    keep = tmp_path / "keep.txt"
    keep.write_text("hello world, what is the other thing?")
    result = invoke(
        source,
        place / "bundle",
        *("--quant", "int8", "--lora", adapter, "--vocab-keep", keep),
        *("--gate", gate_file(tmp_path, {"kl_mean": 0.05})),
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(place / "bundle")
    assert manifest.quality is not None
    assert manifest.quality["text"]["reference"]["name"] == "Tiny-R1+tuned"


@pytest.mark.slow
def test_stored_calibration_stays(source: Path, place: Path, tmp_path: Path):
    gate = gate_file(tmp_path, LOOSE)
    result = invoke(
        source,
        place / "bundle",
        *("--quant", "int8-w8a8", "--calibration-tokens", 512, "--gate", gate),
    )
    assert result.exit_code == 0, result.output
    quality = read_manifest(place / "bundle").quality
    assert quality is not None
    assert set(quality) == {"activation_peaks", "text"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "fp16"}, "--verify has nothing to measure with --quant fp16"),
        ({"quant": "int4", "gate": "int5"}, "unknown gate 'int5'"),
        ({"quant": "int4", "verify": False, "gate": "int4"}, "--gate int4 has no effect without"),
    ],
    ids=str,
)
def test_senseless_options_are_refused_before_any_work(
    source: Path, place: Path, options: dict[str, Any], message: str
):
    values: dict[str, Any] = {"verify": True, "dialect": RUNNABLE, **options}
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(ExportConfig(source=str(source), output=place / "bundle", **values))
    assert not list(place.iterdir())


def test_a_measurement_that_fails_is_no_pass(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    config = ExportConfig(
        source=str(source),
        output=place / "bundle",
        quant="int8",
        dialect=RUNNABLE,
        verify=True,
        kv_capacity=64,
    )
    with pytest.raises(BackendError, match=r"could not be verified \(exit code 1, see above\)"):
        export_checkpoint(config)
    assert not list(place.iterdir())


@pytest.mark.parametrize("kind", [ConfigError, BundleError, DependencyError, ResourceError])
def test_the_childs_error_keeps_its_class(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: type[EdgeError]
):
    """So a missing library is told from an engine that failed, also by the exit code."""
    child = place / "python"
    child.write_text(f"#!/bin/sh\nexit {kind.exit_code}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(kind, match=f"exit code {kind.exit_code}, see above") as caught:
        verify.verify_bundle(place, place, "int4", 64, place / "bundle")
    assert caught.value.exit_code == kind.exit_code


@pytest.mark.parametrize("float_type", ["fp16", "bf16"])
def test_the_reference_has_the_float_type_of_the_bundle(place: Path, float_type: Any):
    keep = (("layers.0.*", "int8"),)
    for options in ({"quant": float_type, "keep": keep}, {"quant": "int4", "dtype": float_type}):
        config = ExportConfig(source="x", output=place, verify=True, **options)
        assert config.float_reference().quant == float_type
        assert config.float_reference().float_type == config.float_type == float_type


class BegunError(Exception):
    """An export passed its checks."""


def begun(phase: str, *_: object) -> None:
    if phase == "calibrate":
        raise BegunError


CALIBRATED: dict[str, Any] = {
    "quant": "int8-w8a8",
    "calibration_tokens": 512,
    "dialect": RUNNABLE,
    "kv_capacity": 64,
}


def test_a_disk_without_room_for_the_float_model_is_refused_before_any_work(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    needed: list[int] = []
    monkeypatch.setattr(
        bundle_writer, "check_free_space", lambda _, required, *__: needed.append(required)
    )
    config = ExportConfig(source=str(source), output=place / "bundle", **CALIBRATED)
    with pytest.raises(BegunError):
        export_checkpoint(config, begun)
    monkeypatch.undo()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed[0] + (64 << 20)))
    with pytest.raises(BegunError):
        export_checkpoint(config, begun)
    message = f"{place} has .* but the bundle with the float model of --verify takes"
    with pytest.raises(ResourceError, match=message):
        export_checkpoint(dataclasses.replace(config, verify=True), begun)


def test_too_little_memory_for_both_models_is_refused_before_any_work(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verify, "read_available_memory_bytes", lambda: 1 << 20)
    config = ExportConfig(source=str(source), output=place / "bundle", verify=True, **CALIBRATED)
    with pytest.raises(ResourceError, match=r"need .* GB of memory together, .* or leave it out"):
        export_checkpoint(config, begun)
    assert not list(place.iterdir())


def test_a_report_without_room_for_the_float_model_names_no_hidden_directory(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")

    def fill_up(phase: str, *_: object) -> None:
        if phase == "hash":
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1 << 20))

    said: list[str] = []
    options: dict[str, Any] = {"quant": "int8", "report": True, "dialect": RUNNABLE}
    config = ExportConfig(source=str(source), output=place / "bundle", **options)
    export_checkpoint(config, fill_up, said.append)
    assert f"not measured: {place} has 1.0 MB free, but the float model takes" in said[-1]


def test_the_reference_is_of_the_same_commit(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    """A branch may move in the hours of a calibration."""
    commits = ["a" * 40, "b" * 40]
    measured: list[str | None] = []

    def download(*_: object) -> tuple[Path, str]:
        return source, commits.pop(0)

    def note(staged: Path, reference: Path, *_: object) -> None:
        measured.extend(read_manifest(bundle).source.revision for bundle in (staged, reference))

    monkeypatch.setattr(opening, "download", download)
    monkeypatch.setattr(pipeline, "verify_bundle", note)
    config = ExportConfig(
        source="owner/tiny", output=place / "bundle", quant="int8", verify=True, dialect=RUNNABLE
    )
    export_checkpoint(config)
    assert measured == ["a" * 40] * 2
    assert len(commits) == 1  # the hub was asked once


def test_files_of_a_killed_verification_are_removed(source: Path, place: Path):
    left = beside(place / "bundle", "scratch") / "reference"
    left.mkdir(parents=True)
    (left / "decoder.onnx").write_bytes(b"x")
    export_checkpoint(ExportConfig(source=str(source), output=place / "bundle", quant="int8"))
    assert [path.name for path in place.iterdir()] == ["bundle"]


def test_a_dialect_that_cannot_run_here_is_not_verified(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before any work: the measurement would fail after all of it."""
    monkeypatch.setattr("onnxruntime.__version__", "1.25.3")
    config = ExportConfig(source=str(source), output=place / "bundle", quant="int8", verify=True)
    message = r"--verify runs the bundle, but dialect native needs .* 1\.26 .*, found 1\.25\.3; .*"
    with pytest.raises(DependencyError, match=message + "export with --dialect portable"):
        export_checkpoint(config)
    assert not list(place.iterdir())


def test_a_bundle_for_another_machine_is_exported_with_a_warning(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    options: dict[str, Any] = {"source": str(source), "quant": "int8", "kv_capacity": 64}
    monkeypatch.setattr("onnxruntime.__version__", "1.25.3")
    export_checkpoint(ExportConfig(output=place / "portable", dialect="portable", **options))
    assert not caplog.messages
    export_checkpoint(ExportConfig(output=place / "native", **options))
    (line,) = caplog.messages
    assert "found 1.25.3; for this machine export with --dialect portable" in line


def test_a_gate_error_can_be_copied_and_pickled():
    error = GateError("gate int4 missed", {"kl_mean": 1.0})
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(twin), twin.figures) == (str(error), error.figures)

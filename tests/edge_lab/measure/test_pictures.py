"""A vision encoder is held to its twin on the CPU, and ``verify`` says when it differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edge.bundle.manifest import read_manifest
from edge_lab.cli.verify import verify
from edge_lab.measure.pictures import EncoderReport, drawn_tile, relative_error
from export.pipeline import ExportConfig, export_checkpoint
from tests.makers.manifests import replace_file
from tests.makers.tiny_vision import write_vision_checkpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vision")
    checkpoint = write_vision_checkpoint(directory / "checkpoint")
    options = {"quant": "fp16", "vision_quant": "int8", "kv_capacity": 256}
    export_checkpoint(
        ExportConfig(str(checkpoint), output=directory / "bundle", **options)  # type: ignore[arg-type]
    )
    return directory / "bundle"


def _verify(bundle: Path) -> tuple[int, dict[str, object], str]:
    arguments = [str(bundle), "--backend", "ort-cpu", "--decode-steps", "2"]
    machine = CliRunner().invoke(verify, [*arguments, "--json"], catch_exceptions=False)
    person = CliRunner().invoke(verify, arguments, catch_exceptions=False)
    assert person.exit_code == machine.exit_code
    return machine.exit_code, json.loads(machine.stdout), person.stdout


def test_both_graphs_of_an_encoder_agree(exported: Path):
    code, found, text = _verify(exported)
    assert (code, found["passed"]) == (0, True)
    vision = found["vision"]
    assert isinstance(vision, dict)
    assert 0 < vision["error"] < 0.03
    assert vision["limit"] == 0.05
    assert "rows of a picture differ by" in text


def test_a_graph_that_computes_something_else_is_a_miss(exported: Path, tmp_path: Path):
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    graph = onnx.load(bundle / "vision.onnx", load_external_data=False)
    (cubic,) = [each for each in graph.graph.initializer if each.name == "gelu.cubic"]
    cubic.CopyFrom(onnx.helper.make_tensor(cubic.name, cubic.data_type, [], [0.5]))
    replace_file(bundle, "vision.onnx", graph.SerializeToString())
    code, found, text = _verify(bundle)
    assert (code, found["passed"]) == (3, False)
    assert "MISSED: rows of a picture differ by" in text
    assert "1 thresholds missed" in text


def test_a_text_bundle_is_told_nothing_of_pictures(tmp_path: Path):
    from tests.makers.tiny_models import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "text", "llama")
    export_checkpoint(ExportConfig(str(checkpoint), output=tmp_path / "b", quant="fp16"))
    assert "vision" not in read_manifest(tmp_path / "b").extras
    _, found, text = _verify(tmp_path / "b")
    assert "vision" not in found
    assert "picture" not in text


def test_a_nan_does_not_pass():
    tile = drawn_tile(8)
    assert relative_error(tile, tile) == 0
    broken = np.full_like(tile, np.nan)
    assert not EncoderReport(relative_error(broken, tile), 0.01).passed
    assert EncoderReport(0.01, 0.01).passed

"""What an export says before it downloads or writes anything."""

from __future__ import annotations

import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge.bundle.manifest import read_manifest
from edge.bundle.quant_rules import Quant
from edge.errors import ResourceError
from edge_lab.planner.models import BUILT_IN
from export.config import ExportConfig
from export.forecast import Forecast, _likely_schemes, forecast_of_preview
from export.pipeline import export_checkpoint
from export.quantize.from_source import source_schemes
from export.recipes import RECIPES
from export.sources.checkpoint_text import read_json
from export.sources.download import Download, Preview
from export.sources.hf_directory import HfDirectory
from export.sources.quantization_config import read_quantization
from tests.makers.quantized_golden import QuantizedGolden
from tests.makers.tiny_models import write_checkpoint

SPEC = BUILT_IN["deepseek-r1:1.5b"].spec
WEIGHTS_BYTES = 3_554_214_752  # model.safetensors of the 1.5B, in bf16
Usage = namedtuple("Usage", "total used free")


def of_1_5b(tmp_path: Path, num_bytes: int | None = WEIGHTS_BYTES, **options: Any) -> Forecast:
    config = ExportConfig("owner/name", tmp_path / "bundles" / "b", report=True)
    download = Download(num_bytes, tmp_path / "cache" / "hub")
    config = replace(config, **options)
    return forecast_of_preview(config, config, Preview("owner/name", SPEC, None, download))


def test_a_person_reads_the_download_the_disk_and_the_time(tmp_path: Path):
    disk, time = of_1_5b(tmp_path).lines()
    assert disk.startswith(f"3.55 GB to download to {tmp_path}/cache/hub; the bundle takes about ")
    found = re.findall(r"([\d.]+) GB of disk at the peak, ([\d.]+) GB after", disk)
    peak, after = map(float, found[0])
    assert after == pytest.approx(3.55 + 1.72, abs=0.02)
    tokens = RECIPES["default"].calibration_tokens
    states = 2 * 2 * 4 * tokens * SPEC.hidden_size  # of the float and the rounded model
    assert peak == pytest.approx(after + 3.65 + states / 1e9, abs=0.02)  # and the float model
    assert re.fullmatch(
        r"int4, awq\+gptq: expect about \d+ min on two cores, measuring included; sooner, but "
        r"loses more: --fast \(about \d+ s\), --method awq \(about \d+ min\)",
        time,
    )


def test_fast_takes_a_minute_at_1_5b(tmp_path: Path):
    found = of_1_5b(tmp_path, named="fast", report=False)
    assert found.recipe == "int4, rtn"
    assert found.seconds < 90
    assert not found.sooner
    assert "while it is made" not in found.lines()[0]
    assert found.reference_bytes == found.working_bytes == 0
    assert of_1_5b(tmp_path).sooner["--fast"] == found.seconds


def test_a_size_that_is_not_known_is_not_made_up(tmp_path: Path):
    found = of_1_5b(tmp_path, None)
    assert found.lines()[0].startswith("the size of the download is not known; ")
    assert found.as_dict()["peak_bytes"] is None
    found.check_disk(tmp_path / "bundles" / "b")
    assert of_1_5b(tmp_path, 0).lines()[0].startswith("already downloaded; the bundle takes ")


@pytest.mark.parametrize(("free_bytes", "fits"), [(6_500_000_000, True), (5_000_000_000, False)])
def test_a_disk_that_is_too_small_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, fits: bool
):
    """It holds the download and the bundle each for itself, but not both."""
    monkeypatch.setattr(
        "edge_make.atomic_swap.shutil.disk_usage", lambda _: Usage(10**10, 0, free_bytes)
    )
    found = of_1_5b(tmp_path)
    assert found.needed_bytes < free_bytes
    assert free_bytes > WEIGHTS_BYTES
    if fits:
        found.check_disk(tmp_path / "bundles" / "b")
        return
    with pytest.raises(ResourceError, match=r"the download \(3.55 GB\) with the bundle \(1.9"):
        found.check_disk(tmp_path / "bundles" / "b")


@pytest.mark.parametrize(
    "name", ["ct-w4a16", "awq", "gptq", "auto-round-gptq", "ct-w8a16", "ct-fp8"]
)
def test_the_layers_of_a_quantized_source_are_foreseen(tmp_path: Path, name: str):
    """By its config alone, as the tensors say once they are here."""
    directory = QuantizedGolden.load(name).write(tmp_path / name)
    quantization = read_quantization(read_json(directory / "config.json"), directory)
    assert quantization is not None
    with HfDirectory(directory) as checkpoint:
        assert _likely_schemes(checkpoint.spec, quantization) == source_schemes(checkpoint)


@pytest.mark.parametrize("quant", ["int4", "int8", "fp16"])
def test_the_bundle_is_no_larger_than_foreseen(tmp_path: Path, quant: Quant):
    source = write_checkpoint(tmp_path / "Tiny", "qwen2")
    config = ExportConfig(str(source), tmp_path / "b", quant=quant, named="default")
    if quant == "int4":
        config = replace(config, named="fast")
    manifest = export_checkpoint(config)
    preview = Preview("owner/tiny", manifest.model, None, Download(0, tmp_path))
    size = sum(info.num_bytes for info in read_manifest(tmp_path / "b").files.values())
    assert size <= forecast_of_preview(config, config, preview).bundle_bytes

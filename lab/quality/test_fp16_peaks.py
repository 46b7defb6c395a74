"""`lab fp16-peaks` sees what calibration's float model sees, and what FP16 does not hold."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edge.bundle.manifest import read_manifest
from export.sources.opening import open_checkpoint
from tests.conftest import Bundles, Checkpoints, require_kernels
from tests.export.quantize.layers import run_layers
from tests.makers.goldens import Golden

from . import fp16_peaks


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_peaks_are_those_of_the_float_model(
    tiny_bundles: Bundles, tiny_checkpoints: Checkpoints, dialect: str
):
    require_kernels(dialect)
    bundle, ids = tiny_bundles("qwen2", dialect), Golden.load("qwen2").ids[:64]
    runner = fp16_peaks.PeakRunner(bundle, read_manifest(bundle))
    found: fp16_peaks.Peaks = {}
    for window in (ids[:40], ids[40:]):
        runner.run(window, found)
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        expected: dict[str, float] = {}
        for window in (ids[:40], ids[40:]):
            for layer in run_layers(checkpoint, window[None]):
                for name, sizes in layer.peaks.items():
                    expected[name] = max(expected.get(name, 0.0), float(sizes.max()))
    assert len(expected) > 10
    del expected["final_norm"]  # the graph norms the last token alone, calibration all of them
    for name, peak in expected.items():
        assert found[name] == pytest.approx(peak, rel=0.01), name
    assert found["layers.0.q.rope"] > 0


def test_the_table_has_a_kind_once_with_its_largest_layer():
    peaks = {"layers.0.o.out": 2.0, "layers.11.o.out": 655.04, "logits": 30.0, "layers.2.k": np.nan}
    lines = fp16_peaks.table(peaks).splitlines()[2:]
    assert "| `o.out` | 655 | 11 | 1 % |" in lines
    assert "| `logits` | 30 |  | 0.046 % |" in lines
    assert "| `k` | nan | 2 | nan % |" in lines
    assert len(lines) == 3


def test_what_fp16_does_not_hold_is_an_error(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bundle = tiny_bundles("qwen2", "portable")
    options = [str(bundle), "--text", "prose", "--tokens", "40", "--window", "32"]
    monkeypatch.setattr(sys, "argv", ["fp16-peaks", *options])
    fp16_peaks.main()
    assert "40 tokens of prose" in capsys.readouterr().out
    for peak in (65520.0, float("inf"), float("nan")):

        def run(self: object, ids: object, peaks: fp16_peaks.Peaks, peak: float = peak) -> None:
            peaks["layers.1.down.out"] = peak

        with monkeypatch.context() as patch:
            patch.setattr(fp16_peaks.PeakRunner, "run", run)
            with pytest.raises(SystemExit, match=r"layers\.1\.down\.out is not finite in fp16"):
                fp16_peaks.main()


def test_bundles_that_it_cannot_read_are_named(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    def refused(bundle: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fp16-peaks", str(bundle), *options])
        with pytest.raises(SystemExit) as info:
            fp16_peaks.main()
        return str(info.value)

    assert "is typed bf16, not fp16" in refused(tiny_bundles("qwen2", "portable", "bf16"))
    assert "not within 1 to 128" in refused(tiny_bundles("qwen2", "portable"), "--window", "200")

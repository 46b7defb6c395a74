"""`lab layer-error` on a tiny model: methods in their order, texts that are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Checkpoints

from . import layer_error


def test_a_text_that_calibration_knows_loses_less(
    tiny_checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    known = "The table has four sound chairs, and the fifth is a list of them. " * 200
    (tmp_path / "known.txt").write_text(known)
    (tmp_path / "other.txt").write_text("0 1 2 3 4 5 6 7 8 9 + - * / = ( ) [ ] { } " * 200)
    texts = {name: tmp_path / f"{name}.txt" for name in ("known", "other")}
    monkeypatch.setattr(layer_error, "TEXTS", texts)
    rows = list(
        layer_error.measure(
            str(tiny_checkpoints("qwen2")), 1, [None, texts["known"]], 2048, 512, [0.01, 1e6], 64
        )
    )
    assert [row.linear for row in rows[::7]] == ["qkv", "o", "gate_up", "down"]
    assert len(rows) == 4 * (1 + 2 * 3)
    by_name = {(row.linear, row.method, row.calibration): row.errors for row in rows}
    for linear in ("qkv", "gate_up", "down"):
        rounded = by_name[linear, "rtn", ""]
        fitted = by_name[linear, "awq+gptq, damping 1 %", "known.txt"]
        assert 0 < fitted[0] < 0.5 * rounded[0]
        assert fitted[0] < 0.7 * fitted[1]  # it knows the first text only
        # With endless damping GPTQ has nothing to make up for: what is left is AWQ.
        damped = by_name[linear, "awq+gptq, damping 1e+08 %", "known.txt"]
        assert damped == pytest.approx(by_name[linear, "awq", "known.txt"], rel=0.02)

"""`scripts/quality` on a tiny model: what is there is not done again, and the table has it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import quality
from tests.conftest import Checkpoints, require_kernels

ROWS = ("int4-rtn-g32", "fp16")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The table has four sound chairs, and the fifth is a list of them. " * 4)
    texts = {"prose": text, "code": text}
    monkeypatch.setattr(quality, "TEXTS", texts)
    monkeypatch.setattr(quality, "_ALL_TEXTS", texts)


def call(monkeypatch: pytest.MonkeyPatch, source: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    monkeypatch.setattr(quality, "model_file", lambda _options: source)
    quality.main()


def test_a_recipe_is_measured_once(
    texts: None,
    tiny_checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    require_kernels("native")
    lines: list[list[Any]] = []
    run = quality.run

    def watched(line: list[Any]) -> Any:
        lines.append(line)
        return run(line)

    monkeypatch.setattr(quality, "run", watched)
    work = ["--work", str(tmp_path / "work"), "--recipe", "int4-rtn-g32", "--tokens", "40"]
    work += ["--window", "32"]
    source = tiny_checkpoints("qwen2")
    call(monkeypatch, source, *work, "--text", "prose")
    place = tmp_path / "work" / "smollm2" / "int4-rtn-g32"
    result = json.loads((place / "prose.json").read_text())
    assert not (place / "bundle").exists()
    call(monkeypatch, source, *work, "--text", "prose")
    assert len(lines) == 1
    table = capsys.readouterr().out.splitlines()
    row = next(line for line in table if line.startswith("| `int4-rtn-g32`"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert float(cells[2]) == pytest.approx(result["kl_mean"], abs=1e-4)
    alone = result["bundle_alone"]
    assert float(cells[3]) == pytest.approx(alone["kl_mean"], abs=1e-4)
    assert float(cells[6]) == pytest.approx(100 * alone["top1_agreement"], abs=0.1)
    assert result["kl_mean"] > 0
    cost = json.loads((place / "export.json").read_text())
    assert 20e6 < cost["peak_bytes"] < 4e9
    assert cost["seconds"] > 0
    call(monkeypatch, source, *work)  # the other text too
    assert len(lines) == 2
    assert json.loads((place / "code.json").read_text())["kl_mean"] == result["kl_mean"]
    call(monkeypatch, source, *work, "--text", "prose", "--tokens", "20")
    assert len(lines) == 3
    assert json.loads((place / "prose.json").read_text())["tokens"] < result["tokens"]


def test_answers_are_paired_with_those_of_the_float_model(
    texts: None,
    tiny_checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    require_kernels("native")
    work = ["--work", str(tmp_path / "work"), "--recipe", "int4-rtn-g32", "--text", "prose"]
    work += ["--limit", "12", "--task", "choices", "chinese"]
    call(monkeypatch, tiny_checkpoints("qwen2"), *work, "--tokens", "40", "--window", "32")
    place = tmp_path / "work" / "smollm2"
    read = [json.loads((place / name / "task-choices.json").read_text()) for name in ROWS]
    ours, theirs = (set(result["wrong"]) for result in read)
    assert [result["items"] for result in read] == [12, 12]
    row = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == "`int4-rtn-g32`"
    assert cells[1].startswith(f"{100 * (12 - len(ours)) / 12:.1f} (")
    assert f"; {100 * (len(ours) - len(theirs)) / 12:+.1f} (" in cells[1]
    assert ", p " in cells[3]
    # Another number of questions is another measurement, which no old answer is paired with.
    work[work.index("12")] = "5"
    work.remove("choices")
    call(monkeypatch, tiny_checkpoints("qwen2"), *work, "--tokens", "40", "--window", "32")
    assert json.loads((place / ROWS[0] / "task-chinese.json").read_text())["items"] == 5


def test_the_loss_is_counted_over_all_tasks(tmp_path: Path):
    def store(name: str, task: str, wrong: list[int]) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "export.json").write_text("{}")
        right = 20 - len(wrong)
        result = {"asked": {}, "items": 20, "correct": right, "accuracy": right / 20}
        (tmp_path / name / f"task-{task}.json").write_text(json.dumps({**result, "wrong": wrong}))

    store("fp16", "choices", [1, 2])
    store("fp16", "programs", [5])
    store("int8", "choices", [1, 3, 4, 5, 6, 7, 8])  # 6 lost, 1 won
    store("int8", "programs", [5, 6])  # 1 lost
    assert quality._loss(7, 1, 40) in quality.task_table(tmp_path, "mine")
    assert quality._loss(7, 1, 40).startswith("+15.0 (")
    assert quality._loss(7, 1, 40).endswith("p 0.07")  # 2 * (1 + 8) / 2**8


def test_a_rival_needs_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for given in ("q4_0", "q4_0=missing.gguf", "int8=" + __file__):
        with pytest.raises(SystemExit):
            call(monkeypatch, tmp_path, "--checkpoint", given)

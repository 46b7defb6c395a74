"""`lab quality` on a tiny model: what is there is not done again, and the table has it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.peers.gguf_rivals import RIVALS
from tests.conftest import Checkpoints, require_kernels
from tests.export.sources.test_gguf import write_tiny

from . import quality
from . import score as quality_score
from . import table as quality_table

ROWS = ("int4-rtn-g32", "fp16")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The table has four sound chairs, and the fifth is a list of them. " * 4)
    for module in (quality, quality_table):
        monkeypatch.setattr(module, "TEXTS", {"prose": text, "code": text})
    monkeypatch.setattr(quality_table, "_HALF", 1)


def call(monkeypatch: pytest.MonkeyPatch, source: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    monkeypatch.setattr(quality, "model_file", lambda _options: source)
    quality.main()


def edge_llm_eval(bundle: Path, reference: Path, text: Path, *options: str) -> dict[str, Any]:
    line = ["eval", bundle, "--against", reference, "--text", text, "--json", *options]
    result: dict[str, Any] = json.loads(quality._call(quality._edge_llm(*line)))
    return result


def test_figures_are_those_of_edge_llm_eval_and_measured_once(
    texts: None,
    tiny_checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    require_kernels("native")
    scored: list[str] = []
    score = quality_score.score

    def watched(*arguments: Any, **options: Any) -> Any:
        for name, figures in score(*arguments, **options):
            scored.append(name)
            yield name, figures

    monkeypatch.setattr(quality, "score", watched)
    work = ["--work", str(tmp_path / "work"), "--recipe", "int4-rtn-g32", "--keep-bundles"]
    cut = ["--tokens", "40", "--window", "32"]
    source = tiny_checkpoints("qwen2")
    call(monkeypatch, source, *work, *cut, "--text", "prose", "--served")
    assert scored == ["prose"] * 2
    place = tmp_path / "work" / "smollm2" / "int4-rtn-g32"
    alone, served = (
        json.loads((place / f"{kind}prose.json").read_text()) for kind in ("", "served-")
    )
    reference = place.parent / "fp16" / "bundle"
    expected = edge_llm_eval(place / "bundle", reference, tmp_path / "text.txt", *cut)
    assert served["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-3)
    for name, value in expected["bundle_alone"].items():
        assert alone[name] == pytest.approx(value, rel=1e-3), name
    assert alone["kl_mean"] > 0
    assert alone["kl_mean"] != served["kl_mean"]
    assert alone["tokens"] == expected["tokens"]
    assert alone["bits_per_weight"] == expected["bits_per_weight"]

    call(monkeypatch, source, *work, *cut, "--text", "prose")
    assert len(scored) == 2
    call(monkeypatch, source, *work, *cut, "--text", "prose", "code")
    assert scored[2:] == ["code"]
    table = capsys.readouterr().out.splitlines()
    table = table[table.index(next(line for line in table if "KL, five unknown kinds" in line)) :]
    lines = (table[0], next(line for line in table if line.startswith("| `int4-rtn-g32`")))
    heads, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    cells = dict(zip(heads, row, strict=True))
    cost = json.loads((place / "export.json").read_text())
    assert (
        cells["Bits per weight (with lm_head)"]
        == f"{alone['bits_per_weight']:.2f} ({expected['bits_per_weight_with_lm_head']:.2f})"
    )
    assert float(cells["CPU minutes"]) == pytest.approx(cost["cpu_s"] / 60, abs=0.06)
    assert float(cells["KL, ten texts"]) == pytest.approx(alone["kl_mean"], abs=1e-4)
    assert float(cells["Top-1, %"]) == pytest.approx(100 * alone["top1_agreement"], abs=0.1)
    assert 20e6 < cost["peak_bytes"] < 4e9
    assert cost["cpu_s"] > 0.1

    call(monkeypatch, source, *work, "--text", "prose", "--tokens", "20", "--window", "32")
    assert scored[3:] == ["prose"]
    assert json.loads((place / "prose.json").read_text())["tokens"] < alone["tokens"]
    # Another text by the same name is another text: neither its figures nor its logits are kept.
    (tmp_path / "text.txt").write_text(
        "Nine chairs stood in the hall when the table was carried. " * 4
    )
    call(monkeypatch, source, *work, *cut, "--text", "prose")
    anew = json.loads((place / "prose.json").read_text())
    expected = edge_llm_eval(place / "bundle", reference, tmp_path / "text.txt", *cut)
    assert anew["kl_mean"] == pytest.approx(expected["bundle_alone"]["kl_mean"], rel=1e-3)
    assert anew["kl_mean"] != alone["kl_mean"]


# Writes a matrix that says how often it was made, and layers in Q8_0 whatever is asked for.
PROGRAMS = {
    "llama-imatrix": """
output = Path(sys.argv[sys.argv.index("-o") + 1])
assert len(Path(sys.argv[sys.argv.index("-f") + 1]).read_text()) > 10_000
with output.open("a") as file:
    file.write("made\\n")
""",
    "llama-quantize": """
*options, floats, output, kind, threads = sys.argv[1:]
assert ("--imatrix" in options) == kind.startswith("IQ4"), (options, kind)
q8_0 = gguf.GGMLQuantizationType.Q8_0
def convert(tensor):
    if not is_linear(tensor):
        return tensor.data, tensor.tensor_type
    return gguf.quants.quantize(tensor.data.astype(np.float32), q8_0), q8_0
rewrite(Path(floats), Path(output), convert)
""",
}
_HEAD = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(Path.cwd())!r})
from pathlib import Path
import gguf, numpy as np
from lab.peers.gguf_rivals import is_linear, rewrite
"""


def test_a_rivals_file_is_made_counted_and_measured(
    texts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    require_kernels("native")
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(_HEAD + body)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(quality, "build_llama_cpp", lambda _work, _programs: tmp_path)
    source = write_tiny(tmp_path, "qwen2")
    rivals = ["IQ4_XS+imatrix", "Q4_0"]
    cut = ["--tokens", "40", "--window", "32", "--text", "prose"]
    call(monkeypatch, source, "--work", str(tmp_path), "--recipe", "--rival", *rivals, *cut)
    work = tmp_path / "smollm2"
    for rival in rivals:
        about = json.loads((work / rival / "export.json").read_text())
        assert about["bits_per_weight"] == 8.5
        assert about["types"] == {"Q8_0": 14}
        assert 8.5 < about["bits_per_weight_with_lm_head"] < 16
        figures = json.loads((work / rival / "prose.json").read_text())
        assert 0 < figures["kl_mean"] < 0.01
        assert not (work / rival / "weights.gguf").exists()
        assert not (work / rival / "bundle").exists()
    assert (work / "imatrix.gguf").read_text() == "made\n"
    # The matrix is part of what a rival that uses it costs.
    noted = json.loads((work / "imatrix.json").read_text())
    cost = [json.loads((work / rival / "export.json").read_text())["cpu_s"] for rival in rivals]
    assert noted["tokens"] > 10_000
    assert cost[0] > noted["cpu_s"] > 0
    call(
        monkeypatch, source, "--work", str(tmp_path), "--recipe", "--rival", "IQ4_NL+imatrix", *cut
    )
    assert (work / "imatrix.gguf").read_text() == "made\n"


def test_the_models_own_answers_go_on_where_they_were_interrupted(
    tiny_checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    require_kernels("native")
    quality.export(str(tiny_checkpoints("qwen2")), quality._FLOAT, tmp_path)
    monkeypatch.setattr(quality, "TOKENS", 60)
    monkeypatch.setattr(quality, "_ANSWER_TOKENS", 24)
    texts = []
    for folder in ("at once", "interrupted"):
        answers = tmp_path / f"{folder}.jsonl"
        if folder == "interrupted":
            first = (tmp_path / "at once.jsonl").read_text("utf-8").splitlines(keepends=True)[0]
            answers.write_text(first, "utf-8")
        quality.write_answers(tmp_path / "bundle", answers, tmp_path / f"{folder}.txt")
        lines = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
        assert sum(len(line["ids"]) for line in lines) >= 60
        assert [line["question"] for line in lines] == list(quality._QUESTIONS[: len(lines)])
        texts.append((tmp_path / f"{folder}.txt").read_text("utf-8"))
        assert texts[-1] == "\n\n".join(line["text"] for line in lines)
    assert texts[0] == texts[1] != ""


def test_a_format_whose_grid_the_weights_are_on_is_left_out(capsys: pytest.CaptureFixture[str]):
    assert quality.chosen_rivals(None, off_grid=False) == []
    assert not any("Q4_K" in name for name in quality.chosen_rivals([], off_grid=False))
    assert "left out" in capsys.readouterr().err
    assert quality.chosen_rivals(["Q4_K_S", "Q4_0"], off_grid=False) == ["Q4_K_S", "Q4_0"]
    assert "stored on the grid of that format" in capsys.readouterr().err
    assert quality.chosen_rivals([], off_grid=True) == list(RIVALS)
    assert quality.chosen_rivals(["Q4_0"], off_grid=False) == ["Q4_0"]
    assert not capsys.readouterr().err


def test_the_lesson_has_all_of_the_development_texts():
    pieces = quality.lesson_texts()
    whole = "".join(path.read_text("utf-8") for path in quality_score.DEVELOPMENT_TEXTS.values())
    assert "".join("".join(pieces).split()) == "".join(whole.split())
    assert len(pieces) > 40
    assert max(map(len, pieces)) < 4000


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

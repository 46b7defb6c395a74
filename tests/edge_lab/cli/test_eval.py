from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge.bundle.manifest import read_manifest
from edge.bundle.verified_files import verify_files
from edge.cli import COMMAND_GROUP
from edge.engine_config import EngineConfig
from edge.errors import (
    EXIT_GATE_MISSED,
    BackendError,
    BundleError,
    CheckpointError,
    ConfigError,
    DependencyError,
)
from edge.runtime.llm import LLM
from edge_lab.cli import evaluation
from edge_lab.cli.eval import evaluate
from edge_lab.measure import evaluator, tasks
from edge_lab.measure.evaluator import _shape
from tests.edge_lab.measure.test_report import check_html
from tests.standins.tensorrt import write_engine

ROOT = Path(__file__).parents[3]
SHORT = ("--tokens", 300, "--window", 64)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


def figures(*arguments: object) -> list[dict[str, Any]]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_bundle_against_itself(tiny_bundles):
    bundle = tiny_bundles("qwen2", "portable")
    (found,) = figures(bundle, "--against", bundle, *SHORT)
    assert found["kl_mean"] == found["kl_p99"] == 0
    assert found["top1_agreement"] == found["perplexity_ratio"] == 1
    assert found["perplexity"] == found["perplexity_reference"]
    assert found["tokens"] == 300  # the begin token opens each window
    assert found["bits_per_weight"] == 16
    for row in found["layers"]:
        assert row["key_error"] == 0
        assert row["value_error"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_fewer_bits_are_further_away(tiny_bundles, tmp_path: Path):
    int8, int4, fp16 = (tiny_bundles("qwen2", "portable", q) for q in ("int8", "int4", "fp16"))
    page = tmp_path / "report.html"
    eight, four = figures(int8, int4, "--against", fp16, *SHORT, "--html", page)
    assert 0 < eight["kl_mean"] < four["kl_mean"]
    assert eight["layers"][1]["key_error"] < four["layers"][1]["key_error"]
    assert eight["layers"][1]["value_error"] < four["layers"][1]["value_error"]
    assert check_html(page.read_text()).count("svg") == 4


def test_a_narrow_terminal_tells_bundles_apart(
    tiny_bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = [f"deepseek-r1-distill-qwen-1.5b-{name}" for name in ("int4-g32", "int4-g64", "int8")]
    bundles = [shutil.copytree(tiny_bundles("qwen2", "portable"), tmp_path / n) for n in names]
    monkeypatch.setenv("COLUMNS", "80")
    (found,) = figures(bundles[0], *SHORT)
    result = invoke(*bundles, *SHORT)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for name in names:
        assert name in result.stdout
    low, high = found["confidence"]["perplexity"]
    interval = f"{found['perplexity']:.3f} ({low:.3f} to {high:.3f})"
    assert result.stdout.count(interval) == 3


def test_a_missing_renderer_is_told_before_anything_is_measured(
    tiny_bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    bundle = tiny_bundles("qwen2", "portable")
    result = invoke(bundle, "--against", "absent", *SHORT, "--html", "report.html")
    assert isinstance(result.exception, DependencyError)
    assert "drawing charts needs vl-convert-python" in str(result.exception)


@pytest.mark.usefixtures("slow_clock")
def test_scoring_and_tasks_print_lines_without_a_terminal(tiny_bundles, tmp_path: Path):
    bundle = tiny_bundles("qwen2", "portable")
    task = tmp_path / "task.jsonl"
    row = {"question": "the sea", "choices": ["hello", "world"], "answer": 1}
    task.write_text("\n".join([json.dumps(row)] * 3))
    for arguments, step in (
        (SHORT, "score: 100 % (300 of 300 tokens)"),
        (("--task", task), "answer: 100 % (3 of 3 questions)"),
    ):
        result = invoke(bundle, *arguments, "--json")
        assert len(result.stdout.splitlines()) == 1
        lines = result.stderr.splitlines()
        for name in ("open: 100 %", step):
            assert any(line.startswith(f"{bundle.name}: {name}") for line in lines), lines
        assert any(" so far, about " in line for line in lines)


def test_rounded_activations_lose_more(tiny_bundles):
    int4, fp16 = (tiny_bundles("qwen2", "portable", quant) for quant in ("int4", "fp16"))
    (plain,) = figures(int4, "--against", fp16, *SHORT, "--no-int8-activations")
    (rounded,) = figures(int4, "--against", fp16, *SHORT, "--int8-activations")
    assert (plain["int8_activations"], rounded["int8_activations"]) == (False, True)
    assert plain["kl_mean"] != rounded["kl_mean"]  # which is larger is chance at so few weights
    assert "bundle_alone" not in plain | rounded


@pytest.mark.slow
def test_activations_are_measured_as_they_are_served(tiny_bundles):
    """By default the figures are those that a service has; the bundle's own are beside them."""
    int4, fp16 = (tiny_bundles("qwen2", "portable", quant) for quant in ("int4", "fp16"))
    against = ("--against", fp16, *SHORT)
    (found,) = figures(int4, *against)
    (rounded,) = figures(int4, *against, "--int8-activations")
    (plain,) = figures(int4, *against, "--no-int8-activations")
    alone = found.pop("bundle_alone")
    assert found == rounded
    assert alone == {name: plain[name] for name in alone}
    assert {"kl_mean", "top1_agreement", "perplexity_ratio"} <= set(alone)
    shown = " ".join(invoke(int4, *against).stdout.split())
    assert "int8, as the CPU serves it" in shown
    assert "KL, mean: the bundle alone" in shown


@pytest.mark.slow
def test_a_float_reference_is_opened_once(tiny_bundles, monkeypatch: pytest.MonkeyPatch):
    """One with integer weights is opened as the bundle beside it is."""
    opened: list[tuple[str, bool | None]] = []

    def note(bundle: Path, engine: EngineConfig) -> LLM:
        opened.append((read_manifest(bundle).quantization.name, engine.int8_activations))
        return LLM(bundle, engine)

    monkeypatch.setattr(evaluator, "LLM", note)
    int4, int8, fp16 = (tiny_bundles("qwen2", "portable", q) for q in ("int4", "int8", "fp16"))
    figures(int4, int8, "--against", fp16, *SHORT)
    both = [("int4", None), ("int4", False), ("int8", None), ("int8", False)]
    assert opened == [both[0], ("fp16", False), *both[1:]]
    opened.clear()
    figures(int4, "--against", int8, *SHORT)
    assert opened == [("int4", None), ("int8", None), ("int4", False), ("int8", False)]


def test_a_bundle_without_rounding_is_measured_once(tiny_bundles):
    fp16 = tiny_bundles("qwen2", "portable", "fp16")
    (found,) = figures(fp16, "--against", fp16, *SHORT)
    assert found["int8_activations"] is False
    assert "bundle_alone" not in found


def test_a_reference_with_a_name_that_none_can_have(tiny_bundles):
    result = invoke(tiny_bundles("qwen2", "portable"), "--against", "n" * 300, *SHORT)
    assert isinstance(result.exception, BundleError)


def test_activations_that_would_stay_float_are_refused(tiny_bundles):
    """Before a reference is looked for."""
    fp16 = tiny_bundles("qwen2", "portable", "fp16")
    result = invoke(fp16, "--against", "absent", *SHORT, "--int8-activations")
    assert isinstance(result.exception, ConfigError)
    assert "no effect on" in str(result.exception)


def test_the_cpu_computes_beside_an_engine_and_a_gpu(
    tiny_bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge.device.nodes.find_gpu_node", lambda: "/dev/nvmap")
    reference = tiny_bundles("qwen2", "portable")
    bundle = shutil.copytree(reference, tmp_path / "bundle")
    write_engine(bundle, max_batch=1, max_prefill=24, kv_capacity=128, kv_buckets=(128,))
    (found,) = figures(bundle, "--against", reference, *SHORT)
    assert found["engine"] == "ort-cpu"
    assert found["kl_mean"] == 0
    task = tmp_path / "task.jsonl"
    row = {"question": "the sea", "choices": ["hello", "world"], "answer": 1}
    task.write_text(json.dumps(row))
    assert figures(bundle, "--task", task)[0]["items"] == 1


def test_a_rotated_bundle_is_compared_with_its_tied_original(tiny_bundles):
    """The rotation unties the lm_head: another model by its numbers, the same by what it says."""
    rotated, tied = (tiny_bundles("qwen3", "portable", q) for q in ("int8-w8a8", "fp16"))
    (found,) = figures(rotated, "--against", tied, *SHORT)
    assert 0 < found["kl_mean"] < 0.5


def test_gate_and_its_exit_code(tiny_bundles, tmp_path: Path):
    int4, fp16 = (tiny_bundles("qwen2", "portable", q) for q in ("int4", "fp16"))
    gate = tmp_path / "gate.json"
    gate.write_text('{"kl_mean": 0.0}')
    result = invoke(int4, "--against", fp16, *SHORT, "--gate", gate)
    assert result.exit_code == EXIT_GATE_MISSED == 3
    assert "is above 0" in result.stderr
    gate.write_text('{"kl_mean": 100.0}')
    assert invoke(int4, "--against", fp16, *SHORT, "--gate", gate).exit_code == 0


def test_a_report_without_a_place_is_refused_before_anything_is_measured(
    tiny_bundles, tmp_path: Path
):
    page = tmp_path / "missing" / "report.html"
    result = invoke(tiny_bundles("qwen2", "portable"), *SHORT, "--html", page)
    assert isinstance(result.exception, ConfigError)
    assert f"{page} cannot be written: {page.parent} is no directory" in str(result.exception)
    assert not result.output


def test_results_that_cannot_be_saved_are_still_printed(tiny_bundles, tmp_path: Path):
    result = invoke(tiny_bundles("qwen2", "portable"), *SHORT, "--json", "--html", tmp_path)
    assert isinstance(result.exception, ConfigError)  # a directory
    assert json.loads(result.stdout)["tokens"] == 300


def test_save_into_a_bundle_of_another_is_refused_before_anything_is_measured(
    tiny_bundles, monkeypatch: pytest.MonkeyPatch
):
    bundle = tiny_bundles("qwen2", "portable")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    result = invoke(bundle, *SHORT, "--save")
    assert isinstance(result.exception, ConfigError)
    assert f"--save writes into {bundle}" in str(result.exception)
    assert result.stdout == ""


def test_save_keeps_the_bundle_sound(tiny_bundles, tmp_path: Path):
    bundle = shutil.copytree(tiny_bundles("qwen2", "portable"), tmp_path / "bundle")
    assert invoke(bundle, *SHORT, "--save").exit_code == 0
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    assert manifest.quality is not None
    assert manifest.quality["text"]["tokens"] == 300
    assert manifest.quality["text"]["kl_mean"] is None


def test_a_task_and_its_flips(tiny_bundles, tmp_path: Path):
    int4, fp16 = (tiny_bundles("qwen2", "portable", q) for q in ("int4", "fp16"))
    task = tmp_path / "task.jsonl"
    row = {"question": "the sea", "choices": ["hello", "world"], "answer": 1}
    task.write_text("\n".join([json.dumps(row)] * 3))
    page = tmp_path / "report.html"
    (found,) = figures(int4, "--against", fp16, "--task", task, "--limit", 2, "--html", page)
    assert found["items"] == 2
    assert found["correct"] in (0, 2)
    assert found["against"]["lost"] + found["against"]["won"] in (0, 2)
    check_html(page.read_text())
    gate = tmp_path / "gate.json"
    for limit, code in ((-1.1, EXIT_GATE_MISSED), (1.0, 0)):
        gate.write_text(json.dumps({"accuracy_loss": limit}))
        result = invoke(int4, "--against", fp16, "--task", task, "--limit", 2, "--gate", gate)
        assert result.exit_code == code


def test_answers_written_together_are_those_written_alone(
    tiny_bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answers: list[dict[str, list[int]]] = []
    running, most = 0, 0
    lock = threading.Lock()
    plain = LLM.generate

    def generate(llm, prompt, params):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        result = plain(llm, prompt, params)
        answers[-1][prompt[0]["content"]] = [token.id for token in result.tokens]
        with lock:
            running -= 1
        return result

    monkeypatch.setattr(LLM, "generate", generate)
    task = tmp_path / "task.jsonl"
    words = ("hello", "the world", "the sea and the", "world", "and")
    task.write_text("\n".join(json.dumps({"question": word, "answer": "#### 1"}) for word in words))
    bundle = tiny_bundles("qwen2", "portable")
    found: dict[str, Any] = {}
    for batch in (None, 1, 3, 9):
        answers.append({})
        most = 0
        given = () if batch is None else ("--batch", batch)
        (found,) = figures(bundle, "--task", task, "--max-tokens", 12, *given)
        assert most <= (batch or 1)
        assert (most > 1) == ((batch or 1) > 1)
        assert found["wrong"] == [1, 2, 3, 4, 5]  # in the order of the file
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert len(set(map(tuple, answers[0].values()))) == len(words)
    assert found["cut"] == sum(len(ids) == 12 for ids in answers[0].values()) > 0
    printed = invoke(bundle, "--against", bundle, "--task", task, "--max-tokens", 12).stdout
    assert printed.count(f", {found['cut']} cut short") == 2


def test_a_question_that_fails_ends_the_others(
    tiny_bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    plain = tasks.answer_item

    def answer(llm, line, item, **options):
        seen.append(line)
        if line == 2:
            raise BackendError("the engine failed")
        return plain(llm, line, item, **options)

    monkeypatch.setattr(evaluator, "answer_item", answer)
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join([json.dumps({"question": "the sea", "answer": "#### 1"})] * 30))
    started = time.monotonic()
    long = ("--task", task, "--max-tokens", 1500, "--batch", 2)
    result = invoke(tiny_bundles("qwen2", "portable"), *long)
    assert isinstance(result.exception, BackendError)
    assert str(result.exception) == "the engine failed"
    assert len(seen) <= 4
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("layout", ["choices", "number", "program"])
def test_a_question_that_is_too_long_is_named_before_any_is_answered(
    tiny_bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
):
    monkeypatch.setattr(evaluator, "answer_item", lambda *_, **__: pytest.fail("it was answered"))
    layouts: dict[str, dict[str, Any]] = {
        "choices": {"choices": ["a", "b"], "answer": 1},
        "number": {"answer": "#### 1"},
        "program": {"tests": "assert f()"},
    }
    head = "def f():\n    " if layout == "program" else ""
    texts = (f"{head}sea", f"{head}{'the sea ' * 3000}")
    rows = [{"question": text, **layouts[layout]} for text in texts]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)))
    result = invoke(tiny_bundles("qwen2", "portable"), "--task", task)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"{task}, line 2: the prompt has ")


def test_choices_are_not_compared_together(tiny_bundles, tmp_path: Path):
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"question": "the sea", "choices": ["a", "b"], "answer": 1}))
    result = invoke(tiny_bundles("qwen2", "portable"), "--task", task, "--batch", 2)
    assert isinstance(result.exception, ConfigError)
    assert "--batch has no effect: choices" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "t", "--window", 9], "--window does not go with --task"),
        (["--limit", 3], "--limit needs --task"),
        (["--batch", 2], "--batch needs --task"),
        (["--window", 100_000], "is longer than"),
        (["--gate", "int5"], "unknown gate"),
        (["--gate", "int4"], "add --against"),
        (["--text", "absent"], "cannot read"),
    ],
)
def test_wrong_options(tiny_bundles, arguments, message):
    result = invoke(tiny_bundles("qwen2", "portable"), *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_other_models_are_not_compared(tiny_bundles):
    result = invoke(
        tiny_bundles("qwen2", "portable"), "--against", tiny_bundles("qwen3", "portable"), *SHORT
    )
    assert isinstance(result.exception, ConfigError)
    assert "cannot be compared" in str(result.exception) or "dimensions" in str(result.exception)


def test_an_epsilon_in_float32_is_the_same_model(tiny_bundles):
    """GGUF stores it so, and what converts such a file may write 9.999999974752427e-07."""
    manifest = read_manifest(tiny_bundles("qwen2", "portable"))
    rounded = float(np.float32(manifest.model.rms_norm_eps))
    assert rounded != manifest.model.rms_norm_eps
    for epsilon, same in ((rounded, True), (1.01 * rounded, False)):
        model = msgspec.structs.replace(manifest.model, rms_norm_eps=epsilon)
        other = msgspec.structs.replace(manifest, model=model)
        assert (_shape(manifest) == _shape(other)) == same


def test_sigterm_ends_the_export_and_leaves_nothing(tiny_bundles, tmp_path: Path):
    """It comes while the export starts, and that would go on."""
    export, number = tmp_path / "export", tmp_path / "number"
    export.write_text(f"#!/bin/sh\necho $$ >{number}\nkill -TERM $PPID\nexec sleep 100\n")
    export.chmod(0o755)
    code = "import sys; sys.executable = sys.argv.pop(1); from edge.cli import main; main()"
    arguments = [export, "eval", tiny_bundles("qwen2"), "--against", tmp_path]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 143, done.stderr
    assert not list(tmp_path.glob("edge-llm-reference-*"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_a_checkpoint_is_exported_first(
    tiny_bundles, tiny_checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The verb `export` as an installed package would offer it to the child process.
    info = tmp_path / "path" / "offer-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offer\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[edge_llm.commands]\nexport = export.cli:export\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(info.parent), str(ROOT)]))
    entry = EntryPoint("export", "export.cli:export", COMMAND_GROUP)
    monkeypatch.setattr(evaluation, "entry_points", lambda **_: [entry])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    bundle = tiny_bundles("qwen2", "portable")  # the reference takes its dialect, so KL is 0
    (found,) = figures(bundle, "--against", tiny_checkpoints("qwen2"), *SHORT)
    assert found["kl_mean"] == 0
    assert not list(tmp_path.glob("edge-llm-reference-*"))
    result = invoke(bundle, "--against", tmp_path / "nothing", *SHORT)
    assert isinstance(result.exception, CheckpointError)

"""The verb ``prove``: what it says before, prints after, and reads again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.bundle.minisign import check_signature, parse_signature
from edge_lab.prove import run as prove_run
from edge_lab.prove.report import read_report, seal
from edge_lab.prove.steps import Done
from edge_make.signing import make_key_pair
from tests.command_line import Result
from tests.edge_lab.prove.test_report import CONTENT
from tests.edge_lab.prove.test_run import Steps
from tests.makers.keys import minisign, need_minisign

EdgeLlm = Callable[..., Result]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """A device on which every step passes, whatever this machine is."""
    answers = Steps()

    def logged_run(*_: Any, **__: Any) -> Callable[[str, Sequence[str]], Done]:
        return answers

    monkeypatch.setattr(prove_run, "logged_run", logged_run)
    monkeypatch.setattr(prove_run, "find_gpu_node", lambda: "/dev/nvmap")
    monkeypatch.setattr(prove_run, "has_tensorrt", lambda: True)
    monkeypatch.setattr(prove_run, "check_free_space", lambda *_: None)
    return answers


def test_a_proof_ends_with_a_table_and_a_file_to_send(
    edge_llm: EdgeLlm, steps: Steps, tmp_path: Path
):
    done = edge_llm("prove", "-o", tmp_path / "proof")
    assert done.code == 0, done.err
    assert f"{tmp_path}/proof/report.json can be sent as it is." in done.out
    page = (tmp_path / "proof/report.md").read_text()
    assert page in done.out
    assert "| own |" in page
    shown = edge_llm("prove", tmp_path / "proof/report.json")
    assert (shown.code, shown.out) == (0, page)
    rows = json.loads(edge_llm("prove", tmp_path / "proof/report.json", "--json").out)
    assert [row["engine"] for row in rows] == list(prove_run.ENGINES)


def test_exit_codes_tell_a_miss_from_a_missing_gpu(
    edge_llm: EdgeLlm, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps.answers["own_verify"] = (3, json.dumps({"passed": False}))
    done = edge_llm("prove", "-o", tmp_path / "miss", "--json")
    assert done.code == 3
    assert json.loads(done.out)["problems"] == ["own verify failed: exit code 3"]
    monkeypatch.setattr(prove_run, "has_tensorrt", lambda: False)
    assert edge_llm("prove", "-o", tmp_path / "cpu").code == 69
    assert read_report(tmp_path / "cpu/report.json")["engines"].keys() == {"cpu"}


def test_a_dry_run_runs_nothing_and_says_what_it_takes(
    edge_llm: EdgeLlm, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "proof"
    done = edge_llm("prove", "--dry-run", "-o", output)
    assert done.code == 0
    assert not steps.commands
    assert not output.exists()
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [
        step.name for step in prove_run.ProofPlan(output, gpu=True).steps
    ]
    found = json.loads(edge_llm("prove", "--dry-run", "-o", output, "--json").out)
    assert found["minutes"] == pytest.approx(sum(step["minutes"] for step in found["steps"]))
    assert found["minutes"] <= 15  # what the documentation promises
    assert "5 GB" in lines[-1]
    monkeypatch.setattr(prove_run, "find_gpu_node", lambda: None)
    assert edge_llm("prove", "--dry-run").out.startswith("There is no NVIDIA GPU with TensorRT")


def test_power_modes_need_a_gpu(edge_llm: EdgeLlm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prove_run, "find_gpu_node", lambda: None)
    done = edge_llm("prove", "--power-modes")
    assert done.code == 69
    assert "leave it out" in done.err


@pytest.mark.parametrize(
    "option", [("--minutes", "1"), ("-o", "x"), ("--power-modes",), ("--dry-run",), ("--key", "k")]
)
def test_options_that_a_table_ignores_are_refused(
    edge_llm: EdgeLlm, tmp_path: Path, option: tuple[str, ...]
):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(seal(CONTENT)))
    done = edge_llm("prove", path, *option)
    assert done.code == 64
    assert "has no effect with REPORTS" in done.err


def test_an_edited_report_is_refused(edge_llm: EdgeLlm, tmp_path: Path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(seal(CONTENT)).replace("412.345", "912.345"))
    done = edge_llm("prove", path)
    assert done.code == 65
    assert "is not as edge-llm prove wrote it" in done.err


def test_many_devices_make_one_table(edge_llm: EdgeLlm, tmp_path: Path):
    paths = []
    for module in ("AGX", "NX"):
        machine = {**CONTENT["machine"], "module": module}
        paths.append(tmp_path / f"{module}.json")
        paths[-1].write_text(json.dumps(seal({**CONTENT, "machine": machine})))
    lines = [line for line in edge_llm("prove", *paths).out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["AGX"] * 3 + ["NX"] * 3


@pytest.mark.live
def test_a_signature_is_one_that_minisign_checks(edge_llm: EdgeLlm, steps: Steps, tmp_path: Path):
    need_minisign()
    key = make_key_pair(tmp_path / "my.key", tmp_path / "my.pub", "")
    assert edge_llm("prove", "-o", tmp_path / "p", "--key", tmp_path / "my.key").code == 0
    report, signature = tmp_path / "p/report.json", tmp_path / "p/report.json.minisig"
    made = parse_signature(signature.read_bytes(), "it")
    assert check_signature(report.read_bytes(), made, [key]) == key
    assert minisign("-V", "-p", tmp_path / "my.pub", "-m", report).returncode == 0


@pytest.mark.live
def test_a_key_that_is_none_is_refused_before_the_run(
    edge_llm: EdgeLlm, steps: Steps, tmp_path: Path
):
    need_minisign()
    (tmp_path / "my.key").write_text("nothing")
    done = edge_llm("prove", "-o", tmp_path / "p", "--key", tmp_path / "my.key")
    assert done.code == 64
    assert not steps.commands
    done = edge_llm("prove", "--password-file", tmp_path / "my.key")
    assert (done.code, "give --key, too" in done.err) == (64, True)

"""A proof: every step real or said to be missing, and a run that goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from edge.cli import cli
from edge_lab.prove import power
from edge_lab.prove import run as prove_run
from edge_lab.prove.report import read_report, table
from edge_lab.prove.run import ENGINES, REPORT, ProofPlan, exit_code, prove
from edge_lab.prove.steps import Done
from lab.gpu.test_check import BENCH, DOCTOR, INSPECT, NO_GPU, TIMES

SOAK = {"growth": {"grows": False, "bytes_per_prompt": 0.0, "source": "available"}}
FULL_BENCH = {**BENCH, "roofline": {"reached": 0.7}, "decode_joules_per_token": 0.1}


class Steps:
    """Answers by the last word of a step; writes down what was run."""

    def __init__(self, **answers: tuple[int, str] | tuple[int, str, str]) -> None:
        self.commands: dict[str, list[str]] = {}
        self.answers: dict[str, tuple[Any, ...]] = {
            "doctor": (0, json.dumps(DOCTOR)),
            "tensorrt": (0, "10.16.2.10\n"),
            "export": (0, json.dumps({"bundle": "bundle"})),
            "build": (0, json.dumps({"engine": "bundle/engines/x"})),
            "verify": (0, json.dumps({"passed": True})),
            "bench": (0, json.dumps(FULL_BENCH)),
            "inspect": (0, json.dumps(INSPECT)),
            "layers": (0, json.dumps({**FULL_BENCH, "layers": {"decode": TIMES}})),
            "soak": (0, json.dumps(SOAK)),
            "mode": (0, json.dumps(FULL_BENCH)),
            **answers,
        }

    def __call__(self, step: str, command: Sequence[str]) -> Done:
        self.commands[step] = list(command)
        key = step.replace("-", "_")
        words = (key, key.rpartition("_")[2], key.partition("_")[0])
        found = next((self.answers[word] for word in words if word in self.answers), (0, ""))
        return Done(*found)


def go(output: Path, steps: Steps, *, gpu: bool = True, **options: Any) -> dict[str, Any]:
    said: list[str] = []
    plan = ProofPlan(output, gpu, shape="tiny", layers=2, **options)
    content = prove(plan, said.append, steps)
    assert read_report(output / REPORT) == content
    return content


def test_a_device_on_which_all_is_well(tmp_path: Path):
    steps = Steps()
    content = go(tmp_path / "proof", steps)
    assert exit_code(content) == 0
    assert content["problems"] == []
    assert set(steps.commands) == {step.name for step in ProofPlan(tmp_path, gpu=True).steps}
    assert [row[4] for row in table([content])] == list(ENGINES)
    assert {row[2] for row in table([content])} == {"10.16.2.10"}
    assert not (tmp_path / "proof/work").exists()  # gigabytes, which nobody needs any more


@pytest.mark.parametrize(
    ("version", "both"),
    [("10.3.0", False), ("10.9.0.34", False), ("10.13.3", True), ("11.4", True), (None, False)],
)
def test_both_kinds_of_own_plugins_are_proven_where_tensorrt_has_both(
    tmp_path: Path, version: str | None, both: bool
):
    answer = (1, "") if version is None else (0, f"{version}\n")
    content = go(tmp_path / "proof", Steps(tensorrt=answer))
    assert list(content["engines"]) == [name for name in ENGINES if both or "python" not in name]
    assert list(content["engines"])[-1] == content["measured"]  # runs in the power modes


def test_each_engine_is_built_measured_and_soaked_before_the_next(tmp_path: Path):
    """The engine that was built last is the one that runs."""
    steps = Steps()
    go(tmp_path / "proof", steps)
    order = [step for step in steps.commands if step not in ("doctor", "checkpoint", "export")][1:]
    parts = ("build", "verify", "bench", "inspect", "layers", "soak")
    assert order == [f"{name}-{part}" for name in ENGINES for part in parts]
    for name, options in ENGINES.items():
        assert steps.commands[f"{name}-build"][3:-1] == list(options)


def test_every_command_is_one_that_edge_llm_takes(tmp_path: Path):
    """Held against the real parsers: a wrong option would fail on the device only."""
    gpu, cpu = Steps(), Steps(doctor=(0, json.dumps(NO_GPU)))
    go(tmp_path / "gpu", gpu)
    go(tmp_path / "cpu", cpu, gpu=False)
    seen = set()
    for command in [*gpu.commands.values(), *cpu.commands.values()]:
        if command[0] != "edge-llm":
            continue
        seen.add(command[1])
        verb = cli.get_command(click.Context(cli), command[1])
        assert verb is not None
        places = ("bundle", "bundle/engines/x")
        verb.make_context(command[1], [str(tmp_path) if a in places else a for a in command[2:]])
    assert seen == {"doctor", "export", "build", "verify", "bench", "inspect"}


def test_kernels_that_were_not_tried_for_want_of_memory_are_counted(tmp_path: Path):
    skipped = {"count": 3, "largest_bytes": 10**9, "available_bytes": 302 << 20}
    steps = Steps(own_inspect=(0, json.dumps({**INSPECT, "skipped_tactics": skipped})))
    content = go(tmp_path / "proof", steps)
    rows = {row[4]: row[-2] for row in table([content])}
    assert rows == {"tensorrt": "0", "own-python": "0", "own": "3"}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path):
    class Interrupted(Steps):
        def __call__(self, step: str, command: Sequence[str]) -> Done:
            if step == f"{[*ENGINES][-1]}-verify":
                raise KeyboardInterrupt
            return super().__call__(step, command)

    first, second = Interrupted(), Steps()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "proof", first)
    content = go(tmp_path / "proof", second)
    assert content["passed"]
    assert not set(first.commands) & set(second.commands)
    assert set(first.commands) | set(second.commands) == {
        step.name for step in ProofPlan(tmp_path, gpu=True).steps
    }


def test_a_step_that_failed_is_tried_again_and_its_work_is_kept(tmp_path: Path):
    failed = Steps(own_verify=(3, json.dumps({"passed": False, "misses": ["cosine 0.9"]})))
    content = go(tmp_path / "proof", failed)
    assert exit_code(content) == 3
    assert content["problems"] == ["own verify failed: exit code 3"]
    assert content["engines"]["own"]["verify"]["result"]["misses"] == ["cosine 0.9"]
    assert content["engines"]["own"]["bench"]["verdict"] == "passed"  # the rest went on
    again = Steps()
    assert go(tmp_path / "proof", again)["passed"]
    assert set(again.commands) == {"own-verify"}


def test_answers_of_another_machine_are_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    go(tmp_path / "proof", Steps(own_soak=(3, "")))
    monkeypatch.setattr(prove_run, "_present", lambda: {"power_mode": "MODE_15W"})
    again = Steps()
    said: list[str] = []
    plan = ProofPlan(tmp_path / "proof", gpu=True, shape="tiny", layers=2)
    content = prove(plan, said.append, again)
    assert content["passed"]
    assert "doctor" in again.commands
    assert "begins anew" in said[0]


def test_a_power_cut_within_an_answer_costs_that_step_only(tmp_path: Path):
    go(tmp_path / "proof", Steps(own_soak=(3, "")))
    answer = tmp_path / "proof/work/steps/own-bench.json"
    answer.write_bytes(answer.read_bytes()[:40])
    again = Steps()
    assert go(tmp_path / "proof", again)["passed"]
    assert set(again.commands) == {"own-bench", "own-soak"}


def test_no_step_begins_when_the_time_is_over(tmp_path: Path):
    content = go(tmp_path / "proof", Steps(), minutes=0)
    assert exit_code(content) in (3, 69)
    assert content["export"]["verdict"] == "skipped"
    assert any("run the same command again" in problem for problem in content["problems"])
    assert go(tmp_path / "proof", Steps())["passed"]


def failing(message: str, code: int = 70) -> tuple[int, str, str]:
    return code, "", f"a line of the log\nedge-llm: error: {message}"


OUTCOMES: dict[str, tuple[Steps, str]] = {
    "doctor fails": (Steps(doctor=(69, json.dumps(DOCTOR))), "doctor: the GPU works"),
    "doctor dies": (Steps(doctor=(1, "Traceback")), "doctor: exit code 1"),
    "no GPU works": (Steps(doctor=(0, json.dumps(NO_GPU))), "no NVIDIA GPU with TensorRT works"),
    "no checkpoint": (Steps(checkpoint=(1, "")), "export is missing: there is no checkpoint"),
    "no export": (Steps(export=failing("no room", 71)), "export failed: edge-llm: error: no room"),
    "nothing after it": (Steps(export=failing("x")), "own soak is missing: there is no bundle"),
    "no build": (Steps(own_build=failing("no kernel")), "own build failed: edge-llm: error: no k"),
    "no soak after it": (Steps(own_build=failing("x")), "own soak is missing: the build failed"),
    "bench says nothing": (Steps(tensorrt_bench=(0, "")), "tensorrt bench failed: it printed no"),
    "a leak": (Steps(own_soak=(3, json.dumps(SOAK))), "own soak failed: exit code 3"),
    "unpacked weights": (
        Steps(own_inspect=(0, json.dumps({"compiled": [{"unpacking": 9}]}))),
        "own layers failed: 9 layers unpack weights",
    ),
}


@pytest.mark.parametrize("name", list(OUTCOMES))
def test_every_fault_is_a_problem_with_its_reason(name: str, tmp_path: Path):
    steps, problem = OUTCOMES[name]
    content = go(tmp_path / "proof", steps)
    assert not content["passed"]
    assert exit_code(content) in (3, 69)
    assert any(found.startswith(problem) for found in content["problems"]), content["problems"]


def test_without_a_gpu_the_cpu_proves_what_it_can_and_says_what_is_not_proven(tmp_path: Path):
    steps = Steps(doctor=(0, json.dumps(NO_GPU)))
    content = go(tmp_path / "proof", steps, gpu=False)
    assert exit_code(content) == 69
    assert set(content["engines"]) == {"cpu"}
    assert {found["verdict"] for found in content["engines"]["cpu"].values()} == {"passed"}
    (problem,) = content["problems"]
    assert "own kernels, power and GPU memory are not proven" in problem
    assert not (tmp_path / "proof/work").exists()


def test_the_report_does_not_say_where_its_sender_keeps_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "home of Jürgen"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    steps = Steps(own_build=failing(f"no room in {home}/x and {sys.prefix}/lib"))
    go(home / "proof", steps)
    text = (home / "proof" / REPORT).read_text()
    assert "rgen" not in text
    assert sys.prefix not in text
    assert "no room in ~/x and PYTHON/lib" in text


def test_steps_have_the_state_of_the_machine_after_them(tmp_path: Path):
    content = go(tmp_path / "proof", Steps())
    assert [step["step"] for step in content["steps"]] == [
        step.name for step in ProofPlan(tmp_path, gpu=True).steps
    ]
    for step in content["steps"]:
        assert step["code"] == 0
        assert step["after"]["memory_available_bytes"] > 0


def test_two_runs_do_not_write_into_one_directory(tmp_path: Path):
    class Nested(Steps):
        def __call__(self, step: str, command: Sequence[str]) -> Done:
            with pytest.raises(Exception, match="another run of edge-llm prove"):
                go(tmp_path / "proof", Steps())
            return super().__call__(step, command)

    assert go(tmp_path / "proof", Nested())["passed"]


def test_power_modes_are_measured_and_the_first_one_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now, sets = {"mode": 0}, list[int]()

    def set_mode(before: list[str], number: int) -> str | None:
        assert before == ["sudo", "-n"]
        sets.append(number)
        if number == 3:
            return "not this one"
        now["mode"] = number
        return None

    monkeypatch.setattr(power, "check_rights", lambda: ["sudo", "-n"])
    monkeypatch.setattr(power, "modes_without_reboot", lambda: {2: "MODE_30W", 3: "MODE_50W"})
    monkeypatch.setattr(power, "read_power_modes", lambda _: {0: "MAXN", 2: "MODE_30W"})
    monkeypatch.setattr(power, "read_power_mode", lambda _: "MAXN")
    monkeypatch.setattr(power, "set_mode", lambda b, n, *_: set_mode(b, n))
    content = go(tmp_path / "proof", Steps(), power_modes=True)
    assert sets == [2, 3, 0]
    assert now == {"mode": 0}
    assert content["power_modes"]["MODE_30W"]["verdict"] == "passed"
    assert content["problems"] == ["power mode MODE_50W failed: nvpmodel -m 3: not this one"]
    assert [row[3] for row in table([content])][-2:] == ["MODE_30W", "MODE_50W"]


@pytest.mark.slow
def test_a_real_run_on_the_cpu(tmp_path: Path):
    """Every step in its own process, as on a machine of a newcomer."""
    plan = ProofPlan(tmp_path / "proof", gpu=False, shape="tiny", layers=2)
    content = prove(plan, print)
    assert exit_code(content) == 69
    cpu = content["engines"]["cpu"]
    assert {part: found["verdict"] for part, found in cpu.items()} == {
        "verify": "passed",
        "bench": "passed",
        "soak": "passed",
    }, cpu
    assert cpu["bench"]["result"]["decode_tps"] > 0
    assert cpu["soak"]["result"]["prompts"] == 120
    assert content["doctor"]["result"]["checks"]
    assert sorted(path.name for path in (tmp_path / "proof").iterdir()) == [REPORT]

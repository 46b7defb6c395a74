"""``scripts/gpu-check``: it refuses without a GPU, and its report says what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.device.nodes import find_gpu_node
from scripts import gpu_check

ROOT = Path(__file__).parent.parent
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="one"/>
<testcase classname="tests.gpu.test_a" name="two"><failure message="x"/></testcase>
<testcase classname="tests.gpu.test_a" name="three"><error message="x"/></testcase>
<testcase classname="tests.gpu.test_b" name="four"><skipped/></testcase>
</testsuite></testsuites>"""
PASSED = '<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>'
SKIPPED = JUNIT.splitlines()[0] + JUNIT.splitlines()[4] + JUNIT.splitlines()[5]
DOCTOR = {
    "exit_code": 0,
    "summary": "the GPU works",
    "checks": [{"name": "GPU", "status": "ok", "detail": "Orin"}],
}
BENCH = {"decode_tps": 61.512, "prefill_tps": 5083.0, "decode_watts": None, "backend": "ort-cuda"}


def test_without_a_gpu_it_refuses_in_one_line(tmp_path: Path):
    if find_gpu_node() is not None:
        pytest.skip("there is a GPU here")
    before = sorted(ROOT.iterdir())
    done = subprocess.run(
        [ROOT / "scripts/gpu-check", "--output", tmp_path / "report"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 69
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-check: no NVIDIA GPU here")
    assert sorted(ROOT.iterdir()) == before  # no environment was made
    assert not (tmp_path / "report").exists()


class Steps:
    """Answers of the commands, by step; pytest leaves its XML file."""

    def __init__(self, junit: str = PASSED, **answers: tuple[int, str]) -> None:
        self.junit = junit
        self.answers = {
            "commit": (0, "abc123\n"),
            "source": (0, "/models/smollm2.gguf\n"),
            "doctor": (0, f"noise\n{json.dumps(DOCTOR)}\n"),
            "bench_ort_cuda": (0, f"{json.dumps(BENCH)}\n"),
            "bench_tensorrt": (69, ""),
            **answers,
        }
        self.commands: dict[str, list[str]] = {}

    def __call__(self, step: str, command: Sequence[str]) -> gpu_check.Done:
        self.commands[step] = list(command)
        if step == "tests" and self.junit:
            (target,) = [a for a in command if a.startswith("--junitxml=")]
            Path(target.removeprefix("--junitxml=")).write_text(self.junit)
        return gpu_check.Done(*self.answers.get(step.replace("-", "_"), (0, "")))


def check(output: Path, steps: Steps, *arguments: str) -> tuple[int, Any]:
    code = gpu_check.main(["--output", str(output), *arguments], steps)
    return code, json.loads((output / "report.json").read_text())


def test_a_good_run(tmp_path: Path):
    steps = Steps()
    code, report = check(tmp_path, steps)
    assert code == 0
    assert report["passed"]
    assert report["commit"] == "abc123"
    assert report["doctor"] == DOCTOR
    assert report["tests"] == {"code": 0, "passed": 1, "failed": 0, "skipped": 0, "failures": []}
    assert report["bench"]["ort-cuda"]["result"] == BENCH
    assert report["bench"]["tensorrt"]["code"] == 69
    assert steps.commands["export"][2] == "/models/smollm2.gguf"
    assert steps.commands["doctor"][2] == steps.commands["export"][4]
    text = (tmp_path / "report.txt").read_text()
    for words in (
        "the GPU works",
        "1 passed, 0 failed",
        "61.51 tokens/s in decode, 5083 tokens/s in prefill\n",
        "exit code 69",
        "\npassed\n",
    ):
        assert words in text


def test_a_bundle_of_ones_own_is_not_exported(tmp_path: Path):
    steps = Steps()
    check(tmp_path, steps, "--bundle", "bundles/mine")
    assert "export" not in steps.commands
    assert steps.commands["bench-ort-cuda"][2] == "bundles/mine"


@pytest.mark.parametrize(
    "steps",
    [
        Steps(doctor=(69, json.dumps(DOCTOR))),
        Steps(doctor=(1, "Traceback")),
        Steps(tests=(1, "")),
        Steps(junit=SKIPPED),
        Steps(junit=""),
        Steps(export=(65, "")),
        Steps(bench_ort_cuda=(70, "")),
    ],
    ids=["doctor", "doctor died", "tests", "all skipped", "no tests", "export", "no bench"],
)
def test_a_bad_run_is_not_passed(steps: Steps, tmp_path: Path):
    (tmp_path / "tests.xml").write_text(PASSED)  # of an earlier run
    code, report = check(tmp_path, steps)
    assert code == 1
    assert not report["passed"]
    assert "NOT passed" in (tmp_path / "report.txt").read_text()


def test_failures_are_named(tmp_path: Path):
    _, report = check(tmp_path, Steps(junit=JUNIT, tests=(1, "")))
    tests = report["tests"]
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 2, 1)
    assert tests["failures"] == ["tests.gpu.test_a::two", "tests.gpu.test_a::three"]


def test_steps_leave_their_whole_output(tmp_path: Path):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = gpu_check.logged_run(tmp_path)("step", [sys.executable, "-c", code])
    assert done == (3, "out\n")
    assert (tmp_path / "step.log").read_text() == "err\nout\n"

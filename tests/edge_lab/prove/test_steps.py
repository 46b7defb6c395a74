"""A step: what it prints is kept, and it ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_lab.prove.steps import NOT_BEGUN, TIMED_OUT, Done, cell, last_json, logged_run


def test_steps_leave_their_whole_output(tmp_path: Path):
    said: list[str] = []
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = logged_run(tmp_path, said.append)("step", [sys.executable, "-c", code])
    assert done == (3, "out\n", "err")
    assert (tmp_path / "step.log").read_text() == "err\nout\n"
    assert said == ["step"]


def test_the_verb_is_that_of_this_python(tmp_path: Path):
    done = logged_run(tmp_path, print)("help", ["edge-llm", "--version"])
    assert done.code == 0
    assert f"python {sys.version.split()[0]}" in done.output


def ends(pid: int) -> bool:
    """Whether a process ends within five seconds; a zombie has ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


GRANDCHILD = (
    "import subprocess, sys, time; "
    "print(subprocess.Popen(['sleep', '100'], stdout=subprocess.DEVNULL).pid, flush=True); "
    "time.sleep(100)"
)


def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path):
    run = logged_run(tmp_path, print, limit_s=lambda step: {"slow": 1.0}[step])
    done = run("slow", [sys.executable, "-c", GRANDCHILD])
    assert done.code == TIMED_OUT
    assert "it was ended after 1 s" in done.error
    assert ends(int(done.output))
    found = cell(done)
    assert (found["verdict"], found["reason"]) == ("failed", "it was ended after 1 s")


def test_an_interrupted_run_leaves_no_process_behind(tmp_path: Path):
    """SIGTERM, as the verb takes it: it raises, and the step's process group is ended."""
    code = (
        "import signal, sys; from pathlib import Path; "
        "from edge_lab.prove.steps import logged_run; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        f"logged_run(Path({str(tmp_path)!r}), print)"
        f"('step', [sys.executable, '-c', {GRANDCHILD.replace('print(', 'sys.stderr.write(str(')!r}"
        ".replace('.pid, flush=True)', '.pid)); sys.stderr.flush()')])"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    log = tmp_path / "step.log"
    for _ in range(200):
        if log.exists() and log.read_text().strip().isdigit():
            break
        time.sleep(0.05)
    grandchild = int(log.read_text())
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(timeout=20) == 143
    assert ends(grandchild)


@pytest.mark.parametrize(
    ("done", "verdict", "reason"),
    [
        (Done(0, '{"a": 1}'), "passed", ""),
        (Done(0, "no json"), "failed", "it printed no JSON"),
        (Done(70, "", "note\nedge-llm: error: x\nlast"), "failed", "edge-llm: error: x"),
        (Done(70, ""), "failed", "exit code 70"),
        (Done(NOT_BEGUN, "", "error: the time was over"), "skipped", "error: the time was over"),
    ],
)
def test_a_cell_has_a_verdict_and_a_reason(done: Done, verdict: str, reason: str):
    found = cell(done, json_needed=True)
    assert (found["verdict"], found["reason"]) == (verdict, reason)


def test_the_last_object_is_the_answer():
    assert last_json('{"a": 1}\nnoise\n{"b": 2}\n{broken\n') == {"b": 2}
    assert last_json("[1]\n") is None

"""Programs that a model wrote: found in its answer, run, and kept from everything else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from textwrap import indent

import pytest

from edge.errors import ResourceError
from edge.limited_child import LimitedChild, Limits
from edge_lab.measure import programs
from edge_lab.measure.programs import (
    ProgramItem,
    check_program,
    program_of_answer,
    program_of_continuation,
)
from edge_lab.measure.tasks import read_task
from tests.edge.test_limited_child import UNCONFINED_START

ITEM = ProgramItem("import math\n\n\ndef double(x):\n    '''Twice x.'''\n", "assert double(2) == 4")
RIGHT = "def double(x):\n    return 2 * x"
TASK = Path(programs.__file__).parent / "data" / "tasks" / "programs.jsonl"


def body(statement: str) -> str:
    return f"def double(x):\n    {statement}\n    return 2 * x"


def hold_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every limited child stand still from its start, as one that gets no core."""
    start = LimitedChild._started

    def stopped(self: LimitedChild) -> subprocess.Popen[bytes]:
        process = start(self)
        os.kill(process.pid, signal.SIGSTOP)
        return process

    monkeypatch.setattr(LimitedChild, "_started", stopped)


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (RIGHT, None),
        (body("import math, re, heapq; from collections import Counter; print('hello')"), None),
        ("def double(x):\n    return x", "AssertionError at line 1 of tests"),
        ("def double(x)", "SyntaxError"),
        ("def triple(x):\n    return 3 * x", "NameError"),
        (body("raise SystemExit(0)"), "SystemExit"),
        (body("double(x)"), "RecursionError"),
        (body("import os; os._exit(0)"), "exit code 0 before it answered"),
        (body("x = [0] * 10**10"), "more than"),
        (body("open('/etc/hostname')"), "PermissionError"),
        (body("open('/tmp/edge-llm-escaped', 'w')"), "PermissionError"),
        (body("import os; os.listdir('/')"), "PermissionError"),
        (body("import os; os.fork()"), "PermissionError"),
        (body("import os; os.kill(os.getppid(), 9)"), "PermissionError"),
        (body("import os; os.execv('/bin/true', ['true'])"), "PermissionError"),
        (body("import threading; threading.Thread(target=print).start()"), "can't start"),
        (body("import subprocess; subprocess.run(['true'])"), "Error"),
        (body("import socket; socket.socket()"), "Error"),
        (body("import numpy"), "ModuleNotFoundError"),
        (body("input()"), "lost sys.stdin"),
        (body("import hashlib; assert len(hashlib.md5(b'a').hexdigest()) == 32"), None),
        (
            body(
                "import datetime, time; datetime.datetime.strptime('29 Feb 2024', '%d %b %Y')\n"
                "    import array, calendar, numbers, queue, traceback; time.strptime('7', '%d')"
            ),
            None,
        ),
    ],
)
def test_a_program_computes_and_does_nothing_else(program: str, complaint: str | None):
    found = check_program(ITEM, program)
    if complaint is None:
        assert found is None
    else:
        assert found is not None
        assert complaint in found
    assert not Path("/tmp/edge-llm-escaped").exists()


@pytest.mark.parametrize(
    ("future", "annotation"), [("", "int"), ("from __future__ import annotations\n", "'int'")]
)
def test_a_program_is_a_module_of_its_own(future: str, annotation: str):
    """Its future imports are those that it states, and dataclasses find it."""
    point = "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n"
    program = f"{future}{point}def double(x: int):\n    return 2 * Point(x).x"
    tests = f"{ITEM.tests}\nassert double.__annotations__ == {{'x': {annotation}}}"
    assert check_program(ProgramItem(ITEM.question, tests), program) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "while True: pass",
        "import signal; signal.setitimer(signal.ITIMER_PROF, 0)\n    while True: pass",
    ],
)
def test_an_endless_program_is_ended(statement: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "_LIMITS", Limits(cpu_s=0.3, memory_bytes=512 << 20))
    monkeypatch.setattr("edge.limited_child._MIN_WALL_S", 2.0)
    found = check_program(ITEM, body(statement))
    assert found is not None
    assert "more than 0.3 s" in found


@pytest.mark.slow
def test_a_program_that_sleeps_is_wrong_and_one_that_is_held_up_is_not(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(programs, "_LIMITS", Limits(cpu_s=0.3, memory_bytes=512 << 20))
    monkeypatch.setattr("edge.limited_child._MIN_WALL_S", 2.0)
    assert "more than 0.3 s" in str(check_program(ITEM, body("import time; time.sleep(60)")))
    hold_children(monkeypatch)
    with pytest.raises(ResourceError, match="too busy"):
        check_program(ITEM, RIGHT)


def test_one_program_leaves_nothing_to_the_next():
    assert check_program(ITEM, f"import builtins\nbuiltins.found = 1\n{RIGHT}") is None
    assert "NameError" in str(check_program(ITEM, f"found\n{RIGHT}"))


def test_no_program_runs_unconfined(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edge.limited_child._START", UNCONFINED_START)
    with pytest.raises(ResourceError, match=r"is not run here: only Linux on .* riscv64"):
        check_program(ITEM, RIGHT)


# ------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"Here:\n```python\n{RIGHT}\n```\nDone.", RIGHT),
        (f"```\nprint(1)\n```\nso\n```python\n{RIGHT}\n```\n```\n>>> double(2)\n```", RIGHT),
        (f"```python\n{RIGHT}", RIGHT),  # cut off before the fence
        (RIGHT, RIGHT),
        (f"1. So:\n\n   ```python\n{indent(RIGHT, '   ')}\n   ```\n2. Done.", RIGHT),
        (f"- So is `x`: ```Python 3\n{indent(RIGHT, '  ')}\n  ```", RIGHT),
        (f"With ```x``` so:\n```py\n{RIGHT}\n```\n".replace("\n", "\r\n"), RIGHT),
        (f"~~~python\n{RIGHT}\n~~~\n```\n```", RIGHT),
        (f"```python\nfrom __future__ import annotations\n{RIGHT}\n```", RIGHT),
        (
            "```python\n    return 2 * x\n```",
            "def double(x):\n    '''Twice x.'''\n    return 2 * x",
        ),
    ],
)
def test_the_program_is_found(answer: str, expected: str):
    program = program_of_answer(ITEM, answer)
    assert program is not None
    assert program.endswith(expected)
    assert program.removeprefix("from __future__ import annotations\n").startswith("import math\n")
    assert check_program(ITEM, program) is None


@pytest.mark.parametrize("answer", ["", "It doubles x.", "```python\nprint(4)\n```"])
def test_no_program_is_found(answer: str):
    assert program_of_answer(ITEM, answer) is None


def test_a_continuation_ends_with_the_function():
    text = "\n    y = [\n        x\n]\n\n    return 2 * x\n\n\nprint(double(3))\nopen('a')\n"
    program = program_of_continuation(ITEM, text)
    assert program.endswith("]\n\n    return 2 * x\n\n")
    assert check_program(ITEM, program) is None


# ------------------------------------------------------------------------------- the task


def test_every_built_in_program_can_be_solved_and_missed():
    lines = [json.loads(line) for line in TASK.read_text("utf-8").splitlines()]
    items = [item for _, item in read_task(TASK)]
    assert len(items) == len({item.question for item in items}) == 60
    for item, line in zip(items, lines, strict=True):
        assert isinstance(item, ProgramItem)
        # In this process: they are ours, and 120 children would take half a minute.
        space: dict[str, object] = {}
        exec(item.question + line["solution"] + item.tests, space)
        for wrong in ("    return None\n", "    return []\n"):
            with pytest.raises((AssertionError, TypeError)):
                exec(item.question + wrong + item.tests, {})


def test_a_built_in_program_passes_in_the_child():
    for line in TASK.read_text("utf-8").splitlines()[::20]:
        raw = json.loads(line)
        item = ProgramItem(raw["question"], raw["tests"])
        assert check_program(item, raw["question"] + raw["solution"]) is None

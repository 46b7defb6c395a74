"""The edits of `python3 -m tools mutants` can be made, and its runner tells what became of one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from tools.gates.mutants import Mutant, MutantError, Run, read_table

pytestmark = pytest.mark.once


def test_the_table_can_be_read() -> None:
    assert all(mutant.tests and mutant.breaks for mutant in read_table())


TOY = {
    "pytest.ini": "[pytest]\n",
    "toy/__init__.py": "",
    "toy/sums.py": "def add(a, b):\n    return a + b\n\n\ndef wait():\n    return 0\n",
    "tests/test_sums.py": """
import os, subprocess, sys
import pytest
from toy.sums import add, wait

def test_add():
    assert add(2, 2) == 4

def test_a_child_adds(tmp_path):
    code = "from toy.sums import add; assert add(2, 3) == 5"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)

def test_wait():
    assert wait() == 0

@pytest.mark.skipif(True, reason="needs a program")
def test_with_a_program():
    assert wait() == 0
""",
}


def toy_mutant(name: str, before: str, after: str, test: str = "test_add") -> Mutant:
    return Mutant(name, "toy/sums.py", "", before, after, (f"tests/test_sums.py::{test}",))


KILLED = toy_mutant("K", "a + b", "a - b")
SURVIVOR = toy_mutant("S", "a + b", "a * b")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkout of a small package."""
    root = tmp_path / "toy"
    for name, text in TOY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / ".gitignore").write_text(".mutants\n__pycache__\n")
    subprocess.run(["git", "init", "--quiet", root], check=True)
    return root


@pytest.mark.slow
def test_each_outcome_of_a_mutant(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mutants = [
        KILLED,
        SURVIVOR,
        toy_mutant("C", "a + b", "a * b", "test_a_child_adds"),
        toy_mutant("I", "def wait", "def wait_for", "test_wait"),
        toy_mutant("P", "return 0", "return 1", "test_with_a_program"),
        toy_mutant("G", "a ** b", "a * b"),
        toy_mutant("T", "a + b", "a * b", "test_gone"),
        msgspec.structs.replace(KILLED, id="F", tests=("tests/test_gone.py",)),
        msgspec.structs.replace(KILLED, id="M", file="toy/moved_from.py"),
        toy_mutant("W", "a + b\n", "a + b  # as before\n"),
    ]
    found = Run(toy, mutants).run()
    assert {name: result.kind for name, result in found.items()} == {
        "K": "killed",
        "S": "survived",
        "C": "killed",
        "I": "error",
        "P": "not run",
        "G": "stale",
        "T": "stale",
        "F": "stale",
        "M": "killed",
        "W": "error",
    }
    assert found["K"].detail == "test_add"
    assert "ImportError" in found["I"].detail  # no test has failed, so none has noticed
    assert "test_with_a_program" in found["P"].detail
    assert "`before` occurs 0 times in toy/sums.py" in found["G"].detail
    assert "there is no tests/test_sums.py::test_gone" in found["T"].detail
    assert "changes nothing" in found["W"].detail
    assert (toy / "toy/sums.py").read_text() == TOY["toy/sums.py"]

    # What was noticed is not tried again, as long as edit, file and tests are the same.
    capsys.readouterr()
    again = Run(toy, [KILLED, SURVIVOR]).run()
    told = capsys.readouterr().out
    assert "K    killed   earlier" in told
    assert "1 tests without an edit" in told
    assert again["K"] == found["K"]
    assert again["S"].kind == "survived"
    assert KILLED.key(toy) == found["K"].key
    tests = toy / "tests/test_sums.py"
    tests.write_text(tests.read_text().replace("add(2, 2) == 4", "add(2, 2) < 9"))
    assert KILLED.key(toy) != found["K"].key


@pytest.mark.slow
def test_tests_that_do_not_end_are_ended(toy: Path) -> None:
    hanging = toy_mutant("H", "return 0", "while True: pass", "test_wait")
    assert Run(toy, [hanging], limit_s=3).run()["H"].kind == "hung"


def test_nothing_is_proven_by_tests_that_fail_anyway_or_test_another_package(toy: Path) -> None:
    tests = toy / "tests/test_sums.py"
    tests.write_text(tests.read_text().replace("add(2, 2) == 4", "add(2, 2) == 5"))
    with pytest.raises(MutantError, match=r"(?s)with 1 without any edit.*assert 4 == 5"):
        Run(toy, [KILLED]).run()
    (toy / "time").mkdir()  # Python's own comes before it
    (toy / "time/sums.py").write_text(TOY["toy/sums.py"])
    with pytest.raises(MutantError, match="the copy would test time of"):
        Run(toy, [msgspec.structs.replace(KILLED, file="time/sums.py")]).run()

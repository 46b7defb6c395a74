"""The default run leaves out live and slow tests, says so, and refuses those without a mark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.selection import PROGRAMS

ROOT = Path(__file__).parent.parent
MARKED = """
import pytest
def test_plain(): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.live
def test_live(): pass
@pytest.mark.timing
def test_timing(): pass
"""
CONFTEST = """
from tests import selection
from tests.selection import pytest_addoption
def pytest_configure(config):
    if not config.pluginmanager.is_registered(selection):
        config.pluginmanager.register(selection)
"""


def run(folder: Path, text: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of pytest on one file of tests, ``test_it.py``."""
    (folder / "test_it.py").write_text(text)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n  live\n  timing\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environ.update(PYTHONPATH=str(ROOT), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-v", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        cwd=folder,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        ((), "plain"),
        (("--all",), "plain slow live timing"),
        (("test_it.py",), "plain slow live timing"),
        (("-m", "live"), "live timing"),
        pytest.param(("-n", "2"), "plain", marks=pytest.mark.slow),
    ],
)
def test_what_a_run_leaves_out(tmp_path: Path, arguments: tuple[str, ...], ran: str):
    code, out = run(tmp_path, MARKED, *arguments)
    assert code == 0, out
    passed = [name for name in ("plain", "slow", "live", "timing") if f"test_{name} PASSED" in out]
    if "-n" in arguments:
        passed = ["plain"] * ("1 passed" in out)
    assert passed == ran.split()
    said = "left out: 2 tests marked live and 1 tests marked slow; scripts/test --all runs"
    assert (said in out) == (ran == "plain")


@pytest.mark.parametrize("mark", ["", "@pytest.mark.live"])
@pytest.mark.parametrize(
    ("what", "name"),
    [("socket.create_server(('127.0.0.1', 0)).close()", "a server"),
     ("subprocess.run([FOUND])", "groff")],
)  # fmt: skip
def test_what_starts_a_server_must_be_marked(tmp_path: Path, mark: str, what: str, name: str):
    assert "groff" in PROGRAMS
    program = tmp_path / "bin/groff"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = (
        f"import pytest, socket, subprocess\nFOUND = '{program}'\n{mark}\ndef test_it(): {what}\n"
    )
    code, out = run(tmp_path, text, "--all")
    assert (code == 0) == bool(mark), out
    assert (f"this test starts {name}: mark it live" in out) == (not mark)


def test_a_server_of_a_fixture_counts_unless_it_is_shared(tmp_path: Path):
    text = """
import contextlib, pytest, socket
from tests.selection import shared_server
@pytest.fixture(params=[contextlib.nullcontext, shared_server])
def server(request):
    with request.param(): socket.create_server(("127.0.0.1", 0)).close()
def test_it(server): pass
def test_of_another_kind(tmp_path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "s"))
        one.listen()
"""
    code, out = run(tmp_path, text)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "test_it[nullcontext] ERROR" in out
    assert "2 passed, 1 error" in out


def test_a_slow_test_without_a_mark_is_named(tmp_path: Path):
    text = "import tests.selection\ndef test_it(): tests.selection.NOTED_S = -1.0\n"
    code, out = run(tmp_path, text)
    assert code == 0
    assert "slow without a mark:   0.0 s  test_it.py::test_it" in out

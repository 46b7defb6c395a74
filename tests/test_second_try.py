"""Only what is marked ``timing`` runs twice, it is counted, and a run that needs it often fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.second_try import MOST

ROOT = Path(__file__).parent.parent
CONFTEST = "from tests.second_try import pytest_configure, pytest_runtest_protocol\n"
# A file counts the tries, as a try may be in any process.
HEAD = """
from pathlib import Path
import pytest

def tries(name):
    with Path(name).open("a") as file:
        file.write("x")
        return file.tell()

@pytest.fixture
def broken():
    tries("broken")
    raise OSError("no such device")

@pytest.fixture(scope="module")
def shared():
    return tries("shared")
"""


def late(name: str, passes_at: int = 2) -> str:
    """A test marked ``timing`` that passes at its so many-th try."""
    return (
        f"\n@pytest.mark.timing\ndef test_{name}(shared, tmp_path):\n"
        f"    (tmp_path / 'only').mkdir()\n"
        f"    assert tries('{name}') >= {passes_at}, 'too late'\n"
    )


def run(folder: Path, text: str, processes: str) -> tuple[int, str]:
    """Exit code and output of pytest on one module."""
    (folder / "test_module.py").write_text(HEAD + text)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = timing: has a second try\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    # Without the plugins of other packages, which take seconds to import.
    environ.update(PYTHONPATH=str(ROOT), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-n", processes, folder],
        capture_output=True, text=True, check=False, env=environ, cwd=folder, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_few_second_tries_pass_and_are_named(tmp_path: Path, processes: str):
    names = [f"late_{n}" for n in range(MOST)]
    code, out = run(tmp_path, "".join(map(late, names)) + late("soon", passes_at=1), processes)
    assert code == pytest.ExitCode.OK, out
    assert f"{MOST + 1} passed" in out
    named = out.split(f"second tries: {MOST}, and a run may have {MOST}")[1]
    for name in names:
        assert f"test_module.py::test_{name}: its first try failed" in named
        assert (tmp_path / name).read_text() == "xx"
    assert "too late" in named
    assert "test_soon" not in named
    assert (tmp_path / "soon").read_text() == "x"


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "2"])
def test_too_many_second_tries_fail_a_run_whose_tests_passed(tmp_path: Path, processes: str):
    code, out = run(tmp_path, "".join(late(f"late_{n}") for n in range(MOST + 1)), processes)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert f"{MOST + 1} passed" in out
    assert f"second tries: {MOST + 1}, and a run may have {MOST}" in out


def test_two_failures_fail(tmp_path: Path):
    code, out = run(tmp_path, late("never", passes_at=3), "0")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "1 failed" in out
    assert (tmp_path / "never").read_text() == "xx"


def test_unmarked_tests_and_failing_fixtures_run_once(tmp_path: Path):
    text = (
        "\ndef test_plain():\n    assert tries('plain') >= 2\n"
        "\n@pytest.mark.timing\ndef test_broken(broken): pass\n"
        "\n@pytest.mark.timing\ndef test_skipped():\n    tries('skipped')\n    pytest.skip('x')\n"
    )
    code, out = run(tmp_path, text, "0")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 1 skipped, 1 error" in out
    assert "second tries" not in out
    assert {name: (tmp_path / name).read_text() for name in ("plain", "broken", "skipped")} == {
        "plain": "x",
        "broken": "x",
        "skipped": "x",
    }

"""Where ``CI`` is set, a skip that nobody has allowed fails the run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import skips

ROOT = Path(__file__).parent.parent
TESTS = {
    "test_module.py": "import pytest\npytest.importorskip('no_such_module')\ndef test(): pass\n",
    "test_single.py": """
import pytest
def test_passes(): pass
def test_allowed(): pytest.skip("no Jetson here (none)")
@pytest.mark.skipif(True, reason="needs shellcheck")
def test_forbidden(): pass
@pytest.mark.xfail(strict=True)
def test_known_to_fail(): assert False
""",
}


def run(folder: Path, *arguments: str, ci: str) -> tuple[int, str]:
    """Exit code and output of pytest on ``TESTS``."""
    for name, text in TESTS.items():
        (folder / name).write_text(text)
    (folder / "conftest.py").write_text("from tests.skips import pytest_configure\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    # Without the plugins of other packages, which take seconds to import.
    environ.update(CI=ci, PYTHONPATH=str(ROOT), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", *arguments, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        cwd=folder,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_skip_that_is_not_allowed_fails_the_run(tmp_path: Path, processes: str):
    code, out = run(tmp_path, "-n", processes, ci="true")
    assert code == pytest.ExitCode.TESTS_FAILED
    listed = out.split("skips that tests/skips.py does not allow")[1].splitlines()[1:3]
    assert listed[0].startswith("test_module.py: could not import 'no_such_module'")
    assert listed[1] == "test_single.py::test_forbidden: needs shellcheck"
    assert "test_allowed" not in out
    assert "1 passed" in out


def test_allowed_skips_pass_and_nothing_is_judged_elsewhere(tmp_path: Path):
    assert run(tmp_path, "-n", "0", ci="")[0] == pytest.ExitCode.OK
    chosen = ("-k", "allowed or passes", "--ignore", "test_module.py")
    assert run(tmp_path, "-n", "0", *chosen, ci="1")[0] == pytest.ExitCode.OK


def test_old_kernels_are_an_excuse_on_python_3_10_only():
    reason = "needs ONNX Runtime >= 1.26 for dialect native"
    assert skips.is_allowed(reason) == (sys.version_info < (3, 11))
    assert not skips.is_allowed("needs Debian's packages chromium and chromium-driver")


def test_a_program_of_debian_may_lack_only_where_it_could_not_be_installed(
    monkeypatch: pytest.MonkeyPatch,
):
    reasons = [
        "needs Debian's package docker-registry",
        "needs Debian's package prometheus",
        "needs HAProxy (Debian: haproxy)",
        "needs nginx (Debian: nginx-light)",
        "needs systemd (Debian: systemd)",
        "needs groff",
    ]
    for value, allowed in (("0", False), ("1", True)):
        monkeypatch.setenv("EDGE_LLM_NO_PROGRAMS", value)
        judged = importlib.reload(skips)
        assert [judged.is_allowed(reason) for reason in reasons] == [allowed] * len(reasons)
    monkeypatch.undo()
    importlib.reload(skips)

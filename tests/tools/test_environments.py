"""``python3 -m lab`` and ``python3 -m tools``: a name leads to a program in its environment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.__main__ import PROGRAMS as EXPERIMENTS
from tests.documents import ROOT
from tools.__main__ import PROGRAMS as TOOLS
from tools.environments import Environment, Program

ENTRIES = {"lab": EXPERIMENTS, "tools": TOOLS}
ALL = [(package, name) for package, programs in ENTRIES.items() for name in programs]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("package", "name"), ALL)
def test_every_name_is_a_module_that_can_be_run_from_lock_files(package: str, name: str) -> None:
    program = ENTRIES[package][name]
    found = importlib.util.find_spec(program.module)
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text("utf-8")
    assert '__name__ == "__main__"' in source
    # It calls itself by the name that it is run by.
    assert "ArgumentParser(" not in source or f'"python3 -m {package} {name}"' in source
    for lock in program.environment.locks:
        assert (ROOT / f"requirements/{lock}.txt").exists()
    groups = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(f"\n{group} = [" in groups for group in program.environment.groups)


@pytest.mark.parametrize("package", ENTRIES)
def test_without_a_name_all_are_listed(package: str) -> None:
    done = run(package)
    assert done.returncode == 0
    assert f"usage: python3 -m {package} NAME" in done.stdout
    for name, program in ENTRIES[package].items():
        assert f"  {name} " in done.stdout
        assert program.about in done.stdout


def test_an_unknown_name_is_refused() -> None:
    done = run("lab", "qualty")
    assert done.returncode == 64
    assert done.stderr == "error: there is no qualty; python3 -m lab lists the names\n"


def test_a_program_gets_its_arguments_in_the_environment_that_it_needs(tmp_path: Path) -> None:
    """With a bash that prints what it is given: the environments themselves are large."""
    bash = tmp_path / "bash"
    bash.write_text("#!/bin/sh\npwd\nprintf '%s\\n' \"$@\"\n")
    bash.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run("lab", "finetune", "a b", "--rank", "8", PATH=path)
    assert done.stdout.splitlines() == [
        str(ROOT),
        "-c",
        ". scripts/_venv",
        "make_venv .venv-finetune laptop smollm2",
        "install_group .venv-finetune parity",
        'exec .venv-finetune/bin/python -m lab.training.finetune "$@"',
        "finetune",
        "a b",
        "--rank",
        "8",
    ]


def test_variables_and_uv_are_there_before_the_program() -> None:
    environment = Environment(
        ".venv-x", ("dev",), has_edge_llm=False, needs_uv=True, variables={"CACHE": "$PWD/x"}
    )
    assert Program("a.b", "", environment).environment.script("a.b").splitlines() == [
        ". scripts/_venv",
        "install_locks .venv-x dev",
        "make_uv .venv-x",
        'export CACHE="$PWD/x"',
        'exec .venv-x/bin/python -m a.b "$@"',
    ]

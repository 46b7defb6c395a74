from __future__ import annotations

import copy
import os
import pickle
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edge import errors
from edge.errors import ContextLengthError, EdgeError, install_command
from tests.packages import PACKAGES

ROOT = Path(__file__).parent.parent.parent


def all_errors(base: type[EdgeError] = EdgeError) -> list[type[EdgeError]]:
    return [base, *(found for child in base.__subclasses__() for found in all_errors(child))]


def documented() -> dict[str, tuple[str | None, int]]:
    """Parent and exit code of every class in the docstring's tree; a child inherits the code."""
    tree: dict[str, tuple[str | None, int]] = {}
    ancestors: list[tuple[int, str]] = []
    line = re.compile(r"^( +)(\w+Error) .*?(?: (\d{1,2}))?$", re.MULTILINE)
    for indent, name, code in line.findall(errors.__doc__ or ""):
        while ancestors and ancestors[-1][0] >= len(indent):
            ancestors.pop()
        parent = ancestors[-1][1] if ancestors else None
        tree[name] = parent, int(code) if code else tree[parent or ""][1]
        ancestors.append((len(indent), name))
    return tree


def test_the_docstring_tells_the_whole_tree_and_its_exit_codes() -> None:
    real = {
        kind.__name__: (None if kind is EdgeError else kind.__mro__[1].__name__, kind.exit_code)
        for kind in all_errors()
        if kind.__module__ == errors.__name__
    }
    assert documented() == real


@pytest.mark.parametrize("kind", all_errors())
def test_exit_codes_are_those_of_sysexits(kind: type[EdgeError]) -> None:
    known = {
        os.EX_USAGE,
        os.EX_DATAERR,
        os.EX_UNAVAILABLE,
        os.EX_SOFTWARE,
        os.EX_OSERR,
        os.EX_TEMPFAIL,
        errors.EXIT_GATE_MISSED,  # the one that sysexits.h does not have
    }
    assert kind.exit_code in known


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.RequestError, ValueError),
        (errors.DependencyError, ImportError),
    ],
)
def test_callers_can_catch_the_builtin(kind: type[EdgeError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


def test_context_length_error_names_both_numbers_and_survives_a_process_border() -> None:
    error = ContextLengthError(5000, 4096)
    for twin in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (twin.num_tokens, twin.capacity) == (5000, 4096)
        assert "5000 tokens" in str(twin)
        assert "4096" in str(twin)


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were in site-packages, beside the pyproject.toml of another project."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "edge" / "errors.py"))


def test_a_checkout_is_installed_by_its_path() -> None:
    words = shlex.split(install_command("check"))
    assert "install" in words
    assert words[-2:] == ["-e", f"{ROOT}[check]"]


@pytest.mark.usefixtures("_elsewhere")
def test_elsewhere_the_requirements_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=1.26",
        "tensorrt-rtx>=1.3; extra == 'check'",
        'polygraphy<2,>=0.49 ; extra == "check"',
        "tomli>=2; (python_version < '3.11') and extra == 'check'",
        "numbers>=2; (python_version >= '3.11') and extra == 'check'",
        "checker>=1; extra == 'checks'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(errors, "_pip_install", lambda: "pip install")
    wanted = ["pip", "install", "tensorrt-rtx>=1.3", "polygraphy<2,>=0.49"]
    for version, more in (((3, 11, 0), ["numbers>=2"]), ((3, 10, 13), ["tomli>=2"])):
        monkeypatch.setattr(sys, "version_info", version)
        assert shlex.split(install_command("check")) == wanted + more


@pytest.mark.usefixtures("_elsewhere")
def test_every_extra_of_the_real_metadata_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_pip_install", lambda: "pip install")
    extras = metadata.metadata("jetson-edge-llm").get_all("Provides-Extra") or []
    assert {"cpu", "cuda", "tensorrt", "export", "check", "serve"} <= set(extras)
    for extra in extras:
        requirements = shlex.split(install_command(extra))[2:]
        assert requirements
        assert all(re.fullmatch(r"[a-z-]+[<>=.,0-9]+", word) for word in requirements)


@pytest.mark.usefixtures("_elsewhere")
def test_files_that_nobody_installed_ask_for_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert install_command("cpu").endswith(" '.[cpu]' (in a checkout of edge-llm)")


def test_the_command_installs_for_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "my venv" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    beside, other = str(python.with_name("pip")), "/usr/bin/pip"
    for found, has_pip, start in (
        ({"pip": beside}, True, "pip install"),
        ({"pip": other}, True, f"'{python}' -m pip install"),
        ({"pip": other, "uv": "/bin/uv"}, False, f"uv pip install --python '{python}'"),
        ({"uv": "/bin/uv"}, True, f"'{python}' -m pip install"),
    ):
        monkeypatch.setattr(shutil, "which", found.get)
        monkeypatch.setattr("importlib.util.find_spec", lambda _, has=has_pip: has or None)
        assert install_command("cpu").startswith(start)


def test_no_message_installs_a_project_by_a_name_that_is_not_ours() -> None:
    extras = set(metadata.metadata("jetson-edge-llm").get_all("Provides-Extra") or [])
    for folder in (*PACKAGES, "scripts", "docs", "docker"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            text = path.read_text("utf-8", "replace")
            assert not re.search(r"install[^\n]*jetson-edge-llm", text), path
            for extra in re.findall(r"install_command\([\"'](\w+)[\"']\)", text):
                assert extra in extras, path

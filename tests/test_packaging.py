"""What the wheel holds, and what its entry points lead to."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
import pytest

from edge.cli import COMMAND_GROUP

ROOT = Path(__file__).parent.parent
PACKAGES = {"edge", "engines", "export"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return parsed


def test_the_wheel_holds_three_packages_and_nothing_else(tmp_path: Path):
    pytest.importorskip("hatchling", reason="builds the wheel")
    # In a process of its own, as a frontend does it; without isolation, so without the network.
    backend = f"from hatchling.build import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", backend], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {*PACKAGES, info}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    assert "edge/py.typed" in names  # the classifier says so
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_is_told_its_packages(project: dict[str, Any]):
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": sorted(PACKAGES)}
    assert all((ROOT / package / "__init__.py").is_file() for package in PACKAGES)


def test_every_verb_is_a_click_command(project: dict[str, Any]):
    verbs = project["project"]["entry-points"][COMMAND_GROUP]
    for name, value in verbs.items():
        command = EntryPoint(name, value, COMMAND_GROUP).load()
        assert isinstance(command, click.Command)
        assert command.name == name
        assert command.help, f"{name} has no help"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name} has no help"
    installed = {entry.name: entry.value for entry in entry_points(group=COMMAND_GROUP)}
    assert installed == verbs, "the installed entry points are old: pip install -e . again"


def test_the_script_is_callable(project: dict[str, Any]):
    ((name, value),) = project["project"]["scripts"].items()
    assert name == "edge-llm"
    assert callable(EntryPoint(name, value, "console_scripts").load())

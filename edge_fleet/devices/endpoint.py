"""Runs the endpoint: checks HAProxy's file, starts HAProxy, reloads, queries and stops it."""

from __future__ import annotations

import csv
import io
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from edge.errors import BackendError, ConfigError, DependencyError
from edge.files import MALFORMED
from edge_make.key_file import read_key_file

from .config import Device, FleetConfig
from .haproxy_file import KEYS_NAME, MASTER_NAME, client_map, configuration, worker_url

CONFIG_NAME = "haproxy.cfg"
SECRET_NAME = "secret"
_CHECK_S = 30.0
_ASK_S = 10.0
_LOOK_S = 3.0
_RELOAD_S = 30.0
_MOST_AT_ONCE = 32


class DeviceState(msgspec.Struct, kw_only=True):
    """The state of a device.

    Attributes:
        state: ``ready``, ``away``, or ``unknown`` if no endpoint runs.
        reason: why it is away, by HAProxy's probe.
        running: number of requests that it has from the endpoint.
        waiting: number of its sessions' requests that wait at the endpoint.
        version: version of its edge-llm; None if it did not say.
        models: the models by name, each with the first digits of its bundle's hash.
    """

    state: str
    reason: str = ""
    running: int = 0
    waiting: int = 0
    version: str | None = None
    models: dict[str, str] = {}


class _Stats(msgspec.Struct):
    version: str


class _Tag(msgspec.Struct):
    name: str
    digest: str


class _Tags(msgspec.Struct):
    models: list[_Tag]


class _Workers(msgspec.Struct):
    urls: list[str]


def find_haproxy() -> str:
    """Find HAProxy's program.

    Raises:
        DependencyError: it is not installed.
    """
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        raise DependencyError("haproxy is not installed; run: sudo apt-get install haproxy")
    return program


def write(config: FleetConfig, source: Path) -> Path:
    """Write HAProxy's file and the files it reads, and let HAProxy check them; return the file.

    If HAProxy refuses the new files, the old ones stay.

    Raises:
        ConfigError: a file cannot be read or written, or HAProxy refuses the configuration.
        DependencyError: HAProxy is not installed.
    """
    program, state = find_haproxy(), Path(config.state_dir)
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if state.stat().st_uid != os.geteuid() or state.stat().st_mode & 0o077:
            raise ConfigError(
                f"{state} belongs to another user or is open to others; run: chmod 700 {state}, or "
                "name another state_dir"
            )
        secret = _secret(state / SECRET_NAME)
        if config.api_key_file is not None:
            keys = read_key_file(Path(config.api_key_file))
            _put(state / KEYS_NAME, client_map(keys))
        tried = state / f"new-{CONFIG_NAME}"
        _put(tried, configuration(config, secret, str(source)))
        _check(program, tried)
        return tried.replace(state / CONFIG_NAME)
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename or state}: {error.strerror}; name another state_dir in "
            f"{source}, or run as the endpoint's user"
        ) from error


def _secret(path: Path) -> str:
    """Read the endpoint's secret; it survives a reload, when two processes talk to each other."""
    if not path.exists():
        _put(path, secrets.token_urlsafe(32))
    return path.read_text("ascii")


def _put(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600, exist_ok=False)
    new.write_text(text, "utf-8")
    new.replace(path)


def _check(program: str, file: Path) -> None:
    ran = subprocess.run(
        [program, "-c", "-f", str(file)],
        capture_output=True,
        text=True,
        timeout=_CHECK_S,
        check=False,
    )
    if ran.returncode or "WARNING" in ran.stderr:
        said = (ran.stderr or ran.stdout).strip()
        raise ConfigError(f"{program} refuses the configuration {file}:\n{said}")


def run(config: FleetConfig, source: Path) -> NoReturn:
    """Replace this process by HAProxy's master, which runs until SIGTERM, or SIGUSR1 to drain.

    Raises:
        ConfigError: the endpoint already runs, or its files cannot be written (`write`).
        DependencyError: HAProxy is not installed.
    """
    if _is_running(config):
        raise ConfigError(
            f"the endpoint of {source} runs already; after a change: edge-llm fleet reload {source}"
        )
    file = write(config, source)
    mode = "-Ws" if "NOTIFY_SOCKET" in os.environ else "-W"
    master = f"{config.state_dir}/{MASTER_NAME},mode,600"
    program = find_haproxy()
    os.execv(program, [program, mode, "-f", str(file), "-S", master])


def run_router(config: FleetConfig, source: Path) -> NoReturn:
    """Replace this process by vllm-router, which chooses devices for chats and completions.

    Raises:
        ConfigError: the file names no port for it.
        DependencyError: vllm-router is not installed.
    """
    if config.router_port is None:
        raise ConfigError(f"{source} has no router_port; write one, e.g. router_port = 30000")
    program = shutil.which("vllm-router", path=str(Path(sys.executable).parent))
    program = program or shutil.which("vllm-router")
    if program is None:
        raise DependencyError("vllm-router is not installed; run: pip install vllm-router==0.1.17")
    options = {
        "--host": "127.0.0.1",
        "--port": str(config.router_port),
        "--policy": config.router_policy,
        "--health-check-endpoint": "/ready",
        "--health-check-interval-secs": "2",
        "--worker-startup-timeout-secs": "86400",
        "--worker-startup-check-interval": "1",
        "--request-timeout-secs": str(config.answer_s),
        "--max-payload-size": str(64 << 20),
        "--retry-max-retries": str(config.retries + 1),
        "--log-level": "warning",
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": str(config.router_port + 2),
    }
    words = [word for option in options.items() for word in option]
    workers = [worker_url(config, name) for name in config.devices]
    os.execv(program, [program, *words, "--worker-urls", *workers])


def reload(config: FleetConfig, source: Path) -> None:
    """Apply the present contents of the fleet's file and the files of keys without failed requests.

    The old process hands its open sockets to the new one, and ends when its answers have.

    Raises:
        BackendError: no endpoint runs, or HAProxy refuses the new file; the old one stays in use.
        ConfigError: the file cannot be written (`write`); the old one stays in use.
    """
    _workers_of_master(config)
    write(config, source)
    said = _master(config, "reload")
    if "Success=0" in said:
        raise BackendError(f"HAProxy did not take the new file, the old one serves:\n{said}")
    deadline = time.monotonic() + _RELOAD_S
    while not _is_running(config):
        if time.monotonic() > deadline:
            raise BackendError(f"HAProxy has not answered for {_RELOAD_S:g} s since its reload")
        time.sleep(0.05)
    if config.router_port is not None:
        _tell_router(config)


def _tell_router(config: FleetConfig) -> None:
    """Add new devices to vllm-router and remove old ones; if it is off, it reads them later."""
    base = f"http://127.0.0.1:{config.router_port}"
    try:
        with urllib.request.urlopen(f"{base}/list_workers", timeout=_ASK_S) as answer:
            has = set(msgspec.json.decode(answer.read(), type=_Workers).urls)
        wants = {worker_url(config, name) for name in config.devices}
        calls = [("remove_worker", url) for url in has - wants]
        calls += [("add_worker", url) for url in wants - has]
        for verb, url in calls:
            request = urllib.request.Request(f"{base}/{verb}?url={url}", method="POST")
            with urllib.request.urlopen(request, timeout=_ASK_S) as answer:
                answer.read()
    except urllib.error.HTTPError as error:
        with error:
            raise BackendError(
                f"vllm-router refuses a device (status {error.code}): "
                f"{error.read(300).decode(errors='replace')}; restart it: edge-llm fleet router"
            ) from error
    except OSError:
        return


def stop(config: FleetConfig) -> int:
    """Stop the endpoint; running answers have ``drain_timeout_s``.

    Returns:
        The number of connections that were cut.

    Raises:
        BackendError: no endpoint runs.
    """
    master, _ = _workers_of_master(config)
    os.kill(master, 10)  # SIGUSR1: take no new connections, let running ones end
    deadline = time.monotonic() + config.drain_timeout_s
    while _is_alive(master):
        if time.monotonic() > deadline:
            left = sum(each.running for each in _proxy_states(config).values())
            with suppress(ProcessLookupError):
                os.kill(master, 15)
            return left
        time.sleep(0.1)
    return 0


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def status(config: FleetConfig) -> dict[str, DeviceState]:
    """Ask HAProxy and every device for their state.

    Raises:
        BackendError: the endpoint runs, but does not answer.
    """
    running = _is_running(config)
    states = _proxy_states(config) if running else {}
    with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        looked = pool.map(_look, config.devices.values())
        found = {}
        for name, (version, models) in zip(config.devices, looked, strict=True):
            device = states.get(name)
            if device is None:
                why = "not in the running endpoint; run: edge-llm fleet reload" if running else ""
                device = DeviceState(state="unknown", reason=why)
            device.version, device.models = version, models
            found[name] = device
    return found


def _proxy_states(config: FleetConfig) -> dict[str, DeviceState]:
    said = _master(config, "@1 show stat").lstrip("# ")
    rows = {(row["pxname"], row["svname"]): row for row in csv.DictReader(io.StringIO(said))}
    states = {}
    for (proxy, name), row in rows.items():
        if proxy == "devices" and name != "BACKEND":
            ready = row["status"].startswith("UP")
            last = f"{row['check_status']} {row['check_code']} {row['last_chk']}".strip()
            load = rows[f"device-{name}", name]
            states[name] = DeviceState(
                state="ready" if ready else "away",
                reason="" if ready else " ".join(last.split()),
                running=int(load["scur"] or 0),
                waiting=int(load["qcur"] or 0),
            )
    return states


def _look(device: Device) -> tuple[str | None, dict[str, str]]:
    try:
        stats = msgspec.json.decode(_get(device, "/stats"), type=_Stats)
        tags = msgspec.json.decode(_get(device, "/api/tags"), type=_Tags)
    except (OSError, *MALFORMED):
        return None, {}
    return stats.version, {tag.name: tag.digest.rpartition(":")[2][:12] for tag in tags.models}


def _get(device: Device, path: str) -> bytes:
    headers = {"Authorization": f"Bearer {device.key}"} if device.key else {}
    request = urllib.request.Request(device.url.rstrip("/") + path, headers=headers)
    with urllib.request.urlopen(request, timeout=_LOOK_S) as answer:
        data: bytes = answer.read(1 << 20)
        return data


def _is_running(config: FleetConfig) -> bool:
    try:
        _workers_of_master(config)
    except BackendError:
        return False
    return True


def _workers_of_master(config: FleetConfig) -> tuple[int, Sequence[str]]:
    """Return the master's process id, and its report about its workers."""
    lines = [line for line in _master(config, "show proc").splitlines() if line[:1] != "#"]
    masters = [line.split() for line in lines if " master " in line]
    if not masters or not any(" worker " in line for line in lines):
        raise BackendError(f"HAProxy's master in {config.state_dir} has no worker")
    return int(masters[0][0]), lines


def _master(config: FleetConfig, command: str) -> str:
    """Send a command to HAProxy's master process."""
    path = f"{config.state_dir}/{MASTER_NAME}"
    try:
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(_ASK_S)
            asked.connect(path)
            asked.sendall(f"{command}\n".encode())
            asked.shutdown(socket.SHUT_WR)
            said = b""
            while data := asked.recv(1 << 16):
                said += data
    except OSError as error:
        raise BackendError(
            f"no endpoint runs here ({path}: {error.strerror or error}); run: edge-llm fleet up"
        ) from error
    return said.decode(errors="replace")

"""Starts, finds and ends the processes of Ray on this machine: the head's, or a device's."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from edge.errors import BackendError, ConfigError, DeadlineError, DependencyError, install_command

from .config import FleetConfig, check_token
from .names import HEAD_RESOURCE, device_resource

STORE_BYTES = 100_000_000
"""Shared memory of Ray's object store; by default it would take 30 % of a device's memory."""
_START_S = 120.0
_REJOIN_S = (1.0, 30.0)
_CONNECT_S = 5.0
_STOP_S = 30.0
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_TLS = ("RAY_USE_TLS", "RAY_TLS_")
_STARTED = "Ray runtime started"


def environment(config: FleetConfig) -> dict[str, str]:
    """Return the variables with which every process of Ray is started here.

    Raises:
        ConfigError: the token cannot be used.
    """
    check_token(config)
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": config.token_file,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray compares the patch level, too, which each JetPack and Debian has its own of.
        "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
        # On SIGTERM Ray would wait half a minute for its own Serve; the head drains by itself.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Where 5 % of a machine's memory are left Ray would kill its workers, which are the fleet's
        # part, whoever took the rest; a Jetson with a model on its GPU has less at rest.
        "RAY_memory_monitor_refresh_ms": "0",
        # Each log of Ray has two files of 20 MB; by default they are six of 512 MB. After a head
        # was killed its devices write 40 MB into the new one's until they have joined it.
        "RAY_ROTATION_MAX_BYTES": "20000000",
        "RAY_ROTATION_BACKUP_COUNT": "1",
    }


def start_head(config: FleetConfig) -> None:
    """Start Ray's head in the background, unless it runs.

    Raises:
        BackendError: Ray did not start; the message names its log.
    """
    place = _directory(config, "head")
    if find_head(config) is not None:
        return
    # A head that was killed leaves its address there, and Ray takes it for one that runs if any
    # process of this machine names the same address: so does the node of a device beside it.
    (place / "ray_current_cluster").unlink(missing_ok=True)
    command = [
        *_ray_start(place),
        "--head",
        f"--port={config.ray_port}",
        f"--node-ip-address={config.ray_host}",
        "--include-dashboard=false",
        "--no-monitor",
        "--disable-usage-stats",
        f"--resources={json.dumps({HEAD_RESOURCE: 1})}",
    ]
    if find_spec("grpc") is not None:  # only then Ray opens that port, and else it refuses one
        command.append(f"--ray-client-server-port={config.ray_port + 1}")
    log = place / "start.log"
    # Ray gives itself up where it has not started within 30 s, as on a machine with other work. The
    # second time it finds its files in memory.
    for _ in range(2):
        with log.open("wb") as output, _kept(place) as lock:
            process = subprocess.Popen(
                command,
                env=_environ(config),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
        (place / "head.pid").write_text(f"{process.pid} {_started(process.pid)}")
        deadline = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < deadline:
            if _STARTED in log.read_text("utf-8", "replace"):
                return
            time.sleep(0.1)
        process.terminate()
        process.wait()
    raise BackendError(f"Ray did not start at {config.address}: {_last_line(log)}; see {log}")


def find_head(config: FleetConfig) -> int | None:
    """Return the process that holds Ray's head here; None where none runs."""
    try:
        pid, started = (_directory(config, "head") / "head.pid").read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return int(pid) if _started(int(pid)) == started else None


def drained_file(config: FleetConfig) -> Path:
    """Return where the head keeps which devices are drained; it outlives the head."""
    return _directory(config, "head") / "drained"


def stop_head(config: FleetConfig) -> bool:
    """End Ray's head and what it started; returns whether it ran."""
    pid = find_head(config)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while find_head(config) is not None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # where `up` was called in this process
        if time.monotonic() > deadline:
            raise DeadlineError(f"Ray's head, process {pid}, did not end within {_STOP_S:g} s")
        time.sleep(0.05)
    return True


def stay_joined(
    config: FleetConfig, name: str, labels: Mapping[str, str], told: Callable[[str], None]
) -> None:
    """Join this machine as a device until SIGTERM or SIGINT, again whenever Ray ends.

    Ray ends on a device when its head is gone or was made anew, and where it did not start within
    the 30 s that it allows itself.

    Args:
        config: the fleet's file.
        name: of the device.
        labels: that Ray shows of it.
        told: is called with a line when Ray has ended.
    """
    place = _directory(config, name)
    command = [
        *_ray_start(place),
        f"--address={config.address}",
        f"--resources={json.dumps({device_resource(name): 1})}",
        "--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()),
    ]
    signals: list[int] = []  # no lock: the handler runs between any two steps of this same thread
    process: subprocess.Popen[bytes] | None = None

    def end(number: int, _: object) -> None:
        signals.append(number)
        if process is not None:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    wait_s = _REJOIN_S[0]
    while not signals:
        began = time.monotonic()
        with _kept(place):
            process = subprocess.Popen(
                command, env=_environ(config), stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent
            )
            if signals:  # the signal came while it was started
                process.terminate()
            code = process.wait()
        if signals:
            return
        lived_s = time.monotonic() - began
        wait_s = _REJOIN_S[0] if lived_s > _REJOIN_S[1] else min(2 * wait_s, _REJOIN_S[1])
        told(
            f"Ray ended with code {code} after {lived_s:.0f} s; {name} joins again in {wait_s:g} s"
        )
        again = time.monotonic() + wait_s
        while not signals and time.monotonic() < again:
            time.sleep(0.1)


def connect(config: FleetConfig) -> None:
    """Connect this process to Ray; only on a machine that belongs to the fleet.

    Raises:
        BackendError: there is no Ray at the fleet's address, or it has another token.
        DependencyError: Ray is not installed.
    """
    os.environ.update(environment(config))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would count before the file
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    # By default Ray tries for a quarter of an hour, 20 times 46 s.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        socket.create_connection((config.ray_host, config.ray_port), _CONNECT_S).close()
    except OSError as error:
        raise BackendError(
            f"no head of the fleet answers at {config.address}: {error.strerror or error}; on the "
            "head run: edge-llm fleet up"
        ) from error
    try:
        import ray
    except ImportError as error:
        raise _not_installed() from error
    try:
        ray.init(
            address=config.address,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"cannot connect to Ray at {config.address} from this machine: {error}; is the fleet "
            "up, and is this its head or one of its devices?"
        ) from error


def _ray_start(place: Path) -> list[str]:
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        raise _not_installed()
    return [
        sys.executable,
        str(ray),
        "start",
        "--block",
        "--num-cpus=0",
        f"--object-store-memory={STORE_BYTES}",
        f"--temp-dir={place}",
        "--include-log-monitor=false",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
    ]


def _end_with_parent() -> None:
    """Let the process that is being started get SIGTERM when this one is killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _not_installed() -> DependencyError:
    return DependencyError(f"a fleet needs Ray; run: {install_command('fleet')}")


def _environ(config: FleetConfig) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") or name.startswith(_TLS)
    }
    return kept | environment(config)


def _directory(config: FleetConfig, name: str) -> Path:
    """Make the directory of Ray's sockets and logs, closed to others; sockets need a short path.

    Raises:
        ConfigError: somebody else has a directory of that name.
    """
    base = Path("/tmp") / f"edge-llm-fleet-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{base} is not this user's own closed directory; remove it")
    # An address is another machine's in another network namespace, which may share /tmp.
    network = Path("/proc/thread-self/ns/net").stat().st_ino
    key = f"{config.address} {name} {network}"
    place = base / hashlib.sha256(key.encode()).hexdigest()[:8]
    place.mkdir(mode=0o700, exist_ok=True)
    return place


@contextlib.contextmanager
def _kept(place: Path) -> Iterator[int]:
    """Take a directory under ``/tmp`` for a Ray; of those before, only what the last left stays.

    systemd-tmpfiles(8) cleans ``/tmp`` of what is old after 10 days on Debian 13, and spares what
    is in a locked directory. The lock lasts as long as this process, or one that is given the
    descriptor, has it.
    """
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(BlockingIOError):  # nothing is removed where another Ray runs
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Ray names them by date; the last one's logs say why it has ended.
            for session in sorted(place.glob("session_2*"))[:-1]:
                shutil.rmtree(session, ignore_errors=True)
            (place / "session_latest").unlink(missing_ok=True)  # Ray leaves one that leads nowhere
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)


def _started(pid: int) -> str:
    """Return when a process started, in ticks since boot; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"

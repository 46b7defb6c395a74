"""A real systemd for the tests: process 1 of its own namespaces, with the service installed.

It sees this machine's files through an overlay: nothing is downloaded, and nothing of this machine
is changed. What it takes is root, namespaces, overlayfs and cgroup v2 (`why_not` tells).
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent
PORT = 8000
_BOOT = ROOT / "tests" / "data" / "boot-systemd.sh"
_DIRECTIVES = ROOT / "tests" / "data" / "systemd-directives.json"
_SYSTEMD = Path("/lib/systemd/systemd")
_CLONE_NEWNET = 0x40000000
_PROBE = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$0"
mkdir "$0/u" "$0/w" "$0/r" "$0/c"
mount -t cgroup2 cgroup2 "$0/c"
mkdir "$0/c/edge-llm-test-$$"
rmdir "$0/c/edge-llm-test-$$"
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/u,workdir=$0/w" "$0/r"
mount --bind / "$0/r/mnt"
mknod -m 666 "$0/null" c 1 3
unshare --mount --pid --fork --uts --ipc --net --cgroup mount -t proc proc "$0/r/proc"
"""
_TARGET = """[Unit]
Description=What the tests need of a system
Requires=systemd-journald.service systemd-journald.socket
After=systemd-journald.service
DefaultDependencies=no
AllowIsolate=yes
"""
_COMMAND = """#!/opt/edge-llm/bin/python
import sys
from edge.cli import main
sys.exit(main())
"""


def why_not(directory: Path) -> str | None:
    """Why no systemd can be booted here; None if it can."""
    if not _SYSTEMD.exists() or shutil.which("unshare") is None:
        return "needs systemd (Debian: systemd)"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", _PROBE, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["?"])[-1]
    return f"no namespaces for a systemd here: {last}"


class Machine:
    """A running systemd. Use it as a context manager.

    Args:
        directory: an empty one, for whatever it takes.
        bundle: that is served, as ``/var/lib/edge-llm/bundles/tiny``.
    """

    def __init__(self, directory: Path, bundle: Path) -> None:
        self._directory = directory
        self._payload = directory / "payload"
        self._bundle = bundle
        self._console = directory / "console"
        self._boot: subprocess.Popen[bytes] | None = None
        self._group: Path | None = None
        self.pid = 0

    def __enter__(self) -> Machine:
        self._fill()
        work = self._directory / "work"
        work.mkdir()
        # Never the paths themselves: the service does not see /root, /home and /tmp.
        binds = {
            Path(sys.base_prefix): "/opt/python",
            Path(sysconfig.get_paths()["purelib"]): "/opt/libraries",
            ROOT: "/opt/checkout",
        }
        with self._console.open("wb") as output:
            self._boot = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "bash", str(_BOOT)]
                + [str(work), str(self._payload)]
                + [f"{here}={there}" for here, there in binds.items()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._await_boot()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._boot is not None
        self._boot.kill()  # and with it process 1, and with that all others
        self._boot.wait(30)
        self._remove_cgroups()

    # ------------------------------------------------------------------------------- what is in it

    def _fill(self) -> None:
        """Lay out what the machine has beside this one's files; the product by its installer."""
        etc, opt = self._payload / "etc", self._payload / "opt/edge-llm"
        (etc / "systemd/system").mkdir(parents=True)
        (etc / "systemd/system/edge-llm-test.target").write_text(_TARGET)
        (etc / "systemd/journald.conf").write_text("[Journal]\nStorage=volatile\nAudit=no\n")
        (etc / "machine-id").write_text(f"{os.getpid():032x}\n")
        # A virtual environment as the installer makes it, of this one's libraries.
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        libraries = opt / "lib" / version / "site-packages"
        libraries.mkdir(parents=True)
        (libraries / "of-the-tests.pth").write_text("/opt/checkout\n/opt/libraries\n")
        (opt / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
        (opt / "bin").mkdir()
        (opt / "bin/python").symlink_to(f"/opt/python/bin/{version}")
        (opt / "bin/edge-llm").write_text(_COMMAND)
        (opt / "bin/edge-llm").chmod(0o755)
        bundles = self._payload / "var/lib/edge-llm/bundles"
        bundles.mkdir(parents=True)
        shutil.copytree(self._bundle, bundles / "tiny")
        for path in (bundles, *bundles.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self.install("tiny", "--bundle", "/var/lib/edge-llm/bundles/tiny", "--with", "cpu")
        shared = bool(sysconfig.get_config_var("Py_ENABLE_SHARED"))
        library = "Environment=LD_LIBRARY_PATH=/opt/python/lib\n" if shared else ""
        # What JetPack 6's systemd 249 does not know yet, so does not let through either.
        calls = json.loads(_DIRECTIVES.read_text())["calls_after_249"]
        library += f"SystemCallFilter=~{' '.join(calls)}\n"
        added = {"edge-llm": "WatchdogSec=6\n"}
        added |= dict.fromkeys(("edge-llm-watch", "edge-llm-rollout", "edge-llm-switch"), "")
        for unit, lines in added.items():
            drop_in = etc / f"systemd/system/{unit}@.service.d/99-test.conf"
            drop_in.parent.mkdir(exist_ok=True)
            drop_in.write_text(f"[Service]\n{library}{lines}")

    def install(self, *arguments: str) -> None:
        """Run the installer on what the machine will be booted with."""
        subprocess.run(
            ["bash", ROOT / "scripts/install-service", *arguments, "--no-venv"],
            env={"PATH": os.environ["PATH"], "DESTDIR": str(self._payload)},
            check=True,
            capture_output=True,
            timeout=120,
        )

    # ------------------------------------------------------------------------------- boot

    def _await_boot(self) -> None:
        assert self._boot is not None

        def booted() -> bool:
            assert self._boot is not None
            if self._boot.poll() is not None:
                raise AssertionError(f"systemd did not start:\n{self._console.read_text()}")
            children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text()
            if not children.split():
                return False
            self.pid = int(children.split()[0])
            return self.ask("systemctl", "is-active", "edge-llm-test.target") == "active"

        try:
            until(booted, 60)
        except TimeoutError as error:
            raise AssertionError(
                f"systemd did not come up:\n{self._console.read_text()}"
            ) from error
        group = Path(f"/proc/{self._boot.pid}/cgroup").read_text()
        self._group = Path(group.partition("0::")[2].splitlines()[0])

    def _remove_cgroups(self) -> None:
        """Remove the branch of the cgroup tree, which outlives what was in it."""
        if self._group is None:
            return
        script = (
            'mount --make-rprivate / && mount -t cgroup2 cgroup2 "$0" && cd "$0" && '
            'find "./$1" -depth -type d -exec rmdir {} +'
        )
        mount = self._directory / "cgroup"
        mount.mkdir()
        command = ["unshare", "--mount", "sh", "-c", script, str(mount), str(self._group)]
        # The last processes are on their way out.
        until(lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0, 30)

    # ------------------------------------------------------------------------------- in it

    def call(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as root."""
        namespaces = ("mount", "pid", "uts", "ipc", "net", "cgroup", "root")
        enter = ["nsenter", f"--target={self.pid}", *(f"--{name}" for name in namespaces)]
        return subprocess.run(
            [*enter, "--wd=/", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_COLORS": "0", "LC_ALL": "C"},
        )

    def ask(self, *command: str) -> str:
        """What a command prints, stripped; see `call`."""
        return self.call(*command).stdout.strip()

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as systemd has them."""
        lines = self.ask("systemctl", "show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in lines.splitlines())

    def log(self, unit: str) -> str:
        """The journal of a unit: its own lines, and what systemd says of it."""
        return self.ask("journalctl", "--unit", unit, "--output=cat", "--no-pager")

    def path(self, path: str) -> Path:
        """A file of the machine, for this process."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    @contextlib.contextmanager
    def _network(self) -> Iterator[None]:
        libc = ctypes.CDLL(None, use_errno=True)
        ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        theirs = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(theirs, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter the machine's network")
            yield
        finally:
            if libc.setns(ours, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot leave the machine's network")
            os.close(ours)
            os.close(theirs)

    def request(
        self, path: str, body: Any = None, key: str | None = None, timeout: float = 60
    ) -> tuple[int, bytes]:
        """Ask the service; returns status and body.

        Raises:
            OSError: nobody listens.
        """
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=timeout)
        with self._network():  # a socket stays in the network that it was made in
            connection.sock = socket.create_connection(("127.0.0.1", PORT), timeout)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body)
        try:
            connection.request("GET" if body is None else "POST", path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait for something.

    Raises:
        TimeoutError: it did not come.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(0.1)

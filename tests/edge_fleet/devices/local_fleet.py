"""A real fleet on loopback: Ray's head, and devices with their own ``edge-llm serve``.

Ray takes the machine's own address even where it is told 127.0.0.1, so all of this lives in a
network namespace that has nothing but loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_fleet.devices.cluster import drained_file, find_head
from edge_fleet.devices.config import read_config
from tests.conftest import write_secret

_CLONE_NEWNET = 0x40000000
EDGE_LLM = Path(sys.executable).with_name("edge-llm")
HEAD_PORT = 18000
SLOTS = 4
QUEUE = 4


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Move this thread, and what it starts, into a network namespace of loopback only."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET):
            pytest.skip(f"no network namespace can be made here: {os.strerror(ctypes.get_errno())}")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            assert libc.setns(before, _CLONE_NEWNET) == 0
    finally:
        os.close(before)


def run(*arguments: str, home: Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ``edge-llm`` and return how it ended."""
    return subprocess.run(
        [EDGE_LLM, *arguments],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Process:
    """A process in a session of its own; its output goes to a file."""

    def __init__(self, log: Path, *arguments: str, home: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [EDGE_LLM, *arguments],
                env={**os.environ, "HOME": str(home)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def kill(self) -> None:
        """Kill it and everything that it has started, at once, as a power cut would."""
        _kill_session(self._process.pid)
        self._process.wait()

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Wait until its output has this."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log.read_text("utf-8", "replace"):
            assert self._process.poll() is None, self.log.read_text("utf-8", "replace")
            assert time.monotonic() < deadline, self.log.read_text("utf-8", "replace")
            time.sleep(0.05)


def session(leader: int) -> list[int]:
    """List the processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            state, number, threads = fields[0], int(fields[3]), int(fields[17])
            # A process whose first thread has ended is shown as a zombie, but the others
            # keep its sockets open (proc(5)).
            if number == leader and (state != "Z" or threads > 1):
                found.append(int(path.parent.name))
    return found


def _kill_session(leader: int) -> None:
    for pid in session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class LocalFleet:
    """A fleet of the devices a, b and c.

    Args:
        directory: for its files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "fleet.toml"
        write_secret(directory / "fleet.token", os.urandom(32).hex())
        self.write()
        # Another namespace of the network may have had this one's number.
        drained_file(read_config(self.file)).unlink(missing_ok=True)
        self.services: dict[str, Process] = {}
        self.nodes: dict[str, Process] = {}

    def write(self, *lines: str, **more: str) -> None:
        """Write the fleet's file, with further lines, and more of them for a device."""
        tables = [
            f'[devices.{name}]\nurl = "http://127.0.0.1:{self.port(name)}"\n{more.get(name, "")}'
            for name in "abc"
        ]
        head = [f"port = {HEAD_PORT}", 'token_file = "fleet.token"', "min_context = 128"]
        self.file.write_text("\n".join([*head, *lines, *tables]) + "\n")

    @staticmethod
    def port(name: str) -> int:
        """The port of a device's own service."""
        return 18001 + "abc".index(name)

    def serve(self, name: str, bundle: Path, *options: str) -> None:
        """Start a device's own service, in place of the one that it may have."""
        if name in self.services:
            self.services[name].kill()
        log = self.directory / f"serve-{name}.log"
        log.unlink(missing_ok=True)
        options = (f"--num-slots={SLOTS}", f"--queue-capacity={QUEUE}", *options)
        model = ("--model", f"tiny={bundle}", "--default-model", "tiny")
        arguments = ("serve", *model, "--port", str(self.port(name)), *options)
        self.services[name] = Process(log, *arguments, home=self.directory)
        self.services[name].wait_for("ready: ")

    def join(self, name: str, timeout_s: float = 300, home: Path | None = None) -> None:
        """Let a device join the head that is up, and wait for it unless ``timeout_s`` is 0.

        One after the other: a node of Ray gives itself up where it has not started within 30 s,
        which three at once on two busy cores do not. Its user has the home directory ``home``.
        """
        log = self.directory / f"join-{name}.log"
        log.unlink(missing_ok=True)
        arguments = ("fleet", "join", str(self.file), name)
        self.nodes[name] = Process(log, *arguments, home=home or self.directory)
        if timeout_s:
            self.nodes[name].wait_for("Ray runtime started", timeout_s)

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a verb of ``edge-llm fleet``."""
        return run("fleet", verb, str(self.file), *arguments, home=self.directory)

    def devices(self) -> dict[str, Any]:
        """Return the state of the devices, as the head tells it."""
        _, _, body = ask("/stats")
        devices: dict[str, Any] = json.loads(body)["devices"]
        return devices

    def wait(self, timeout_s: float = 60, **states: str) -> dict[str, Any]:
        """Wait until devices have these states."""
        deadline = time.monotonic() + timeout_s
        while True:
            devices = self.devices()
            if all(devices[name]["state"] == state for name, state in states.items()):
                return devices
            assert time.monotonic() < deadline, devices
            time.sleep(0.1)

    def kill_head(self) -> None:
        """Kill the head and all that Ray has started for it, until its port refuses."""
        pid = find_head(read_config(self.file))
        assert pid is not None, "no head runs"
        _kill_session(pid)
        deadline = time.monotonic() + 20
        while session(pid) or listens(HEAD_PORT):
            assert time.monotonic() < deadline, session(pid)
            time.sleep(0.05)

    def close(self) -> None:
        """End everything."""
        self.run("down")
        for process in (*self.nodes.values(), *self.services.values()):
            process.kill()


def listens(port: int) -> bool:
    """Whether a connection to a local port is taken; one that is reset was."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != errno.ECONNREFUSED


def ask(
    path: str = "/v1/chat/completions", body: Any = None, port: int = HEAD_PORT, **headers: str
) -> tuple[int, Any, bytes]:
    """Send a request; returns status, headers and body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data)
    request.add_header("Content-Type", "application/json")
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()

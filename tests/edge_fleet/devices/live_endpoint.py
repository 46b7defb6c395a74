"""An endpoint as ``edge-llm fleet up`` runs it, for tests."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_secret
from tests.ports import free_port

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy (Debian: haproxy)")
ROUTER = shutil.which("vllm-router", path=str(Path(sys.executable).parent)) or shutil.which(
    "vllm-router"
)
needs_router = pytest.mark.skipif(ROUTER is None, reason="needs vllm-router; EDGE_LLM_FLEET=1")
KEY = "key-of-ann-0123456789"
Devices = Mapping[str, "int | Mapping[str, Any]"]


class Endpoint:
    """HAProxy in front of devices, with its file."""

    def __init__(self, folder: Path, port: int, state: Path | None = None) -> None:
        self.folder = folder
        self.port = port
        self.file = folder / "fleet.toml"
        # Short, as sockets' paths must be.
        self.state = state or Path(tempfile.mkdtemp(prefix="fleet-"))
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, devices: Devices, **keys: Any) -> None:
        """Write the file; a device is its port, or more of its keys."""
        lines = [f"port = {self.port}", f'state_dir = "{self.state}"']
        lines += [f"{name} = {json.dumps(value)}" for name, value in keys.items()]
        for name, told in devices.items():
            table = {"port": told} if isinstance(told, int) else dict(told)
            table = {"url": f"http://127.0.0.1:{table.pop('port')}", **table}
            lines += [f"[devices.{name}]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.file.write_text("\n".join(lines))

    def command(self, verb: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "edge.cli", "fleet", verb, str(self.file), *more]

    def run(self, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(verb, *more), capture_output=True, text=True, timeout=60, check=False
        )

    def do(self, verb: str, *more: str) -> str:
        ran = self.run(verb, *more)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command("up"), stdout=log, stderr=log)
        wait_until(lambda: self._is_ready() or self._has_ended(), 30)
        assert not self._has_ended(), self.log.read_text()

    def _has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def _is_ready(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.port)) == 0

    def ask(
        self, body: Any, path: str = "/v1/chat/completions", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data, method = (None, "GET") if body is None else (json.dumps(body), "POST")
        connection.request(method, path, data, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        found = response.status, response.headers, response.read()
        connection.close()
        return found

    def device(self, body: Any, **headers: str) -> str:
        status, answered, data = self.ask(body, **headers)
        assert status == 200, data
        return answered["X-Edge-Device"]

    def lines(self) -> list[dict[str, Any]]:
        """The lines of requests in the log."""
        text = self.log.read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


def chat(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 2, **fields}


def wait_until(fact: Callable[[], Any], timeout_s: float = 10) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := fact()):
        assert time.monotonic() < deadline
        time.sleep(0.03)
    return found


@contextmanager
def endpoint(folder: Path, devices: Devices, **keys: Any) -> Iterator[Endpoint]:
    front = Endpoint(folder, free_port())
    front.write(devices, **keys)
    try:
        front.start()
        yield front
    finally:
        if front.process is not None and front.process.poll() is None:
            front.process.send_signal(signal.SIGTERM)
            front.process.wait(20)
        shutil.rmtree(front.state)


@contextmanager
def router(front: Endpoint, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """vllm-router, as ``edge-llm fleet router`` runs it."""
    assert ROUTER is not None
    paths = os.pathsep.join([str(Path(ROUTER).parent), os.environ["PATH"]])
    with (front.folder / "router.log").open("wb") as log:
        process = subprocess.Popen(
            front.command("router"), stdout=log, stderr=log, env={**os.environ, "PATH": paths}
        )
    try:
        wait_until(lambda: len(workers(port)) or process.poll() is not None, 40)
        assert process.poll() is None, (front.folder / "router.log").read_text()
        time.sleep(2.5)  # HAProxy looks once a second
        yield process
    finally:
        process.kill()
        process.wait()


def workers(port: int) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/list_workers")
        found: list[str] = json.loads(connection.getresponse().read())["urls"]
    except (OSError, ValueError):
        return []
    finally:
        connection.close()
    return found


def answers(port: int, proxy: str) -> int:
    """How many good answers passed a part of HAProxy."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    begin = f'haproxy_backend_http_responses_total{{proxy="{proxy}",code="2xx"}} '
    (line,) = [line for line in text.splitlines() if line.startswith(begin)]
    return int(line.removeprefix(begin))


def keys(folder: Path, name: str = "keys", text: str = f"ann:{KEY}\n") -> str:
    """A file of keys beside the fleet's."""
    write_secret(folder / name, text)
    return name

"""A server that does what its requests say, in a thread or, to be killed, in a process.

``python -m tests.edge_serve.batch.stub PORT DELAY_S``
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Stub(ThreadingHTTPServer):
    """Answers a body with what it says.

    A body may have ``first``, a list of statuses for the first times that it comes (0 cuts the
    connection, -1 in the middle of an answer), ``then``, a status for later, ``retry_after``,
    ``raw``, the bytes of the answer, ``wait_s``, and ``waits_s``, a list of waits for the first
    times.

    Attributes:
        seen: how often each body came.
        headers: of the newest request.
        most: requests at once, so far.
        key: that it wants, if any.
        first: statuses of a body that has no ``first`` of its own.
        idle_s: after which a connection that has had an answer is closed; None keeps it.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.seen: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.now = self.most = 0
        self.key: str | None = None
        self.models_status = 200
        self.ready_status = 404
        self.first: list[int] = []
        self.idle_s: float | None = None
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that left."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        status = {"/v1/models": self.server.models_status, "/ready": self.server.ready_status}
        self._send(status.get(self.path, 404), b'{"data": []}', {})

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = json.loads(body)
        with server.lock:
            server.headers = {name.lower(): value for name, value in self.headers.items()}
            times = server.seen[body.decode()]
            server.seen[body.decode()] += 1
            server.now += 1
            server.most = max(server.most, server.now)
        waits = asked.get("waits_s", [])
        wait_s = waits[times] if times < len(waits) else asked.get("wait_s", 0)
        time.sleep(server.delay_s + wait_s)
        with server.lock:
            server.now -= 1
        first = asked.get("first", server.first)
        status = first[times] if times < len(first) else asked.get("then", 200)
        headers = {}
        if times < len(first) and "retry_after" in asked:
            headers["retry-after"] = str(asked["retry_after"])
        if server.key is not None and self.headers["authorization"] != f"Bearer {server.key}":
            status = 401
        if status <= 0:
            self.close_connection = True
            if status < 0:
                self._send(200, b"[1, 2", {"content-length": "2000"})
            return
        raw = asked.get("raw")
        answer = json.dumps({"path": self.path, "echo": asked}).encode()
        self._send(status, answer if raw is None else raw.encode(), headers)
        self.connection.settimeout(server.idle_s)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.send_header("x-request-id", "req_1")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def stub(delay_s: float = 0.0) -> Iterator[Stub]:
    with Stub(0, delay_s) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def write_requests(path: Path, bodies: list[Any], url: str = "/v1/chat/completions") -> Path:
    """One row for each body: ``row-0``, ``row-1`` and so on."""
    lines = [
        json.dumps({"custom_id": f"row-{i}", "method": "POST", "url": url, "body": body})
        for i, body in enumerate(bodies)
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    Stub(int(sys.argv[1]), float(sys.argv[2])).serve_forever()

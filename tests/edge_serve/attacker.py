"""Hostile clients in a process of their own, until standard input ends; then counts of answers.

``python -m tests.edge_serve.attacker KIND PORT NUM ADDRESS...``; EDGE_LLM_ATTACKER_KEY is a key.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from edge_serve.http.connections import raise_file_limit

MIB = 2**20
_PAUSE_S = 0.2  # eight of them send 4 MiB each, five times a second
_TEXT = "hello world " * (4 * MIB // 12 - 100)
_LETTERS = "x" * len(_TEXT)
_PART = {"type": "text", "text": _TEXT}
TEXTS: tuple[tuple[str, object], ...] = (
    ("/tokenize", {"prompt": _TEXT}),
    ("/tokenize", {"prompt": _LETTERS}),
    ("/tokenize", {"messages": [{"role": "system", "content": _TEXT}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [_PART]}]}),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": _TEXT}]}),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": _TEXT}]}),
    ("/v1/completions", {"prompt": [_TEXT[: MIB // 2]] * 7}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hello"}],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"description": _LETTERS}},
                }
            ],
        },
    ),
)
"""Requests whose texts nobody can answer to, by path."""


def post(path: str, data: bytes, length: int | None = None) -> bytes:
    key = os.environ.get("EDGE_LLM_ATTACKER_KEY")
    allowed = f"Authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{allowed}Content-Type: application/json\r\n"
        f"Content-Length: {len(data) if length is None else length}\r\nConnection: close\r\n\r\n"
    ).encode() + data


class Attack:
    """What all hostile connections share."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        self.port = port
        self.addresses = addresses
        self.answers: Counter[str] = Counter()
        self.ended = threading.Event()

    def connect(self, number: int) -> socket.socket:
        address = self.addresses[number % len(self.addresses)]
        return socket.create_connection(("127.0.0.1", self.port), 20, (address, 0))

    def send(self, number: int, request: bytes) -> None:
        """Send again and again, and read the answers."""
        while not self.ended.is_set():
            try:
                with self.connect(number) as sock:
                    sock.sendall(request)
                    answer = b""
                    while part := sock.recv(65536):
                        answer = (answer + part)[:100]
                self.answers[answer.split(b" ", 2)[1].decode()] += 1
            except (OSError, IndexError):
                self.answers["cut"] += 1
            self.ended.wait(_PAUSE_S)

    def leave(self, number: int, request: bytes) -> None:
        """Send again and again, and leave at once."""
        while not self.ended.is_set():
            try:
                with self.connect(number) as sock:
                    sock.sendall(request)
                self.answers["left"] += 1
            except OSError:  # no port is free, or the backlog is full
                self.ended.wait(_PAUSE_S)

    def hold(self, num: int, request: bytes) -> None:
        """Open connections, send part of a request on each, and wait."""
        held = []
        for number in range(num):
            with suppress(OSError):
                sock = self.connect(number)
                held.append(sock)
                sock.settimeout(2)
                sock.sendall(request)
        self.ended.wait()
        for sock in held:
            sock.close()


def main(kind: str, port: str, num: str, *addresses: str) -> None:
    raise_file_limit()
    attack = Attack(int(port), list(addresses))
    works: list[Callable[[], None]]
    if kind in ("texts", "long"):
        bodies = [(path, json.dumps({"model": "tiny", **body}).encode()) for path, body in TEXTS]  # type: ignore[dict-item]
        if kind == "long":  # long, but it fits into a context of 128 Ki tokens
            text = json.dumps({"model": "tiny", "prompt": _TEXT[: MIB // 2]}).encode()
            bodies = [("/tokenize", text)]
        works = [
            lambda number=number: attack.send(number, post(*bodies[number % len(bodies)]))  # type: ignore[misc]
            for number in range(int(num))
        ]
    elif kind == "leave":
        request = post("/v1/completions", b'{"model": "tiny", "prompt": "x", "max_tokens": 64}')
        works = [lambda number=number: attack.leave(number, request) for number in range(int(num))]  # type: ignore[misc]
    elif kind == "stalled":
        request = post("/v1/chat/completions", b"[" + b" " * (4 * MIB - 2), 4 * MIB)
        works = [lambda: attack.hold(int(num), request)]
    elif kind == "chunks":
        request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        request += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        request += b"1\r\nx\r\n" * (MIB // 6)
        works = [lambda: attack.send(0, request)] * int(num)
    else:
        works = [lambda: attack.hold(int(num), b"")]
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    attack.ended.set()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps(attack.answers))


if __name__ == "__main__":
    os.nice(10)  # what it costs is its own; what is measured is the server
    main(*sys.argv[1:])

"""Loads the HTTP service for a while: no answer may be 5xx, and memory must not grow.

The service runs in a process of its own with a scripted engine, so that the service and the
scheduler are tested. Clients ask a mixture: chats and completions, whole and streamed, scored
prompts, several answers at once, metrics, requests that are wrong in every way, and clients that
leave before or within an answer. It fails on an answer of 500 or above, and on a good request that
gets neither 200 nor 429. It also fails if resident memory grows by more than 16 MiB: the median of
the last tenth of the time against that of the tenth after the warm-up. A peak in between is
reported
too, but is not growth: that many requests happened to run at once.

Usage: python3 -m lab load-server [--seconds 600] [--clients 16] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_GROWTH_MIB = 16.0
WARM_UP_SHARE = 0.15
ANSWER_S = 60.0
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GOOD = frozenset({"chat", "chat_n", "chat_stream", "text", "text_stream", "scored", "look"})


def message(method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def post(path: str, **fields: Any) -> bytes:
    return message("POST", path, json.dumps({"model": "tiny", **fields}).encode())


def words(rng: random.Random) -> str:
    return " ".join(rng.choice(("what", "is", "a", "sky", "of", "blue")) for _ in range(30))


def good(kind: str, rng: random.Random) -> bytes:
    """Make a request that is right."""
    messages = [{"role": "user", "content": words(rng)}]
    tokens = rng.randrange(1, 60)
    if kind.startswith("chat"):
        return post(
            CHAT,
            messages=messages,
            max_tokens=tokens,
            n=3 if kind == "chat_n" else 1,
            stream=kind == "chat_stream",
        )
    if kind == "scored":
        return post(TEXT, prompt=words(rng), echo=True, logprobs=1, max_tokens=1)
    if kind == "look":
        path = rng.choice(("/metrics", "/stats", "/", "/v1/models", "/ready", "/openapi.json"))
        return message("GET", path)
    return post(TEXT, prompt=words(rng), max_tokens=tokens, stream=kind == "text_stream")


def bad(rng: random.Random) -> bytes:
    """Make a request that is wrong."""
    messages = [{"role": "user", "content": "what"}]
    return rng.choice(
        (
            post(CHAT),
            post(CHAT, messages=messages, temperature=-1),
            post(CHAT, messages=messages, n=2**31),
            post(CHAT, messages=messages, some_field=rng.random()),
            post(CHAT, messages=[{"role": "user", "content": "x" * 200_000}]),
            post(TEXT, prompt=[2**40]),
            post(TEXT, prompt=""),
            message("POST", CHAT, b"[" * 5000),
            message("POST", CHAT, b'{"model": "tiny", "messages": ['),
            message("POST", CHAT, b"\xff\xfe", "text/plain"),
            message("DELETE", CHAT),
            message("GET", f"/{rng.random()}"),
            b"NONSENSE\r\n\r\n",
        )
    )


@dataclass
class Asked:
    """One request, as its client saw it; times are monotonic.

    Attributes:
        status: status of the answer; 0 is a client that left, -1 no answer.
        first_s: time of the first event of a stream; None for other answers.
        timing: the answer's ``Server-Timing``.
    """

    kind: str
    began_s: float
    status: int = -1
    first_s: float | None = None
    ended_s: float = 0.0
    timing: str = ""


class Load:
    """Clients of one server, and the answers to their requests.

    Args:
        port: port of the server, on loopback.
        seed: seed of the requests.
        patience_s: seconds after which a client gives up.

    Attributes:
        answers: counts by kind and status; 0 is a client that left.
        wrong: requests that got an answer that they must not get.
        asked: every request that has ended.
    """

    def __init__(self, port: int, seed: int, patience_s: float = ANSWER_S) -> None:
        self._port = port
        self._rng = random.Random(seed)
        self._patience_s = patience_s
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.asked: list[Asked] = []

    async def run(self, seconds: float, clients: int) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(until) for _ in range(clients)))

    async def _client(self, until: float) -> None:
        kinds = (*sorted(GOOD), "bad", "bad", "leaves", "leaves")
        while time.monotonic() < until:
            asked = Asked(self._rng.choice(kinds), time.monotonic())
            kind = asked.kind
            try:
                await asyncio.wait_for(self._ask(asked), self._patience_s)
            except (asyncio.TimeoutError, OSError, ValueError) as error:
                self.wrong.append(f"{kind}: {error!r}")
                asked.status = -1
            asked.ended_s = time.monotonic()
            self.asked.append(asked)
            status = asked.status
            self.answers[f"{kind} {status}"] += 1
            if status >= 500 or (kind in GOOD and status not in (-1, 200, 429)):
                self.wrong.append(f"{kind}: {status}")
            if status == 429:
                await asyncio.sleep(0.5)

    def _request(self, kind: str) -> bytes:
        if kind == "bad":
            return bad(self._rng)
        if kind == "leaves":
            kind = self._rng.choice(("chat_stream", "chat", "text"))
        return good(kind, self._rng)

    async def _ask(self, asked: Asked) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(self._request(asked.kind))
            if asked.kind == "leaves":
                await writer.drain()
                await asyncio.sleep(self._rng.random() * 0.3)
                asked.status = 0
                return
            answer = b""
            while piece := await reader.read(1 << 20):
                answer += piece
                if asked.first_s is None and b"\r\ndata: " in answer:
                    asked.first_s = time.monotonic()
        finally:
            writer.close()
        if b'data: {"error"' in answer:
            raise ValueError(f"an error within a stream: {answer[-200:]!r}")
        if timing := re.search(rb"(?i)\r\nserver-timing: ([^\r]*)", answer[:4096]):
            asked.timing = timing[1].decode()
        try:
            asked.status = int(answer.split(b" ", 2)[1])
        except IndexError:
            raise ConnectionError("the connection was closed without an answer") from None


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[1]) / 1024


async def measure(
    server: subprocess.Popen[str], port: int, options: argparse.Namespace
) -> dict[str, Any]:
    load = Load(port, options.seed)
    started = time.monotonic()
    running = asyncio.create_task(load.run(options.seconds, options.clients))
    seen: list[tuple[float, float]] = []
    while not running.done():
        await asyncio.wait({running}, timeout=1.0)
        seen.append((time.monotonic() - started, rss_mib(server.pid)))
    await running
    warm_s = options.seconds * WARM_UP_SHARE
    after = [mib for at, mib in seen if at > warm_s]
    tenth = max(1, len(seen) // 10)
    warm, end = statistics.median(after[:tenth]), statistics.median(after[-tenth:])
    minutes = range(int(seen[-1][0] // 60) + 1)
    by_minute = [[mib for at, mib in seen if at // 60 == minute] for minute in minutes]
    total = sum(load.answers.values())
    return {
        "seconds": round(time.monotonic() - started, 1),
        "requests": total,
        "answers": dict(sorted(load.answers.items())),
        "wrong": load.wrong[:20],
        "num_wrong": len(load.wrong),
        "rss_start_mib": round(seen[0][1], 1),
        "rss_by_minute_mib": [round(statistics.median(part), 1) for part in by_minute if part],
        "rss_warm_mib": round(warm, 1),
        "rss_peak_mib": round(max(after), 1),
        "rss_end_mib": round(end, 1),
        "growth_mib": round(end - warm, 1),
    }


def run(options: argparse.Namespace, bundle: Path, log: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.edge_serve.child", str(bundle), str(options.delay_s)]
    with log.open("w") as errors:
        server = subprocess.Popen(command, stderr=errors, text=True)
        try:
            port = None
            for _ in range(600):
                text = log.read_text()
                found = re.search(r"listening on \S+ port (\d+)", text)
                if found and "ready: " in text:
                    port = int(found[1])
                    break
                time.sleep(0.1)
            if port is None:
                raise SystemExit(f"the service did not start:\n{log.read_text()}")
            return asyncio.run(measure(server, port, options))
        finally:
            server.terminate()
            server.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python3 -m lab load-server",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--delay-s", type=float, default=0.001, help="of every row of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, help="default: a tiny one is made")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.bundle is None:
            from .server import make_bundle

            options.bundle = make_bundle(Path(directory))
        log = Path(directory) / "log"
        result = run(options, options.bundle, log)
        text = log.read_text()
        result["tracebacks"] = text.count("Traceback")
    print(json.dumps(result, indent=None if options.json else 2))
    good = result["growth_mib"] <= MAX_GROWTH_MIB
    return 0 if good and not (result["num_wrong"] or result["tracebacks"]) else 1


if __name__ == "__main__":
    sys.exit(main())

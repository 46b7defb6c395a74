"""Measure what a request, a streamed event and a look at a device cost the head of a fleet.

A real head and two devices of Ray in a network of loopback only; in place of `edge-llm serve` a
server that answers from a script, so that an answer's tokens come 60 ms apart. What counts is the
processor time of the head's process, which other work on the machine changes little. Prints one
JSON line, in milliseconds of one core; `scripts/fleet-simulation` takes it as its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import edge
from tests.edge_fleet.devices.local_fleet import HEAD_PORT, LocalFleet, own_network

DEVICES = "ab"
BEATS_S = (0.05, 0.5)
TOKENS = 129
PACE_S = 0.06
PROMPT = "word " * 800  # some 4 KB, as 1,020 tokens of English are
EVENT = {
    "id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "model": "tiny",
    "choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}],
}  # fmt: skip
_TICKS = os.sysconf("SC_CLK_TCK")


# ----------------------------------------------------------------------------------- the device


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer as a device's service does: ready, with one model, and tokens at a fixed pace."""
    if scope["type"] != "http":
        return
    body = b""
    while scope["method"] == "POST":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(body) if body else {}

    async def say(kind: bytes, data: bytes, more: bool = False, *, start: bool = True) -> None:
        if start:
            headers = [(b"content-type", kind)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})

    if asked.get("stream"):
        event = b"data: " + json.dumps(EVENT).encode() + b"\n\n"
        for number in range(asked["max_tokens"]):
            await say(b"text/event-stream", event, True, start=not number)
            await asyncio.sleep(PACE_S)
        await say(b"", b"data: [DONE]\n\n", start=False)
        return
    model = {"loaded": True, "num_slots": 256, "queue_capacity": 1024, "backend": "scripted"}
    answers = {
        "/stats": {"version": edge.__version__, "models": {"tiny": model}},
        "/v1/models": {"data": [{"id": "tiny", "max_model_len": 8192}]},
        "/api/tags": {"models": [{"name": "tiny", "digest": "0" * 64}]},
    }
    whole = {"object": "chat.completion", "choices": [{"message": {"content": "token " * 129}}]}
    await say(b"application/json", json.dumps(answers.get(scope["path"], whole)).encode())


# ----------------------------------------------------------------------------------- the head


def head_process() -> int:
    """Find the process of the head's actor in this network."""
    here = Path("/proc/thread-self/ns/net").stat().st_ino
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            if name.startswith(b"ray::HeadActor") and (path / "ns/net").stat().st_ino == here:
                return int(path.name)
        except OSError:
            continue  # it has just ended
    raise SystemExit("error: no head runs")


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def ask(number: int, *, stream: bool) -> None:
    """Send a request and read its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", HEAD_PORT, timeout=120)
    messages = [{"role": "user", "content": f"{number} {PROMPT}"}]
    body = json.dumps({"messages": messages, "max_tokens": TOKENS, "stream": stream})
    headers = {"Content-Type": "application/json", "X-Session-Id": str(number)}
    connection.request("POST", "/v1/chat/completions", body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200 or (stream and not text.endswith(b"[DONE]\n\n")):
        raise SystemExit(f"error: status {answer.status}: {text[-300:]!r}")


def measure(pid: int, count: int, at_once: int, *, stream: bool) -> tuple[float, float]:
    """Ask this often; returns the processor time that the head took, and the time, in seconds."""
    before, began = cpu_s(pid), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda number: ask(number, stream=stream), range(count)))
    return cpu_s(pid) - before, time.perf_counter() - began


def main() -> None:
    """Bring a fleet up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=600, help="whole answers per round")
    parser.add_argument("--streams", type=int, default=24, help="streams at once")
    options = parser.parse_args()
    with own_network(), tempfile.TemporaryDirectory() as directory:
        fleet = LocalFleet(Path(directory))
        services = []
        try:
            for name in DEVICES:
                port = str(fleet.port(name))
                command = [sys.executable, "-m", "uvicorn", "--log-level=error", f"--port={port}"]
                services.append(subprocess.Popen([*command, "scripts.fleet_head_cost:app"]))
            head(fleet, BEATS_S[0], wait_s=0)
            for name in DEVICES:
                fleet.join(name)
            print(json.dumps(costs(fleet, options)))
        finally:
            fleet.close()
            for service in services:
                service.kill()
                service.wait()


def head(fleet: LocalFleet, beat_s: float, wait_s: float = 120) -> int:
    """Start the head, or start it anew with another beat; returns its process."""
    lines = [f"port = {HEAD_PORT}", 'token_file = "fleet.token"', f"beat_s = {beat_s}"]
    lines += [f'[devices.{name}]\nurl = "http://127.0.0.1:{fleet.port(name)}"' for name in DEVICES]
    fleet.file.write_text("\n".join(lines))
    up = fleet.run("up", "--wait-s", str(wait_s))
    if up.returncode and wait_s:
        raise SystemExit(up.stdout + up.stderr)
    return head_process()


def idle_share(pid: int) -> float:
    """Share of a core that a head takes without requests."""
    time.sleep(2)
    before, began = cpu_s(pid), time.perf_counter()
    time.sleep(10)
    return (cpu_s(pid) - before) / (time.perf_counter() - began)


def costs(fleet: LocalFleet, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in rounds; returns medians, and all values."""
    found: dict[str, list[float]] = {"request_ms": [], "token_ms": [], "look_ms": []}
    for _ in range(options.rounds):
        often = idle_share(head(fleet, BEATS_S[0]))
        pid = head(fleet, BEATS_S[1])
        idle = idle_share(pid)
        looks = len(DEVICES) * (1 / BEATS_S[0] - 1 / BEATS_S[1])
        found["look_ms"].append(1e3 * (often - idle) / looks)
        measure(pid, 50, 8, stream=False)  # connections and caches
        took, lasted = measure(pid, options.requests, 8, stream=False)
        request = (took - idle * lasted) / options.requests
        found["request_ms"].append(1e3 * request)
        count = 2 * options.streams
        took, lasted = measure(pid, count, options.streams, stream=True)
        token = (took - idle * lasted - count * request) / count / TOKENS
        found["token_ms"].append(1e3 * token)
    return {
        name: {"median": round(statistics.median(values), 3), "all": [round(v, 3) for v in values]}
        for name, values in found.items()
    }


if __name__ == "__main__":
    main()

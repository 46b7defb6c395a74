"""Measure what a relay in front of devices costs, and how many prompt tokens stay cached.

Devices are scripted: tokens come at a fixed pace. Each has slots that keep the text of their last
sequence; a next prompt finds its longest beginning there, as in `edge-llm serve`. The cost is the
processor time of the relay's processes, which other work on the machine changes little. Prints one
JSON line for each relay of each round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import edge

DEVICES, SLOTS = 4, 4
TOKENS, MIX_TOKENS, PACE_S = 129, 128, 0.06
PROMPT = "word " * 800  # some 4 KB, like 1,020 tokens of English
CHARS_PER_TOKEN = 4
EVENT = {
    "id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}],
}  # fmt: skip
# The mix: more sessions at once than half of all slots; a third of them share a system prompt.
SESSIONS, AT_ONCE, TURNS, THINK_S, ANSWER_S = 72, 20, 5, 0.4, 0.25
SYSTEM_CHARS, FIRST_CHARS, TURN_CHARS = 2000, 4000, 240
_TICKS = os.sysconf("SC_CLK_TCK")
_HERE = Path(__file__).parents[2]


# ----------------------------------------------------------------------------------- the device


class _Slots:
    """Slots of a device and their texts; a prompt takes the free one that shares most with it."""

    def __init__(self) -> None:
        self._held = [""] * SLOTS
        self._used = [0] * SLOTS
        self._free = set(range(SLOTS))
        self._count = itertools.count(1)
        self._changed = asyncio.Condition()

    async def take(self, text: str) -> tuple[int, int]:
        """Wait for a slot; return it, and how many characters of the text it already held."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free)
            shared = {slot: _shared(self._held[slot], text) for slot in self._free}
            slot = max(self._free, key=lambda slot: (shared[slot], -self._used[slot]))
            self._free.discard(slot)
            return slot, shared[slot]

    async def give(self, slot: int, held: str) -> None:
        """Give a slot back, with the text that it holds now."""
        async with self._changed:
            self._held[slot], self._used[slot] = held, next(self._count)
            self._free.add(slot)
            self._changed.notify()


def _shared(one: str, other: str) -> int:
    """Count the characters of the longest beginning that two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


_slots: _Slots | None = None


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer as a device's service does: ready, with one model, and tokens at a fixed pace."""
    global _slots
    if scope["type"] != "http":
        return None
    body = b""
    while scope["method"] == "POST":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(body) if body else {}
    tokens = asked.get("max_tokens") or asked.get("max_completion_tokens") or 0

    async def say(kind: bytes, data: bytes, more: bool = False, *, start: bool = True) -> None:
        if start:
            headers = [(b"content-type", kind)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})

    if asked.get("stream"):
        event = b"data: " + json.dumps(EVENT).encode() + b"\n\n"
        for number in range(tokens):
            await say(b"text/event-stream", event, True, start=not number)
            await asyncio.sleep(PACE_S)
        return await say(b"", b"data: [DONE]\n\n", start=False)
    model = {"loaded": True, "num_slots": SLOTS, "queue_capacity": 1024, "backend": "scripted"}
    answers: dict[str, Any] = {
        "/stats": {"version": edge.__version__, "models": {"tiny": model}},
        "/v1/models": {
            "object": "list",
            "data": [{"id": "tiny", "object": "model", "max_model_len": 8192}],
        },
        "/api/tags": {"models": [{"name": "tiny", "digest": "0" * 64}]},
    }
    if scope["path"].endswith("/render"):  # vllm-router asks for tokens; edge-llm serve has none
        await send({"type": "http.response.start", "status": 404, "headers": []})
        return await say(b"", b"{}", start=False)
    if scope["method"] == "POST":
        answers[scope["path"]] = await _whole(asked, tokens)
    return await say(b"application/json", json.dumps(answers.get(scope["path"], {})).encode())


async def _whole(asked: dict[str, Any], tokens: int) -> dict[str, Any]:
    global _slots
    _slots = _slots or _Slots()
    text = "".join(f"<{each['role']}>{each['content']}" for each in asked["messages"])
    cached, answer = 0, "token " * TOKENS
    if tokens == MIX_TOKENS:
        slot, cached = await _slots.take(text)
        answer = f"{random.random()} " * (TOKENS * CHARS_PER_TOKEN // 20)
        await asyncio.sleep(ANSWER_S)
        await _slots.give(slot, f"{text}<assistant>{answer}")
    usage = {
        "prompt_tokens": len(text) // CHARS_PER_TOKEN, "completion_tokens": TOKENS,
        "total_tokens": len(text) // CHARS_PER_TOKEN + TOKENS,
        "prompt_tokens_details": {"cached_tokens": cached // CHARS_PER_TOKEN},
    }  # fmt: skip
    message = {"role": "assistant", "content": answer}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "tiny",
            "choices": [choice], "usage": usage}  # fmt: skip


# ----------------------------------------------------------------------------------- the relays


class Relay(NamedTuple):
    """A running relay: its port, and the processes whose trees are measured."""

    port: int
    pids: tuple[int, ...]

    def cpu_s(self) -> float:
        """Return the seconds of processor time that it has used."""
        return sum(map(cpu_s, self.pids))


def free_port() -> int:
    """Find a port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def started(command: list[str], port: int, **options: Any) -> Iterator[Relay]:
    """Run a program until it listens; it ends with the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=_HERE, **options)
        try:
            deadline = time.monotonic() + 90
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"error: {shlex.join(command)}\n{log.read()[-3000:].decode()}")
                time.sleep(0.05)
            yield Relay(port, (process.pid,))
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def cpu_s(pid: int) -> float:
    """Return the seconds of processor time that a process and its children have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / _TICKS + sum(map(cpu_s, map(int, children)))


@contextlib.contextmanager
def endpoint(folder: Path, urls: list[str], *, routed: bool) -> Iterator[Relay]:
    """Run a fleet's endpoint, with vllm-router in it or without; devices queue by themselves."""
    port, router_port = free_port(), free_port()
    lines = [f"port = {port}", f'state_dir = "{folder / str(port)}"', "slots = 64"]
    lines += [f"router_port = {router_port}"] if routed else []
    for number, url in enumerate(urls):
        lines += [f"[devices.d{number}]", f'url = "{url}"']
    file = folder / f"{port}.toml"
    file.write_text("\n".join(lines))
    fleet = [sys.executable, "-m", "edge.cli", "fleet"]
    with started([*fleet, "up", str(file)], port) as relay:
        if not routed:
            yield relay
            return
        with started([*fleet, "router", str(file)], router_port) as router:
            time.sleep(5)  # HAProxy looks once a second
            yield Relay(port, relay.pids + router.pids)


@contextlib.contextmanager
def vllm_router(policy: str, urls: list[str]) -> Iterator[Relay]:
    """Run vllm-router alone."""
    port = free_port()
    command = ["vllm-router", "--policy", policy, "--health-check-endpoint", "/ready"]
    command += ["--log-level", "error", "--port", str(port), "--prometheus-port", str(free_port())]
    with started([*command, "--worker-urls", *urls], port) as relay:
        yield relay


@contextlib.contextmanager
def given(text: str, urls: list[str]) -> Iterator[Relay]:
    """Run the relay that the command line names."""
    port = free_port()
    command = []
    for word in shlex.split(text):
        command += urls if word == "{devices}" else [word.replace("{port}", str(port))]
    with started(command, port) as relay:
        yield relay


# ----------------------------------------------------------------------------------- the load


class Client(threading.local):
    """A connection per thread."""

    connection: http.client.HTTPConnection | None = None


_client = Client()


def post(port: int, body: dict[str, Any], session: str | None) -> tuple[str, bytes]:
    """Send a request and read its answer; return the device's name, if given, and the body."""
    if _client.connection is None or _client.connection.port != port:
        _client.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Content-Type": "application/json"} | ({"X-Session-Id": session} if session else {})
    data = json.dumps({"model": "tiny"} | body)
    _client.connection.request("POST", "/v1/chat/completions", data, headers)
    answer = _client.connection.getresponse()
    text = answer.read()
    if answer.status != 200 or (body.get("stream") and not text.endswith(b"[DONE]\n\n")):
        raise SystemExit(f"error: status {answer.status}: {text[-300:]!r}")
    return answer.headers.get("X-Edge-Device", ""), text


def wait_for_answer(port: int) -> None:
    """Wait until a relay has found its devices."""
    deadline = time.monotonic() + 60
    while True:
        try:
            post(port, {"messages": [{"role": "user", "content": "x"}], "max_tokens": TOKENS}, None)
        except (SystemExit, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def load(relay: Relay, count: int, at_once: int, *, stream: bool) -> tuple[float, float]:
    """Ask this often; return the relay's processor time and the time that passed, in seconds."""

    def ask(number: int) -> None:
        messages = [{"role": "user", "content": f"{number} {PROMPT}"}]
        body = {"messages": messages, "max_tokens": TOKENS, "stream": stream}
        post(relay.port, body, str(number))

    before, began = relay.cpu_s(), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(ask, range(count)))
    return relay.cpu_s() - before, time.perf_counter() - began


def cached_share(relay: Relay, seed: int, *, named: bool) -> float:
    """Play the mix of sessions; return the share of prompt tokens that were cached."""
    cached: list[int] = []
    total: list[int] = []

    def session(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        words = [f"{chance.random()}" for _ in range(FIRST_CHARS // 18)]
        system = f"system {number % 3} " * (SYSTEM_CHARS // 9)
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": " ".join(words)},
        ]
        time.sleep(chance.random() * THINK_S)
        for _ in range(TURNS):
            body: dict[str, Any] = {"messages": messages, "max_tokens": MIX_TOKENS}
            body |= {"user": f"{seed}-{number}"} if named else {}
            _, text = post(relay.port, body, f"{seed}-{number}" if named else None)
            answer = json.loads(text)
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            total.append(answer["usage"]["prompt_tokens"])
            more = " ".join(f"{chance.random()}" for _ in range(TURN_CHARS // 18))
            messages += [answer["choices"][0]["message"], {"role": "user", "content": more}]
            time.sleep(chance.expovariate(1 / THINK_S))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(session, range(SESSIONS)))
    return float(sum(cached) / sum(total))


def measure(name: str, relay: Relay, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Measure one relay; return milliseconds of a core, and shares of cached tokens."""
    load(relay, 50, 8, stream=False)  # connections and caches
    time.sleep(1)
    before, began = relay.cpu_s(), time.perf_counter()
    time.sleep(8)
    idle = (relay.cpu_s() - before) / (time.perf_counter() - began)
    took, lasted = load(relay, options.requests, 8, stream=False)
    request = (took - idle * lasted) / options.requests
    count = 2 * options.streams
    took, lasted = load(relay, count, options.streams, stream=True)
    token = (took - idle * lasted - count * request) / count / TOKENS
    found = {
        "relay": name,
        "idle_cores": round(idle, 4),
        "request_ms": round(1e3 * request, 3),
        "token_ms": round(1e3 * token, 4),
    }
    if name != "none":
        found["cached_named"] = round(cached_share(relay, seed, named=True), 3)
        found["cached_unnamed"] = round(cached_share(relay, seed + 1, named=False), 3)
    return found


def main() -> None:
    """Start devices, then each relay in turn, and print its cost."""
    parser = argparse.ArgumentParser(
        "python3 -m lab relay-cost", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=400, help="whole answers per round")
    parser.add_argument("--streams", type=int, default=24, help="streams at once")
    parser.add_argument(
        "--relay",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another relay; {port} and {devices} (URLs) in the command are filled in; repeatable",
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in range(DEVICES)]
        uvicorn = [sys.executable, "-m", "uvicorn", "--log-level=error", "lab.bench.relay_cost:app"]
        devices = [
            stack.enter_context(started([*uvicorn, f"--port={port}"], port)) for port in ports
        ]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        relays: dict[str, Callable[[], AbstractContextManager[Relay]]] = {
            "HAProxy": lambda: endpoint(folder, urls, routed=False),
            "HAProxy with vllm-router": lambda: endpoint(folder, urls, routed=True),
            "vllm-router cache_aware": lambda: vllm_router("cache_aware", urls),
            "vllm-router consistent_hash": lambda: vllm_router("consistent_hash", urls),
        }
        for each in options.relay:
            name, _, text = each.partition("=")
            relays[name] = functools.partial(given, text, urls)
        for seed in range(options.rounds):
            print(json.dumps(measure("none", devices[0], options, seed)), flush=True)
            for name, start in relays.items():
                with start() as relay:
                    wait_for_answer(relay.port)
                    print(json.dumps(measure(name, relay, options, seed)), flush=True)


if __name__ == "__main__":
    main()

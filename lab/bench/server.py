"""Measure the cost of the HTTP service above the core: milliseconds per request and per token.

A scripted engine takes no time, so only Python around it is measured: first the core alone
(`LLM.submit`, read from asyncio), then the same through the server and a socket, whose client runs
in a process of its own. Answers of two lengths give the cost per request and per token. With
``--delay-ms``, eight streams at once show how even the gaps between tokens are.

Usage: python3 -m lab bench-server [--tokens 200] [--repeats 30] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from tests.edge_serve.scripted import ScriptedEngine, running
from tests.makers.tiny_models import write_checkpoint

QUESTION = [{"role": "user", "content": "what"}]
MAX_PER_REQUEST_MS = 5.0
MAX_PER_TOKEN_MS = 0.5


def make_bundle(directory: Path) -> Path:
    """Make a tiny bundle; only its tokenizer and token table are used."""
    from export.pipeline import ExportConfig, export_checkpoint

    source = write_checkpoint(directory / "checkpoint", "qwen2")
    output = directory / "bundle"
    export_checkpoint(ExportConfig(source=str(source), output=output, quant="fp16"))
    return output


async def time_core(llm: LLM, tokens: int) -> float:
    """Return the seconds of one answer that is read in this process."""
    params = SamplingParams(temperature=0, max_tokens=tokens)
    started = time.perf_counter()
    generation = llm.submit(QUESTION, params)
    async for _ in generation:
        pass
    return time.perf_counter() - started


def request(tokens: int, stream: bool) -> bytes:
    body = {
        "model": "tiny",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": tokens,
        "stream": stream,
    }
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def ask(sock: socket.socket, tokens: int, stream: bool) -> list[float]:
    """Return the times since sending at which parts of the answer came; the last is its end."""
    started = time.perf_counter()
    sock.sendall(request(tokens, stream))
    received = b""
    times = []
    while True:
        received += sock.recv(65536)
        times.append(time.perf_counter() - started)
        if received.endswith(b"0\r\n\r\n"):
            return times
        head, found, body = received.partition(b"\r\n\r\n")
        if found and not stream:
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            if len(body) >= length:
                return times


def client(port: int, jobs: list[tuple[int, bool]], results: Any) -> None:
    """Ask one question after the other over one connection; put the times of each into a queue."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        results.put([ask(sock, tokens, stream) for tokens, stream in jobs])


def in_processes(port: int, jobs: list[list[tuple[int, bool]]]) -> list[list[list[float]]]:
    """Run one client process per list of jobs."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=client, args=(port, job, results)) for job in jobs]
    for process in processes:
        process.start()
    answers = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return answers


def line(short: list[float], long: list[float], tokens: int) -> tuple[float, float]:
    """Return milliseconds per request and per token, from the medians of two lengths."""
    first, last = statistics.median(short) * 1e3, statistics.median(long) * 1e3
    per_token = (last - first) / (tokens - 1)
    return first - per_token, per_token


def measure(bundle: Path, tokens: int, repeats: int, delay_ms: float) -> dict[str, float]:
    engine = ScriptedEngine()
    options = {"kv_capacity": tokens + 64, "num_slots": 8}
    with running(bundle, engine, llm=options, idle_connection_s=60) as live:
        engine.say(QUESTION, "</think>" + "x" * tokens, ends=False)
        core = {}
        for length in (1, tokens):
            times = [asyncio.run(time_core(engine.llm, length)) for _ in range(repeats + 3)]
            core[length] = times[3:]
        core_request_ms, core_token_ms = line(core[1], core[tokens], tokens)
        result = {"core_request_ms": core_request_ms, "core_token_ms": core_token_ms}
        for name, stream in (("whole", False), ("stream", True)):
            jobs = [(n, stream) for n in (1, tokens) for _ in range(repeats + 3)]
            (times_of,) = in_processes(live.port, [jobs])
            ends = [times[-1] for times in times_of]
            short, long = ends[3 : repeats + 3], ends[repeats + 6 :]
            request_ms, token_ms = line(short, long, tokens)
            result[f"{name}_request_ms"] = request_ms
            result[f"{name}_token_ms"] = token_ms
            result[f"{name}_extra_request_ms"] = request_ms - core_request_ms
            result[f"{name}_extra_token_ms"] = token_ms - core_token_ms
        engine.delay_s = delay_ms / 1e3 / 8  # every row of a step of eight waits
        answers = in_processes(live.port, [[(tokens, True)]] * 8)
        gaps = [
            (later - earlier) * 1e3
            for (times,) in answers
            for earlier, later in itertools.pairwise(times[8:])
        ]
        ordered = sorted(gaps)
        result["itl_p50_ms"] = ordered[len(ordered) // 2]
        result["itl_p99_ms"] = ordered[len(ordered) * 99 // 100]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab bench-server",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--delay-ms", type=float, default=10.0)
    parser.add_argument("--bundle", type=Path, help="default: a tiny one is made")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundle = options.bundle or make_bundle(Path(directory))
        result = measure(bundle, options.tokens, options.repeats, options.delay_ms)
    result = {name: round(value, 4) for name, value in result.items()}
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:26} {value:9.3f}")
    for name, limit in (("request", MAX_PER_REQUEST_MS), ("token", MAX_PER_TOKEN_MS)):
        worst = max(result[f"{kind}_extra_{name}_ms"] for kind in ("whole", "stream"))
        verdict = "within" if worst <= limit else "BEYOND"
        print(f"extra per {name}: {worst:.3f} ms, {verdict} {limit} ms")


if __name__ == "__main__":
    main()

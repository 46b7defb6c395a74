"""Compare a device's tokens per second through the head of a fleet with those at its own address.

usage: fleet_bench.py HEAD DEVICE [--streams 1,4] [--tokens 128] [--rounds 5] [--key KEY]

HEAD and DEVICE are base URLs; the fleet should have that one device, or the others be drained. Both
sides stream the same greedy answers in turns, so that a machine that slows down slows both. Prints
one JSON line: per number of streams the tokens per second of both, the median ratio of the rounds
and the lowest and highest, and the seconds to the first token.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request
from statistics import median
from typing import Any


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("head")
    parser.add_argument("device")
    parser.add_argument("--streams", default="1,4", help="numbers of streams at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--key", help="API key, where both want one")
    options = parser.parse_args()
    result: dict[str, Any] = {"tokens": options.tokens, "rounds": options.rounds}
    for count in map(int, options.streams.split(",")):
        rounds: list[tuple[dict[str, float], dict[str, float]]] = []
        measure(options.head, count, options)  # both are warm then
        measure(options.device, count, options)
        for i in range(options.rounds):
            urls = [options.head, options.device]
            pair = {url: measure(url, count, options) for url in (urls if i % 2 else urls[::-1])}
            rounds.append((pair[options.head], pair[options.device]))
        ratios = sorted(head["tokens_s"] / device["tokens_s"] for head, device in rounds)
        result[f"{count} streams"] = {
            "ratio": round(median(ratios), 4),
            "lowest": round(ratios[0], 4),
            "highest": round(ratios[-1], 4),
            "head": middle([head for head, _ in rounds]),
            "device": middle([device for _, device in rounds]),
        }
    print(json.dumps(result))


def middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: round(median(each[name] for each in rounds), 3) for name in rounds[0]}


def measure(url: str, count: int, options: argparse.Namespace) -> dict[str, float]:
    """Stream this many answers at once; returns tokens per second and seconds to the first."""
    answers: list[tuple[int, float]] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(stream(url, i, options)))
        for i in range(count)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if len(answers) != count:
        raise SystemExit(f"{count - len(answers)} of {count} answers of {url} failed, see above")
    return {
        "tokens_s": sum(tokens for tokens, _ in answers) / took,
        "ttft_s": median(first for _, first in answers),
    }


def stream(url: str, number: int, options: argparse.Namespace) -> tuple[int, float]:
    """Stream one answer; returns its tokens and the seconds to the first."""
    body = {
        "messages": [{"role": "user", "content": f"{number}: tell me about the sea."}],
        "max_tokens": options.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/chat/completions", data=json.dumps(body).encode()
    )
    request.add_header("Content-Type", "application/json")
    request.add_header("X-Session-Id", f"fleet-bench {number}")
    if options.key:
        request.add_header("Authorization", f"Bearer {options.key}")
    began = time.perf_counter()
    first, tokens = 0.0, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"{url}: {event['error']['message']}")
            first = first or time.perf_counter() - began
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return tokens, first


if __name__ == "__main__":
    main()

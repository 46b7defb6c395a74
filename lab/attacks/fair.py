"""Attacks a running service on loopback as one client, and times another's chats beside it.

Attackers come from 127.0.0.2 (of `addresses` from eight, 127.0.0.10 on) and the good client from
127.0.0.1; a service without keys takes each address for a client. Each attack keeps its connections
busy for some seconds. The good client asks one chat of 4 tokens after the other, alone and beside
it. An attack is held if each of these chats is answered, with a P95 of at most three times the P95
alone; else the exit code is 1. The service must listen on loopback. Give it and this script a core
each (taskset), or they slow each other.
With --equal N it attacks nobody. It prints how many tokens a second N clients get together that
each ask for one answer of 64 tokens after the other.

Usage: python3 -m lab attack-fair --port 8000 [--seconds 20] [--only n16,long] [--json]
       python3 -m lab attack-fair --port 8000 --equal 8 [--seconds 20]
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

GOOD, ATTACKER = "127.0.0.1", "127.0.0.2"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ANSWER_S = 60.0
MOST_S, MOST_EQUAL = 120.0, 200
MOST_RATIO = 3.0  # P95 beside an attack over the P95 alone


def ask(port: int, source: str, path: str, body: dict[str, Any], timeout_s: float) -> int:
    """Send one request; return its status, or 0 if no answer came in time."""
    return fetch(port, source, path, body, timeout_s)[0]


def fetch(
    port: int, source: str, path: str, body: dict[str, Any], timeout_s: float
) -> tuple[int, bytes]:
    """Send one request; return status and body, or 0 and nothing if no answer came in time."""
    connection = http.client.HTTPConnection(
        GOOD, port, timeout=timeout_s, source_address=(source, 0)
    )
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    except OSError:
        return 0, b""
    else:
        return response.status, data
    finally:
        connection.close()


def leave_unread(port: int, source: str, body: dict[str, Any], over: threading.Event) -> int:
    """Ask for a stream and read nothing of it until the attack ends; 0 if that was refused."""
    try:
        with socket.create_connection((GOOD, port), ANSWER_S, (source, 0)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            data = json.dumps(body).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {GOOD}\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            over.wait()
            return int(sock.recv(12)[9:12] or 0)
    except (OSError, ValueError):
        return 0


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Say yes."}], "temperature": 0, **fields}


def text(number: int, tokens: int, **fields: Any) -> dict[str, Any]:
    """Make a prompt of about this many tokens, unlike that of any other number."""
    return {"prompt": f"{number}" + " one" * tokens, "temperature": 0, **fields}


@dataclass(frozen=True)
class Attack:
    """Connections that each send one request after the other, from these addresses in turn."""

    connections: int
    path: str
    fields: dict[str, Any]
    prompt_tokens: int = 0
    sources: tuple[str, ...] = (ATTACKER,)
    reads: bool = True

    def body(self, number: int) -> dict[str, Any]:
        if self.path == CHAT:
            return chat(**self.fields)
        return text(number, self.prompt_tokens, **self.fields)


ATTACKS = {
    "n16": Attack(4, CHAT, {"n": 16, "max_tokens": 16}),
    "long": Attack(4, TEXT, {"max_tokens": 1}, 3000),
    "connections": Attack(68, CHAT, {"max_tokens": 16}),
    "unlimited": Attack(1, CHAT, {"n": 4}),
    "addresses": Attack(8, CHAT, {"n": 4}, sources=tuple(f"127.0.0.{i}" for i in range(10, 18))),
    "unread": Attack(30, CHAT, {"stream": True}, reads=False),
    "scored": Attack(4, TEXT, {"max_tokens": 1, "echo": True, "logprobs": 1}, 3000),
}


@dataclass
class Seen:
    """Answers that the good client got.

    Attributes:
        seconds: time of each answer.
        statuses: number of answers by status; 0 means none in time.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def p95_s(self) -> float:
        """The least time that 95 % of the answers did not exceed."""
        return sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]

    def told(self) -> dict[str, Any]:
        return {
            "median_s": round(statistics.median(self.seconds), 3) if self.seconds else None,
            "p95_s": round(self.p95_s, 3) if self.seconds else None,
            "worst_s": round(max(self.seconds), 3) if self.seconds else None,
            "statuses": dict(self.statuses),
        }


def watch(port: int, seconds: float) -> Seen:
    """Ask chats for this long, at least one."""
    seen, until = Seen(), time.monotonic() + seconds
    while True:
        began = time.monotonic()
        status = ask(port, GOOD, CHAT, chat(max_tokens=4), ANSWER_S)
        seen.statuses[status] += 1
        if status == 200:
            seen.seconds.append(time.monotonic() - began)
        if time.monotonic() > until:
            return seen
        time.sleep(0.05)


def beside(port: int, attack: Attack, seconds: float) -> tuple[Seen, Counter[int]]:
    """Watch during an attack; return the good client's answers, and the attackers' statuses."""
    over = threading.Event()
    statuses: Counter[int] = Counter()

    def run(number: int) -> None:
        while not over.is_set():
            source = attack.sources[number % attack.connections % len(attack.sources)]
            if attack.reads:
                status = ask(port, source, attack.path, attack.body(number), ANSWER_S)
            else:
                status = leave_unread(port, source, attack.body(number), over)
            statuses[status] += 1
            number += attack.connections
            over.wait(0.1)

    threads = [
        threading.Thread(target=run, args=(number,), daemon=True)
        for number in range(attack.connections)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # until they wait for the engine
    try:
        return watch(port, seconds), statuses
    finally:
        over.set()
        for thread in threads:
            thread.join(ANSWER_S)


def equal(port: int, clients: int, seconds: float) -> float:
    """Return the tokens per second of this many clients with an address each."""
    began = time.monotonic()
    counts, refused = [0] * clients, list[str]()

    def run(number: int) -> None:
        turn = 0
        while time.monotonic() < began + seconds:
            body = text(1000 * turn + number, 60, max_tokens=64)
            status, data = fetch(port, f"127.0.0.{20 + number}", TEXT, body, ANSWER_S)
            if status != 200:
                refused.append(f"a client got status {status}: {data[:200]!r}")
                return
            counts[number] += json.loads(data)["usage"]["completion_tokens"]
            turn += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if refused:
        raise SystemExit(refused[0])
    return sum(counts) / (time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python3 -m lab attack-fair", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--port", type=int, required=True, help="of a service on 127.0.0.1")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each attack, 120 at most")
    parser.add_argument("--only", default=",".join(ATTACKS), help="attacks, by name")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--equal", type=int, metavar="N", help="clients that share, 200 at most")
    given = parser.parse_args()
    if given.equal is not None:
        if not 0 < given.equal <= MOST_EQUAL:
            parser.error(f"--equal is {given.equal}; give 1 to {MOST_EQUAL}")
        print(f"{equal(given.port, given.equal, given.seconds):.1f} tokens/s")
        return 0
    names = given.only.split(",")
    if unknown := set(names) - set(ATTACKS):
        parser.error(f"unknown attacks {sorted(unknown)}; there are {', '.join(ATTACKS)}")
    if not 0 < given.seconds <= MOST_S:
        parser.error(f"--seconds is {given.seconds:g}; give more than 0 and at most {MOST_S:g}")
    found: dict[str, Any] = {"alone": watch(given.port, min(given.seconds, 5.0)).told()}
    if not found["alone"]["p95_s"]:
        print(f"no chat was answered: {found['alone']}; is a service there?", file=sys.stderr)
        return 1
    for name in names:
        good, statuses = beside(given.port, ATTACKS[name], given.seconds)
        ratio = good.p95_s / found["alone"]["p95_s"] if good.seconds else math.inf
        held = set(good.statuses) == {200} and ratio <= MOST_RATIO
        found[name] = {
            **good.told(),
            "ratio": round(ratio, 2),
            "held": held,
            "attackers": dict(statuses),
        }
    if given.json:
        print(json.dumps(found, indent=2))
    for name, row in () if given.json else found.items():
        took = "none answered"
        if row["median_s"] is not None:
            took = "median {median_s:.3f} s, P95 {p95_s:.3f} s, worst {worst_s:.3f} s".format(**row)
        if "ratio" in row:
            took += f", P95 {row['ratio']} of alone{'' if row['held'] else ': NOT HELD'}"
        print(f"{name:12} {took}; statuses {row['statuses']}, attackers {row.get('attackers', {})}")
    return 0 if all(found[name]["held"] for name in names) else 1


if __name__ == "__main__":
    raise SystemExit(main())

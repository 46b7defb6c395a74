"""Storms a running service with clients that leave at once, and times good clients beside them.

Attackers from 127.0.0.2 connect, send a chat and leave, after ``--stay-ms`` or at once. Beside them
``/health`` is asked from 127.0.0.1 on the service's port and on its probe port, and one chat of 4
tokens after the other. Then the next chats are timed. With ``--pid``, rounds of clients that leave
follow, and the process's resident memory is read after each of them and after 15 s of rest.

Give the service a processor of its own (``taskset``). Usage: python3 -m lab attack-storm
--port 8000 [--probe-port 9000] [--pid PID] [--seconds 15] [--stay-ms 0] [--rounds 12] [--json]
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

GOOD, ATTACKER = "127.0.0.1", "127.0.0.2"
THREADS = 8
ROUND = 800
IDLE_S = 15.0
MOST_S = 60.0
CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "Say yes."}], "temperature": 0, "max_tokens": 4}
).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(CHAT), CHAT)
)


def leave(port: int, stay_s: float) -> None:
    """Connect, send a chat, and close the connection without reading anything."""
    with socket.create_connection((GOOD, port), 30, (ATTACKER, 0)) as sock:
        sock.sendall(REQUEST)
        if stay_s:
            time.sleep(stay_s)


def storm(port: int, stay_s: float, most: int, over: Event, left: Any) -> None:
    """Leave again and again in `THREADS` threads: ``most`` times, or until ``over`` if it is 0."""
    os.nice(10)  # the server is to be measured, not the attackers
    lock = threading.Lock()
    begun = 0

    def run() -> None:
        nonlocal begun
        while not over.is_set():
            with lock:
                if most and begun >= most:
                    return
                begun += 1
            try:
                leave(port, stay_s)
            except OSError:  # no port is free, or the server's backlog is full
                time.sleep(0.01)
            else:
                with left.get_lock():
                    left.value += 1

    threads = [threading.Thread(target=run, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Attackers:
    """Clients that leave, in a process of their own."""

    def __init__(self, port: int, stay_s: float, most: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self.over = context.Event()
        self._left = context.Value("l", 0)
        self._process = context.Process(
            target=storm, args=(port, stay_s, most, self.over, self._left), daemon=True
        )
        self._process.start()

    def wait(self) -> int:
        """Wait for their end; return how many have left."""
        self._process.join(MOST_S)
        self._process.kill()
        return int(self._left.value)


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, float]:
    """Send one request; return its status, 0 if no answer came in time, and the seconds."""
    began = time.monotonic()
    connection = http.client.HTTPConnection(GOOD, port, timeout=MOST_S, source_address=(GOOD, 0))
    status = 0
    with suppress(OSError, http.client.HTTPException):
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, body, kind)
        response = connection.getresponse()
        response.read()
        status = response.status
    connection.close()
    return status, time.monotonic() - began


class Watch(threading.Thread):
    """Asks the same question again and again until it is told to stop; at least once."""

    def __init__(self, port: int, path: str, body: bytes | None = None) -> None:
        super().__init__(daemon=True)
        self._asked = port, path, body
        self._over = threading.Event()
        self._seconds: list[float] = []
        self._statuses: Counter[int] = Counter()
        self.start()

    def run(self) -> None:
        while True:
            status, took_s = ask(*self._asked)
            self._statuses[status] += 1
            self._seconds.append(took_s)
            if self._over.wait(0.05):
                return

    def told(self) -> dict[str, Any]:
        self._over.set()
        self.join()
        ordered = sorted(self._seconds)
        at = {"p50_ms": 0.5, "p99_ms": 0.99, "worst_ms": 1.0}
        return {
            **{k: round(1e3 * ordered[min(len(ordered) - 1, int(v * len(ordered)))], 1)
               for k, v in at.items()},
            "statuses": dict(self._statuses),
        }  # fmt: skip


def watched(given: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Watch for this long."""
    watches = {
        "health": Watch(given.port, "/health"),
        "chat": Watch(given.port, "/v1/chat/completions", CHAT),
    }
    if given.probe_port:
        watches["probe health"] = Watch(given.probe_port, "/health")
        watches["probe ready"] = Watch(given.probe_port, "/ready")
    time.sleep(seconds)
    return {name: watch.told() for name, watch in watches.items()}


def resident_mib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise SystemExit(f"process {pid} has ended")
    return int(found[1]) // 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        "python3 -m lab attack-storm", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--port", type=int, required=True, help="of a service on 127.0.0.1")
    parser.add_argument("--probe-port", type=int, help="of the service, if it has one")
    parser.add_argument("--pid", type=int, help="of the service, to see its memory")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the storm, 60 at most")
    parser.add_argument("--stay-ms", type=float, default=0.0, help="before a client leaves")
    parser.add_argument("--rounds", type=int, default=12, help=f"of {ROUND}, with --pid")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not 0 < given.seconds <= MOST_S:
        parser.error(f"--seconds is {given.seconds:g}; give more than 0 and at most {MOST_S:g}")
    if ask(given.port, "/ready")[0] != 200:
        print(f"no service is ready on port {given.port}; start it first", file=sys.stderr)
        return 1
    stay_s = given.stay_ms / 1e3
    found: dict[str, Any] = {"alone": watched(given, 3.0)}
    attackers = Attackers(given.port, stay_s)
    time.sleep(1.0)  # until they are in full swing
    found["storm"] = watched(given, given.seconds)
    attackers.over.set()
    found["left"] = attackers.wait()
    found["next"] = Counter(ask(given.port, "/v1/chat/completions", CHAT)[0] for _ in range(5))
    if given.pid:
        sizes = [resident_mib(given.pid)]
        for _ in range(given.rounds):
            Attackers(given.port, stay_s, ROUND).wait()
            ask(given.port, "/health")  # answered after those who came before
            sizes.append(resident_mib(given.pid))
        time.sleep(IDLE_S)
        found["resident_mib"] = {"rounds": sizes, "idle": resident_mib(given.pid)}
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    for when in ("alone", "storm"):
        for name, row in found[when].items():
            print(
                f"{when:6} {name:13} median {row['p50_ms']:8.1f} ms, P99 {row['p99_ms']:8.1f} ms, "
                f"worst {row['worst_ms']:8.1f} ms; statuses {row['statuses']}"
            )
    print(f"{found['left']} clients left; the next chats got {dict(found['next'])}")
    if given.pid:
        sizes, idle = found["resident_mib"].values()
        print(f"resident MiB: {sizes} by round, {idle} after {IDLE_S:g} s of rest")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

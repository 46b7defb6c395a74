"""A service with a real model under good and hostile load for an hour: does anything grow?

`edge-llm serve` runs in a process of its own, as the unit runs it, with API keys. Clients ask the
mixture of `load_server.py`: good requests of every kind, wrong ones, and clients that leave. Beside
them the attackers of the tests take turns of half a minute: texts that fit no context, long texts,
bodies that never end, silent connections, and nobody. After every sixth turn the keys are replaced
and the service is told to reload.

It fails on an answer of 500 or above to anybody, on a good request that gets neither 200 nor 429,
on a traceback in the log, on resident memory that grows by more than 16 MiB and on file descriptors
that grow by more than 8. Growth is the median of the last tenth of the time against that of the
tenth after the warm-up; each holds whole rounds of turns from 25 minutes on.

Usage: scripts/soak [--minutes 60] [--report FILE.md] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge._version import __version__
from edge.key_file import hashed_line, make_key
from scripts import load_server
from scripts.load_server import Load, rss_mib

MAX_GROWTH_MIB = 16.0
MAX_FD_GROWTH = 8
WARM_UP_SHARE = 0.15
TURN_S = 30.0
TURNS_TO_RELOAD = 6
TURNS: tuple[tuple[str, int, tuple[str, ...]] | None, ...] = (
    None,
    ("texts", 8, ("127.0.0.2",)),
    ("long", 4, ("127.0.0.2",)),
    ("stalled", 200, ("127.0.0.2",)),
    ("idle", 1200, tuple(f"127.0.0.{last}" for last in range(2, 8))),
)
"""Attacks: what `tests.edge.server.attacker` takes; None is half a minute of peace."""


@dataclass
class Seen:
    """What is measured of the process, once a second."""

    at_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def look(self, pid: int, at_s: float) -> None:
        self.at_s.append(at_s)
        self.rss_mib.append(rss_mib(pid))
        self.fds.append(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
        self.threads.append(sum(1 for _ in Path(f"/proc/{pid}/task").iterdir()))

    def growth(self, values: list[Any]) -> tuple[float, float]:
        """Medians of the tenth after the warm-up and of the last tenth."""
        warm_s = self.at_s[-1] * WARM_UP_SHARE
        after = [value for at, value in zip(self.at_s, values, strict=True) if at > warm_s]
        tenth = max(1, len(values) // 10)
        return statistics.median(after[:tenth]), statistics.median(after[-tenth:])


class KeyedLoad(Load):
    """Clients that send their key with every request."""

    def __init__(self, port: int, seed: int, key: str) -> None:
        super().__init__(port, seed)
        self._header = b"\r\nAuthorization: Bearer " + key.encode() + b"\r\n"

    def _request(self, kind: str) -> bytes:
        first, _, rest = super()._request(kind).partition(b"\r\n")
        return first + self._header + rest


class Service:
    """`edge-llm serve` in a process of its own; clients and attackers have a key each."""

    def __init__(self, bundle: Path, directory: Path) -> None:
        self._keys = directory / "keys"
        self.log = directory / "log"
        self.key, self.attackers_key = make_key(), make_key()
        self._write_keys()
        command = [sys.executable, "-m", "edge.cli", "serve", "--model", f"tiny={bundle}"]
        command += ["--port", "0", "--api-key-file", str(self._keys)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, text=True)
        self.port = self._await_ready()

    def _write_keys(self) -> None:
        """Write the two keys and a third that is another one each time."""
        keys = {"soak": self.key, "attacker": self.attackers_key, "other": make_key()}
        fresh = self._keys.with_suffix(".new")
        fresh.touch(0o600)
        fresh.write_text("".join(f"{hashed_line(name, key)}\n" for name, key in keys.items()))
        fresh.replace(self._keys)

    def _await_ready(self) -> int:
        for _ in range(1200):
            text = self.log.read_text()
            found = re.search(r"listening on \S+ port (\d+)", text)
            if found and "ready: " in text:
                return int(found[1])
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.process.kill()
        raise SystemExit(f"the service did not start:\n{self.log.read_text()}")

    def reload(self) -> None:
        """Replace the keys and tell the service."""
        self._write_keys()
        self.process.send_signal(signal.SIGHUP)


async def attack(service: Service, counts: Counter[str], until_s: float) -> None:
    """Let the attackers take turns; their answers are counted by kind and status."""
    turn = 0
    while time.monotonic() < until_s:
        kind = TURNS[turn % len(TURNS)]
        turn += 1
        left_s = min(TURN_S, until_s - time.monotonic())
        if kind is None:
            await asyncio.sleep(left_s)
        else:
            await _one_turn(service, kind, left_s, counts)
        if turn % TURNS_TO_RELOAD == 0:
            service.reload()
            counts["reload"] += 1


async def _one_turn(
    service: Service, kind: tuple[str, int, tuple[str, ...]], seconds: float, counts: Counter[str]
) -> None:
    name, num, addresses = kind
    command = ("-m", "tests.edge.server.attacker", name, str(service.port), str(num), *addresses)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "EDGE_LLM_ATTACKER_KEY": service.attackers_key},
    )
    await asyncio.sleep(seconds)
    out, _ = await process.communicate(b"")
    for status, count in json.loads(out or b"{}").items():
        counts[f"{name} {status}"] += count


async def measure(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    load = KeyedLoad(service.port, options.seed, service.key)
    hostile: Counter[str] = Counter()
    seen = Seen()
    seconds = 60 * options.minutes
    started = time.monotonic()
    attacking = asyncio.create_task(attack(service, hostile, started + seconds))
    running = asyncio.create_task(load.run(seconds, options.clients))
    while not running.done():
        await asyncio.wait({running}, timeout=1.0)
        seen.look(service.process.pid, time.monotonic() - started)
    await running
    await attacking
    return _result(load, hostile, seen)


def _result(load: Load, hostile: Counter[str], seen: Seen) -> dict[str, Any]:
    rss, fds, threads = (seen.growth(v) for v in (seen.rss_mib, seen.fds, seen.threads))
    minutes = range(int(seen.at_s[-1] // 60) + 1)
    by_minute = [
        [mib for at, mib in zip(seen.at_s, seen.rss_mib, strict=True) if at // 60 == minute]
        for minute in minutes
    ]
    answers = {**load.answers, **{f"attack {kind}": count for kind, count in hostile.items()}}
    return {
        "seconds": round(seen.at_s[-1], 1),
        "requests": sum(load.answers.values()),
        "good_answers": sum(
            count
            for kind, count in load.answers.items()
            if kind.split()[0] in load_server.GOOD and kind.endswith(" 200")
        ),
        "answers": dict(sorted(answers.items())),
        "num_5xx": sum(n for kind, n in answers.items() if re.search(r" 5\d\d$", kind)),
        "wrong": load.wrong[:20],
        "num_wrong": len(load.wrong),
        "rss_by_minute_mib": [round(statistics.median(part), 1) for part in by_minute if part],
        "rss_peak_mib": round(max(seen.rss_mib), 1),
        "rss_warm_mib": round(rss[0], 1),
        "rss_end_mib": round(rss[1], 1),
        "growth_mib": round(rss[1] - rss[0], 1),
        "fds_warm": fds[0],
        "fds_end": fds[1],
        "fds_peak": max(seen.fds),
        "threads_warm": threads[0],
        "threads_end": threads[1],
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What of the bars was missed."""
    found = []
    if result["growth_mib"] > MAX_GROWTH_MIB:
        found.append(f"memory grew by {result['growth_mib']} MiB")
    if result["fds_end"] - result["fds_warm"] > MAX_FD_GROWTH:
        found.append(f"descriptors grew from {result['fds_warm']} to {result['fds_end']}")
    counts = ("num_5xx", "num_wrong", "tracebacks")
    return found + [f"{name}: {result[name]}" for name in counts if result[name]]


def report(result: dict[str, Any], options: argparse.Namespace) -> str:
    """The report in Markdown."""
    missed = failures(result)
    verdict = "Every bar is met." if not missed else f"Missed: {'; '.join(missed)}."
    rows = [
        ("time", f"{result['seconds'] / 60:.1f} min, {options.clients} clients and an attacker"),
        (
            "requests",
            f"{result['requests']:,}, of them {result['good_answers']:,} good and answered",
        ),
        ("answers of 500 and above", f"{result['num_5xx']} (bar: 0)"),
        ("good requests that got neither 200 nor 429", f"{result['num_wrong']} (bar: 0)"),
        ("tracebacks in the log", f"{result['tracebacks']} (bar: 0)"),
        (
            "resident memory after the warm-up, at the end, at most",
            f"{result['rss_warm_mib']}, {result['rss_end_mib']}, {result['rss_peak_mib']} MiB",
        ),
        ("growth", f"{result['growth_mib']} MiB (bar: {MAX_GROWTH_MIB:g})"),
        (
            "file descriptors after the warm-up, at the end, at most",
            f"{result['fds_warm']:g}, {result['fds_end']:g}, {result['fds_peak']}",
        ),
        (
            "threads after the warm-up, at the end",
            f"{result['threads_warm']:g}, {result['threads_end']:g}",
        ),
        ("version", f"edge-llm {__version__}, Python {platform.python_version()}"),
        ("bundle", options.bundle.name),
        ("machine", f"{platform.machine()}, {os.cpu_count()} cores, {options.note or 'no note'}"),
    ]
    lines = ["# Soak", "", f"Made by `scripts/soak --minutes {options.minutes:g}`. {verdict}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += ["Resident memory, MiB, median of each minute:", "", "```"]
    by_minute = result["rss_by_minute_mib"]
    lines += [
        " ".join(f"{mib:7.1f}" for mib in by_minute[at : at + 10])
        for at in range(0, len(by_minute), 10)
    ]
    lines += ["```", ""]
    if result["wrong"]:
        lines += ["The first requests that went wrong:", ""]
        lines += [f"- `{what}`" for what in result["wrong"]] + [""]
    lines += ["Answers by kind of request and status (0: the client left, -1: no answer):", ""]
    lines += ["| Request | Status: number |", "|---|---|"]
    kinds: dict[str, list[str]] = {}
    for name, count in result["answers"].items():
        kind, _, status = name.rpartition(" ")
        kinds.setdefault(kind or name, []).append(f"{status}: {count:,}" if kind else f"{count:,}")
    lines += [f"| {kind} | {', '.join(statuses)} |" for kind, statuses in kinds.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=4, help="good and wrong ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="also write the report into this file")
    parser.add_argument("--note", default="", help="about the machine, for the report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        service = Service(options.bundle, Path(directory))
        try:
            result = asyncio.run(measure(service, options))
        finally:
            service.process.terminate()
            service.process.wait(60)
        result["exit_code"] = service.process.returncode
        result["tracebacks"] = service.log.read_text().count("Traceback")
    text = report(result, options)
    if options.report is not None:
        options.report.write_text(text)
    print(json.dumps(result) if options.json else text)
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Puts a service with a real model under good and hostile load for an hour: does anything grow?

`edge-llm serve` runs in a process of its own, as the unit runs it, with API keys. Clients ask the
mixture of `load_server.py`: good requests of every kind, wrong ones, and clients that leave. Beside
them the attackers of the tests take turns of half a minute: texts that fit no context, long texts,
bodies that never end, silent connections, and nobody. After every sixth turn the keys are replaced
and the service is told to reload.

It fails on any of these: an answer of 500 or above to anybody; a good request that gets neither 200
nor 429 within a minute; a traceback in the log; resident memory that grows by more than 16 MiB;
file descriptors that grow by more than 8. Growth is the median of the last tenth of the time
against that of the tenth after the warm-up; each holds whole rounds of turns from 25 minutes on.

Clients wait five minutes all the same, to tell where the time of every slow request went: in the
server's queue, before the first token, or after it. It also tells how long the engine's thread
computed meanwhile, was ready and got no CPU, and slept; and how many requests came later and left
earlier.

Usage: python3 -m lab soak [--minutes 60] [--report FILE.md] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge._version import __version__
from edge_make.key_file import hashed_line, make_key
from lab.bundles import quickstart_bundle

from . import load as load_server
from .load import ANSWER_S, MAX_GROWTH_MIB, WARM_UP_SHARE, Asked, Load, rss_mib

MAX_FD_GROWTH = 8
PATIENCE_S = 5 * ANSWER_S
NUM_SLOWEST = 20
TURN_S = 30.0
TURNS_TO_RELOAD = 6
TURNS: tuple[tuple[str, int, tuple[str, ...]] | None, ...] = (
    None,
    ("texts", 8, ("127.0.0.2",)),
    ("long", 4, ("127.0.0.2",)),
    ("stalled", 200, ("127.0.0.2",)),
    ("idle", 1200, tuple(f"127.0.0.{last}" for last in range(2, 8))),
)
"""Attacks, as `tests.edge_serve.attacker` takes them; None is half a minute of peace."""


@dataclass
class Seen:
    """Measurements of the process and the machine, once a second.

    Attributes:
        cpu_s: per thread, seconds that it computed and that it was ready but got no CPU.
    """

    began_s: float
    at_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    cpu_s: list[dict[str, tuple[float, float]]] = field(default_factory=list)

    def look(self, pid: int) -> None:
        self.at_s.append(time.monotonic() - self.began_s)
        self.rss_mib.append(rss_mib(pid))
        self.fds.append(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
        self.load.append(os.getloadavg()[0])
        self.cpu_s.append(dict(_threads(pid)))
        self.threads.append(len(self.cpu_s[-1]))

    def by_minute(self, values: list[float]) -> list[float]:
        """Return the median of each minute."""
        parts: dict[int, list[float]] = {}
        for at, value in zip(self.at_s, values, strict=True):
            parts.setdefault(int(at // 60), []).append(value)
        return [round(statistics.median(part), 1) for part in parts.values()]

    def engine(self) -> str:
        """Return the thread that computed most: with one inference thread, the engine's."""
        last = self.cpu_s[-1]
        return max(last, key=lambda thread: last[thread][0])

    def spent(self, thread: str, began_s: float, ended_s: float) -> tuple[float, float]:
        """Return how long a thread computed and waited for a CPU between two times, to a second."""
        first = max(bisect.bisect_right(self.at_s, began_s - self.began_s) - 1, 0)
        last = min(bisect.bisect_left(self.at_s, ended_s - self.began_s), len(self.at_s) - 1)
        before, after = (self.cpu_s[at].get(thread, (0.0, 0.0)) for at in (first, last))
        return after[0] - before[0], after[1] - before[1]

    def growth(self, values: list[Any]) -> tuple[float, float]:
        """Return the medians of the tenth after the warm-up and of the last tenth."""
        warm_s = self.at_s[-1] * WARM_UP_SHARE
        after = [value for at, value in zip(self.at_s, values, strict=True) if at > warm_s]
        tenth = max(1, len(values) // 10)
        return statistics.median(after[:tenth]), statistics.median(after[-tenth:])


def _threads(pid: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the kernel's schedstat of each thread: seconds it ran, seconds it waited."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            ran, waited = (thread / "schedstat").read_text().split()[:2]
            yield thread.name, (int(ran) / 1e9, int(waited) / 1e9)


class KeyedLoad(Load):
    """Clients that send their key with every request."""

    def __init__(self, port: int, seed: int, key: str) -> None:
        super().__init__(port, seed, PATIENCE_S)
        self._header = b"\r\nAuthorization: Bearer " + key.encode() + b"\r\n"

    def _request(self, kind: str) -> bytes:
        first, _, rest = super()._request(kind).partition(b"\r\n")
        return first + self._header + rest


class Service:
    """`edge-llm serve` in a process of its own; clients and attackers have a key each."""

    def __init__(self, bundle: Path, directory: Path, num_threads: int) -> None:
        self._keys = directory / "keys"
        self.log = directory / "log"
        self.key, self.attackers_key = make_key(), make_key()
        self._write_keys()
        command = [sys.executable, "-m", "edge.cli", "serve", "--model", f"tiny={bundle}"]
        command += ["--port", "0", "--api-key-file", str(self._keys)]
        command += ["--num-threads", str(num_threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, text=True)
        self.port = self._await_ready()

    def _write_keys(self) -> None:
        """Write the two keys and a third one that is new each time."""
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
    """Let the attackers take turns; count their answers by kind and status."""
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
    command = ("-m", "tests.edge_serve.attacker", name, str(service.port), str(num), *addresses)
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
    seen = Seen(time.monotonic())
    seconds = 60 * options.minutes
    attacking = asyncio.create_task(attack(service, hostile, seen.began_s + seconds))
    running = asyncio.create_task(load.run(seconds, options.clients))
    while not running.done():
        await asyncio.wait({running}, timeout=1.0)
        seen.look(service.process.pid)
    await running
    await attacking
    return _result(load, hostile, seen)


def _result(load: Load, hostile: Counter[str], seen: Seen) -> dict[str, Any]:
    rss, fds, threads = (seen.growth(v) for v in (seen.rss_mib, seen.fds, seen.threads))
    good = [asked for asked in load.asked if asked.kind in load_server.GOOD]
    late = [asked for asked in good if asked.status == 200 and _took_s(asked) > ANSWER_S]
    wrong = load.wrong + [f"{asked.kind}: answered after {_took_s(asked):.0f} s" for asked in late]
    took_s = sorted(map(_took_s, good))
    computed_s, starved_s = seen.cpu_s[-1][seen.engine()]
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
        "wrong": wrong[:20],
        "num_wrong": len(wrong),
        "took_s": [round(took_s[int(p * (len(took_s) - 1))], 2) for p in (0.5, 0.95, 0.99, 1.0)],
        "slowest": slowest(good, seen),
        "engine_computed_s": round(computed_s, 1),
        "engine_starved_s": round(starved_s, 1),
        "load_by_minute": seen.by_minute(seen.load),
        "rss_by_minute_mib": seen.by_minute(seen.rss_mib),
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


def _took_s(asked: Asked) -> float:
    return asked.ended_s - asked.began_s


def slowest(good: list[Asked], seen: Seen) -> list[dict[str, Any]]:
    """Tell where the time of the slowest good requests went, in seconds."""
    engine, found = seen.engine(), []
    for asked in sorted(good, key=_took_s, reverse=True)[:NUM_SLOWEST]:
        times = {
            name: int(float(ms)) / 1e3
            for name, ms in re.findall(r"(\w+);dur=([\d.]+)", asked.timing)
        }
        if asked.first_s is not None:
            times["ttft"] = asked.first_s - asked.began_s
        computed_s, starved_s = seen.spent(engine, asked.began_s, asked.ended_s)
        overtook = [
            one
            for one in good
            if one.kind != "look" and asked.began_s < one.began_s and one.ended_s < asked.ended_s
        ]
        found.append(
            {
                "kind": asked.kind,
                "status": asked.status,
                "at_s": asked.began_s - seen.began_s,
                "took_s": _took_s(asked),
                "queue_s": times.get("queue"),
                "ttft_s": times.get("ttft"),
                "engine_computed_s": computed_s,
                "engine_starved_s": starved_s,
                "engine_slept_s": max(0.0, _took_s(asked) - computed_s - starved_s),
                "overtaken_by": len(overtook),
            }
        )
    return found


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| Request | Status | Began at, s | Took, s | In the queue | First token | Engine computed "
        "| Got no CPU | Slept | Overtaken by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            "" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v)
            for v in row.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _grid(values: list[float]) -> list[str]:
    lines = [
        " ".join(f"{value:7.1f}" for value in values[at : at + 10])
        for at in range(0, len(values), 10)
    ]
    return ["```", *lines, "```", ""]


def failures(result: dict[str, Any]) -> list[str]:
    """Say which bars were missed."""
    found = []
    if result["growth_mib"] > MAX_GROWTH_MIB:
        found.append(f"memory grew by {result['growth_mib']} MiB")
    if result["fds_end"] - result["fds_warm"] > MAX_FD_GROWTH:
        found.append(f"descriptors grew from {result['fds_warm']} to {result['fds_end']}")
    counts = ("num_5xx", "num_wrong", "tracebacks")
    return found + [f"{name}: {result[name]}" for name in counts if result[name]]


def report(result: dict[str, Any], options: argparse.Namespace) -> str:
    """Write the report in Markdown."""
    missed = failures(result)
    verdict = "Every bar is met." if not missed else f"Missed: {'; '.join(missed)}."
    rows = [
        ("time", f"{result['seconds'] / 60:.1f} min, {options.clients} clients and an attacker"),
        (
            "requests",
            f"{result['requests']:,}, of them {result['good_answers']:,} good and answered",
        ),
        ("answers of 500 and above", f"{result['num_5xx']} (bar: 0)"),
        (
            f"good requests that got neither 200 nor 429 within {ANSWER_S:g} s",
            f"{result['num_wrong']} (bar: 0)",
        ),
        (
            "good requests took, median, P95, P99, at most",
            f"{', '.join(f'{took:g}' for took in result['took_s'])} s",
        ),
        (
            "the engine's thread computed, and was ready but got no CPU",
            f"{result['engine_computed_s']:,} s, {result['engine_starved_s']:,} s",
        ),
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
    lines = [
        "# Soak",
        "",
        f"Made by `python3 -m lab soak --minutes {options.minutes:g}`. {verdict}",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += [
        "Resident memory, MiB, median of each minute:",
        "",
        *_grid(result["rss_by_minute_mib"]),
    ]
    lines += ["Load of the machine (1 minute's average), likewise:", ""]
    lines += _grid(result["load_by_minute"])
    lines += [
        "The slowest good requests. Of each, what the server says it waited in the queue and until "
        "the first token",
        "(of a stream: what the client saw), what the engine's thread did meanwhile, and how many "
        "requests began later and",
        "ended earlier:",
        "",
        *_table(result["slowest"]),
        "",
    ]
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
        "python3 -m lab soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="default: that of scripts/quickstart")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=4, help="good and wrong ones")
    parser.add_argument("--num-threads", type=int, default=1, help="that the service computes with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="also write the report into this file")
    parser.add_argument("--note", default="", help="about the machine, for the report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    options = parser.parse_args()
    options.bundle = options.bundle or quickstart_bundle()
    with tempfile.TemporaryDirectory() as directory:
        service = Service(options.bundle, Path(directory), options.num_threads)
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

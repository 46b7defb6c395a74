"""Keeps the reports of devices in a SQLite file, and decides which devices may begin.

Nothing else is kept: the progress of a roll-out follows from the reports. So a killed receiver, or
a report that comes twice or late, changes nothing.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from edge.errors import ConfigError

from .wanted import NOBODY, Report, Wanted

SILENT_S = 86_400.0
"""Seconds without a poll while a state is wanted, after which no wave waits for a device."""
_TABLES = """
create table if not exists seen (device text primary key, at_s real not null);
create table if not exists wanted (number integer primary key, at_s real not null);
create table if not exists reports (device text, number integer, ended_s real, data blob not null,
    primary key (device, number));
"""


class Progress(msgspec.Struct, frozen=True):
    """The progress of a roll-out.

    Attributes:
        number, reference, do: fields of the wanted state.
        wave: the wave that is open, from 1.
        waves: number of waves.
        devices: last report of each device, in the order of the waves; None if it has not reported.
        stopped: why no other device begins; empty while one may.
        done: whether every device that polls has the bundle.
        begin: last position that may begin now (`edge_fleet.waves.wanted.Envelope`).
    """

    number: int
    reference: str
    do: str
    wave: int
    waves: int
    devices: dict[str, Report | None]
    stopped: str
    done: bool
    begin: str


class Reports:
    """The file of reports.

    Args:
        path: the file; it is made if it is missing.

    Raises:
        ConfigError: it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            file.executescript(_TABLES)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as file, file:
                yield file
        except sqlite3.Error as error:
            raise ConfigError(f"cannot keep reports in {self._path}: {error}") from error

    def saw(self, device: str) -> None:
        """Note that a device has polled."""
        with self._open() as file:
            file.execute("insert or replace into seen values (?, ?)", (device, time.time()))

    def add(self, device: str, report: Report) -> None:
        """Keep a report, unless there is a later one for this state."""
        with self._open() as file:
            file.execute(
                "insert into reports values (?1, ?2, ?3, ?4) on conflict do update set "
                "ended_s = ?3, data = ?4 where ?3 >= ended_s and ?5",
                (
                    device,
                    report.number,
                    report.ended_s,
                    msgspec.json.encode(report),
                    report.outcome != "waiting",
                ),
            )

    def progress(self, wanted: Wanted, names: Iterable[str]) -> Progress:
        """Return how far these devices are with a wanted state."""
        with self._open() as file:
            rows = file.execute(
                "select device, data from reports where number = ?", [wanted.number]
            )
            found = {name: msgspec.json.decode(data, type=Report) for name, data in rows}
            seen = dict(file.execute("select device, at_s from seen"))
            now = time.time()
            file.execute("insert or ignore into wanted values (?, ?)", (wanted.number, now))
            [[since_s]] = file.execute("select at_s from wanted where number = ?", [wanted.number])
        order = sorted(names, key=wanted.position)
        # A device that was off before has this long from when the state was first handed out.
        awake = {name for name in order if now - max(since_s, seen.get(name, 0.0)) < SILENT_S}
        outcomes = {name: found[name].outcome for name in order if name in found}
        failed = [name for name, outcome in outcomes.items() if outcome in ("rejected", "failed")]
        stopped = ""
        if len(failed) > wanted.max_failed:
            stopped = (
                f"{len(failed)} failed, at most {wanted.max_failed} may: {', '.join(failed[:9])}"
            )
        wave, count = _open_wave(wanted, order, awake, outcomes)
        return Progress(
            number=wanted.number,
            reference=wanted.reference,
            do=wanted.do,
            wave=wave,
            waves=len(wanted.waves),
            devices={name: found.get(name) for name in order},
            stopped=stopped,
            done=bool(order) and all(outcomes.get(name) in ("has", "back") for name in order),
            begin=NOBODY if stopped or not count else wanted.position(order[count - 1]),
        )


def _open_wave(
    wanted: Wanted, order: list[str], awake: set[str], outcomes: Mapping[str, str]
) -> tuple[int, int]:
    """Return the open wave, and how many devices in the order may have begun.

    A wave is done once each of its devices that still polls has ended, and one has the bundle.
    """
    count = 0
    for wave, size in enumerate(wanted.waves, 1):
        share = size.endswith("%")
        upto = math.ceil(int(size[:-1]) / 100 * len(order)) if share else int(size)
        count = max(count, min(upto, len(order)))
        ended = [outcomes.get(name) for name in order[:count] if name in awake]
        final = all(outcome in ("has", "rejected", "failed", "back") for outcome in ended)
        if not (final and "has" in ended):
            return wave, count
    return len(wanted.waves), count

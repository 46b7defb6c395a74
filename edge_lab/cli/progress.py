"""Shows how far a verb is, on stderr: bars in a terminal, a line now and then anywhere else.

A step shorter than 10 seconds prints no line. A longer one prints a line after 10 s, then every
10 % or every 30 s, whichever comes first, even while it reports nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from edge_make.progress import Progress

_QUICK_S = 10.0
_SILENCE_S = 30.0
_LEAST_GAP_S = 1.0
_LEAST_SHARE = 1e-3  # share of the work that must be done before its pace is judged
_TICK_S = 1.0

_clock = time.monotonic


@contextmanager
def show_progress(speak_for_themselves: Collection[str] = ()) -> Iterator[Progress]:
    """Show the progress of a verb.

    Args:
        speak_for_themselves: steps done by a process that shows its own progress on the same
            stderr; nothing is shown of them.
    """
    if _is_terminal():
        with _Bars(speak_for_themselves) as bars:
            yield bars
        return
    lines = ProgressLines(lambda line: click.echo(line, err=True), lambda: _clock())
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(_TICK_S):
            lines.tick()

    def report(step: str, done: float, total: float, unit: str = "", detail: str = "") -> None:
        if step not in speak_for_themselves:
            lines(step, done, total, unit, detail)

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()


def _is_terminal() -> bool:
    if not sys.stderr.isatty():
        return False
    from rich.console import Console

    return not Console(stderr=True).is_dumb_terminal


@dataclass
class _Step:
    first: float  # amount that was done when it began
    began_s: float
    done: float
    total: float
    unit: str
    detail: str
    told_s: float | None = None  # when its last line was printed
    told_tenths: int = 0

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 1.0


class ProgressLines:
    """Lines about steps that take long; may be called from several threads.

    Args:
        write: prints a line.
        clock: seconds, monotonic.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write = write
        self._clock = clock
        self._lock = threading.Lock()
        self._steps: dict[str, _Step] = {}

    def __call__(
        self, step: str, done: float, total: float, unit: str = "", detail: str = ""
    ) -> None:
        """Take note of a step's progress, as `edge_make.progress.Progress` describes."""
        with self._lock:
            now = self._clock()
            known = self._steps.get(step)
            if known is None:
                if done >= total:
                    return  # over before it began
                known = self._steps[step] = _Step(done, now, done, total, unit, detail)
            known.total, known.unit, known.detail = total, unit, detail
            known.done = max(known.done, min(done, total))
            if known.fraction < 1:
                self._tell_if_due(step, known, now)
                return
            del self._steps[step]  # the same step may come again
            if now - known.began_s >= _QUICK_S:
                self._write(_last_line(step, known, now))

    def tick(self) -> None:
        """Print a line for each silent step whose line is due; call this once a second."""
        with self._lock:
            now = self._clock()
            for name, step in self._steps.items():
                self._tell_if_due(name, step, now)

    def _tell_if_due(self, name: str, step: _Step, now: float) -> None:
        tenths = int(10 * step.fraction)
        if step.told_s is None:
            due = now - step.began_s >= _QUICK_S
        else:
            gap = now - step.told_s
            further = tenths > step.told_tenths and gap >= _LEAST_GAP_S
            due = further or gap >= _SILENCE_S
        if due:
            step.told_s, step.told_tenths = now, tenths
            self._write(_line(name, step, now))


def _line(name: str, step: _Step, now: float) -> str:
    elapsed = now - step.began_s
    parts = [f"{_duration(elapsed)} so far"]
    if step.done > 0:
        parts.insert(0, _share(step))
    elif step.detail:
        parts.insert(0, step.detail)
    gained = step.done - step.first
    if gained >= _LEAST_SHARE * step.total:
        left = elapsed * (step.total - step.done) / gained
        parts.append(f"about {_duration(left)} left")
    return f"{name}: {', '.join(parts)}"


def _last_line(name: str, step: _Step, now: float) -> str:
    return f"{name}: {_share(step)}, took {_duration(now - step.began_s)}"


def _share(step: _Step) -> str:
    # Say 100 % only of a step that is finished.
    percent = f"{100 if step.fraction >= 1 else min(int(100 * step.fraction), 99)} %"
    inside = []
    if step.unit and step.total >= 1e7:
        inside.append(f"{step.done / 1e6:,.0f} of {step.total / 1e6:,.0f} M {step.unit}")
    elif step.unit:
        inside.append(f"{step.done:,.0f} of {step.total:,.0f} {step.unit}")
    if step.detail:
        inside.append(step.detail)
    return f"{percent} ({'; '.join(inside)})" if inside else percent


def _rate(speed: float, unit: str) -> str:
    """Write the rate per second, or per minute where a second does less than one unit."""
    if speed >= 1e6:
        return f"{speed / 1e6:.0f} M {unit}/s"
    if speed >= 1:
        return f"{speed:,.1f} {unit}/s" if speed < 100 else f"{speed:,.0f} {unit}/s"
    return f"{60 * speed:.1f} {unit}/min"


def _duration(seconds: float) -> str:
    """Write seconds as ``0:12``, ``41:07`` or ``2:05:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Bars:
    """A bar per step with its rate and remaining time."""

    def __init__(self, speak_for_themselves: Collection[str]) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self._hidden = speak_for_themselves
        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}

    def __call__(
        self, step: str, done: float, total: float, unit: str = "", detail: str = ""
    ) -> None:
        """Take note of a step's progress, as `edge_make.progress.Progress` describes."""
        if step in self._hidden:
            if done < total:
                self._rich.stop()
            else:
                self._rich.start()
            return
        if step not in self._tasks:
            self._tasks[step] = self._rich.add_task(step, total=total, rate="", detail="")
        task = self._rich.tasks[self._rich.task_ids.index(self._tasks[step])]
        speed = task.speed or 0
        rate = _rate(speed, unit) if unit and speed else ""
        self._rich.update(task.id, completed=done, total=total, rate=rate, detail=detail)

    def __enter__(self) -> _Bars:
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()

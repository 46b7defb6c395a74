"""The lines of long steps on a scripted clock, and where bars are shown instead."""

from __future__ import annotations

import io
import re
import threading

import click
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from edge_lab.cli import progress as shown
from edge_lab.cli.progress import ProgressLines, show_progress
from edge_make.progress import Progress, prefixed, uncounted


class Screen:
    """Lines and when they were printed; the clock is whatever the test says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self.times: list[float] = []
        self.progress = ProgressLines(self._write, lambda: self.now)

    def _write(self, line: str) -> None:
        self.lines.append(line)
        self.times.append(self.now - 1000.0)

    @property
    def percents(self) -> list[int]:
        return [int(percent) for line in self.lines for percent in re.findall(r"(\d+) %", line)]

    def run(self, seconds: int, total: int, step: str = "work") -> None:
        """A step at an even pace that reports ten times a second, and the heartbeat beside it."""
        begin = self.now
        self.progress(step, 0, total, "pieces")
        for tenth in range(1, 10 * seconds + 1):
            self.now = begin + tenth / 10
            self.progress(step, total * tenth / (10 * seconds), total, "pieces")
            if tenth % 10 == 0:
                self.progress.tick()


def test_a_quick_step_prints_nothing():
    screen = Screen()
    screen.run(9, 100, "one")
    screen.run(9, 100, "another")
    assert screen.lines == []


def test_a_line_after_ten_seconds_and_then_at_every_ten_percent():
    screen = Screen()
    screen.run(40, 1000)
    assert screen.times == [10, 12, 16, 20, 24, 28, 32, 36, 40]
    assert screen.percents == [25, 30, 40, 50, 60, 70, 80, 90, 100]
    assert screen.lines[0] == "work: 25 % (250 of 1,000 pieces), 0:10 so far, about 0:30 left"
    assert screen.lines[-1] == "work: 100 % (1,000 of 1,000 pieces), took 0:40"


def test_every_thirty_seconds_where_ten_percent_take_longer():
    screen = Screen()
    screen.run(1000, 1000)
    gaps = [after - before for before, after in zip(screen.times, screen.times[1:], strict=False)]
    assert max(gaps) <= 30
    assert gaps.count(30) >= 20
    assert set(range(10, 101, 10)) <= set(screen.percents)


def test_the_estimate_follows_the_rate_of_this_run_and_the_units_are_readable():
    screen = Screen()
    screen.progress("quantize", 0, 140e6, "weights")
    screen.now += 12
    screen.progress("quantize", 44e6, 140e6, "weights")
    assert screen.lines == [
        "quantize: 31 % (44 of 140 M weights), 0:12 so far, about 0:26 left",
    ]
    resumed = Screen()  # half of it was there: that half says nothing of the pace
    resumed.progress("calibrate", 500, 1000, "sequences")
    resumed.now += 3600
    resumed.progress("calibrate", 600, 1000, "sequences")
    assert resumed.lines == [
        "calibrate: 60 % (600 of 1,000 sequences), 1:00:00 so far, about 4:00:00 left",
    ]


def test_a_step_that_reports_nothing_is_told_of_every_thirty_seconds():
    screen = Screen()
    screen.progress("build", 0, 1)
    for second in range(1, 76):
        screen.now += 1
        if second == 35:
            screen.progress("build", 0, 1, "", "Tactic timing")
        screen.progress.tick()
    screen.progress("build", 1, 1)
    assert screen.times == [10, 40, 70, 75]
    assert screen.lines == [
        "build: 0:10 so far",
        "build: Tactic timing, 0:40 so far",
        "build: Tactic timing, 1:10 so far",
        "build: 100 %, took 1:15",
    ]
    screen.now += 100
    screen.progress.tick()
    assert len(screen.lines) == 4


def test_a_step_may_come_again_and_two_may_take_turns():
    screen = Screen()
    screen.run(11, 10)
    screen.run(11, 10)
    assert [line for line in screen.lines if "100 %" in line] == [
        "work: 100 % (10 of 10 pieces), took 0:11"
    ] * 2
    turns = Screen()
    for done in range(5):
        for step in ("calibrate", "quantize"):
            turns.progress(step, done, 4)
            turns.now += 3
    assert turns.lines[-2:] == ["calibrate: 100 %, took 0:24", "quantize: 100 %, took 0:24"]


@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 1), st.booleans()), max_size=60))
def test_lines_never_go_back_nor_crowd_nor_say_100_early(
    events: list[tuple[float, float, bool]],
):
    screen = Screen()
    screen.progress("work", 0, 1, "", "")
    for seconds, done, is_tick in events:
        screen.now += seconds
        if is_tick:
            screen.progress.tick()
        elif done < 1:
            screen.progress("work", done, 1)
    told = screen.percents
    assert told == sorted(told)
    assert 100 not in told
    assert all(b - a >= 1 for a, b in zip(screen.times, screen.times[1:], strict=False))
    assert not screen.times or screen.times[0] >= 10
    screen.now += 10
    screen.progress("work", 1, 1)
    assert screen.percents[-1] == 100


def test_progress_ticks_while_the_verb_is_busy_and_stops_with_it(monkeypatch: pytest.MonkeyPatch):
    told, now = threading.Event(), [0.0]
    lines: list[str] = []

    def echo(line: str, *, err: bool) -> None:
        assert err
        lines.append(line)
        told.set()

    monkeypatch.setattr(shown, "_TICK_S", 0.001)
    monkeypatch.setattr(shown, "_clock", lambda: now[0])
    monkeypatch.setattr(click, "echo", echo)
    with show_progress() as progress, uncounted(progress, "build"):
        now[0] = 42.0
        assert told.wait(30)
    assert lines == ["build: 0:42 so far", "build: 100 %, took 0:42"]
    assert not any(thread.name == "progress" for thread in threading.enumerate())


@pytest.mark.usefixtures("slow_clock")
def test_a_process_of_its_own_speaks_for_itself(capsys: pytest.CaptureFixture[str]):
    with show_progress(["verify"]) as progress:
        for step in ("verify", "hash"):
            with uncounted(prefixed(progress, ""), step):
                pass
    assert re.fullmatch(r"hash: 100 %, took 0:\d\d\n", capsys.readouterr().err)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(rich.console, "Console", lambda **_: console)
    monkeypatch.setattr(shown, "_is_terminal", lambda: True)
    return screen


def test_a_terminal_has_a_bar_for_each_step(
    terminal: io.StringIO, capsys: pytest.CaptureFixture[str]
):
    """Two steps take turns, so neither may end the other's bar; the name may look like markup."""

    def work(progress: Progress) -> None:
        for done in (1, 2):
            progress("calibrate", done, 2, "sequences")
            progress("[quantize]", 5e7 * done, 1e8, "weights", "[layer 3]")

    with show_progress(["verify"]) as progress:
        work(progress)
        with uncounted(progress, "verify"):
            terminal.write("its own bar")
    last = terminal.getvalue().split("calibrate")[-1]
    assert last.count("100%") == 2
    assert "[quantize]" in last
    assert "[layer 3]" in last
    assert "verify" not in terminal.getvalue()
    assert "so far" not in capsys.readouterr().err

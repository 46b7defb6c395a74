"""A fleet in simulated time: real schedulers, caches and routing, and steps that only cost time.

The head is one processor: each request, each streamed token and each look at a device takes what it
was measured to take, one after the other. What a step costs on a device, `simulated_devices` says.
Whatever else is reported (who waits, what is cached, how prompts and decode steps take turns, where
the rule ``head`` sends a request) is the code's own.

Sessions come from the seed alone: begin, texts, lengths and pauses are the same for every rule.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from edge_fleet.devices.ring import Ring
from edge_fleet.devices.routing import Router
from scripts.simulated_devices import Device, Head, HeadCost, Sink, Turn, sessions

MEASURED = HeadCost(0.0026, 0.00056, 0.0010)
_BEAT_S, _SILENT_BEATS = 0.5, 6  # fleet.toml's beat_s and silent_s; who is lost has no power
_BOUND = 1.5  # times the mean load: HAProxy's hash-balance-factor
_KNEE_S = 2.0  # within which the median first answer comes, below the knee
_WARM = 1 / 3  # of the time counts for nothing, as the fleet is still filling
_LENGTH_S = ((1, 3600.0), (10, 1200.0), (100, 300.0), (1000, 180.0))  # by number of devices


@dataclass
class Figures:
    """What came of it, after the time in which the fleet fills.

    Attributes:
        tokens: that reached clients.
        ttft_s: seconds from a turn to its first token, or to the end where that has not come.
        prompt, cached: tokens of prompts of answers that ended.
        asked_again: turns that a lost device had.
        head, mean, most: share of the time in which the head, the devices on average and the
            busiest of them had work.
    """

    seconds: float = 0.0
    devices: int = 0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    asked_again: int = 0
    head: float = 0.0
    mean: float = 0.0
    most: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second and device."""
        return self.tokens / self.seconds / self.devices

    @property
    def cached_share(self) -> float:
        return self.cached / max(1, self.prompt)

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.ttft_s, share)) if self.ttft_s else float("nan")


# ----------------------------------------------------------------------------------- rules


class Rule:
    """Chooses a device for a session; this one by chance.

    Args:
        devices: all of them, by name.
        seed: of its draws.
    """

    def __init__(self, devices: dict[str, Device], seed: int) -> None:
        self.devices = devices
        self.known = list(devices.values())
        self.rng = random.Random(f"{seed} rule")

    def choose(self, key: str) -> Device:
        return self.rng.choice(self.known)

    def remember(self, key: str, name: str) -> None:
        """Hear that this device has answered."""

    def lose(self, device: Device) -> None:
        """Send nothing there any more."""
        self.known.remove(device)


class _Least(Rule):
    def choose(self, key: str) -> Device:
        least = min(each.in_flight for each in self.known)
        return self.rng.choice([each for each in self.known if each.in_flight == least])


class _Hash(Rule):
    def __init__(self, devices: dict[str, Device], seed: int) -> None:
        super().__init__(devices, seed)
        self.ring = Ring(devices)

    def order(self, key: str) -> Iterator[Device]:
        devices = (self.devices[name] for name in self.ring.order(key))
        return (device for device in devices if device.is_known)

    def choose(self, key: str) -> Device:
        return next(self.order(key))


class _Bounded(_Hash):
    def choose(self, key: str) -> Device:
        mean = (1 + sum(each.in_flight for each in self.known)) / len(self.known)
        limit = max(1.0, _BOUND * mean)
        return next(each for each in self.order(key) if each.in_flight < limit)


class _Head(Rule):
    def __init__(self, devices: dict[str, Device], seed: int) -> None:
        super().__init__(devices, seed)
        self.router = Router(devices)

    def choose(self, key: str) -> Device:
        found = self.router.choose(key, self.devices, lambda device: device.is_known)
        assert found is not None
        return found

    def remember(self, key: str, name: str) -> None:
        self.router.remember(key, name)


RULES: dict[str, type[Rule]] = {
    "random": Rule,
    "least": _Least,  # requests
    "hash": _Hash,  # of the session
    "bounded": _Bounded,  # as hash, over 1.5 times the mean load the next on the ring
    "head": _Head,  # edge-llm fleet's own
}


class Fleet:
    """Devices behind one rule of routing.

    Args:
        count: devices.
        rule: one of `RULES`.
        rate: new sessions per second.
        burst: see `sessions`.
        length_s: for how long it is played; the first third counts for nothing.
        losses: share of the devices that is lost, one after the other, in the middle third; at
            least one is left.
        seed: of everything that is drawn.
        cost: of the head's work.
        beat_s: seconds between two looks at a device; after 6 of them one is noticed to be lost.
    """

    def __init__(
        self,
        count: int,
        rule: str,
        rate: float,
        *,
        burst: float = 2.0,
        length_s: float = 600.0,
        losses: float = 0.0,
        seed: int = 0,
        cost: HeadCost = MEASURED,
        beat_s: float = _BEAT_S,
    ) -> None:
        self.length_s, self.warm_s = length_s, length_s * _WARM
        self.figures = Figures(length_s - self.warm_s, count)
        self.devices = {each.name: each for each in map(Device, range(count))}
        self.rule = RULES[rule](self.devices, seed)
        self.head = Head(cost, count, beat_s)
        self._silent_s = _SILENT_BEATS * beat_s
        self._sessions = sessions(rate, burst, length_s, seed)
        self._events: list[tuple[float, int, Callable[[float, Any], None], Any]] = []
        self._numbers = itertools.count()
        self._open: dict[int, Turn] = {}  # turns without a first token, by session
        own = random.Random(f"{seed} losses")
        lost = min(round(losses * count), count - 1)
        for device in own.sample(list(self.devices.values()), lost):
            self._at(length_s * own.uniform(1 / 3, 2 / 3), self._lose, device)
        self._at(self.warm_s, self._count, None)
        self._at(0.0, self._begin, None)

    def _at(self, at: float, what: Callable[[float, Any], None], about: Any) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), what, about))

    def run(self) -> Figures:
        """Play to the end."""
        while self._events and self._events[0][0] < self.length_s:
            at, _, what, about = heapq.heappop(self._events)
            what(at, about)
        figures, seconds = self.figures, self.figures.seconds
        late = [t for t in self._open.values() if t.came_s >= self.warm_s]
        figures.ttft_s += [self.length_s - turn.came_s for turn in late]
        busy = [min(1.0, each.backend.busy_s / seconds) for each in self.devices.values()]
        figures.mean, figures.most = sum(busy) / len(busy), max(busy)
        done_s = self.head.busy_s - max(0.0, self.head.free_s - self.length_s)
        figures.head = self.head.looks + (1 - self.head.looks) * done_s / seconds
        return figures

    def _count(self, at: float, _: None) -> None:
        self.head.busy_s = max(0.0, self.head.free_s - at)  # what it has not come to yet
        for device in self.devices.values():
            device.backend.busy_s = 0.0

    # ------------------------------------------------------------------------------- to a device

    def _begin(self, at: float, turn: Turn | None) -> None:
        if turn is not None:
            self._come(at, turn)
        following = next(self._sessions, None)
        if following is not None:
            self._at(following.came_s, self._begin, following)

    def _come(self, at: float, turn: Turn) -> None:
        if turn.first_s is None:
            self._open[turn.session] = turn
        self._at(self.head.work(at, self.head.request_s), self._send, turn)

    def _send(self, at: float, turn: Turn) -> None:
        device = self.rule.choose(f"session {turn.session}")
        device.in_flight += 1
        device.running[turn.session] = turn
        if device.lost_s is not None:
            return  # nobody knows it yet; `_notice` takes the turn up
        device.begin(turn, at)
        if not device.is_stepping:
            device.is_stepping = True
            self._at(device.backend.now, self._step, device)

    def _lose(self, at: float, device: Device) -> None:
        device.lost_s = at
        self._at(at + self._silent_s, self._notice, device)

    def _notice(self, at: float, device: Device) -> None:
        """Ask again what it had: whole answers the head does, and streams their clients."""
        device.is_known = False
        self.rule.lose(device)
        turns = list(device.running.values())
        device.running.clear()
        device.in_flight = 0
        for turn in turns:
            self.figures.asked_again += 1
            self._come(at, turn)

    # ------------------------------------------------------------------------------- and back

    def _step(self, at: float, device: Device) -> None:
        if device.lost_s is not None:
            return
        said, device.said = device.said, []
        for sink, is_end in said:
            if is_end:
                self._at(max(at, self.head.free_s), self._end, (device, sink))
            else:
                self._pass_on(self.head.work(at, self.head.token_s), sink.turn)
        if device.core.is_idle:
            device.is_stepping = False
            return
        device.core.step()
        self._at(device.backend.now, self._step, device)

    def _pass_on(self, at: float, turn: Turn) -> None:
        if at >= self.length_s:
            return  # nobody sees it any more
        if turn.first_s is None:
            turn.first_s = at
            del self._open[turn.session]
            if turn.came_s >= self.warm_s:
                self.figures.ttft_s.append(at - turn.came_s)
        self.figures.tokens += at >= self.warm_s

    def _end(self, at: float, about: tuple[Device, Sink]) -> None:
        device, sink = about
        turn = sink.turn
        if device.running.get(turn.session) is not turn:
            return  # it was lost with its device before the head came to this
        del device.running[turn.session]
        device.in_flight -= 1
        self.rule.remember(f"session {turn.session}", device.name)
        if at >= self.warm_s:
            self.figures.prompt += sink.stats.prompt_tokens
            self.figures.cached += sink.stats.cached_tokens
        following = turn.next(at)
        if following is not None:
            self._at(following.came_s, self._come, following)


# ----------------------------------------------------------------------------------- tables


class Case(NamedTuple):
    """A row of the table, but for the seed."""

    devices: int
    rate: float  # sessions per minute and device
    rule: str


def play(given: argparse.Namespace, case: Case, seed: int) -> Figures:
    """Play one fleet."""
    length_s = given.length_s or next(s for n, s in reversed(_LENGTH_S) if n <= case.devices)
    return Fleet(
        case.devices,
        case.rule,
        case.rate * case.devices / 60,
        burst=given.burst,
        length_s=length_s,
        losses=given.losses,
        seed=seed,
        beat_s=given.beat_s,
        cost=HeadCost(given.request_ms / 1e3, given.token_ms / 1e3, given.look_ms / 1e3),
    ).run()


def _spread(values: Sequence[float], form: str) -> str:
    low, middle, high = (format(f(values), form) for f in (min, median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def row(case: Case, found: Sequence[Figures]) -> str:
    """Write a row: the median of the seeds, and in brackets the lowest and highest."""
    cells = [f"{case.devices:,}", f"{case.rate:g}", case.rule]
    cells.append(_spread([each.rate for each in found], ".1f"))
    cells.append(_spread([each.percentile(50) for each in found], ".1f"))
    cells.append(_spread([each.percentile(99) for each in found], ".0f"))
    cells.append(_spread([each.cached_share for each in found], ".0%"))
    cells.append(_spread([each.asked_again for each in found], ".0f"))
    busy = [median(getattr(each, name) for each in found) for name in ("head", "mean", "most")]
    cells.append(" / ".join(f"{share:.0%}" for share in busy))
    return f"| {' | '.join(cells)} |"


def knee(rows: Sequence[tuple[Case, Sequence[Figures]]]) -> str:
    """Say up to which of the rates of one fleet and rule first answers come in time."""
    best = None
    for case, found in sorted(rows, key=lambda each: each[0].rate):
        if median(each.percentile(50) for each in found) > _KNEE_S:
            return f"{best:g}" if best is not None else f"below {case.rate:g}"
        best = case.rate
    return f"{best:g} or more"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="sessions/min and device"
    )
    parser.add_argument("--burst", type=float, default=2.0)
    parser.add_argument("--length-s", type=float, help="1 device 3600, 10 1200, 100 300, 1000 180")
    parser.add_argument("--losses", type=float, default=0.0, help="share of the devices")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--request-ms", type=float, default=1e3 * MEASURED.request_s)
    parser.add_argument("--token-ms", type=float, default=1e3 * MEASURED.token_s)
    parser.add_argument("--look-ms", type=float, default=1e3 * MEASURED.look_s)
    parser.add_argument("--beat-s", type=float, default=_BEAT_S, help="beat_s of fleet.toml")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args(arguments)
    cases = list(
        itertools.starmap(Case, itertools.product(given.devices, given.rates, given.rules))
    )
    print("| devices | sessions/min and device | rule | tok/s and device | TTFT P50, s "
          "| TTFT P99, s | cached | asked again | busy: head / devices / most |")  # fmt: skip
    print("|" + "---|" * 9)
    rows: list[tuple[Case, list[Figures]]] = []
    with ProcessPoolExecutor(given.processes) as pool:
        jobs = [[pool.submit(play, given, case, seed) for seed in given.seeds] for case in cases]
        for case, seeds in zip(cases, jobs, strict=True):
            rows.append((case, [job.result() for job in seeds]))
            print(row(*rows[-1]), flush=True)
    print(f"\n| devices | {' | '.join(given.rules)} |\n|---|{'---|' * len(given.rules)}")
    for count in given.devices:
        cells = [
            knee([each for each in rows if (each[0].devices, each[0].rule) == (count, rule)])
            for rule in given.rules
        ]
        print(f"| {count:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

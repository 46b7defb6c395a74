"""A fleet in simulated time: real schedulers and books of the cache, steps that only cost time.

Every device is an `EngineCore` as the server runs it, with its own clock. Its backend computes
nothing: a step moves the clock by what a step of this size was measured to cost. Whatever else is
reported (who waits, what is cached, how prompts and decode steps take turns) is the code's own.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.step import Step
from edge.engine_config import EngineConfig
from edge.errors import EdgeError
from edge.runtime.sampling import SamplingParams
from edge.runtime.scheduler.core import EngineCore, SequenceState
from edge.runtime.scheduler.request import Request

VOCAB = 64
SLOTS = 4
CAPACITY = 8192
CHUNK = 512
# The 1.5B in INT4 with --prefill int8 on two cores: docs/benchmarks.md, 217 tokens/s of prefill,
# and 60, 69, 101 and 163 ms between the tokens of 1, 2, 4 and 8 streams.
_PREFILL_S = 1 / 217
_DECODE_S = ((1, 0.060), (2, 0.069), (4, 0.101), (8, 0.163))
# Azure's conversations of 2023 (Splitwise, ISCA 2024, table and figure 3): medians of 1,020 tokens
# of prompt and 129 of answer. What a later turn adds is taken as short.
_PROMPT_TOKENS, _ANSWER_TOKENS, _TURN_TOKENS = 1020, 129, 60
_SPREAD = 0.6  # sigma of the lengths' logarithms
_MEAN_TURNS = 4.0
_THINK_S = 20.0
_PLACES = 64  # of one device on the ring
_NOTICED_S = 1.5  # until a lost device gets no more requests: fleet.toml's silent_s
_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def step_seconds(batch: int, seq: int) -> float:
    """Seconds of a step, between the measured ones by straight lines."""
    if seq > 1:
        return _DECODE_S[0][1] + batch * seq * _PREFILL_S
    sizes, seconds = zip(*_DECODE_S, strict=True)
    return float(np.interp(batch, sizes, seconds))


class _Table:
    """An embedding table whose rows nobody reads."""

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        return np.zeros((*ids.shape, 1), np.float16)


class _Clocked:
    """A backend that moves a clock and answers token 1."""

    name = "simulated"
    forward_best = None
    rounds_activations = False
    kv_scales: dict[str, Any] = {}  # noqa: RUF012 - never changed
    hidden_states = None
    cache_bytes = 0
    failed = None
    num_slots, capacity, max_step_tokens = SLOTS, CAPACITY, CHUNK

    def __init__(self) -> None:
        self.now = 0.0

    def forward(self, step: Step) -> NDArray[np.float32]:
        self.now += step_seconds(step.batch, step.seq)
        logits = np.zeros((step.batch, step.logits_indices.shape[1], VOCAB), np.float32)
        logits[..., 1] = 9.0
        return logits

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Move nothing: the books are the core's."""

    def read_slot(self, slot: int, length: int) -> NDArray[np.float32]:
        return np.zeros((1, 1, 1, length, 1), np.float32)

    def write_slot(self, slot: int, rows: NDArray[np.float32]) -> None:
        """Move nothing."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Turn:
    """A request of a session."""

    session: int
    turn: int
    turns: int
    came_s: float
    ids: list[int]
    answer: int
    tries: int = 0


class _Sink:
    """Hears the end of one answer."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self.first_s: float | None = None

    def progress(self, progress: Any) -> None:
        """Nobody asked for it."""

    def push(self, token: Any, reason: Any) -> Any:
        return reason

    def finish(self, reason: Any, stats: Any) -> None:
        if reason != "cancelled":
            self._ended()

    def fail(self, error: EdgeError) -> None:
        raise error


class Device:
    """One engine with its clock."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.backend = _Clocked()
        config = EngineConfig(num_slots=SLOTS, prefill_chunk=CHUNK)
        self.core = EngineCore(
            self.backend,  # type: ignore[arg-type]
            _Table(),  # type: ignore[arg-type]
            VOCAB,
            config,
            clock=lambda: self.backend.now,
        )
        self.is_alive = True
        self.running: dict[int, tuple[Turn, SequenceState]] = {}

    @property
    def load(self) -> int:
        return len(self.core.running) + len(self.core.waiting)


@dataclass
class Figures:
    """What came of it."""

    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    turns: int = 0
    retried: int = 0
    ended_s: float = 0.0

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.ttft_s, share)) if self.ttft_s else float("nan")


def _place(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Fleet:
    """Devices behind one rule of routing.

    Args:
        count: devices.
        rule: ``random``, ``least`` (loaded), ``hash`` of the session, or ``spill``: the hash, and
            the next device on the ring where one has more than 1.5 times the mean load.
        rate: new sessions per second.
        burst: coefficient of variation of the times between them; 1 is Poisson's.
        length_s: for how long sessions begin; what has begun is answered to its end.
        losses: share of the devices that is lost, one after the other, in the middle third.
        seed: of everything that is drawn.
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
    ) -> None:
        self.rng = random.Random(seed)
        self.rule, self.figures = rule, Figures()
        self.devices = [Device(i) for i in range(count)]
        self.known = list(self.devices)  # alive, as far as the router knows
        ring = [(_place(f"{d.index}/{i}"), d) for d in self.devices for i in range(_PLACES)]
        ring.sort(key=lambda each: each[0])
        self.ring = ring
        self.places = [place for place, _ in ring]
        self.events: list[tuple[float, int, str, Any]] = []
        self.number = 0
        self.stepping: set[int] = set()
        shape = (
            1 / burst**2
        )  # of a gamma distribution, as BurstGPT (arXiv 2401.17644) models bursts
        at, session = 0.0, 0
        while (at := at + self.rng.gammavariate(shape, 1 / (rate * shape))) < length_s:
            session += 1
            self._at(at, "turn", self._first(session, at))
        lost = self.rng.sample(self.devices, round(losses * count))
        for device in lost:
            self._at(length_s * self.rng.uniform(1 / 3, 2 / 3), "loss", device)

    def _at(self, at: float, kind: str, what: Any) -> None:
        self.number += 1
        heapq.heappush(self.events, (at, self.number, kind, what))

    def _length(self, median: int) -> int:
        return max(1, min(4 * median, round(median * self.rng.lognormvariate(0, _SPREAD))))

    def _text(self, count: int) -> list[int]:
        return self.rng.choices(range(2, VOCAB), k=count)

    def _first(self, session: int, at: float) -> Turn:
        turns = 1
        while self.rng.random() > 1 / _MEAN_TURNS and turns < 12:
            turns += 1
        text = self._text(self._length(_PROMPT_TOKENS))
        return Turn(session, 1, turns, at, text, self._length(_ANSWER_TOKENS))

    def run(self) -> Figures:
        """Play to the end of the last answer."""
        while self.events:
            at, _, kind, what = heapq.heappop(self.events)
            if kind == "turn":
                self._send(what, at)
            elif kind == "step":
                self._step(what)
            elif kind == "loss":
                self._lose(what, at)
            else:
                self.known.remove(what)
        return self.figures

    def _send(self, turn: Turn, at: float) -> None:
        device = self._choose(turn)
        if not device.is_alive:  # nobody has noticed yet: the connection is refused
            self.known = [each for each in self.known if each is not device] or self.known
            device = self._choose(turn)
            if not device.is_alive:
                self._at(at + 0.5, "turn", turn)
                return
        device.backend.now = max(device.backend.now, at)
        request = Request(
            ids=tuple(turn.ids),
            params=SamplingParams(**{**_fields(_GREEDY), "max_tokens": turn.answer}),
            end_ids=frozenset(),
        )
        sink = _Sink(lambda: self._ended(device, turn))
        sequence = device.core.sequence(request, sink, "", at)
        device.running[turn.session] = turn, sequence
        device.core.add(sequence)
        self._go_on(device)

    def _go_on(self, device: Device) -> None:
        if device.index not in self.stepping and not device.core.is_idle and device.is_alive:
            self.stepping.add(device.index)
            self._at(device.backend.now, "step", device)

    def _step(self, device: Device) -> None:
        self.stepping.discard(device.index)
        if device.is_alive:
            device.core.step()
            self._go_on(device)

    def _ended(self, device: Device, turn: Turn) -> None:
        _, sequence = device.running.pop(turn.session)
        stats, figures, now = sequence.stats, self.figures, device.backend.now
        figures.tokens += stats.completion_tokens
        figures.turns += 1
        figures.prompt += stats.prompt_tokens
        figures.cached += stats.cached_tokens
        # From its first arrival, also where a lost device had it before.
        figures.ttft_s.append(sequence.submitted_s + stats.ttft_s - turn.came_s)
        figures.ended_s = max(figures.ended_s, now)
        room = CAPACITY - 4 * (_ANSWER_TOKENS + _TURN_TOKENS)
        if turn.turn < turn.turns and len(turn.ids) + turn.answer < room:
            at = now + self.rng.expovariate(1 / _THINK_S)
            ids = turn.ids + [1] * turn.answer + self._text(self._length(_TURN_TOKENS))
            self._at(
                at,
                "turn",
                Turn(
                    turn.session, turn.turn + 1, turn.turns, at, ids, self._length(_ANSWER_TOKENS)
                ),
            )

    def _lose(self, device: Device, at: float) -> None:
        """A device is gone with what it has begun, which is asked again elsewhere."""
        if sum(each.is_alive for each in self.devices) == 1:
            return
        device.is_alive = False
        for turn, _ in device.running.values():
            turn.tries += 1
            self.figures.retried += 1
            self._at(at + _NOTICED_S, "turn", turn)
        device.running.clear()
        self._at(at, "gone", device) if device in self.known else None

    def _choose(self, turn: Turn) -> Device:
        if self.rule == "random":
            return self.rng.choice(self.known)
        if self.rule == "least":
            least = min(each.load for each in self.known)
            return self.rng.choice([each for each in self.known if each.load == least])
        alive = set(map(id, self.known))
        start = bisect.bisect(self.places, _place(f"session {turn.session}"))
        mean = sum(each.load for each in self.known) / len(self.known)
        limit = max(1.5 * (mean + 1 / len(self.known)), 1.0)
        home: Device | None = None
        for i in range(len(self.ring)):
            device = self.ring[(start + i) % len(self.ring)][1]
            if id(device) not in alive:
                continue
            home = home or device
            if self.rule == "hash" or device.load < limit:
                return device
        assert home is not None
        return home


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


RULES = ("random", "least", "hash", "spill")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0, 1.5, 2.0], help="sessions/min and device"
    )
    parser.add_argument("--burst", type=float, default=2.0)
    parser.add_argument("--length-s", type=float, default=600.0)
    parser.add_argument("--losses", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print("| devices | sessions/min and device | rule | tok/s and device | TTFT P50 / P99, s "
          "| prompt tokens cached | asked again |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for count in given.devices:
        for rate in given.rates:
            for rule in given.rules:
                found = Fleet(
                    count,
                    rule,
                    rate * count / 60,
                    burst=given.burst,
                    length_s=given.length_s,
                    losses=given.losses,
                    seed=given.seed,
                ).run()
                print(
                    f"| {count:,} | {rate:g} | {rule} | {found.tokens / found.ended_s / count:.1f} "
                    f"| {found.percentile(50):.1f} / {found.percentile(99):.1f} "
                    f"| {found.cached / max(found.prompt, 1):.0%} | {found.retried} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

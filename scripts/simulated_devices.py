"""What a simulated fleet is made of: sessions, devices with real schedulers, and the head's costs.

Every device is an `EngineCore` as the server runs it, with its own clock. Its backend computes
nothing: a step moves the clock by what a step of this size was measured to cost.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.backends.step import Step
from edge.engine_config import EngineConfig
from edge.errors import EdgeError
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.scheduler.core import EngineCore
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
_MOST_ADDED = 4 * (_ANSWER_TOKENS + _TURN_TOKENS)
_SPREAD = 0.6  # sigma of the lengths' logarithms; none is longer than 4 medians
_MEAN_TURNS, _MOST_TURNS = 4.0, 12
_THINK_S = 20.0
_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


class HeadCost(NamedTuple):
    """Seconds of one core, as `scripts/fleet-head-cost` measures them.

    Attributes:
        request_s: of a request and the end of its answer.
        token_s: of an event of a stream.
        look_s: of a look at a device.
    """

    request_s: float
    token_s: float
    look_s: float


def step_seconds(batch: int, seq: int) -> float:
    """Seconds of a step, between the measured ones by straight lines."""
    if seq > 1:
        return _DECODE_S[0][1] + batch * seq * _PREFILL_S
    sizes, seconds = zip(*_DECODE_S, strict=True)
    return float(np.interp(batch, sizes, seconds))


_PLAIN_S = [0.0, *(step_seconds(batch, 1) for batch in range(1, SLOTS + 1))]


class _Table:
    """An embedding table whose rows nobody reads."""

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        return np.zeros((*ids.shape, 1), np.float16)


def _logits(batch: int) -> NDArray[np.float32]:
    logits = np.zeros((batch, 1, VOCAB), np.float32)
    logits[..., 1] = 9.0
    logits.flags.writeable = False
    return logits


_LOGITS = [_logits(batch) for batch in range(SLOTS + 1)]


class _Clocked:
    """A backend that moves a clock and answers token 1."""

    name = "simulated"
    forward_best = None
    meanwhile: Callable[[], None] | None = None
    rounds_activations = False
    kv_scales: dict[str, Any] = {}  # noqa: RUF012 - never changed
    hidden_states = None
    cache_bytes = 0
    failed = None
    num_slots, capacity, max_step_tokens = SLOTS, CAPACITY, CHUNK

    def __init__(self) -> None:
        self.now = self.busy_s = 0.0

    def forward(self, step: Step) -> NDArray[np.float32]:
        took_s = _PLAIN_S[step.batch] if step.seq == 1 else step_seconds(step.batch, step.seq)
        self.now += took_s
        self.busy_s += took_s
        return _LOGITS[step.batch]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Move nothing: the books are the core's."""

    def read_slot(self, slot: int, length: int) -> NDArray[np.float32]:
        return np.zeros((1, 1, 1, length, 1), np.float32)

    def write_slot(self, slot: int, rows: NDArray[np.float32]) -> None:
        """Move nothing."""

    def close(self) -> None:
        """Nothing is open."""


class Part(NamedTuple):
    """A turn of a session, as it was drawn: pause before it, what it adds, how long it answers."""

    think_s: float
    added: list[int]
    answer: int


@dataclass
class Turn:
    """A request of a session.

    Attributes:
        came_s: when its client sent it.
        ids: its whole prompt.
        later: the turns after it.
        first_s: when its first token reached the client; None before.
    """

    session: int
    came_s: float
    ids: list[int]
    answer: int
    later: list[Part]
    first_s: float | None = None

    def next(self, ended_s: float) -> Turn | None:
        """Make the turn that follows; None where none does, or the cache would be too small."""
        if not self.later or len(self.ids) + self.answer >= CAPACITY - _MOST_ADDED:
            return None
        part, *later = self.later
        ids = [*self.ids, *[1] * self.answer, *part.added]
        return Turn(self.session, ended_s + part.think_s, ids, part.answer, later)


def sessions(rate: float, burst: float, length_s: float, seed: int) -> Iterator[Turn]:
    """Draw the first turns of all sessions, in order; the same for the same arguments.

    Args:
        rate: new sessions per second.
        burst: coefficient of variation of the times between them; 1 is Poisson's.
        length_s: for how long sessions begin.
        seed: of everything that is drawn.
    """
    arrivals = random.Random(f"{seed} arrivals")
    shape = 1 / burst**2  # of a gamma distribution, as BurstGPT (arXiv 2401.17644) models bursts
    at = 0.0
    for session in itertools.count():
        at += arrivals.gammavariate(shape, 1 / (rate * shape))
        if at >= length_s:
            return
        own = random.Random(f"{seed} session {session}")
        parts = [_part(own, _PROMPT_TOKENS)]
        while own.random() > 1 / _MEAN_TURNS and len(parts) < _MOST_TURNS:
            parts.append(_part(own, _TURN_TOKENS))
        yield Turn(session, at, parts[0].added, parts[0].answer, parts[1:])


def _part(own: random.Random, tokens: int) -> Part:
    def length(median_tokens: int) -> int:
        drawn = round(median_tokens * own.lognormvariate(0, _SPREAD))
        return max(1, min(4 * median_tokens, drawn))

    added = own.choices(range(2, VOCAB), k=length(tokens))
    return Part(own.expovariate(1 / _THINK_S), added, length(_ANSWER_TOKENS))


class Sink:
    """Puts the tokens of one answer where the head will find them."""

    def __init__(self, device: Device, turn: Turn) -> None:
        self._device = device
        self.turn = turn
        self.stats: Any = None

    def progress(self, progress: Any) -> None:
        """Nobody asked for it."""

    def push(self, token: Any, reason: Any) -> Any:
        self._device.said.append((self, False))
        return reason

    def finish(self, reason: Any, stats: Any) -> None:
        self.stats = stats
        self._device.said.append((self, True))

    def fail(self, error: EdgeError) -> None:
        raise error


class Device:
    """One engine with its clock.

    Attributes:
        is_known: whether the head takes it for alive.
        lost_s: when it was lost; None while it lives.
        in_flight: requests that the head has sent there and that have not ended.
        running: their turns, by session.
        said: what the head has not passed on yet: tokens (false), and ends of answers (true).
    """

    def __init__(self, index: int) -> None:
        self.name = f"device-{index}"
        self.backend = _Clocked()
        self.core = EngineCore(
            self.backend,  # type: ignore[arg-type]
            _Table(),  # type: ignore[arg-type]
            VOCAB,
            EngineConfig(num_slots=SLOTS, prefill_chunk=CHUNK),
            clock=lambda: self.backend.now,
        )
        self.is_known = True
        self.lost_s: float | None = None
        self.in_flight = 0
        self.running: dict[int, Turn] = {}
        self.said: list[tuple[Sink, bool]] = []
        self.is_stepping = False

    @property
    def slots(self) -> int:
        return SLOTS

    @property
    def load(self) -> float:
        return self.in_flight / SLOTS

    def begin(self, turn: Turn, at: float) -> None:
        """Queue a turn."""
        self.backend.now = max(self.backend.now, at)
        params = replace(_GREEDY, max_tokens=turn.answer)
        request = Request(ids=tuple(turn.ids), params=params, end_ids=frozenset())
        self.core.add(self.core.sequence(request, Sink(self, turn), "", at))


class Head:
    """One processor, which does one thing after the other.

    Args:
        cost: of what it does.
        devices: that it looks at.
        beat_s: seconds between two looks at one, as in fleet.toml.
    """

    def __init__(self, cost: HeadCost, devices: int, beat_s: float) -> None:
        self.looks = min(1.0, devices * cost.look_s / beat_s)  # share of its time
        slower = 1 / max(1e-9, 1 - self.looks)
        self.request_s, self.token_s = cost.request_s * slower, cost.token_s * slower
        self.free_s = self.busy_s = 0.0

    def work(self, at: float, seconds: float) -> float:
        """Do something that comes at this time; returns when it is done."""
        self.free_s = max(self.free_s, at) + seconds
        self.busy_s += seconds
        return self.free_s

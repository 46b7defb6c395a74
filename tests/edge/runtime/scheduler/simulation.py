"""The whole core under a load, on machines of known speed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edge.backends import Step
from edge.bundle.embeddings import EmbeddingTable
from edge.runtime.scheduler.policy import Policy
from edge.runtime.scheduler.sequence import SequenceState
from tests.edge.runtime.scheduler.conftest import GREEDY, Engine, make_request

Cost = Callable[[int], float]
_LONGEST = 4096


class Machine:
    """Milliseconds of a decode step by its sequences, and of a chunk by its tokens."""

    def __init__(self, decode: Cost, chunk: Cost) -> None:
        self.decode, self.chunk = decode, chunk


MACHINES = {
    # The 1.5B in INT4, measured on two cores of an x86 server.
    "cpu": Machine(lambda b: 25 + 10 * (b - 1), lambda c: 24 + 7.5 * c),
    # A GPU whose steps have a fixed cost, and one that computes while it reads its weights.
    "additive": Machine(lambda b: 5 + 0.3 * (b - 1), lambda c: 5 + 0.19 * c),
    "roofline": Machine(lambda b: max(10, 4 + 0.1 * b), lambda c: max(10, 4 + 0.1 * c)),
}


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, its prompt's tokens and its answer's."""

    at_s: float
    prompt: int
    answer: int


class FixedChunks(Policy):
    """Runs a prompt in chunks of one size, whatever they cost."""

    def chunk_tokens(self, decoding: int, *, alert: bool = False) -> int:
        return self.step_tokens


@dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Attributes:
        tokens_per_s: sampled tokens over the whole time.
        ttft_s: of each request, from its arrival.
        itl_s: every gap between two tokens.
    """

    tokens_per_s: float
    ttft_s: tuple[float, ...]
    itl_s: tuple[float, ...]


class Simulation:
    """A core whose clock moves by what its steps cost, with 5 % of noise."""

    def __init__(
        self, table: EmbeddingTable, machine: Machine, num_slots: int, **options: Any
    ) -> None:
        self.now = 100.0
        self._machine = machine
        self._sent = 0
        self._noise = random.Random(0)
        self.engine = Engine(
            table,
            num_slots=num_slots,
            capacity=_LONGEST,
            max_step_tokens=512,
            reuse_prefix=False,
            clock=lambda: self.now,
            **options,
        )
        self._forward = self.engine.backend.forward
        setattr(self.engine.backend, "forward", self._timed)  # noqa: B010

    def _timed(self, step: Step) -> Any:
        seq = step.seq
        ms = self._machine.chunk(seq) if seq > 1 else self._machine.decode(step.batch)
        self.now += ms / 1e3 * (1 + 0.05 * self._noise.random())
        return self._forward(step)

    def warm_up(self) -> None:
        """A first request alone, from which the policy learns."""
        self.run([Arrival(self.now, 512, 8)])

    def run(self, arrivals: Sequence[Arrival]) -> Outcome:
        """Play requests that come at fixed times."""
        began = self.now
        coming = sorted(arrivals, key=lambda each: each.at_s, reverse=True)
        known: list[SequenceState] = []
        while coming or not self.engine.core.is_idle:
            if self.engine.core.is_idle and coming:
                self.now = max(self.now, coming[-1].at_s)
            while coming and coming[-1].at_s <= self.now:
                known.append(self.submit(coming.pop()))
            self.engine.core.step()
        return self._outcome(known, began)

    def run_clients(self, clients: int, requests: int, prompt: int, answer: int) -> Outcome:
        """Play clients that each send their next request once the one before is answered."""
        began, left = self.now, requests
        known: list[SequenceState] = []
        running: list[SequenceState] = []
        while left or running:
            while left and len(running) < clients:
                running.append(self.submit(Arrival(self.now, prompt, answer)))
                known.append(running[-1])
                left -= 1
            self.engine.core.step()
            running = [each for each in running if not each.ended]
        return self._outcome(known, began)

    def submit(self, arrival: Arrival) -> SequenceState:
        """Send a request now; it counts as sent when it came."""
        params = replace(GREEDY, max_tokens=arrival.answer)
        self._sent += 1  # no two prompts that run at once begin alike
        request = make_request([self._sent % 40] * arrival.prompt, params, end_ids=frozenset())
        sequence, _ = self.engine.submit(request)
        sequence.submitted_s = min(sequence.submitted_s, arrival.at_s)
        return sequence

    def _outcome(self, known: list[SequenceState], began: float) -> Outcome:
        tokens = sum(each.stats.completion_tokens for each in known)
        return Outcome(
            tokens / (self.now - began),
            tuple(each.stats.ttft_s for each in known),
            tuple(gap for each in known for gap in each.stats.itl_s),
        )

"""Readers are served while the device computes the next step; no answer shows it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends import Step
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError
from edge.runtime.drafts import NgramDrafter
from edge.runtime.generation import FinishReason
from edge.runtime.sampling import SampledToken, Sampler
from tests.edge.runtime.conftest import VOCAB

from .conftest import GREEDY, Collected, Engine, answer_alone, drafting_of, make_request

# Milliseconds: of a step on the device, and on the CPU of drawing a token, of serving its reader
# and of finding what a grammar allows next. With a batch of 8 all of that is shorter than a step.
STEP, DRAW, SERVE, MASK = 6.0, 0.1, 0.4, 0.1


@dataclass
class Device:
    """Scripted time: what it computes ends on its own, whatever the CPU does meanwhile."""

    now: float = 0.0
    ended: float | None = None
    idle: list[float] = field(default_factory=list)

    def attach(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        forward, sample = engine.backend.forward, Sampler.sample

        def timed(step: Step) -> Any:
            if self.ended is not None:
                self.idle.append(self.now - self.ended)
            self.ended = self.now + STEP
            logits = forward(step)  # serves readers, if anyone does
            self.now = max(self.now, self.ended)
            return logits

        def drawn(sampler: Sampler, *arguments: Any) -> SampledToken:
            self.now += DRAW
            return sample(sampler, *arguments)

        monkeypatch.setattr(engine.backend, "forward", timed)
        monkeypatch.setattr(Sampler, "sample", drawn)


class Slow(Collected):
    """A reader whose text, stop strings and stream take time."""

    def __init__(self, device: Device, stop_after: int = 0) -> None:
        super().__init__()
        self.device, self.stop_after = device, stop_after

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        self.device.now += SERVE
        reason = super().push(token, reason)
        if len(self.ids) == self.stop_after:
            self.announced = reason = "stop"
        return reason


class Grammar:
    """A constraint that takes time to say what it allows, which is everything but ``forbidden``."""

    def __init__(self, device: Device, forbidden: int) -> None:
        self.device, self.forbidden, self.asked = device, forbidden, 0

    def mask(self) -> NDArray[np.float32]:
        self.device.now += MASK
        self.asked += 1
        allowed = np.zeros(VOCAB, np.float32)
        allowed[self.forbidden] = -np.inf
        return allowed

    def accept(self, token_id: int) -> None:
        assert token_id != self.forbidden
        self.forbidden = token_id + 1  # what the script says next, so the answer counts by twos


def run(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch, batch: int, *, overlaps: bool
) -> tuple[list[float], list[list[int]]]:
    """The device's idle times between steps of a full batch, and the answers.

    Without that after the first step, before which no grammar is asked.
    """
    device = Device()
    engine = Engine(table, num_slots=batch, overlaps=overlaps, clock=lambda: device.now)
    with monkeypatch.context() as patch:
        device.attach(engine, patch)
        grammars = [Grammar(device, 2) for _ in range(batch)]
        requests = [
            make_request([1], replace(GREEDY, max_tokens=40), constraint=grammar)
            for grammar in grammars
        ]
        sinks = [engine.submit(request, Slow(device))[1] for request in requests]
        engine.run()
        assert all(grammar.asked == 40 for grammar in grammars)
    full = [len(slots) == batch for slots in engine.backend.batches]
    between = [
        gap for gap, now, before in zip(device.idle, full[1:], full, strict=False) if now and before
    ]
    assert len(between) > 30
    return between[1:], [sink.ids for sink in sinks]


@pytest.mark.parametrize("batch", [1, 8])
def test_the_device_waits_for_nothing_but_the_draw(
    batch: int, table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
):
    idle, answers = run(table, monkeypatch, batch, overlaps=True)
    assert max(idle) == pytest.approx(batch * DRAW)
    waits, same = run(table, monkeypatch, batch, overlaps=False)
    assert min(waits) == pytest.approx(batch * (DRAW + SERVE + MASK))
    assert answers == same == [same[0]] * batch


def test_a_stop_found_late_drops_what_was_computed_meanwhile(table: EmbeddingTable):
    engine = Engine(table, overlaps=True)
    _, stopped = engine.submit(make_request([1]), Slow(Device(), stop_after=3))
    _, other = engine.submit(make_request([11], replace(GREEDY, max_tokens=9)))
    engine.run()
    assert (stopped.ids, stopped.reason) == ([2, 3, 4], "stop")
    assert other.ids == list(range(12, 21))
    assert engine.core.counts["completion"] == 3 + 9
    engine.check_books()
    # Its rows are a prefix for the next turn: the prompt and the tokens before the last.
    engine.answer(make_request([1, 2, 3, 4, 5], replace(GREEDY, max_tokens=1)))
    assert engine.core.counts["cached"] == 3


def test_what_was_computed_meanwhile_leaves_no_nan_behind(table: EmbeddingTable):
    def script(seen: tuple[int, ...]) -> Any:
        return np.full(VOCAB, np.nan, np.float32) if 4 in seen else (seen[-1] + 1) % VOCAB

    engine = Engine(table, script, overlaps=True)
    _, stopped = engine.submit(make_request([1]), Slow(Device(), stop_after=3))
    engine.run()
    assert (stopped.ids, stopped.reason) == ([2, 3, 4], "stop")
    assert engine.backend.rows_of(0, 4) == [0] * 4
    engine.check_books()


def test_what_is_drawn_is_not_lost_when_the_next_step_fails(table: EmbeddingTable):
    engine = Engine(table, overlaps=True)
    _, sink = engine.submit(make_request([1]))
    _, stops = engine.submit(make_request([11]), Slow(Device(), stop_after=3))
    for _ in range(3):
        engine.core.step()
    seen = len(sink.ids)
    engine.backend.fails = True
    engine.core.step()
    assert isinstance(sink.last, BackendError)
    assert len(sink.ids) == seen + 1
    assert (stops.ids, stops.reason) == ([12, 13, 14], "stop")
    engine.check_books()  # no row of the failed step is kept
    assert not any(slot.length for slot in engine.core.roster.pool.slots)


def test_a_grammar_that_fails_meanwhile_ends_its_own_sequence(table: EmbeddingTable):
    class Fails(Grammar):
        def mask(self) -> NDArray[np.float32]:
            if self.asked == 3:
                raise ZeroDivisionError
            return super().mask()

    engine = Engine(table, overlaps=True)
    grammar = Fails(Device(), 2)
    _, sink = engine.submit(make_request([1], constraint=grammar))
    _, other = engine.submit(make_request([11], replace(GREEDY, max_tokens=9)))
    engine.run()
    assert len(sink.ids) == 3
    assert "constraint of a request failed: ZeroDivisionError" in str(sink.last)
    assert other.ids == list(range(12, 21))
    engine.check_books()


def test_readers_are_served_even_if_no_step_follows(table: EmbeddingTable):
    engine = Engine(table, overlaps=True)
    sequence, sink = engine.submit(make_request([1]))
    for _ in range(3):
        engine.core.step()
    assert len(sink.ids) < len(sequence.ids) - 1
    sequence.cancelled = True
    engine.core.step()
    assert sink.ids == sequence.ids[1:]
    assert sink.reason == "cancelled"
    engine.core.end_all(None)


@pytest.mark.parametrize("seed", range(5))
def test_drafting_may_be_switched_at_any_time(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch, seed: int
):
    rng, sample = random.Random(seed), Sampler.sample
    engine = Engine(
        table,
        lambda seen: (seen[-1] * 3 + len(seen) % 3) % VOCAB,
        overlaps=True,
        drafter=NgramDrafter(),
        speculative=5,
    )

    def drawn(sampler: Sampler, *arguments: Any) -> SampledToken:
        drafting_of(engine.core).enabled ^= rng.random() < 0.2  # as another thread may
        return sample(sampler, *arguments)

    requests = [make_request([i, 1, i], replace(GREEDY, max_tokens=30)) for i in range(8)]
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", drawn)
        sinks = [engine.submit(request)[1] for request in requests]
        engine.run()
    expected = [answer_alone(engine.backend.script, request, 64) for request in requests]
    assert [(sink.ids, sink.reason) for sink in sinks] == expected

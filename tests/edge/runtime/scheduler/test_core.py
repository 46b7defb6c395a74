"""`EngineCore` by property: whatever happens beside it, a sequence's answer is its answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from numpy.typing import NDArray

from edge.backends import Rows, Step
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError, DeadlineError, DeviceMemoryError
from edge.model.slot_rows import SlotRows
from edge.runtime.draft_model import ModelDrafter
from edge.runtime.generation import FinishReason, GenerationStats, PromptProgress
from edge.runtime.sampling import SampledToken
from edge.runtime.scheduler.draft_policy import DecodeRun
from edge.runtime.scheduler.drafter import DraftContext, Drafter, DraftWorth
from edge.runtime.scheduler.sequence import SequenceState
from lab.quality.best_logits import best_of
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import (
    COUNT_UP,
    END,
    GREEDY,
    SAMPLED,
    Collected,
    DropMiddle,
    Engine,
    answer_alone,
    drafting_of,
    failed_as_told,
    make_request,
)
from tests.standins.scripted_backend import Script, ScriptedBackend, random_logits
from tests.standins.slot_rows import by_name, stacked

SCRIPT = random_logits(VOCAB)


class Guesser:
    """A drafter that is right about a greedy answer, but for each ``wrong_each``-th token."""

    is_free = True
    first_guess = 0.3
    newest = 0.15

    def __init__(self, script: Script, wrong_each: int) -> None:
        self.script = script
        self.wrong_each = wrong_each
        self.verdicts: list[tuple[int, int]] = []

    def begin(self, slot: int, salt: str) -> None:
        pass

    def slide(self, slot: int, before: list[int], after: list[int]) -> None:
        pass

    def saw(self, slot: int, before: list[int], tokens: Sequence[int], hidden: Any) -> None:
        raise AssertionError("the scripted target puts out no hidden states")

    def behind(self, context: DraftContext) -> int:
        return 0

    def read(self, context: DraftContext, most: int) -> None:
        raise AssertionError("it is never behind")

    def offer(self, context: DraftContext) -> int:
        return context.limit

    def propose(
        self, contexts: Sequence[DraftContext], count: int, worth: DraftWorth
    ) -> list[list[int]]:
        return [self._guess(context.ids, min(count, context.limit)) for context in contexts]

    def _guess(self, ids: list[int], limit: int) -> list[int]:
        seen = list(ids)
        for _ in range(limit):
            logits = np.asarray(self.script(tuple(seen)))
            guess = int(logits.argmax()) if logits.ndim else int(logits)
            seen.append((guess + 1) % VOCAB if len(seen) % self.wrong_each == 0 else guess)
        return seen[len(ids) :]

    def observe(self, slot: int, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed
        self.verdicts.append((proposed, accepted))


class Stopping(Collected):
    """A reader that finds a stop string in some token."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.stopped = False

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        reason = super().push(token, reason)
        self.stopped = reason is None and len(self.ids) == self.stop_after
        if self.stopped:
            self.announced = "stop"
        return self.announced


class Life(RuleBasedStateMachine):
    """Any interleaving of submissions, cancels, deadlines, faults and steps."""

    table: EmbeddingTable

    @initialize(
        num_slots=st.integers(1, 4),
        capacity=st.integers(6, 20),
        chunk=st.integers(1, 6),
        slides=st.booleans(),
        drafts=st.sampled_from([None, "guesser", "same model", "other model"]),
        reuse=st.booleans(),
        overlaps=st.booleans(),
        target_itl_ms=st.sampled_from([None, 20.0]),
        per_sequence_s=st.sampled_from([0.0, 0.001, 0.05]),
        per_token_s=st.sampled_from([0.0, 0.001, 0.05]),
    )
    def begin(
        self,
        num_slots: int,
        capacity: int,
        chunk: int,
        slides: bool,
        drafts: str | None,
        reuse: bool,
        overlaps: bool,
        target_itl_ms: float | None,
        per_sequence_s: float,
        per_token_s: float,
    ) -> None:
        self.now = 100.0
        self.slides = slides
        self.draft: ScriptedBackend | None = None
        drafter: Drafter | None = None
        if drafts == "guesser":
            drafter = Guesser(SCRIPT, 4)
        elif drafts is not None:
            self.draft = ScriptedBackend(
                self.table,
                SCRIPT if drafts == "same model" else lambda seen: SCRIPT((9, *seen)),
                num_slots=num_slots,
                capacity=capacity,
                max_step_tokens=chunk,
            )
            drafter = ModelDrafter(
                self.draft,
                self.table,
                draft_vocab=VOCAB,
                target_vocab=VOCAB,
                cut_rows=SlotRows.without,
            )
        self.engine = Engine(
            self.table,
            SCRIPT,
            num_slots=num_slots,
            capacity=capacity,
            max_step_tokens=chunk,
            overlaps=overlaps,
            reuse_prefix=reuse,
            overflow=DropMiddle() if slides else None,
            drafter=drafter,
            speculative=3,
            target_itl_ms=target_itl_ms,
            clock=lambda: self.now,
        )
        forward = self.engine.backend.forward

        def timed(step: Step) -> Any:
            self.now += 0.01 + step.batch * (per_sequence_s + step.seq * per_token_s)
            return forward(step)

        setattr(self.engine.backend, "forward", timed)  # noqa: B010
        self.known: dict[SequenceState, Collected] = {}

    sequences = Bundle("sequences")

    @rule(
        target=sequences,
        tail=st.lists(st.integers(0, 2), max_size=8),
        follows=st.booleans(),
        max_tokens=st.integers(1, 12),
        seed=st.none() | st.integers(0, 5),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "other"]),
        client=st.sampled_from(["", "other", "third"]),
        deadline_s=st.none() | st.sampled_from([0.05, 5.0]),
        num=st.integers(1, 3),
        stop_after=st.none() | st.integers(1, 6),
    )
    def submit(
        self,
        tail: list[int],
        follows: bool,
        max_tokens: int,
        seed: int | None,
        priority: int,
        salt: str,
        client: str,
        deadline_s: float | None,
        num: int,
        stop_after: int | None,
    ) -> Any:
        # A prompt may continue an earlier answer, as in a chat.
        before = next(reversed(self.known), None) if follows else None
        ids = [*(before.ids if before else [0, 1]), *tail][: self.engine.backend.capacity - 1]
        params = GREEDY if seed is None else replace(SAMPLED, seed=seed)
        request = make_request(
            ids,
            replace(params, max_tokens=max_tokens),
            priority=priority,
            salt=salt,
            client=client,
            deadline_s=deadline_s,
        )
        new = []
        for i in range(num):
            sequence, sink = self.engine.submit(request.sample(i), Stopping(stop_after))
            self.known[sequence] = sink
            new.append(sequence)
        return multiple(*new)

    @rule(sequence=consumes(sequences))
    def cancel(self, sequence: SequenceState) -> None:
        sequence.cancelled = True
        self.engine.core.step()
        assert sequence.ended

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.core.step()

    @rule()
    def fault(self) -> None:
        self.engine.backend.fails = True
        self.engine.core.step()
        self.engine.backend.fails = False

    @precondition(lambda self: self.draft is not None)
    @rule()
    def draft_fault(self) -> None:
        assert self.draft is not None
        self.draft.fails = True
        for _ in range(3):
            self.engine.core.step()
        self.draft.fails = False

    @rule()
    def use_the_backend(self) -> None:
        self.engine.run()
        backend = self.engine.backend
        self.engine.core.call(lambda: backend.write_slot(0, by_name(np.full((1, 1, 3, 1), 7.0))))

    @invariant()
    def books_are_true(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_books()
            drafting = self.engine.core.drafting
            drafter = drafting and drafting.drafter
            if self.draft is not None and isinstance(drafter, ModelDrafter):
                for slot, ids in enumerate(drafter._ids):
                    assert self.draft.rows_of(slot, len(ids)) == ids

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        self.engine.check_books()
        assert self.engine.core.roster.pool.num_free == self.engine.backend.num_slots
        capacity = self.engine.backend.capacity
        for sequence, sink in self.known.items():
            expected = answer_alone(SCRIPT, sequence.request, capacity, self.slides)
            if sink.reason in ("stop", "length"):
                if isinstance(sink, Stopping) and sink.stopped:
                    expected = expected[0][: sink.stop_after], "stop"
                assert (sink.ids, sink.reason) == expected
                continue
            assert sink.ids == expected[0][: len(sink.ids)]
            assert (
                (sink.reason == "cancelled" and sequence.cancelled)
                or (isinstance(sink.last, DeadlineError) and sequence.deadline_s is not None)
                or failed_as_told(sink)
            )
        assert sum(self.engine.core.delivery.outcomes.values()) == len(self.known)


@pytest.fixture(autouse=True)
def _give_the_machine_its_table(table: EmbeddingTable) -> None:
    Life.table = table


def test_many_sequences_run_in_one_step_and_joiners_need_not_wait(table: EmbeddingTable):
    engine = Engine(table)
    _, first = engine.submit(make_request([1], replace(GREEDY, max_tokens=9)))
    engine.core.step()
    engine.core.step()
    _, second = engine.submit(make_request([20, 21], replace(GREEDY, max_tokens=3)))
    engine.run()
    assert (first.ids, second.ids) == (list(range(2, 11)), [22, 23, 24])
    assert engine.backend.batches == [[0]] * 3 + [[1]] + [[0, 1]] * 2 + [[0]] * 4


def test_samples_of_one_prompt_prefill_it_once(table: EmbeddingTable):
    for reuse in (True, False):
        engine = Engine(table, SCRIPT, reuse_prefix=reuse, max_step_tokens=32)
        request = make_request(list(range(20)), replace(SAMPLED, max_tokens=6, seed=8))
        sinks = [engine.submit(request.sample(i))[1] for i in range(4)]
        engine.run()
        assert engine.core.counts["prompt"] - engine.core.counts["cached"] == 20 + 3
        answers = [answer_alone(SCRIPT, request.sample(i), 64)[0] for i in range(4)]
        assert [sink.ids for sink in sinks] == answers
        assert len(set(map(tuple, answers))) == 4
        # The first prefills; from then on all decode together.
        assert [len(batch) for batch in engine.backend.batches[:3]] == [1, 4, 4]


def test_prompts_go_by_priority_then_by_arrival(table: EmbeddingTable):
    engine = Engine(table, num_slots=1)
    order: list[str] = []
    for name, priority in (("c", 1), ("a", 0), ("d", 1), ("b", 0)):
        request = make_request([5], replace(GREEDY, max_tokens=1), priority=priority)
        engine.submit(request, Named(name, order))
    engine.run()
    assert order == ["a", "b", "c", "d"]


def test_a_prompt_of_higher_priority_does_not_wait_for_a_long_one(table: EmbeddingTable):
    engine = Engine(table, max_step_tokens=4)
    order: list[str] = []
    for name, size, priority in (("long", 40, 1), ("same", 3, 1), ("urgent", 6, 0)):
        request = make_request(range(size), replace(GREEDY, max_tokens=1), priority=priority)
        engine.submit(request, Named(name, order))
        if name == "long":
            engine.core.step()
    engine.run()
    assert order == ["urgent", "long", "same"]


def test_a_sequence_is_told_of_its_place_and_of_what_is_read(table: EmbeddingTable):
    clock = iter(range(10_000))
    engine = Engine(table, num_slots=1, max_step_tokens=4, clock=lambda: float(next(clock)))
    prompt, wants = list(range(1, 11)), partial(make_request, wants_progress=True)
    _, first = engine.submit(make_request([30, 31], replace(GREEDY, max_tokens=2)))
    _, second = engine.submit(wants(prompt, replace(GREEDY, max_tokens=2)))
    _, third = engine.submit(wants([*prompt[:8], 40], priority=1))
    engine.core.step()
    assert [one.told[-1].ahead for one in (second, third)] == [0, 1]
    _, urgent = engine.submit(make_request([20], replace(GREEDY, max_tokens=1), priority=-1))
    engine.run()
    assert first.told == urgent.told == []  # they did not ask
    assert [one.ahead for one in second.told] == [0, 1, 0, None, None, None, None]
    assert [one.ahead for one in third.told] == [1, 2, 1, 0, None, None]
    assert {(one.cached, one.processed, one.prefill_s) for one in second.told[:3]} == {(0, 0, 0)}
    assert [(one.total, one.processed) for one in second.told[3:]] == [
        *((10, 0), (10, 4), (10, 8), (10, 10))
    ]
    times = [one.prefill_s for one in second.told[3:]]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1]
    # The beginning was in the cache already, and counts as read.
    assert [(one.cached, one.processed) for one in third.told[-2:]] == [(8, 8), (8, 9)]


def test_a_prompt_that_rides_is_told_of_percents_and_no_more(table: EmbeddingTable):
    engine = Engine(table, capacity=400, target_itl_ms=1e-6)
    engine.submit(make_request([5], replace(GREEDY, max_tokens=399)))
    engine.core.step()
    _, sink = engine.submit(
        make_request([7] * 300, replace(GREEDY, max_tokens=1), wants_progress=True)
    )
    engine.run()
    read = [one.processed for one in sink.told if one.ahead is None]
    assert read[0] == 0
    assert read[-1] == 300
    assert len(read) <= 101
    assert len({100 * processed // 300 for processed in read}) == len(read) > 20


def test_a_sequence_is_counted_at_any_moment(table: EmbeddingTable):
    """Another thread may count between any two lines; whoever drains must not miss one."""
    seen: list[int] = []
    engine = Engine(table)

    def count() -> float:
        seen.append(len(engine.core.roster.waiting) + len(engine.core.roster.running))
        return 0.0

    engine.submit(make_request([1], replace(GREEDY, max_tokens=2)))
    engine.core._clock = count
    engine.core.step()
    assert min(seen) == 1


class Panic(BaseException):
    """What a library of Rust raises when it panics: no `Exception`."""


class Panics:
    def mask(self) -> None:
        raise Panic("index out of bounds")

    def accept(self, token_id: int) -> None: ...


class FaultySink(Collected):
    """Raises where it takes a token, or the end."""

    def __init__(self, fault: BaseException, where: str) -> None:
        super().__init__()
        self.fault = fault
        self.where = where

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        if self.where == "push":
            raise self.fault
        return super().push(token, reason)

    def progress(self, progress: PromptProgress) -> None:
        if self.where == "progress":
            raise self.fault

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        raise self.fault


@pytest.mark.parametrize("role", ["constraint", "progress", "push", "finish"])
def test_a_panic_is_its_own_sequences_fault(table: EmbeddingTable, role: str):
    engine = Engine(table)
    params = replace(GREEDY, max_tokens=3)
    _, good = engine.submit(make_request([1], params))
    if role == "constraint":
        _, bad = engine.submit(make_request([5], params, constraint=Panics()))
    else:
        fault = Panic("index out of bounds")
        request = make_request([5], params, wants_progress=True)
        _, bad = engine.submit(request, FaultySink(fault, role))
    engine.run()
    assert good.ids == [2, 3, 4]
    assert isinstance(bad.last, BackendError)
    assert "index out of bounds" in str(bad.last)


class Named(Collected):
    def __init__(self, name: str, order: list[str]) -> None:
        super().__init__()
        self.name = name
        self.order = order

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        super().finish(reason, stats)
        self.order.append(self.name)


def test_a_fault_ends_only_those_it_struck(table: EmbeddingTable):
    engine = Engine(table, max_step_tokens=4)
    _, decoding = engine.submit(make_request([1], replace(GREEDY, max_tokens=6)))
    engine.core.step()
    _, prefilling = engine.submit(make_request(list(range(10))))
    engine.core.step()  # a token of the first, four of the second
    forward, calls = engine.backend.forward, 0

    def second_fails(step: Step) -> Any:
        nonlocal calls
        calls += 1
        engine.backend.fails = calls == 2
        return forward(step)

    setattr(engine.backend, "forward", second_fails)  # noqa: B010
    engine.core.step()
    assert failed_as_told(prefilling)
    engine.run()
    assert (decoding.ids, decoding.reason) == ([2, 3, 4, 5, 6, 7], "length")
    assert engine.answer(make_request(list(range(10)), replace(GREEDY, max_tokens=1)))[0] == [10]
    assert engine.core.counts["cached"] == 0  # nothing of the one that failed


def test_a_step_that_runs_out_of_memory_leaves_no_row(table: EmbeddingTable):
    engine = Engine(table)
    forward = engine.backend.forward

    def fails(step: Step) -> Any:
        forward(step)
        raise DeviceMemoryError("the GPU is full")

    setattr(engine.backend, "forward", fails)  # noqa: B010
    _, sink = engine.submit(make_request([9, 9, 9]))
    engine.run()
    assert isinstance(sink.last, DeviceMemoryError)
    assert all(not stacked(engine.backend.read_slot(i, 3)).clip(0).any() for i in range(4))


@pytest.mark.parametrize("prompt", [3, 14])
def test_scrubbing_touches_no_row_that_the_step_cannot_have_written(
    table: EmbeddingTable, prompt: int
):
    """On the CPU a row costs memory as soon as it is written."""
    engine = Engine(table, max_step_tokens=32, speculative=8)
    engine.backend.fails = True
    engine.submit(make_request([9] * prompt))
    engine.run()
    zeroed = max(prompt, 1 + 8)
    assert zeroed < engine.backend.max_step_tokens
    rows = engine.backend.rows_of(0, engine.backend.capacity)
    assert rows == [0] * zeroed + [-1] * (len(rows) - zeroed)


def test_logits_that_are_no_numbers_end_only_their_sequence(table: EmbeddingTable):
    def script(seen: tuple[int, ...]) -> Any:
        return np.full(VOCAB, np.nan, np.float32) if seen[0] == 9 else COUNT_UP(seen)

    engine = Engine(table, script)
    _, good = engine.submit(make_request([1], replace(GREEDY, max_tokens=4)))
    _, bad = engine.submit(make_request([9]))
    engine.run()
    assert good.ids == [2, 3, 4, 5]
    assert isinstance(bad.last, BackendError)
    assert "non-finite" in str(bad.last)
    assert all(slot.ids[:1] != [9] for slot in engine.core.roster.pool.slots)
    # Not one row of it is left: a NaN in it would reach the slot's next owner.
    assert all(9 not in stacked(engine.backend.read_slot(i, 8)) for i in range(4))


def nan_after_9(seen: tuple[int, ...]) -> Any:
    return np.full(VOCAB, np.nan, np.float32) if 9 in seen else COUNT_UP(seen)


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("leaves", ["cancelled", "late"])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_an_unfinished_prompt_leaves_no_nan_behind(
    table: EmbeddingTable, leaves: str, meanwhile: bool, best: bool
):
    """The client leaves after the first of two chunks, or while it runs."""
    now = 0.0
    engine = Engine(table, nan_after_9, clock=lambda: now)
    sequence, sink = engine.submit(make_request([1, 9, *[2] * 14], deadline_s=1.0))
    forward = engine.backend.forward

    def leave() -> None:
        nonlocal now
        now, sequence.cancelled = 2.0, leaves == "cancelled"

    def leave_meanwhile(step: Step) -> Any:
        if meanwhile:
            leave()
        rows = forward(step)
        if best:
            return [[best_of(row, 8, row.copy) for row in each] for each in rows]
        return rows

    setattr(engine.backend, "forward_best" if best else "forward", leave_meanwhile)
    engine.core.step()
    leave()
    engine.run()
    assert engine.backend.steps == [(0, 8)], "the rest is not computed"
    assert "non-finite" in str(sink.last)
    assert engine.backend.rows_of(0, 8) == [0] * 8
    assert not any(slot.length for slot in engine.core.roster.pool.slots)


def test_a_prompt_that_rides_leaves_no_nan_behind(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
):
    engine = Engine(table, nan_after_9)
    monkeypatch.setattr(engine.core.policy, "chunk_tokens", lambda *_, **__: 0)
    _, other = engine.submit(make_request([20], replace(GREEDY, max_tokens=20)))
    engine.core.step()
    sequence, sink = engine.submit(make_request([1, 9, *[2] * 30]))
    for _ in range(2):
        engine.core.step()
    sequence.cancelled = True
    engine.run()
    assert engine.backend.batches[1:3] == [[0, 1]] * 2
    assert "non-finite" in str(sink.last)
    assert engine.backend.rows_of(1, 2) == [0, 0]
    assert other.ids == list(range(21, 41))


@pytest.mark.parametrize("call", ["begin", "behind", "offer", "propose", "observe"])
def test_a_drafter_may_fail_in_any_way_and_call(
    table: EmbeddingTable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
):
    def fail(*arguments: Any) -> Any:
        raise MemoryError("no room")

    drafter = Guesser(COUNT_UP, 1000)
    engine = Engine(table, drafter=drafter, speculative=4)
    params = replace(GREEDY, max_tokens=12)
    assert engine.answer(make_request([1], params))[0] == list(range(2, 14))
    assert engine.core.counts["accepted"]
    monkeypatch.setattr(drafter, call, fail)
    assert engine.answer(make_request([20], params))[0] == list(range(21, 33))
    assert drafting_of(engine.core).failed == "MemoryError: no room"
    assert "Traceback" in caplog.text


class Wild(Guesser):
    """Its second guess of each draft makes a NaN."""

    def _guess(self, ids: list[int], limit: int) -> list[int]:
        guess = super()._guess(ids, limit)
        return [*guess[:1], 9, *guess[2:]][:limit]


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("end", [END, 23])
def test_a_guess_that_overflows_leaves_no_nan_behind(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch, end: int, best: bool
):
    """It is wrong, or after the end token; the rows before it are used, and the answer goes on."""
    engine = Engine(table, nan_after_9, drafter=Wild(COUNT_UP, 1000), speculative=4)
    policy = drafting_of(engine.core).policy
    monkeypatch.setattr(policy, "draft_plan", lambda drafts: [DecodeRun((0,), 4)])
    forward = engine.backend.forward

    def forward_best(step: Step) -> Rows:
        return [[best_of(row, 8, row.copy) for row in each] for each in forward(step)]

    engine.backend.forward_best = forward_best if best else None
    params = replace(GREEDY, max_tokens=8)
    _, sink = engine.submit(make_request([20, 21], params, end_ids=frozenset({end})))
    while not engine.core.is_idle:
        engine.core.step()
        engine.check_books()
        assert 9 not in engine.backend.rows_of(0, 64)
    assert sink.ids == list(range(22, min(end + 1, 30)))
    assert engine.backend.steps[1] == (2, 5)
    assert len(engine.backend.steps) == (2 if end == 23 else 5), "right guesses are used"


@pytest.mark.parametrize("drafts", [False, True])
def test_a_right_guess_that_overflows_ends_the_answer_as_without_drafts(
    table: EmbeddingTable, drafts: bool
):
    drafter = Guesser(COUNT_UP, 1000) if drafts else None
    engine = Engine(table, nan_after_9, drafter=drafter, speculative=4)
    _, sink = engine.submit(make_request([4, 5]))
    engine.run()
    assert sink.ids == [6, 7, 8, 9]
    assert "non-finite" in str(sink.last)
    assert 9 not in engine.backend.rows_of(0, 64)
    assert not engine.core.roster.pool.cached_tokens
    assert bool(engine.core.counts["accepted"]) == drafts


class Only:
    """A constraint: the answer counts down from ``start`` and then ends."""

    def __init__(self, start: int) -> None:
        self.next = start
        self.seen: list[int] = []

    def mask(self) -> Any:
        mask = np.full(VOCAB, -np.inf, np.float32)
        mask[self.next if self.next >= 0 else END] = 0
        return mask

    def accept(self, token_id: int) -> None:
        self.seen.append(token_id)
        self.next -= 1


@pytest.mark.parametrize("drafts", [False, True])
def test_constraints_see_what_is_sampled_and_nothing_else(table: EmbeddingTable, drafts: bool):
    """Also where drafts are run, all of which are wrong here but for some."""
    guess = lambda seen: seen[-1] - 1 if seen[-1] % 3 else 7  # noqa: E731
    engine = Engine(
        table,
        SCRIPT,
        drafter=Guesser(guess, 1000) if drafts else None,
        speculative=8,
        clock=lambda: 0.0,
    )
    constraint = Only(8)
    request = make_request([9], replace(SAMPLED, seed=1), constraint=constraint)
    _, other = engine.submit(make_request([9], replace(SAMPLED, seed=1, max_tokens=9)))
    _, sink = engine.submit(request)
    engine.run()
    assert (sink.ids, sink.reason) == ([8, 7, 6, 5, 4, 3, 2, 1, 0, END], "stop")
    assert constraint.seen == sink.ids
    assert other.ids == answer_alone(SCRIPT, make_request([9], replace(SAMPLED, seed=1)), 64)[0][:9]
    assert bool(engine.core.counts["accepted"]) == drafts


@pytest.mark.parametrize("last_step", [0, 1, 3])  # the prefill and two decode steps
def test_nothing_is_sampled_after_a_cancel_during_the_step(table: EmbeddingTable, last_step: int):
    engine = Engine(table)
    constraint = Only(8)
    sequence, sink = engine.submit(make_request([3, 9], constraint=constraint))
    _, other = engine.submit(make_request([9], replace(GREEDY, max_tokens=9)))
    forward, own_steps = engine.backend.forward, 0

    def cancel_meanwhile(step: Step) -> Any:
        nonlocal own_steps
        if sequence.slot is not None and sequence.slot.index in step.slots:
            sequence.cancelled = own_steps == last_step
            own_steps += 1
        return forward(step)

    engine.backend.forward = cancel_meanwhile  # type: ignore[method-assign]
    engine.run()
    assert sink.ids == constraint.seen == [8, 7, 6][:last_step]
    assert sink.reason == "cancelled"
    assert other.ids == list(range(10, 19))


def test_what_a_constraint_or_sink_does_wrong_is_its_own_sequences_fault(table: EmbeddingTable):
    class Broken:
        def mask(self) -> None:
            raise ZeroDivisionError

        def accept(self, token_id: int) -> None: ...

    engine = Engine(table)
    _, good = engine.submit(make_request([1], replace(GREEDY, max_tokens=4)))
    _, constrained = engine.submit(make_request([1], constraint=Broken()))
    _, broken = engine.submit(make_request([1]), FaultySink(KeyError(2), "push"))
    engine.run()
    assert good.ids == [2, 3, 4, 5]
    assert "constraint of a request failed: ZeroDivisionError" in str(constrained.last)
    assert "output of a request failed: KeyError(2)" in str(broken.last)


def test_right_drafts_save_steps(table: EmbeddingTable):
    """On a clock that stands still every step is free, so drafts always pay."""
    request = make_request([40, 41, 42, 43, 44, 45, 46, 1], replace(GREEDY, max_tokens=30))
    plain = Engine(table)
    drafting = Engine(
        table,
        drafter=Guesser(COUNT_UP, 1000),
        speculative=4,
        clock=lambda: 0.0,
    )
    assert plain.answer(request) == drafting.answer(request) == (list(range(2, 32)), "length")
    assert len(plain.backend.steps) == 30
    assert len(drafting.backend.steps) <= 9
    counts = drafting.core.counts
    assert counts["drafted"] == counts["accepted"] >= 21


def test_a_batch_of_one_prefix_is_computed_once_and_many_turns_only_what_is_new(
    table: EmbeddingTable,
):
    """The two workloads that a prefix cache is for, with answers as without it."""
    system = [int(x) for x in np.random.default_rng(0).integers(0, 40, 100)]
    questions = [[*system, i % 7, i // 7, 40] for i in range(50)]
    params = replace(SAMPLED, max_tokens=5, seed=4)
    shared = Engine(table, SCRIPT, capacity=200, max_step_tokens=64)
    sinks = [shared.submit(make_request(ids, params))[1] for ids in questions]
    shared.run()
    for ids, sink in zip(questions, sinks, strict=True):
        assert sink.ids == answer_alone(SCRIPT, make_request(ids, params), 200)[0]
    counts = shared.core.counts
    assert counts["cached"] >= 0.8 * counts["prompt"]

    chat = Engine(table, SCRIPT, capacity=200, max_step_tokens=64)
    turns: list[int] = []
    for turn in range(6):
        turns += [turn, 41, 42, 43, 44, 45, 46, 47]
        expected = answer_alone(SCRIPT, make_request(turns, params), 200)
        found = chat.answer(make_request(turns, params))
        assert found == expected
        turns += found[0]
    counts = chat.core.counts
    assert counts["cached"] >= 0.6 * counts["prompt"]


def test_chats_keep_their_rows_while_others_run_beside_the_one_that_computes(table: EmbeddingTable):
    engine, chats = Engine(table), [[1, 2, 3], [20, 21, 22]]
    for ids, tokens in ((chats[0], 2), ([0], 40), (chats[1], 2)):
        engine.submit(make_request(ids, replace(GREEDY, max_tokens=tokens)))
    for turn, ids in enumerate([[30, 31], *chats, [33, 34], *chats], start=2):
        while engine.core.delivery.outcomes["length"] < turn:
            engine.core.step()
        ids = [*ids, ids[-1] + 1, ids[-1] + 2]
        sequence, _ = engine.submit(make_request(ids, replace(GREEDY, max_tokens=2)))
        engine.core.step()
        engine.check_books()
        slots = [slot.index for slot in engine.core.roster.pool.slots if slot.in_use]
        assert slots in ([0, 1], [1, 2])
        assert sequence.stats.cached_tokens == (4 if ids[:3] in chats else 0)


def test_a_stored_prefix_is_loaded_unless_the_cache_has_more(table: EmbeddingTable):
    from edge.runtime.scheduler import StoredPrefix

    loads: list[int] = []
    stored = list(range(10, 18))

    class Store:
        broken = False

        def lookup(self, ids: Any) -> StoredPrefix | None:
            if list(ids[:8]) != stored:
                return None
            return StoredPrefix(8, self.load)

        def load(self) -> Any:
            loads.append(1)
            rows = np.array(stored, np.float32)[None, None, :, None]
            return None if self.broken else by_name(rows)

    store = Store()
    engine = Engine(table, prefix_store=store)
    request = make_request([*stored, 20], replace(GREEDY, max_tokens=2))
    store.broken = True
    assert engine.answer(request)[0] == [21, 22]
    assert engine.core.counts["cached"] == 0
    store.broken = False
    fresh = Engine(table, prefix_store=store)
    assert fresh.answer(request)[0] == [21, 22]
    assert fresh.core.counts["cached"] == 8
    assert fresh.answer(request)[0] == [21, 22]
    assert len(loads) == 2  # the cache had it
    assert fresh.answer(replace(request, salt="x"))[0] == [21, 22]
    assert fresh.core.counts["cached"] == 24
    assert len(loads) == 3  # not from the cache, where the rows are of another salt
    assert Engine(table, prefix_store=store).answer(
        make_request(stored, replace(GREEDY, max_tokens=1))
    )[0] == [18]
    loads.clear()  # a prompt that is no longer than the prefix: the last token runs anyway
    assert fresh.answer(make_request(stored, replace(GREEDY, max_tokens=1)))[0] == [18]
    assert not loads
    fresh.check_books()


def test_an_overflow_policy_that_frees_nothing_ends_its_sequence(table: EmbeddingTable):
    class Lazy:
        def slide(self, rows: Any, ids: list[int]) -> Any:
            return rows, ids

    engine = Engine(table, capacity=8, overflow=Lazy())
    _, sink = engine.submit(make_request([1, 2]))
    engine.run()
    assert isinstance(sink.last, BackendError)
    assert "bug in the overflow policy" in str(sink.last)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("drafts", [False, True])
def test_the_best_logits_give_the_answers_of_whole_rows(table: EmbeddingTable, drafts: bool):
    """Over slots, chunks and drafts; a row is fetched while it is of the newest step."""
    drafter = Guesser(SCRIPT, 3) if drafts else None
    engine = Engine(table, SCRIPT, num_slots=2, drafter=drafter)
    backend, served = engine.backend, [0]
    fetched: list[int] = []

    def fetch(row: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        assert step == len(backend.steps)
        fetched.append(step)
        return row

    def forward_best(step: Step) -> Rows:
        rows = backend.forward(step)
        served[0] += rows.shape[0] * rows.shape[1]
        number = len(backend.steps)
        return [[best_of(row, 12, partial(fetch, row, number)) for row in each] for each in rows]

    backend.forward_best = forward_best
    requests = [
        make_request(range(1, 12 + i), replace(SAMPLED, temperature=t, max_tokens=20, seed=i))
        for i, t in enumerate([0.0, 0.3, 1.0])
    ]
    sinks = [engine.submit(request)[1] for request in requests]
    engine.run()
    for request, sink in zip(requests, sinks, strict=True):
        assert (sink.ids, sink.reason) == answer_alone(SCRIPT, request, backend.capacity)
    assert 0 < len(fetched) < served[0] / 2

"""A sequence that is preempted or suspended resumes with the same tokens; and who gives way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError, DeadlineError, OverloadError, RequestError
from edge.model.slot_rows import SlotRows
from edge.runtime.scheduler import Suspended
from edge.runtime.scheduler.fair_queue import FEW
from edge.runtime.scheduler.sequence import SequenceState
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import (
    GREEDY,
    SAMPLED,
    Collected,
    DropMiddle,
    Engine,
    answer_alone,
    make_request,
)
from tests.standins.scripted_backend import random_logits

SCRIPT = random_logits(VOCAB)
NO_END: frozenset[int] = frozenset()


def submit(
    engine: Engine, client: str, tokens: int, prompt: int = 1, **options: Any
) -> tuple[SequenceState, Collected]:
    ids = [hash(client) % VOCAB, *[2] * (prompt - 1)]
    params = replace(GREEDY, max_tokens=tokens)
    return engine.submit(make_request(ids, params, client=client, end_ids=NO_END, **options))


class Only:
    """A constraint that allows three tokens, others at each place."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self) -> Any:
        mask = np.full(VOCAB, -np.inf, np.float32)
        place = len(self.accepted)
        mask[[(place * 7 + i) % VOCAB for i in range(3)]] = 0
        return mask

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


# ---------------------------------------------------------------------- the same tokens


@settings(deadline=None, max_examples=80)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 14), st.integers(1, 16), st.booleans(), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    slots=st.integers(1, 3),
    chunk=st.integers(1, 6),
    slides=st.booleans(),
    overlaps=st.booleans(),
    reuse=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_whenever_sequences_are_preempted_they_resume_with_the_same_tokens(
    table: EmbeddingTable,
    requests: list[tuple[int, int, bool, bool]],
    slots: int,
    chunk: int,
    slides: bool,
    overlaps: bool,
    reuse: bool,
    seed: int,
):
    """At any round, in any state, also in the middle of a prompt or behind a slide."""
    rng = random.Random(seed)
    engine = Engine(
        table,
        SCRIPT,
        num_slots=slots,
        capacity=16,
        max_step_tokens=chunk,
        overlaps=overlaps,
        reuse_prefix=reuse,
        overflow=DropMiddle() if slides else None,
    )
    core, known = engine.core, list[tuple[Any, Collected, Any]]()
    for number, (prompt, tokens, samples, constrained) in enumerate(requests):
        params = replace(SAMPLED if samples else GREEDY, max_tokens=tokens, seed=number)
        constraint = Only() if constrained else None
        request = make_request(
            [number % 3, *[1] * (prompt - 1)], params, client=str(number % 4), constraint=constraint
        )
        known.append((request, engine.submit(request)[1], constraint))
    for _ in range(2000):
        if core.is_idle:
            break
        core.step()
        for sequence in list(core.roster.running):
            if rng.random() < 0.3:
                core.delivery.push_sampled()
                if not sequence.ended:
                    assert core._preempt(sequence)
        engine.check_books()
    for request, sink, constraint in known:
        if constraint is not None:
            alone = Engine(
                table,
                SCRIPT,
                num_slots=1,
                capacity=16,
                overflow=engine.overflow,
                max_step_tokens=chunk,
            )
            expected = alone.answer(replace(request, constraint=Only()))
            assert constraint.accepted == sink.ids
        else:
            expected = answer_alone(SCRIPT, request, 16, slides)
        assert (sink.ids, sink.reason) == expected


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.integers(1, 12),
    tokens=st.integers(1, 14),
    at=st.integers(0, 20),
    slides=st.booleans(),
    overlaps=st.booleans(),
    has_rows=st.booleans(),
    seed=st.none() | st.integers(0, 9),
)
def test_a_sequence_suspended_resumes_in_another_engine(
    table: EmbeddingTable,
    prompt: int,
    tokens: int,
    at: int,
    slides: bool,
    overlaps: bool,
    has_rows: bool,
    seed: int | None,
):
    """What both sinks got is the answer of one; also where its rows are lost, but for slides."""
    options: dict[str, Any] = {"capacity": 16, "max_step_tokens": 4}
    if slides and has_rows:
        options["overflow"] = DropMiddle()
    first = Engine(table, SCRIPT, overlaps=overlaps, **options)
    params = replace(SAMPLED, max_tokens=tokens, seed=seed)
    request = make_request([3] * prompt, params)
    sequence, sink = first.submit(request)
    first.submit(make_request([4], replace(params, seed=5)))
    for _ in range(at):
        first.core.step()
    resume_from = first.core.suspend(sequence)
    first.run()
    full = replace(request, params=replace(params, seed=sequence.sampler.seed))
    expected = answer_alone(SCRIPT, full, 16, "overflow" in options)
    if resume_from is None:
        assert (sink.ids, sink.reason) == expected
        return
    assert sink.reason == "cancelled"
    assert resume_from.answer == tuple(sink.ids)
    if not has_rows:
        resume_from = resume_from._replace(saved_rows=None)
    second = Engine(table, SCRIPT, **options)
    ids, reason = second.answer(replace(request, resume_from=resume_from))
    assert ([*sink.ids, *ids], reason) == expected
    second.check_books()


def test_a_sequence_continues_with_its_own_rows(table: EmbeddingTable):
    """Those that another sequence computed may differ in bits."""
    engine = Engine(table, SCRIPT, num_slots=2)
    request = make_request([1, 2, 3], replace(GREEDY, max_tokens=8), client="a", end_ids=NO_END)
    sequence, _ = engine.submit(request)
    for _ in range(4):
        engine.core.step()
    written: list[SlotRows] = []
    write = engine.backend.write_slot

    def write_slot(slot: int, rows: SlotRows) -> None:
        written.append(rows)
        write(slot, rows)

    setattr(engine.backend, "write_slot", write_slot)  # noqa: B010
    assert engine.core._preempt(sequence)
    assert sequence.saved_rows is not None
    own = sequence.saved_rows.rows
    engine.run()
    assert [id(rows) for rows in written] == [id(own)]


# ---------------------------------------------------------------------- who gives way


def test_a_client_with_nothing_gets_a_slot_at_once_from_one_with_more(table: EmbeddingTable):
    engine = Engine(table, num_slots=4)
    many = [submit(engine, "many", 40, prompt=1 + i)[0] for i in range(6)]
    for _ in range(8):
        engine.core.step()
    first, _ = submit(engine, "one", 3)
    second, _ = submit(engine, "two", 3)
    third, _ = submit(engine, "three", 3)
    engine.core.step()
    assert first.slot is not None
    assert second.slot is not None
    assert third.slot is not None
    fourth, _ = submit(engine, "four", 3)
    engine.core.step()
    assert fourth.slot is None, "each has one"
    aside = [each for each in many if each.saved_rows is not None]
    assert len(aside) == 3
    assert engine.core.counts["preempted"] == 3
    engine.run()
    assert [len(each.ids) - len(each.request.ids) for each in many] == [40] * 6


def test_the_cheapest_to_move_gives_way(table: EmbeddingTable):
    engine = Engine(table, num_slots=3, max_step_tokens=32)
    many = [submit(engine, "many", 30, prompt=prompt)[0] for prompt in (20, 4, 12)]
    for _ in range(6):
        engine.core.step()
    submit(engine, "one", 1)
    engine.core.step()
    assert [each.saved_rows is not None for each in many] == [False, True, False]
    engine.run()


def test_a_newcomer_waits_for_a_few_tokens_and_others_for_a_quantum(table: EmbeddingTable):
    quantum = 24
    engine = Engine(table, num_slots=1, capacity=200, max_step_tokens=quantum)
    old, _ = submit(engine, "old", 150)
    engine.core.step()
    newcomer, _ = submit(engine, "new", 100)
    rounds = 0
    while newcomer.slot is None:
        engine.core.step()
        rounds += 1
    assert rounds == FEW
    for client, other in ((newcomer, old), (old, newcomer)) * 2:
        before = client.stats.completion_tokens
        while other.slot is None and not client.ended:
            engine.core.step()
        assert client.stats.completion_tokens - before >= quantum - 1 or client.ended
    engine.run()


def test_equal_requests_do_not_delay_each_other(table: EmbeddingTable):
    """Eight clients that each ask for the same share four slots as one client's requests do."""
    engine = Engine(table, num_slots=4, capacity=256, max_step_tokens=64)
    for number in range(8):
        submit(engine, f"client {number}", 64, prompt=30)
    engine.run()
    assert engine.core.counts["preempted"] == 0


def test_nobody_gives_way_to_lower_priority_or_to_its_own_client(table: EmbeddingTable):
    engine = Engine(table, num_slots=2)
    high = [submit(engine, "a", 40, priority=0)[0] for _ in range(2)]
    for _ in range(30):
        engine.core.step()
    low, _ = submit(engine, "b", 3, priority=1)
    own, _ = submit(engine, "a", 3, priority=0)
    for _ in range(5):
        engine.core.step()
    assert all(each.slot for each in high)
    assert low.slot is own.slot is None
    equal, _ = submit(engine, "c", 3, priority=0)
    engine.core.step()
    assert equal.slot is not None
    engine.run()


@settings(deadline=None, max_examples=60)
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from("abcde"), st.integers(1, 12), st.integers(1, 30), st.integers(1, 4)
        )
        | st.none(),
        max_size=50,
    ),
    slots=st.integers(1, 4),
    chunk=st.integers(2, 8),
)
@example(
    events=[("a", 1, 17, 1), ("c", 1, 1, 1), ("d", 2, 17, 1), ("b", 1, 1, 1)], slots=1, chunk=2
)
def test_nothing_thrashes_and_saved_rows_are_bounded(
    table: EmbeddingTable, events: list[tuple[str, int, int, int] | None], slots: int, chunk: int
):
    engine = Engine(table, num_slots=slots, capacity=32, max_step_tokens=chunk)
    core, sent = engine.core, 0

    def check() -> None:
        engine.check_books()
        rows = sum(
            len(each.saved_rows.ids) for each in core.roster.waiting if each.saved_rows is not None
        )
        assert rows == core.roster.preempted_rows <= core.backend.capacity
        assert all(each.saved_rows is None for each in core.roster.running)
        ran = sum(length for _, length in engine.backend.steps for _ in range(1))
        assert core.counts["preempted"] <= sent + ran

    for event in events:
        if event is not None:
            client, prompt, tokens, n = event
            for _ in range(n):
                submit(engine, client, min(tokens, 32 - prompt), prompt)
                sent += 1
        core.step()
        check()
    while not core.is_idle:
        core.step()
        check()
    assert core.delivery.outcomes["length"] == sent


def test_a_long_answer_goes_on_beside_a_stream_of_newcomers(table: EmbeddingTable):
    """Whose short answers keep every slot busy."""
    quantum, slots = 16, 2
    engine = Engine(table, num_slots=slots, capacity=256, max_step_tokens=quantum)
    long = [submit(engine, f"long {i}", 100)[0] for i in range(slots)]
    for _ in range(FEW + 2):
        engine.core.step()
    number, rounds = 0, 0
    short: list[SequenceState] = []
    while not all(each.ended for each in long):
        while sum(not each.ended for each in short) < 4:
            short.append(submit(engine, f"short {number}", 20)[0])
            number += 1
        engine.core.step()
        rounds += 1
        assert rounds < 100 * 2 * 8, "they starve"
    assert engine.core.counts["preempted"] >= 2


# ---------------------------------------------------------------------- whatever happens to it


def preempted_engine(
    table: EmbeddingTable, **options: Any
) -> tuple[Engine, SequenceState, Collected]:
    """An engine of one slot in which another client's sequence runs, and one is aside."""
    engine = Engine(table, num_slots=1, **options)
    sequence, sink = submit(engine, "a", 30, deadline_s=5.0)
    for _ in range(FEW + 2):
        engine.core.step()
    submit(engine, "b", 20)
    engine.core.step()
    assert sequence.saved_rows is not None
    return engine, sequence, sink


def test_it_can_be_cancelled_and_be_late_and_is_never_dropped(table: EmbeddingTable):
    now = 0.0
    engine, sequence, sink = preempted_engine(table, clock=lambda: now)
    sequence.dropped = OverloadError("the queue is full")
    engine.core.step()
    assert not sequence.ended
    sequence.cancelled = True
    engine.core.step()
    assert sink.reason == "cancelled"
    assert engine.core.roster.preempted_rows == 0
    assert sequence.stats.context_left == 64 - len(sink.ids)
    engine.run()
    engine, sequence, sink = preempted_engine(table, clock=lambda: now)
    now = 6.0
    engine.core.step()
    assert isinstance(sink.last, DeadlineError)
    assert "sampled" in str(sink.last)
    engine.run()


def test_rows_that_cannot_be_written_back_end_their_own_sequence_alone(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
):
    engine, _, sink = preempted_engine(table)
    write, fails = engine.backend.write_slot, ["the cache cannot be written"]

    def write_slot(slot: int, rows: SlotRows) -> None:
        if fails:
            raise BackendError(fails.pop())
        write(slot, rows)

    monkeypatch.setattr(engine.backend, "write_slot", write_slot)
    engine.run()
    assert isinstance(sink.last, BackendError)
    assert engine.core.delivery.outcomes == {"length": 1, "error": 1}
    engine.check_books()


def no_memory(*_: Any) -> None:
    raise MemoryError


def test_where_memory_is_short_nobody_gives_way(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
):
    engine = Engine(table, num_slots=1)
    _, first = submit(engine, "a", 30)
    for _ in range(FEW + 2):
        engine.core.step()
    monkeypatch.setattr(engine.backend, "read_slot", no_memory)
    _, second = submit(engine, "b", 3)
    engine.run()
    assert (first.reason, second.reason) == ("length", "length")
    assert engine.core.counts["preempted"] == 0


def test_a_running_sequence_is_told_no_place_in_the_queue(table: EmbeddingTable):
    engine = Engine(table, num_slots=1)
    _, first = submit(engine, "a", 40, wants_progress=True)
    for _ in range(FEW + 2):
        engine.core.step()
    told = len(first.told)
    submit(engine, "b", 3)
    _, third = submit(engine, "c", 3, wants_progress=True)
    engine.run()
    assert len(first.told) == told
    assert [each.ahead for each in third.told][:2] == [0, None]
    assert engine.core.counts["prompt"] == 3, "a prompt counts once"


def test_closing_ends_sequences_that_are_aside(table: EmbeddingTable):
    engine, _, sink = preempted_engine(table)
    engine.core.end_all(None)
    assert sink.reason == "cancelled"
    assert engine.core.is_idle


def test_rows_of_another_answer_are_refused(table: EmbeddingTable):
    from edge.engine_config import EngineConfig
    from edge.runtime.scheduler import Scheduler
    from tests.edge.runtime.scheduler.conftest import COUNT_UP
    from tests.standins.scripted_backend import ScriptedBackend

    engine = Engine(table)
    sequence, _ = submit(engine, "a", 30, prompt=4)
    for _ in range(5):
        engine.core.step()
    resume_from = engine.core.suspend(sequence)
    assert resume_from is not None
    scheduler = Scheduler(ScriptedBackend(table, COUNT_UP), table, VOCAB, EngineConfig())
    for wrong in (
        resume_from._replace(answer=(7, *resume_from.answer[1:])),
        resume_from._replace(pending=resume_from.pending + 1),
        resume_from._replace(pending=0),
    ):
        with pytest.raises(RequestError, match="not those of this prompt"):
            scheduler.submit([replace(sequence.request, resume_from=wrong)], [Collected()])
    scheduler.close()


def test_many_clients_share_slots_by_turns(table: EmbeddingTable):
    """Eight clients of four endless answers each: all go on, and in like measure."""
    engine = Engine(table, num_slots=4, capacity=4096, max_step_tokens=8)
    core = engine.core
    for i in range(32):
        submit(engine, f"client {i % 8}", 400)
    done: Counter[str] = Counter()
    for _ in range(400):
        before = {
            each: each.stats.completion_tokens
            for each in (*core.roster.running, *core.roster.waiting)
        }
        core.step()
        for each, tokens in before.items():
            done[each.request.client] += each.stats.completion_tokens - tokens
    assert len(done) == 8
    assert min(done.values()) > 0.5 * max(done.values())
    assert isinstance(core.suspend(core.roster.running[0]), Suspended)
    core.end_all(None)

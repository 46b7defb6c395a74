"""`Scheduler`: threads, asyncio, back pressure, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge.bundle.embeddings import EmbeddingTable
from edge.engine_config import EngineConfig
from edge.errors import (
    BackendError,
    ContextLengthError,
    DeadlineError,
    EdgeError,
    OverloadError,
    RequestError,
    ResourceError,
)
from edge.runtime import stream as stream_module
from edge.runtime.scheduler import Request, Scheduler
from edge.runtime.scoring import score
from edge.runtime.stream import Generation, GenerationChunk, OutputStream
from edge.runtime.stream import submit as submit_all
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import (
    COUNT_UP,
    GREEDY,
    SAMPLED,
    answer_alone,
    make_request,
    take_config,
)
from tests.standins.scripted_backend import ScriptedBackend, random_logits
from tests.standins.slot_rows import by_name

SCRIPT = random_logits(VOCAB)
Make = Callable[..., tuple[Scheduler, ScriptedBackend]]


@pytest.fixture
def make(table: EmbeddingTable) -> Iterator[Make]:
    opened: list[Scheduler] = []

    def make_one(script: Any = COUNT_UP, **options: Any) -> tuple[Scheduler, ScriptedBackend]:
        sizes = {key: options.pop(key) for key in ("num_slots", "capacity") if key in options}
        backend = ScriptedBackend(table, script, **{"num_slots": 4, **sizes})
        config = take_config(options)
        opened.append(Scheduler(backend, table, VOCAB, config, **options))
        return opened[-1], backend

    yield make_one
    for scheduler in opened:
        scheduler.close()


def submit(scheduler: Scheduler, request: Request, n: int = 1) -> list[Generation]:
    """Queue samples whose readers get tokens without text."""
    requests = [request.sample(i) for i in range(n)]
    return submit_all(scheduler, requests, [OutputStream() for _ in requests])


def ids_of(generation: Generation) -> list[int]:
    return [token.id for chunk in generation for token in chunk.tokens]


def ids_alone(request: Request, capacity: int) -> list[int]:
    """The ids that a reader must get; it is not shown the end token."""
    return [id_ for id_ in answer_alone(SCRIPT, request, capacity)[0] if id_ not in request.end_ids]


def engine_threads() -> int:
    return sum(thread.name == "edge-llm-engine" for thread in threading.enumerate())


class Gate:
    """A script that waits until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, seen: tuple[int, ...]) -> int:
        self.entered.set()
        assert self.opened.wait(10)
        return (seen[-1] + 1) % VOCAB


def test_samples_and_their_seeds(make: Make):
    scheduler, _ = make(SCRIPT)
    request = make_request([1, 2], replace(SAMPLED, seed=2**64 - 1, max_tokens=8))
    generations = submit(scheduler, request, n=3)
    assert [generation.seed for generation in generations] == [2**64 - 1, 0, 1]
    for generation in generations:
        assert generation.prompt_ids == [1, 2]
        sample = request.sample(generation.index)
        assert ids_of(generation) == ids_alone(sample, 64)
    open_seed = replace(request, params=replace(request.params, seed=None))
    assert len({generation.seed for generation in submit(scheduler, open_seed, n=3)}) == 3


def test_what_can_never_run_is_refused_at_once(make: Make):
    scheduler, backend = make(capacity=10)
    for ids, error in (
        ([], RequestError),
        ([VOCAB], RequestError),
        ([-1], RequestError),
        ([1] * 10, ContextLengthError),
    ):
        with pytest.raises(error):
            submit(scheduler, make_request(ids))
    with pytest.raises(RequestError, match="n must be"):
        submit(scheduler, make_request([1]), n=0)
    wrong: Any
    for wrong in (0.0, "1", float("nan")):
        with pytest.raises(RequestError, match="deadline must be a positive number"):
            submit(scheduler, make_request([1], deadline_s=wrong))
    for wrong in (None, "1", 0.5):
        with pytest.raises(RequestError, match="priority must be an integer"):
            submit(scheduler, make_request([1], priority=wrong))
    with pytest.raises(RequestError, match="give each its own"):
        submit(scheduler, make_request([1], constraint=object()), n=2)
    with pytest.raises(RequestError, match="give each its own"):
        scheduler.submit([make_request([1])] * 2, [OutputStream()] * 2)
    # One that is wrong takes the others of its group with it.
    with pytest.raises(RequestError):
        scheduler.submit([make_request([1]), make_request([])], [OutputStream(), OutputStream()])
    assert backend.steps == []
    assert scheduler.stats().waiting == 0


def test_the_queue_is_bounded_and_ordered(make: Make):
    gate = Gate()
    scheduler, _ = make(gate, num_slots=1, queue_capacity=2)
    running = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=2)))[0]
    assert gate.entered.wait(10)
    late = submit(scheduler, make_request([5], replace(GREEDY, max_tokens=1), priority=1))[0]
    early = submit(scheduler, make_request([9], replace(GREEDY, max_tokens=1)))[0]
    with pytest.raises(OverloadError) as caught:
        submit(scheduler, make_request([1]))
    assert caught.value.retry_after_s > 0
    with pytest.raises(RequestError, match="4 answers at once are more than the 3"):
        submit(scheduler, make_request([1]), n=4)  # no later try can help
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.queue_capacity) == (1, 2, 2)
    gate.opened.set()
    assert [ids_of(generation) for generation in (running, late, early)] == [[2, 3], [6], [10]]
    stats = scheduler.stats()
    assert stats.outcomes == {"length": 3, "rejected": 1}
    assert (stats.running, stats.waiting, stats.kv_used_tokens) == (0, 0, 0)


def test_a_place_is_free_when_the_last_token_is_out(make: Make):
    scheduler, _ = make(num_slots=1, queue_capacity=0)
    for _ in range(200):
        assert ids_of(submit(scheduler, make_request([1], replace(GREEDY, max_tokens=1)))[0]) == [2]


def test_cancel_and_deadline(make: Make):
    def slow(seen: tuple[int, ...]) -> int:
        time.sleep(0.002)
        return 1

    scheduler, backend = make(slow, capacity=4000)
    generation = submit(scheduler, make_request([1]))[0]
    chunks = iter(generation)
    next(chunks)
    generation.cancel()
    *_, last = chunks
    assert (last.finish_reason, last.tokens) == ("cancelled", ())
    assert last.stats is not None
    assert len(backend.steps) <= last.stats.completion_tokens + 1
    late = submit(scheduler, make_request([1], deadline_s=0.05))[0]
    with pytest.raises(DeadlineError, match=r"sampled \d+ tokens when its 0.05 s"):
        ids_of(late)
    with pytest.raises(StopIteration):  # an error is the end, too
        next(iter(late))
    dropped = submit(scheduler, make_request([1]))[0]
    next(iter(dropped))
    del dropped
    gc.collect()
    assert scheduler.drain(10)
    assert scheduler.stats().outcomes == {"cancelled": 2, "deadline": 1}


def test_many_readers_on_one_loop_and_one_that_gives_up(make: Make):
    scheduler, _ = make(SCRIPT, num_slots=3)
    requests = [make_request([1, i], replace(SAMPLED, seed=i, max_tokens=20)) for i in range(10)]

    async def read(request: Any) -> list[int]:
        (generation,) = submit(scheduler, request)
        return [token.id async for chunk in generation for token in chunk.tokens]

    async def impatient() -> None:
        (generation,) = submit(scheduler, make_request([3], replace(GREEDY, max_tokens=50)))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(1), 0.01)
        generation.cancel()
        async for _ in generation:
            pass

    async def main() -> list[Any]:
        return await asyncio.gather(*map(read, requests), impatient())

    *answers, _ = asyncio.run(main())
    assert answers == [ids_alone(request, 64) for request in requests]


def test_a_loop_that_is_closed_under_its_reader_harms_nobody(make: Make):
    gate = Gate()
    scheduler, _ = make(gate)
    (generation,) = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=3)))

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(generation.__aiter__().__anext__(), 0.02)

    asyncio.run(give_up())
    gate.opened.set()
    assert ids_of(generation) == [2, 3, 4]


def test_work_that_needs_the_backend_waits_for_it_and_comes_before_the_queue(make: Make):
    gate = Gate()
    scheduler, _ = make(gate, num_slots=1)
    order: list[str] = []
    first = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=2)))[0]
    assert gate.entered.wait(10)
    second = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=2)))[0]
    caller = threading.Thread(
        target=lambda: scheduler.call(lambda: order.append(f"{scheduler.stats().running} run"))
    )
    caller.start()
    time.sleep(0.05)
    gate.opened.set()
    caller.join()
    assert ids_of(first) == ids_of(second) == [2, 3]
    assert order == ["0 run"]
    assert scheduler.stats().cached_tokens == 0  # the work may have overwritten it
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 // 0)


def test_work_and_sequences_take_turns(make: Make):
    scheduler, backend = make(num_slots=2)
    inside, let_go = threading.Event(), threading.Event()
    seen: list[dict[str, int]] = []

    def work() -> None:
        seen.append(scheduler.stats().outcomes)
        inside.set()
        assert let_go.wait(10)

    callers = [threading.Thread(target=scheduler.call, args=(work,)) for _ in range(3)]
    for caller in callers:
        caller.start()
    assert inside.wait(10)
    (late,) = submit(scheduler, make_request([1], deadline_s=1e-3))
    endings = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=20)), n=6)
    time.sleep(2e-3)
    while scheduler.stats().calls < len(callers):
        time.sleep(1e-3)
    let_go.set()
    for caller in callers:
        caller.join()
    assert [len(ids_of(generation)) for generation in endings] == [20] * 6
    with pytest.raises(DeadlineError, match="was still waiting"):
        ids_of(late)
    assert seen == [{}, {"deadline": 1, "length": 2}, {"deadline": 1, "length": 4}]
    assert sum(map(len, backend.batches)) / len(backend.batches) > 1.8


def test_work_of_a_call_is_seen_and_its_steps_count(make: Make):
    scheduler, _ = make(num_slots=1)
    assert scheduler.stats().full_step_s is None
    inside, let_go = threading.Event(), threading.Event()

    def work() -> None:
        inside.set()
        assert let_go.wait(10)
        time.sleep(0.02)
        scheduler.report_step(2)
        scheduler.report_step(1)

    caller = threading.Thread(target=scheduler.call, args=(work,))
    caller.start()
    assert inside.wait(10)
    before = scheduler.stats()
    assert (before.calls, before.running, before.steps) == (1, 0, 0)
    let_go.set()
    caller.join()
    after = scheduler.stats()
    assert (after.calls, after.steps) == (0, 2)
    assert after.last_step_s > before.last_step_s
    # The longest step took 20 ms or more, with 2 tokens; a full one has more.
    least = 0.02 * scheduler._core.policy.step_tokens / 2
    assert after.full_step_s is not None
    assert after.full_step_s >= least


@pytest.mark.parametrize("leaves", [False, True])
def test_a_score_leaves_no_nan_behind(make: Make, table: EmbeddingTable, leaves: bool):
    """Neither where it finds the NaN nor where its client leaves after the step that made it."""

    def script(seen: tuple[int, ...]) -> Any:
        return np.full(VOCAB, np.nan, np.float32) if 9 in seen else (seen[-1] + 1) % VOCAB

    scheduler, backend = make(script)

    def leave(tokens: int) -> None:
        if leaves and 9 in backend.rows_of(0, 8):
            raise RequestError("the client left")

    def work() -> None:
        score(backend, table, [1, 2, 9, *[3] * 20], leave)

    for slot in range(2):
        backend.write_slot(slot, by_name(np.full((1, 1, 64, 1), -1.0)))
    for run in (work, lambda: scheduler.call(work)):  # also where it calls once more
        with pytest.raises(
            RequestError if leaves else BackendError, match="left" if leaves else "NaN"
        ):
            scheduler.call(run)
        # A row takes memory once it is written, so no other one is.
        assert backend.rows_of(0, 64) == [0] * 8 + [-1] * 56
        assert backend.rows_of(1, 64) == [-1] * 64
        backend.write_slot(0, by_name(np.full((1, 1, 64, 1), -1.0)))
    scheduler.call(lambda: score(backend, table, [1, 2, 3]))
    assert backend.rows_of(0, 3) == [1, 2, -1], "rows without a NaN are left"


def test_a_lost_device_ends_everything_and_is_told(make: Make):
    gate = Gate()
    scheduler, backend = make(gate, num_slots=1)
    generations = submit(scheduler, make_request([1]), n=3)
    assert gate.entered.wait(10)
    backend.failed = "the GPU fell off the bus"
    gate.opened.set()
    for generation in generations:
        with pytest.raises(BackendError, match="fell off the bus"):
            ids_of(generation)
    with pytest.raises(BackendError, match="fell off the bus"):
        submit(scheduler, make_request([1]))
    assert scheduler.stats().failed == "the GPU fell off the bus"


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(make: Make):
    def broken(seen: tuple[int, ...]) -> int:
        raise ZeroDivisionError("a bug")

    scheduler, _ = make(broken)
    generations = submit(scheduler, make_request([1]), n=2)
    for generation in generations:
        with pytest.raises(BackendError, match="ZeroDivisionError: a bug"):
            ids_of(generation)
    with pytest.raises(BackendError, match="a bug"):
        submit(scheduler, make_request([1]))
    with pytest.raises(BackendError, match="a bug"):
        scheduler.call(lambda: None)
    assert scheduler.stats().failed is not None


class Panic(BaseException):
    """What a library of Rust raises when it panics: no `Exception`."""


def test_a_panic_in_the_engine_leaves_nobody_waiting(make: Make):
    def broken(seen: tuple[int, ...]) -> int:
        raise Panic("index out of bounds")

    scheduler, _ = make(broken)
    with pytest.raises(BackendError, match="Panic: index out of bounds"):
        ids_of(submit(scheduler, make_request([1]))[0])
    with pytest.raises(BackendError, match="index out of bounds"):
        submit(scheduler, make_request([1]))


def test_a_thread_that_cannot_start_leaves_nothing_queued(
    make: Make, monkeypatch: pytest.MonkeyPatch
):
    scheduler, _ = make()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_more_threads)
        with pytest.raises(ResourceError, match=r"no more threads.*ulimit"):
            submit(scheduler, make_request([1]))
        with pytest.raises(ResourceError, match="no more threads"):
            scheduler.call(lambda: None)
    assert scheduler.stats().waiting == scheduler.stats().calls == 0
    assert ids_of(submit(scheduler, make_request([1], replace(GREEDY, max_tokens=1)))[0]) == [2]


def _no_more_threads(thread: threading.Thread) -> None:
    raise RuntimeError("no more threads")


def test_work_may_call_for_more_work(make: Make):
    scheduler, _ = make()
    assert scheduler.call(lambda: scheduler.call(lambda: 1) + 1) == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_to_load_its_own(make: Make):
    gate = Gate()
    scheduler, _ = make(gate)
    generation = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=1)))[0]
    assert gate.entered.wait(10)
    with scheduler._thread._changed:  # as if the engine's thread held it at that moment
        child = os.fork()
        if not child:
            os._exit(_use_after_fork(scheduler))
    deadline = time.monotonic() + 10
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if done[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0), "it hangs, or was not refused"
    gate.opened.set()
    assert ids_of(generation) == [2]


def _use_after_fork(scheduler: Scheduler) -> int:
    refused = False
    try:
        submit(scheduler, make_request([1]))
    except BackendError as error:
        refused = "load the bundle in this process" in str(error)
    scheduler.drain()
    scheduler.close()
    return 0 if refused else 1


def test_an_answer_that_nobody_reads_ends(make: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream_module, "_MOST_UNREAD", 20)
    scheduler, _ = make(lambda seen: 1, num_slots=1, capacity=64)
    unread = submit(scheduler, make_request([1]))[0]
    just_so = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=21)))[0]
    assert scheduler.drain(10)
    assert len(ids_of(just_so)) == 21  # the last one is always taken
    found: list[int] = []
    with pytest.raises(RequestError, match=r"wait to be read.*max_tokens"):
        found.extend(token.id for chunk in unread for token in chunk.tokens)
    assert len(found) == 20
    assert scheduler.stats().failed is None


def test_draining(make: Make):
    gate = Gate()
    scheduler, _ = make(gate)
    generation = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=2)))[0]
    assert not scheduler.drain(0.02)
    with pytest.raises(OverloadError, match="shutting down"):
        submit(scheduler, make_request([1]))
    gate.opened.set()
    assert scheduler.drain(10)
    assert ids_of(generation) == [2, 3]


def test_closing_cancels_and_ends_the_thread(make: Make):
    before = engine_threads()
    scheduler, _ = make(lambda seen: 1, num_slots=1, capacity=100_000)
    generations = submit(scheduler, make_request([1]), n=3)
    next(iter(generations[0]))
    assert engine_threads() == before + 1
    scheduler.close()
    scheduler.close()
    assert engine_threads() == before
    for generation in generations:
        *_, last = generation
        assert last.finish_reason == "cancelled"
    with pytest.raises(BackendError, match="closed"):
        submit(scheduler, make_request([1]))


def test_a_scheduler_that_is_dropped_ends_its_thread(table: EmbeddingTable):
    before = engine_threads()
    backend = ScriptedBackend(table, COUNT_UP)
    scheduler = Scheduler(backend, table, VOCAB, EngineConfig())
    generation = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=2)))[0]
    dropped = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert ids_of(generation) == [2, 3]  # its reader keeps it
    del generation
    gc.collect()
    assert dropped() is None
    deadline = time.monotonic() + 10
    while engine_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine_threads() == before


@pytest.mark.slow
def test_a_thousand_requests_of_all_kinds(make: Make):
    """Random cancels, drops and deadlines from eight threads; then all is as before."""
    threads_before = threading.active_count()
    scheduler, _ = make(SCRIPT, num_slots=6, capacity=48, queue_capacity=8)
    ends: list[str] = []
    wrong: list[Any] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(125):
            request = make_request(
                [1, 2, 3, *(rng.randrange(3) for _ in range(rng.randrange(20)))],
                replace(SAMPLED, seed=rng.randrange(4), max_tokens=rng.randint(1, 15)),
                salt=rng.choice(["", "a"]),
                priority=rng.randrange(3),
                deadline_s=rng.choice([None, None, None, 0.05]),
            )
            try:
                (generation,) = submit(scheduler, request)
            except OverloadError:
                ends.append("rejected")
                time.sleep(0.002)
                continue
            stop_at = rng.choice([None, None, 0, 2])
            if rng.random() < 0.05:
                ends.append("dropped")
                continue
            ids: list[int] = []
            reason = None
            try:
                for chunk in generation:
                    ids += [token.id for token in chunk.tokens]
                    if len(ids) == stop_at:
                        generation.cancel()
                    reason = chunk.finish_reason
                ends.append(str(reason))
            except EdgeError as error:
                ends.append(type(error).__name__)
                if not isinstance(error, DeadlineError):
                    wrong.append(error)
            expected = ids_alone(request, 48)
            ended = reason in ("stop", "length")
            if ids != expected[: len(ids)] or (ended and ids != expected):
                wrong.append((request, ids, expected))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert len(ends) == 1000
    assert {"length", "cancelled", "dropped"} <= set(ends)
    assert scheduler.drain(10)
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.kv_used_tokens) == (0, 0, 0)
    assert sum(stats.outcomes.values()) == 1000
    scheduler.close()
    assert threading.active_count() == threads_before


def test_a_full_queue_drops_the_newest_of_the_client_that_has_most(make: Make):
    gate = Gate()
    scheduler, _ = make(gate, num_slots=1, queue_capacity=6)

    def ask(client: str, n: int = 1) -> list[Generation]:
        params = replace(GREEDY, max_tokens=1)
        return submit(scheduler, make_request([1], params, client=client), n=n)

    (running,) = ask("most")
    assert gate.entered.wait(10)
    kept, other, dropped = ask("most", 2), ask("other", 2), ask("most", 2)
    newcomer = ask("new")  # 6 wait; the whole newest submission goes, though one would do
    with pytest.raises(OverloadError, match=r"^6 sequences run or wait and at most 7 may, so 3"):
        ask("new", 3)  # it would have most itself
    newcomer += ask("new")
    for generation in dropped:
        assert generation.take(0.05) is None  # told in the engine's thread
    gate.opened.set()
    for generation in dropped:
        with pytest.raises(OverloadError, match="made room for another's") as caught:
            ids_of(generation)
        assert caught.value.retry_after_s > 0
    assert [ids_of(each) for each in (running, *kept, *other, *newcomer)] == [[2]] * 7
    assert scheduler.drain(10)
    assert scheduler.stats().outcomes == {"length": 7, "rejected": 5}


def test_a_started_sequence_is_not_dropped(make: Make):
    """Of many samples those go that wait, also where their submission is all there is."""
    gate = Gate()
    scheduler, _ = make(gate, num_slots=2, queue_capacity=3)
    request = make_request([1], replace(GREEDY, max_tokens=3), client="most")
    many = submit(scheduler, request, n=5)
    assert gate.entered.wait(10)
    assert scheduler.stats().running == 2
    newcomer = submit(scheduler, make_request([1], replace(GREEDY, max_tokens=1), client="new"))
    gate.opened.set()
    assert [ids_of(each) for each in (*many[:2], *newcomer)] == [[2, 3, 4], [2, 3, 4], [2]]
    for generation in many[2:]:
        with pytest.raises(OverloadError):
            ids_of(generation)


def test_sequences_that_were_put_away_go_on_in_another_scheduler(make: Make):
    """One that runs, one that waits and one that has ended; readers get an end."""
    gate = Gate()

    def slow(seen: tuple[int, ...]) -> int:
        time.sleep(2e-3)
        return gate(seen)

    scheduler, _ = make(slow, num_slots=1)
    sinks = [OutputStream() for _ in range(3)]
    params = replace(GREEDY, max_tokens=40)
    ended, runs, waits = (
        make_request([start], replace(params, max_tokens=most), end_ids=frozenset())
        for start, most in ((30, 1), (5, 40), (20, 40))
    )
    sequences = scheduler.submit([ended, runs, waits], sinks)
    assert gate.entered.wait(10)
    with pytest.raises(BackendError, match=r"no round within 0.05 s"):
        scheduler.suspend(sequences, 0.05)
    gate.opened.set()
    first = sinks[1].get()
    resume_from = scheduler.suspend(sequences, 10)
    assert resume_from[0] is None
    assert resume_from[1] is not None
    assert resume_from[2] is not None
    assert 0 < len(resume_from[1].answer) < 40
    assert resume_from[2].answer == ()
    assert scheduler.stats().running == scheduler.stats().waiting == 0
    assert isinstance(first, GenerationChunk)
    found = [token.id for token in first.tokens]
    while first.finish_reason is None:
        first = sinks[1].get()
        assert isinstance(first, GenerationChunk)
        found += [token.id for token in first.tokens]
    last = sinks[2].get()
    assert isinstance(last, GenerationChunk)
    assert first.finish_reason == last.finish_reason == "cancelled"
    other, _ = make(num_slots=1)
    (one,) = submit(other, replace(runs, resume_from=resume_from[1]))
    (two,) = submit(other, replace(waits, resume_from=resume_from[2]))
    assert [*found, *ids_of(one)] == [(5 + i) % VOCAB for i in range(1, 41)]
    assert ids_of(two) == [(20 + i) % VOCAB for i in range(1, 41)]
    scheduler.close()
    with pytest.raises(BackendError, match="closed"):
        scheduler.suspend(sequences, 1)

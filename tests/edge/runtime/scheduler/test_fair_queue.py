"""`FairQueue` and what the core makes of it: no client waits for more than its turn."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.embeddings import EmbeddingTable
from edge.errors import OverloadError
from edge.runtime.sampling import Sampler
from edge.runtime.scheduler.fair_queue import FairQueue
from edge.runtime.scheduler.sequence import SequenceState
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import GREEDY, Collected, Engine, make_request
from tests.edge.runtime.scheduler.simulation import MACHINES, Simulation


def waiting(client: str = "", tokens: int = 1, answer: int = 1, priority: int = 0) -> SequenceState:
    params = replace(GREEDY, max_tokens=answer)
    request = make_request([1] * tokens, params, client=client, priority=priority)
    return SequenceState(request, Sampler(params, VOCAB), Collected(), "", 0.0)


def start_all(queue: FairQueue) -> list[str]:
    """Start all, one after the other; returns their clients."""
    order = []
    while queue:
        sequence = queue.first(busy=())
        queue.remove(sequence)
        queue.charge(sequence)
        order.append(sequence.request.client)
    return order


def test_clients_take_turns_of_a_quantum_and_pay_back_what_they_overdraw():
    queue = FairQueue(100)
    for client, tokens, count in (("a", 49, 4), ("b", 249, 2), ("c", 99, 4)):
        for _ in range(count):
            queue.add(waiting(client, tokens), busy="abc")
    # Two of 50, one of 250, one of 100; with it b has used its second turn, too.
    assert "".join(start_all(queue)) == "aabc" + "aac" + "bc" + "c"


def test_who_runs_something_comes_after_who_runs_nothing():
    queue = FairQueue(100)
    for client in "ab":
        queue.add(waiting(client), busy="ab")
    assert queue.first(busy=()).request.client == "a"
    assert queue.first(busy="a").request.client == "b"
    assert queue.first(busy="ab").request.client == "a"


def test_a_newcomer_does_not_wait_for_turns_used_in_advance():
    queue = FairQueue(100)
    for client, tokens, count in (("a", 499, 2), ("b", 49, 2)):
        for _ in range(count):
            queue.add(waiting(client, tokens), busy="ab")
    dear = queue.first(busy=())
    queue.remove(dear)
    queue.charge(dear)
    queue.add(waiting("c", 49), busy="c")
    assert dear.request.client + "".join(start_all(queue)) == "a" + "bbc" + "a"


def test_an_answer_costs_a_quantum_at_most():
    queue = FairQueue(100)
    for client, answer in (("a", 100_000), ("b", 95)):
        for _ in range(3):
            queue.add(waiting(client, 5, answer), busy="ab")
    assert "".join(start_all(queue)) == "ababab"


def test_newcomers_start_a_quantum_in_advance_and_no_more():
    """However many come, what waits for its turn is started behind those."""
    queue, quantum = FairQueue(100), 100
    queue.add(waiting("old", 1, 1000), busy={"old"})
    for turn in range(3):
        led = 0
        for number in range(50):
            queue.add(waiting(f"new {turn} {number}", 10, 10))
            first = queue.first(busy=())
            queue.remove(first)
            queue.charge(first)
            if first.request.client == "old":
                break
            led += 20
        assert quantum <= led < quantum + 20
        queue.add(waiting("old", 1, 1000), busy={"old"})


def test_of_newcomers_who_asks_for_least_is_first():
    queue = FairQueue(100)
    for client, tokens, answer in (("a", 50, 100), ("b", 50, 10), ("c", 5, 10)):
        queue.add(waiting(client, tokens, answer))
    assert start_all(queue) == ["c", "b", "a"]


def test_many_samples_and_one_request_alternate_from_the_start():
    """Each of the 16 counts, whoever came first."""
    queue = FairQueue(10)
    for _ in range(16):
        queue.add(waiting("many", 4, 16))
    for _ in range(2):
        queue.add(waiting("one", 4, 16))
    assert "".join(client[0] for client in start_all(queue)) == "momo" + "m" * 14


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["add", "start", "end"]), st.integers(0, 9)), max_size=60
    )
)
def test_one_client_is_served_by_priority_and_then_in_order_of_arrival(
    events: list[tuple[str, int]],
):
    queue, model = FairQueue(8), list[SequenceState]()
    for what, number in events:
        if what == "add":
            sequence = waiting(tokens=1 + number, priority=number % 3)
            queue.add(sequence)
            model.append(sequence)
            model.sort(key=lambda each: each.request.priority)
        elif model:
            found = queue.first(busy={""} if number % 2 else set())
            assert found is model[0]
            if what == "end":  # one that waits is cancelled
                found = model[number % len(model)]
            queue.remove(found)
            if what == "start":
                queue.charge(found)
            model.remove(found)
        assert list(queue.order(set())) == model
        assert (len(queue), set(queue)) == (len(model), set(model))


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 300), st.integers(0, 2)), max_size=30
    ),
    busy=st.sets(st.sampled_from("abcd")),
)
def test_the_order_that_is_told_is_the_order_of_starts(
    sizes: list[tuple[str, int, int]], busy: set[str]
):
    queue = FairQueue(100)
    for client, tokens, priority in sizes:
        queue.add(waiting(client, tokens, priority=priority))
    told = list(queue.order(busy))
    for expected in told:
        assert queue.first(busy) is expected
        queue.remove(expected)
        queue.charge(expected)
        busy.add(expected.request.client)
    assert not queue


REQUESTS = st.tuples(
    st.sampled_from("abc"), st.integers(1, 40), st.integers(1, 20), st.integers(1, 6)
)


@settings(deadline=None)
@given(
    num_slots=st.integers(1, 4),
    quantum=st.integers(2, 16),
    before=st.lists(REQUESTS, max_size=12),
    rounds=st.integers(0, 30),
    beside=st.lists(REQUESTS | st.none(), max_size=20),
    prompt=st.integers(1, 40),
)
def test_a_client_with_nothing_queued_waits_for_one_quantum_of_each_other(
    table: EmbeddingTable,
    num_slots: int,
    quantum: int,
    before: list[tuple[str, int, int, int]],
    rounds: int,
    beside: list[tuple[str, int, int, int] | None],
    prompt: int,
):
    """Whatever they have queued, and go on to queue."""
    engine = Engine(table, num_slots=num_slots, max_step_tokens=quantum)
    core = engine.core
    costs: dict[str, list[int]] = defaultdict(list)
    charge = core.roster.waiting.charge

    def count(sequence: SequenceState) -> None:
        answer = min(sequence.tokens_left or 0, quantum)
        if "new" not in costs:  # what starts in the same round after it does not count
            costs[sequence.request.client].append(len(sequence.pending) + answer)
        charge(sequence)

    setattr(core.roster.waiting, "charge", count)  # noqa: B010
    sent = 0

    def submit(client: str, tokens: int, answer: int, n: int) -> SequenceState:
        nonlocal sent
        sent += 1  # prompts of two requests do not begin alike
        params = replace(GREEDY, max_tokens=answer)
        ids = [sent % VOCAB] * tokens
        request = make_request(ids, params, client=client, end_ids=frozenset())
        return [engine.submit(request)[0] for _ in range(n)][-1]

    for waited in before:
        submit(*waited)
    for _ in range(rounds):
        core.step()
    costs.clear()
    newcomer = submit("new", prompt, 3, 1)
    for each in beside:
        if not newcomer.stats.has_started and each is not None:
            submit(*each)
        core.step()
        if newcomer.stats.has_started:
            break
    while not newcomer.stats.has_started:
        core.step()
    del costs["new"]
    for started in costs.values():
        assert sum(started[:-1]) < quantum
    engine.run()
    assert newcomer.ended


def test_the_last_slot_is_for_a_client_without_one(table: EmbeddingTable):
    engine = Engine(table, num_slots=3)
    many = [
        engine.submit(make_request([5], replace(GREEDY, max_tokens=9 + 5 * i), client="many"))[0]
        for i in range(6)
    ]
    engine.core.step()
    one = [engine.submit(make_request([7], client="one"))[0] for _ in range(2)]
    while not one[0].slot:
        assert sum(each.stats.has_started for each in many) == 3
        engine.core.step()
    assert Counter(s.request.client for s in engine.core.roster.running) == {"many": 2, "one": 1}
    assert one[1].slot is None  # it has one now
    engine.run()


def test_a_sequence_that_started_before_it_was_dropped_continues(table: EmbeddingTable):
    """Callers drop from other threads, and a sequence may start in that moment."""
    engine = Engine(table, num_slots=1)
    pairs = [engine.submit(make_request([5], replace(GREEDY, max_tokens=3))) for _ in range(2)]
    engine.core.step()
    for sequence, _ in pairs:
        sequence.dropped = OverloadError("the queue is full")
    engine.run()
    (_, started), (dropped, waited) = pairs
    assert started.reason == "length"
    assert waited.last is dropped.dropped
    assert engine.core.delivery.outcomes == {"length": 1, "rejected": 1}


@pytest.mark.parametrize(
    ("tokens", "most_s", "most_tokens", "most_gaps_s"), [(20, 0.3, 0, 0.6), (800, 8.0, 40, 3.0)]
)
def test_a_short_prompt_is_read_between_the_chunks_of_a_long_one(
    table: EmbeddingTable, tokens: int, most_s: float, most_tokens: int, most_gaps_s: float
):
    """A newcomer waits for the chunk that runs, and not for 3,000 tokens of another client."""
    simulation = Simulation(table, MACHINES["cpu"], 4)
    simulation.warm_up()
    core = simulation.engine.core

    def submit(client: str, first: int, tokens: int) -> SequenceState:
        params = replace(GREEDY, max_tokens=4)
        ids = [first, *[30] * (tokens - 1)]
        return simulation.engine.submit(
            make_request(ids, params, client=client, end_ids=frozenset())
        )[0]

    long = [submit("long", i, 3000) for i in range(4)]
    core.step()
    short, left = submit("short", 9, tokens), len(long[0].pending)
    while not short.stats.ttft_s:
        core.step()
    # A chunk of 512 tokens takes 3.9 s here, and the long prompt 23 s.
    assert short.stats.ttft_s < most_s
    assert left - len(long[0].pending) <= most_tokens
    while not short.ended:
        core.step()
    assert short.stats.total_s - short.stats.ttft_s < most_gaps_s
    assert not long[1].stats.has_started
    simulation.engine.run()


@pytest.mark.parametrize("common", [False, True])
def test_prompts_of_equal_clients_are_read_one_after_the_other(table: EmbeddingTable, common: bool):
    """Side by side all would end late, and what they have in common would be read twice."""
    engine = Engine(table, capacity=64, max_step_tokens=4)
    rest = 40 if not common else 10
    _, first = engine.submit(make_request([1, *[2] * 39], client="first"))
    engine.core.step()
    ids = [1 if common else 3, *[2] * (rest - 1)]
    second, _ = engine.submit(make_request(ids, client="second"))
    while not first.ids:
        assert not second.stats.has_started or (common and second.stats.cached_tokens == rest - 1)
        engine.core.step()
    engine.run()
    assert second.stats.cached_tokens == (rest - 1 if common else 0)


def test_clients_with_prompts_of_any_length_are_read_in_turn(table: EmbeddingTable):
    """Short ones that keep coming slow a long one down and do not stop it."""
    engine = Engine(table, capacity=64, max_step_tokens=4)
    long, _ = engine.submit(make_request([1] * 60, replace(GREEDY, max_tokens=1), client="long"))
    engine.core.step()
    for number in range(80):
        params = replace(GREEDY, max_tokens=1)
        engine.submit(make_request([2 + number % 40] * 4, params, client=f"short {number}"))
        engine.core.step()
    assert long.ended
    engine.run()

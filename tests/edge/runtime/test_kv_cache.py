"""`SlotPool` against the plainest definitions of its promises."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge.errors import ContextLengthError
from edge.runtime.kv_cache import Placement, Slot, SlotPool, common_prefix

CAPACITY = 9
# Two tokens only, so that prompts share prefixes.
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=CAPACITY - 1)


def plain_prefix(a: list[int], b: list[int]) -> int:
    return max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefix(head: list[int], a: list[int], b: list[int]):
    assert common_prefix(head + a, head + b) == plain_prefix(head + a, head + b)


class Pool(RuleBasedStateMachine):
    """Each row of the model has the salt under which it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(3, CAPACITY)
        self.rows: list[list[tuple[int, str]]] = [[], [], []]

    @rule(ids=tokens, salt=st.sampled_from(["", "a"]))
    def start(self, ids: list[int], salt: str) -> None:
        placement = self.pool.place(ids, salt)
        if placement is None:
            assert all(slot.in_use for slot in self.pool.slots)
            return
        slot, cached, source, refuge = placement
        assert not slot.in_use
        assert cached < len(ids)
        rows = self.rows[slot.index if source is None else source.index]
        if refuge is not None:
            assert refuge is not slot
            assert not refuge.in_use
            self.rows[refuge.index] = self.rows[slot.index]
            refuge.inherit(slot)
        self.rows[slot.index] = rows[:cached]
        # Whatever is reused was computed from these tokens, for this tenant.
        assert self.rows[slot.index] == [(token, salt) for token in ids[:cached]]
        self.pool.take(slot, ids[:cached], salt)
        slot.extend(ids[cached:])
        self.rows[slot.index] += [(token, salt) for token in ids[cached:]]

    @precondition(lambda self: any(slot.in_use for slot in self.pool.slots))
    @rule(data=st.data(), keep=st.booleans(), slid=st.booleans())
    def end(self, data: st.DataObject, keep: bool, slid: bool) -> None:
        slot = data.draw(st.sampled_from([s for s in self.pool.slots if s.in_use]))
        if slid:
            slot.shareable = False
        self.pool.give_back(slot, keep=keep)
        if slid or not keep:
            self.rows[slot.index] = []

    @invariant()
    def books_are_true(self) -> None:
        for slot, rows in zip(self.pool.slots, self.rows, strict=True):
            assert slot.ids == [token for token, _ in rows]
        assert self.pool.used_tokens + self.pool.cached_tokens == sum(map(len, self.rows))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)


def filled(*contents: list[int], capacity: int = 50) -> SlotPool:
    pool = SlotPool(len(contents), capacity)
    for slot, ids in zip(pool.slots, contents, strict=True):
        pool.take(slot, ids, "")
    for slot in pool.slots:
        pool.give_back(slot, keep=True)
    return pool


def test_a_conversation_continues_from_its_rows():
    pool = filled([], [1, 2, 3, 4], [])
    assert pool.place([1, 2, 3, 4, 5], "") == Placement(pool.slots[1], 4)
    assert pool.place([1, 2, 3, 4], "") == Placement(pool.slots[1], 3)  # the last one must run


def test_another_tenant_sees_nothing():
    pool = filled([1, 2, 3, 4], [])
    placement = pool.place([1, 2, 3, 4, 5], "other")
    assert placement == Placement(pool.slots[1], 0)


def test_rows_that_are_moved_stay_their_tenants():
    pool = SlotPool(2, CAPACITY)
    slot, refuge = pool.slots
    pool.take(slot, [1, 2, 3], "a")
    pool.give_back(slot, keep=True)
    refuge.inherit(slot)
    slot.reset()
    assert pool.place([1, 2, 3, 4], "") == Placement(slot, 0)
    assert pool.place([1, 2, 3, 4], "a") == Placement(refuge, 3)


def test_a_short_match_is_copied_and_the_long_rows_stay():
    pool = filled(list(range(20)), [])
    assert pool.place([0, 1, 99], "") == Placement(pool.slots[1], 2, pool.slots[0])


def test_the_least_recently_used_slot_goes_first():
    pool = filled([1, 1], [2, 2], [3, 3])
    pool.take(pool.slots[0], [1, 1], "")
    pool.give_back(pool.slots[0], keep=True)
    assert pool.place([9, 9], "") == Placement(pool.slots[1], 0)


def test_active_slots_stay_neighbours_and_old_rows_are_kept():
    pool = filled([], [5, 6], [], [1, 2, 3, 4])
    pool.take(pool.slots[0], [8], "")
    placement = pool.place([1, 2, 3, 4, 7], "")
    assert placement == Placement(pool.slots[1], 4, source=pool.slots[3], refuge=pool.slots[3])
    pool.take(pool.slots[1], [9], "")
    assert pool.place([4], "") == Placement(pool.slots[2], 0)


def test_an_unrelated_prompt_costs_no_cached_rows_while_a_slot_is_empty():
    pool = filled([1] * 30, [2], [3] * 40, [])
    pool.take(pool.slots[1], [2], "")
    assert pool.place([9, 9], "") == Placement(pool.slots[0], 0, refuge=pool.slots[3])


def test_a_slot_away_from_the_others_loses_its_rows_if_it_is_the_least_recently_used():
    pool = filled([1] * 30, [2], [3] * 40, [4] * 20)
    pool.take(pool.slots[1], [2], "")
    for index in (0, 2):
        pool.take(pool.slots[index], pool.slots[index].ids, "")
        pool.give_back(pool.slots[index], keep=True)
    assert pool.place([9, 9], "") == Placement(pool.slots[0], 0, refuge=pool.slots[3])


def test_of_slots_that_are_mostly_a_prefix_the_one_that_loses_the_fewest_rows_is_continued():
    pool = filled([1, 1, 2, 2], [1, 1, 3], [])
    assert pool.place([1, 1, 4], "") == Placement(pool.slots[1], 2)


def test_rows_of_a_running_sequence_are_shared_by_copy():
    pool = filled([1, 2, 3], [])
    pool.take(pool.slots[0], [1, 2, 3], "")
    assert pool.place([1, 2, 9], "") == Placement(pool.slots[1], 2, pool.slots[0])
    pool.take(pool.slots[1], [1, 2], "")
    assert pool.place([1], "") is None


def test_a_slot_takes_no_more_than_it_holds():
    slot = Slot(0, 4)
    ids = [1, 2, 3]
    slot.extend(ids)
    ids.clear()
    assert (slot.ids, slot.length, slot.remaining) == ([1, 2, 3], 3, 1)
    with pytest.raises(ContextLengthError) as caught:
        slot.extend([4, 5])
    assert (caught.value.num_tokens, caught.value.capacity) == (5, 4)
    assert slot.ids == [1, 2, 3]

"""`SlotCursor` against a list of tokens and the obvious definition of a common prefix."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge.errors import ContextLengthError
from edge.kv_cache import SlotCursor

CAPACITY = 9
# Two tokens only, so that prompts share prefixes.
tokens = st.integers(0, 1)


def common_prefix(a: list[int], b: list[int]) -> int:
    return max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])


class Cursor(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cursor = SlotCursor(CAPACITY)
        self.rows: list[int] = []

    @rule(prompt=st.lists(tokens, min_size=1, max_size=CAPACITY + 2), reuse=st.booleans())
    def start(self, prompt: list[int], reuse: bool) -> None:
        if len(prompt) >= CAPACITY:
            with pytest.raises(ContextLengthError) as caught:
                self.cursor.start(prompt, reuse=reuse)
            assert (caught.value.num_tokens, caught.value.capacity) == (len(prompt), CAPACITY)
            return  # and the rows of before still count
        kept = self.cursor.start(prompt, reuse=reuse)
        expected = min(common_prefix(self.rows, prompt), len(prompt) - 1) if reuse else 0
        assert kept == expected
        self.rows = prompt[:kept]

    @rule(ids=st.lists(tokens, max_size=CAPACITY + 2))
    def advance(self, ids: list[int]) -> None:
        if len(self.rows) + len(ids) > CAPACITY:
            with pytest.raises(ContextLengthError) as caught:
                self.cursor.advance(ids)
            assert caught.value.num_tokens == len(self.rows) + len(ids)
            return
        self.cursor.advance(ids)
        self.rows = self.rows + ids

    @rule()
    def reset(self) -> None:
        self.cursor.reset()
        self.rows = []

    @invariant()
    def books_are_true(self) -> None:
        assert self.cursor.ids == self.rows
        assert self.cursor.length == len(self.rows) <= CAPACITY
        assert self.cursor.remaining == CAPACITY - len(self.rows)


TestSlotCursor = Cursor.TestCase
TestSlotCursor.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)


def test_a_started_prompt_always_leaves_a_token_to_run_and_a_row_for_the_answer():
    cursor = SlotCursor(4)
    assert cursor.start([1, 2, 3], reuse=False) == 0
    cursor.advance([1, 2, 3])
    assert cursor.remaining == 1
    assert cursor.start([1, 2, 3], reuse=True) == 2
    assert cursor.ids == [1, 2]


def test_the_cursor_does_not_hold_on_to_the_callers_list():
    cursor = SlotCursor(8)
    ids = [1, 2, 3]
    cursor.advance(ids)
    ids.clear()
    assert cursor.ids == [1, 2, 3]

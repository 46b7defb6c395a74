"""Which slots run together, and the step that a part of them is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from edge.backends.batching import (
    UNBOUNDED,
    Batching,
    Window,
    canonical_windows,
    padded_step,
    placed_in,
    plan_windows,
    prompt_lengths,
    spread,
    window_step,
)
from edge.backends.step import Step, step_after
from edge_lab.planner.devices import MODULES
from edge_lab.planner.memory import Deployment, plan_process_memory
from edge_lab.planner.models import BUILT_IN
from edge_lab.planner.speed import FITTED, prefill_s, work_of
from edge_make.recipe import find_variant, recipe_linears

SLOTS = st.lists(st.integers(0, 20), unique=True, min_size=1).flatmap(st.permutations)


@settings(deadline=None)
@given(SLOTS, st.integers(1, 8) | st.just(UNBOUNDED), st.sampled_from([0, 1, 2, UNBOUNDED]))
def test_windows_cover_every_slot_once(slots: list[int], width: int, gap: int):
    windows = plan_windows(slots, width, gap)
    rows = [row for window in windows for row in window.rows]
    assert sorted(rows) == list(range(len(slots)))
    covered: set[int] = set()
    for window in windows:
        assert 1 <= window.batch <= width
        assert [slots[row] - window.first for row in window.rows] == list(window.places)
        assert window.places[0] == 0
        assert window.places[-1] == window.batch - 1
        assert all(b - a - 1 <= gap for a, b in itertools.pairwise(window.places))
        assert sorted([*window.places, *window.idle]) == list(range(window.batch))
        mine = set(range(window.first, window.first + window.batch))
        assert covered.isdisjoint(mine)
        covered |= mine
    # As few as possible: no window could have taken the first slot of the next.
    for one, other in itertools.pairwise(windows):
        last = one.first + one.batch - 1
        assert other.first - one.first >= width or other.first - last - 1 > gap


def make_step(slots: list[int], past: list[int], seq: int, num_logits: int = 1) -> Step:
    embeds = np.arange(len(slots) * seq * 2, dtype=np.float16).reshape(len(slots), seq, 2)
    wanted = np.tile(np.arange(seq - num_logits, seq), (len(slots), 1))
    return step_after(slots, past, embeds, wanted)


def runs(batching: Batching, step: Step) -> list[tuple[int, int]]:
    return [(window.first, window.batch) for window in batching.plan(step)]


def test_decode_may_span_more_than_a_chunk():
    batching = Batching(decode_gap=1, chunk_gap=0)
    slots, past = [4, 0, 2], [7, 7, 7]
    assert runs(batching, make_step(slots, past, 1)) == [(0, 5)]
    assert runs(batching, make_step(slots, past, 3)) == [(0, 1), (2, 1), (4, 1)]
    assert runs(batching, make_step([5, 0, 2], past, 1)) == [(0, 3), (5, 1)]


def test_several_tokens_after_a_past_may_run_alone():
    batching = Batching(decode_gap=0, chunk_gap=0, alone_after_past=True)
    assert runs(batching, make_step([0, 1], [0, 0], 3)) == [(0, 2)]
    assert runs(batching, make_step([0, 1], [0, 4], 3)) == [(0, 1), (1, 1)]
    assert runs(batching, make_step([0, 1], [2, 4], 1)) == [(0, 2)]


def test_tokens_and_logits_in_all_bound_a_run():
    batching = Batching(decode_gap=UNBOUNDED, chunk_gap=0, max_batch=3, max_tokens=8, max_logits=4)
    slots, past = [0, 1, 2, 3], [5] * 4
    assert runs(batching, make_step(slots, past, 1)) == [(0, 3), (3, 1)]
    assert runs(batching, make_step(slots, past, 4)) == [(0, 2), (2, 2)]
    assert runs(batching, make_step(slots, past, 4, 4)) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert runs(batching, make_step(slots, past, 9)) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_the_step_of_a_window_is_in_the_order_of_its_slots():
    step = make_step([3, 1, 7], [5, 9, 2], 1)
    part = window_step(Window(1, 3, (1, 0), (0, 2)), step)
    assert list(part.slots) == [1, 2, 3]
    assert part.starts == [9, 0, 5]  # what is idle attends to one row
    assert part.kv_len == step.kv_len
    assert_array_equal(part.embeds[[0, 2]], step.embeds[[1, 0]])
    whole = make_step([4, 5], [1, 1], 2)
    assert window_step(Window(4, 2, (0, 1), (0, 1)), whole) is whole


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), unique=True, min_size=1), st.integers(0, 2))
def test_a_lone_token_runs_beside_an_idle_slot(slots: list[int], spare: int):
    num_slots = max(slots) + 1 + spare
    batching = Batching(decode_gap=1, chunk_gap=0, min_decode=2, num_slots=num_slots)
    step = make_step(slots, [7] * len(slots), 1)
    windows = batching.plan(step)
    assert sorted(row for window in windows for row in window.rows) == list(range(len(slots)))
    for window in windows:
        assert window.batch >= min(2, num_slots)
        assert 0 <= window.first <= window.first + window.batch <= num_slots
        idle = {window.first + place for place in window.idle}
        assert idle.isdisjoint(slots)
        assert [slots[row] - window.first for row in window.rows] == list(window.places)
    chunk = make_step(slots, [0] * len(slots), 3)
    assert batching.plan(chunk) == Batching(decode_gap=1, chunk_gap=0).plan(chunk)


@given(num_slots=st.integers(1, 20), max_batch=st.integers(1, 9), data=st.data())
def test_few_windows_cover_any_other(num_slots: int, max_batch: int, data: st.DataObject):
    windows = canonical_windows(num_slots, max_batch)
    assert len(windows) == len(set(windows)) <= 4 * num_slots
    assert all(0 <= first <= num_slots - batch and batch >= 1 for first, batch in windows)
    assert windows[:num_slots] == [(slot, 1) for slot in range(num_slots)]
    batch = data.draw(st.integers(1, min(max_batch, num_slots)))
    first = data.draw(st.integers(0, num_slots - batch))
    room = [w for a, w in windows if a <= first and a + w >= first + batch]
    assert min(room) < 4 * batch
    if batch <= 2:
        assert min(room) == batch
    window = Window(first, batch, (1, 0), (0, batch - 1))
    wider = placed_in(window, 0, num_slots)
    assert (wider.first, wider.batch, wider.rows) == (0, num_slots, (1, 0))
    assert [wider.first + place for place in wider.places] == [first, first + batch - 1]


@pytest.mark.parametrize("name", ["deepseek-r1:1.5b", "deepseek-r1:7b", "deepseek-r1:8b"])
@pytest.mark.parametrize("quant", ["int4", "int8", "fp16"])
def test_padding_a_prompt_takes_no_more_than_a_tenth_of_its_time(name: str, quant: str):
    """By the planner's formula, on an AGX Orin at full power, of every prompt to 2,048 tokens."""
    longest, lengths = 512, prompt_lengths(512, 64)
    model, mode = BUILT_IN[name].spec, MODULES["agx-orin-64"].modes[0]
    linears = recipe_linears(model, find_variant(quant))
    memory = plan_process_memory(model, linears, 4096, Deployment())
    work = work_of(model, linears, memory.weights, Deployment())
    for tokens in range(1, 2049):
        whole, rest = divmod(tokens, longest)
        if rest > 1:  # one token is a decode step
            rest = next(length for length in lengths if length >= rest)
        padded = whole * longest + rest
        assert -(-padded // longest) == -(-tokens // longest)
        took = prefill_s(work, mode, FITTED, padded, longest)
        assert took <= 1.1 * prefill_s(work, mode, FITTED, tokens, longest)


@given(st.integers(1, 3000), st.integers(1, 80))
def test_lengths_are_few_and_the_longest_is_one(longest: int, most: int):
    lengths = prompt_lengths(longest, most)
    assert len(lengths) <= most
    assert lengths == sorted(set(lengths))
    assert lengths[-1:] == [longest] * (longest > 1)
    order = spread(lengths)
    assert sorted(order) == lengths
    assert order[:1] == lengths[-1:]


def test_a_padded_step_runs_its_last_token_again():
    step = make_step([3, 1], [5, 9], 3)
    padded = padded_step(step, 5, 2)
    assert (padded.batch, padded.seq, padded.num_logits, padded.kv_len) == (2, 5, 2, 14)
    assert padded.positions.tolist() == [[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]]
    assert_array_equal(padded.embeds[:, :3], step.embeds)
    assert_array_equal(padded.embeds[:, 3:], step.embeds[:, [2, 2]])
    assert padded.logits_indices.tolist() == [[2, 2], [2, 2]]
    assert padded_step(step, 3, 1) is step

"""Steps have few shapes, all captured at load: what padding and the slot of prompts must not do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.backends.batching import canonical_windows, prompt_lengths
from edge.backends.step import step_after, zero_rows
from tests.edge.backends.runner import Runner, random_ids
from tests.edge.backends.tensorrt.gpu_runner import (
    ATOL,
    BUCKETS,
    CAPACITY,
    SHAPES_ATOL,
    EngineBundles,
    GpuRunner,
)
from tests.standins.cuda import FakeGpu
from tests.standins.slot_rows import by_name, stacked
from tests.standins.tensorrt import FakeContext

LENGTHS = prompt_lengths(24, 64)


@contextmanager
def unchanged(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> Iterator[None]:
    """No context is changed, none runs outside of its graph, and no kernel is launched by Python.

    These are what a shape change is made of, and what calls a plugin.
    """
    changes: list[str] = []
    change, execute = FakeContext._changes, FakeContext.execute_async_v3

    def noted(self: FakeContext, what: str) -> bool:
        changes.append(what)
        return change(self, what)

    def run(self: FakeContext, stream_handle: int) -> bool:
        changes.append("execute_async_v3")
        return execute(self, stream_handle)

    with monkeypatch.context() as patch:
        patch.setattr(FakeContext, "_changes", noted)
        patch.setattr(FakeContext, "execute_async_v3", run)
        gpu.calls.clear()
        yield
    assert not changes
    assert not {"cuLaunchKernel", "cuStreamBeginCapture"} & set(gpu.calls)


def prompt(runner: GpuRunner, ids: Any, slot: int) -> Any:
    """Logits of the last token, as a prompt wants them."""
    ids, start = np.asarray(ids), runner.lengths[slot]
    last = np.array([[ids.shape[1] - 1]])
    logits = runner.backend.forward(step_after([slot], [start], runner.table[ids], last))
    runner.lengths[slot] += ids.shape[1]
    return np.array(logits[0, 0])


@pytest.mark.parametrize("slots", [1, 4])
def test_every_length_and_start_gives_the_tokens_of_an_unpadded_step(
    slots: int,
    dialect: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    monkeypatch: pytest.MonkeyPatch,
):
    """Also where padding would pass the end of the cache, and of the table of positions."""
    bundle = engine_bundles("qwen2", dialect, max_batch=slots)
    random = np.random.default_rng(slots)
    with GpuRunner(bundle, gpu) as ours, GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain:
        capacity, compared = ours.engine.capacity, 0
        for tokens in [*range(1, 25), *range(2, 25, 3)]:
            start = int(random.integers(0, capacity - tokens + 1))
            start = capacity - tokens if tokens % 3 == 2 else start
            slot = int(random.integers(slots))
            ids = random_ids(1, tokens, seed=tokens)
            rows = stacked(plain.backend.read_slot(slot, start))
            rows[...] = random.normal(0, 0.3, rows.shape)
            for runner in (ours, plain):
                runner.backend.write_slot(slot, by_name(rows))
                runner.lengths[slot] = start
            with unchanged(monkeypatch, gpu):
                found = prompt(ours, ids, slot)
            expected = prompt(plain, ids, slot)
            assert_allclose(found, expected, atol=SHAPES_ATOL, rtol=0)
            best = np.sort(expected)[-2:]
            if best[1] - best[0] > 2 * SHAPES_ATOL:
                assert found.argmax() == expected.argmax()
                compared += 1
            assert_allclose(ours.cache(slot), plain.cache(slot), atol=0.01, rtol=0)
        assert compared > 5


def steps_of_a_service(
    runner: GpuRunner, total: int, seed: int
) -> Iterator[tuple[list[int], Any, Any]]:
    """Slots, tokens and places of logits of a mix of prompts, decode steps, drafts and scores."""
    random, capacity = np.random.default_rng(seed), runner.engine.capacity
    for number in range(total):
        for slot in range(4):
            if runner.lengths[slot] == capacity or random.random() < 0.02:
                runner.lengths[slot] = int(random.integers(0, 40))  # what comes next has a prefix
        kind = random.choice(["prompt", "prompt", "decode", "draft", "score"])
        count = 1 if kind in ("prompt", "score") else int(random.integers(1, 5))
        slots = list(map(int, random.permutation(4)[:count]))
        longest = {"decode": 1, "draft": 4}.get(kind, 24)
        room = min(capacity - runner.lengths[slot] for slot in slots)
        seq = min(int(random.integers(min(2, longest), longest + 1)), room)
        places = np.arange(seq) if kind != "prompt" else np.array([seq - 1])
        yield slots, random_ids(len(slots), seq, seed=number), np.tile(places, (len(slots), 1))


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_step_changes_a_shape_or_calls_python(
    count: int,
    dialect: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    monkeypatch: pytest.MonkeyPatch,
):
    bundle = engine_bundles("qwen2", dialect)
    with GpuRunner(bundle, gpu, max_draft_tokens=3) as ours, unchanged(monkeypatch, gpu):
        for slots, ids, places in steps_of_a_service(ours, count, seed=0):
            starts = [ours.lengths[slot] for slot in slots]
            logits = ours.backend.forward(step_after(slots, starts, ours.table[ids], places))
            assert np.isfinite(logits).all()
            for slot in slots:
                ours.lengths[slot] += ids.shape[1]
            if count > 1000:
                gpu.calls.clear()


def test_a_mix_of_steps_answers_as_the_cpu_does(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """Prompts of several slots take turns in one, tokens are added in between, rows are copied."""
    bundle = engine_bundles("qwen2", dialect)
    with GpuRunner(bundle, gpu, max_draft_tokens=3) as ours, Runner(bundle) as theirs:
        for number, (slots, ids, places) in enumerate(steps_of_a_service(ours, 60, seed=1)):
            starts = [ours.lengths[slot] for slot in slots]
            step = step_after(slots, starts, ours.table[ids], places)
            found = np.array(ours.backend.forward(step))
            assert_allclose(found, theirs.backend.forward(step), atol=ATOL, rtol=0)
            for slot in slots:
                ours.lengths[slot] += ids.shape[1]
            if number % 7 == 3:
                source, target = number % 4, (number + 1) % 4
                ours.lengths[target] = length = ours.lengths[source]
                for backend in (ours.backend, theirs.backend):
                    backend.copy_slot(source, target, length)


def test_a_prompt_that_overflows_leaves_nothing_to_the_next(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """Its padding, and the slot in which prompts are read, are cleared with its own rows."""
    bundle = engine_bundles("qwen2", dialect)
    for slots in (1, 4):
        with GpuRunner(bundle, gpu, num_slots=slots) as runner:
            embeds = runner.table[random_ids(1, 18)].copy()
            embeds[0, 3] = np.nan
            step = step_after([0], [0], embeds, np.array([[17]]))
            assert np.isnan(runner.backend.forward(step)).any()
            zero_rows(runner.backend, 0, 18)
            for slot in range(slots):
                assert np.isfinite(prompt(runner, random_ids(1, 2), slot)).all()
                assert np.isfinite(runner.step(random_ids(1, 1), [slot])).all()


def test_drafts_of_all_slots_are_checked_in_one_graph(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", dialect)
    with GpuRunner(bundle, gpu, max_draft_tokens=3) as ours, Runner(bundle) as theirs:
        spare = 4 if dialect == "native" else 0
        assert ours.engine.capacity == CAPACITY - spare
        for seq in (3, 2, 4):
            ids = random_ids(4, seq, seed=seq)
            gpu.calls.clear()
            found = ours.step(ids, [0, 1, 2, 3])
            assert gpu.calls.count("cuGraphLaunch") == 1
            assert_allclose(found, theirs.step(ids, [0, 1, 2, 3]), atol=ATOL, rtol=0)


def test_with_fewer_graphs_prompts_are_padded_further(
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """A bound leaves the longest step, of all rows: never a dynamic shape."""
    bundle = engine_bundles("qwen2", "native")
    with (
        caplog.at_level(logging.INFO),
        GpuRunner(bundle, gpu, max_graphs=1) as ours,
        GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain,
    ):
        [shape] = ours.engine._graphs._entries
        assert shape == (4, 1, 24, 1, CAPACITY, 0)
        assert "max_graphs is 1" in caplog.text
        for tokens in (2, 9, 24):
            ids = random_ids(1, tokens)
            with unchanged(monkeypatch, gpu):
                found = prompt(ours, ids, 2)
            assert_allclose(found, prompt(plain, ids, 2), atol=SHAPES_ATOL, rtol=0)


def test_the_number_of_graphs_does_not_grow_with_the_slots_times_the_lengths(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", "native")
    for slots in (1, 6):
        with GpuRunner(bundle, gpu, num_slots=slots) as runner:
            windows = len(canonical_windows(slots, 4))
            prompts = len(LENGTHS) + 1  # and one of many logits
            assert len(runner.engine._graphs) == len(BUCKETS) * (windows + prompts)


def test_padding_never_reaches_the_slot(gpu: FakeGpu, engine_bundles: EngineBundles):
    """Where prompts are read elsewhere; in the slot itself, rows behind its end are nobody's."""
    for dialect, slots in (("native", 4), ("portable", 4), ("portable", 1)):
        bundle = engine_bundles("qwen2", dialect)
        with GpuRunner(bundle, gpu, num_slots=slots) as runner:
            mark = stacked(runner.backend.read_slot(0, runner.engine.capacity))
            mark[...] = 0.5
            runner.backend.write_slot(0, by_name(mark))
            prompt(runner, random_ids(1, 7), 0)
            after = stacked(runner.backend.read_slot(0, runner.engine.capacity))
            assert_array_equal(after[:, :, 7:], mark[:, :, 7:])


def test_rows_that_were_written_elsewhere_since_are_brought_along(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """A slot that goes back, decodes and then reads on; and one that gets another's rows."""
    bundle = engine_bundles("qwen2", dialect)
    with GpuRunner(bundle, gpu) as ours, GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain:
        found = []
        for runner in (ours, plain):
            prompt(runner, random_ids(1, 12), 0)
            runner.lengths[0] = 5
            runner.step(random_ids(1, 1, seed=1), [0])
            answers = [prompt(runner, random_ids(1, 3, seed=2), 0)]
            prompt(runner, random_ids(1, 9, seed=3), 1)
            runner.backend.copy_slot(0, 1, 9)
            answers.append(prompt(runner, random_ids(1, 4, seed=4), 1))
            found.append(answers)
        for mine, expected in zip(*found, strict=True):
            assert_allclose(mine, expected, atol=SHAPES_ATOL, rtol=0)

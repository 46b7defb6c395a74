"""The TensorRT runner's steps, on the stand-ins of `cuda` and `tensorrt`.

The stand-ins compute with ONNX Runtime on the bound addresses, so the runner must give the tokens
and logits of the CPU backend; what they refuse, the runner must not do.
"""

from __future__ import annotations

import functools
import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.backends.step import step_after
from edge.backends.tensorrt.bound_context import BoundContext
from edge.bundle import sizes
from edge.bundle.sizes import StepLimits
from edge.errors import BackendError, BundleError
from edge.runtime.scheduler.request import SchedulerStats
from engines import profiles
from tests.conftest import Bundles
from tests.edge.backends.runner import Runner, random_ids
from tests.edge.backends.tensorrt.gpu_runner import (
    ATOL,
    CACHE_ATOL,
    CAPACITY,
    ENGINE,
    SHAPES_ATOL,
    EngineBundles,
    GpuRunner,
    both_drivers,
)
from tests.makers.goldens import FP16_KERNELS
from tests.makers.tiny_models import KINDS
from tests.standins.cuda import FakeGpu
from tests.standins.slot_rows import by_name, stacked
from tests.standins.tensorrt import install, write_engine


@pytest.mark.parametrize(
    ("kind", "gpu", "integrated"),
    [
        *((kind, "pycuda", False) for kind in KINDS),
        ("qwen2", "pycuda", True),
        ("qwen2", "cuda-bindings", False),
        ("qwen2", "cuda-bindings", True),
    ],
    indirect=["gpu"],
)
def test_it_generates_what_the_cpu_generates(
    kind: str, dialect: str, integrated: bool, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """Prefill in chunks into any slot, then decode over the borders of the buckets, with graphs."""
    gpu.integrated = integrated
    bundle = engine_bundles(kind, dialect)
    prompts = [random_ids(1, n, seed=n) for n in (40, 7, 25)]
    slots = [2, 0, 3]
    steps = 30
    with GpuRunner(bundle, gpu) as ours, Runner(bundle) as theirs:

        def step(ids: Any, where: list[int]) -> NDArray[np.float32]:
            """Both take the engine's tokens: rounding alone may decide between two."""
            logits = ours.step(ids, where)
            assert_allclose(logits, theirs.step(ids, where), atol=ATOL, rtol=0)
            return logits

        tokens = []
        for slot, prompt in zip(slots, prompts, strict=True):
            chunks = range(0, prompt.shape[1], 24)
            logits = [step(prompt[:, i : i + 24], [slot]) for i in chunks][-1]
            tokens.append([int(logits[0, -1].argmax())])
        for _ in range(steps):
            logits = step(tokens, slots)
            tokens = [[int(row[-1].argmax())] for row in logits]
        for slot in slots:
            assert_allclose(ours.cache(slot), theirs.cache(slot), atol=CACHE_ATOL, rtol=0)
        # A trial, the chunks, and all decode steps.
        assert gpu.calls.count("cuGraphLaunch") == 1 + 5 + steps
        # Slot 1 was inside every decode step and holds nothing.
        assert not stacked(ours.backend.read_slot(1, ours.backend.capacity)).any()


@pytest.mark.slow
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_slots_in_any_order_with_any_tokens(
    data: st.DataObject, dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """Several tokens behind a past and logits at several places, as verification of drafts does."""
    bundle = engine_bundles("qwen2", dialect)
    num_slots = data.draw(st.sampled_from([3, 4, 6]), label="num_slots")
    eager = data.draw(st.booleans(), label="the GPU runs early")
    with (
        GpuRunner(bundle, gpu, num_slots=num_slots) as ours,
        Runner(bundle, num_slots=num_slots) as theirs,
    ):
        gpu.eager = eager
        for step in range(data.draw(st.integers(1, 6), label="steps")):
            slots = data.draw(
                st.lists(st.integers(0, num_slots - 1), min_size=1, unique=True), label="slots"
            )
            seq = data.draw(st.sampled_from([1, 1, 1, 3, 5, 12]), label="tokens")
            ids = random_ids(len(slots), seq, seed=step)
            assert_allclose(ours.step(ids, slots), theirs.step(ids, slots), atol=ATOL, rtol=0)
        for slot in range(num_slots):
            assert_allclose(ours.cache(slot), theirs.cache(slot), atol=CACHE_ATOL, rtol=0)
        gpu.eager = False


def test_idle_slots_keep_every_row(dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles):
    """Full slots, too: the spare row is not one of theirs."""
    with GpuRunner(engine_bundles("qwen2", dialect), gpu) as runner:
        backend = runner.engine
        assert backend.capacity == (CAPACITY - 1 if dialect == "native" else CAPACITY)
        marks = []
        for slot in range(4):
            rows = stacked(backend.read_slot(slot, backend.capacity))
            rows[...] = np.random.default_rng(slot).standard_normal(rows.shape)
            backend.write_slot(slot, by_name(rows))
            marks.append(rows)
        for slots in ([0, 3], [3], [1, 3], [0]):
            for _ in range(4):  # plain, warm-up, capture, replay
                runner.step(random_ids(len(slots), 1), slots)
        for slot in range(4):
            written = runner.lengths[slot]
            after = stacked(backend.read_slot(slot, backend.capacity))
            assert_array_equal(after[:, :, written:], marks[slot][:, :, written:])
        assert runner.lengths == [8, 4, 0, 12]


def test_the_last_row_is_usable_and_the_next_is_refused(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    with GpuRunner(engine_bundles("qwen2", dialect, max_batch=1), gpu) as runner:
        backend = runner.engine
        assert backend.capacity == CAPACITY  # a batch of one has no idle slots
        for _ in range(6):
            runner.step(random_ids(1, 21), [0])
        runner.step(random_ids(1, 1), [0])
        calls = len(gpu.calls)
        last = runner.step(random_ids(1, 1), [0])
        assert np.isfinite(last).all()
        calls = len(gpu.calls)
        for slot, first, seq, message in (
            (0, CAPACITY, 1, "does not fit a cache of 128 rows"),
            (0, 120, 9, "does not fit"),
            (1, 0, 1, "not slots of the 1"),
            (0, 0, 25, "25 tokens exceeds max_step_tokens 24"),
        ):
            embeds = np.zeros((1, seq, runner.manifest.model.hidden_size), np.float16)
            step = step_after([slot], [first], embeds, np.zeros((1, 1), np.int64))
            with pytest.raises(BackendError, match=message):
                backend.forward(step)
        assert len(gpu.calls) == calls, "refused before the GPU hears of it"


@both_drivers
def test_read_write_and_copy_of_a_slot(dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles):
    with GpuRunner(engine_bundles("qwen2", dialect), gpu) as runner:
        backend = runner.engine
        runner.step(random_ids(1, 23), [2])
        rows = runner.cache(2)
        model = runner.manifest.model
        assert rows.shape == (
            2 * model.num_layers,
            model.attentions()[0].kv_heads,
            23,
            model.attentions()[0].dim,
        )
        assert rows.any(axis=(1, 3)).all()
        backend.write_slot(0, by_name(rows))
        backend.copy_slot(2, 3, 20)
        backend.copy_slot(1, 1, 5)
        assert_array_equal(stacked(backend.read_slot(0, 23)), rows)
        assert_array_equal(stacked(backend.read_slot(3, 20)), rows[:, :, :20])
        assert not stacked(backend.read_slot(0, 60))[:, :, 23:].any()
        assert not stacked(backend.read_slot(1, 60)).any()
        assert stacked(backend.read_slot(1, 0)).shape[2] == 0
        for wrong in (
            lambda: stacked(backend.read_slot(4, 1)),
            lambda: backend.copy_slot(0, -1, 1),
        ):
            with pytest.raises(BackendError, match="not slots of 4"):
                wrong()
        with pytest.raises(BackendError, match="do not fit a cache of"):
            stacked(backend.read_slot(0, CAPACITY + 1))
        with pytest.raises(BackendError, match="do not fit"):
            backend.write_slot(0, by_name(rows[1:]))
        runner.lengths = [23, 0, 23, 20]
        following = random_ids(1, 2, seed=1)
        expected = runner.step(following, [2])
        assert_array_equal(runner.step(following, [0]), expected)


def test_more_logits_than_fit_are_fetched_in_pieces(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", dialect)
    ids = random_ids(2, 24)
    with GpuRunner(bundle, gpu, max_logits=5) as few, GpuRunner(bundle, gpu) as many:
        assert_allclose(few.step(ids, [3, 1]), many.step(ids, [3, 1]), atol=SHAPES_ATOL, rtol=0)
        table = few.table[ids[:1]]
        wanted = np.array([[20, 3, 3, 0, 23, 20, 7, 8, 9]])  # in any order, and twice
        ours = few.backend.forward(step_after([0], [0], table, wanted))
        whole = many.backend.forward(step_after([0], [0], table, np.arange(24)[None]))
        assert_allclose(ours[0], whole[0][wanted[0]], atol=SHAPES_ATOL, rtol=0)
        assert_allclose(
            stacked(few.backend.read_slot(0, 24)), stacked(many.backend.read_slot(0, 24)), atol=0.01
        )


def test_an_engine_of_few_logits_gives_all_in_pieces(
    gpu: FakeGpu, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sizes, "DEFAULT_MAX_LOGITS", 5)
    bundle = Path(shutil.copytree(tiny_bundles("qwen2", "portable"), tmp_path / "bundle"))
    write_engine(bundle, **ENGINE)  # type: ignore[arg-type]
    ids = random_ids(2, 24)
    with GpuRunner(bundle, gpu) as ours, Runner(bundle) as theirs:
        assert_allclose(ours.step(ids, [3, 1]), theirs.step(ids, [3, 1]), atol=ATOL, rtol=0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Optimization profile, sequences and tokens of each run that is put on a stream."""
    found: list[tuple[int, int, int]] = []
    enqueue = BoundContext.enqueue

    def noted(self: BoundContext) -> None:
        assert self._bound is not None
        found.append((self._context._profile, self._bound.batch, self._bound.seq))
        enqueue(self)

    monkeypatch.setattr(BoundContext, "enqueue", noted)
    return found


@pytest.mark.parametrize(
    ("slots", "seq", "expected"),
    [
        ([1], 24, [(0, 1, 24)]),
        ([1], 2, [(0, 1, 2)]),
        ([0, 1, 2, 3], 6, [(2, 4, 6)]),
        ([0, 1], 2, [(2, 2, 2)]),
        ([0, 1, 2], 7, [(0, 1, 7)] * 3),  # more tokens each than the batch takes
        ([0, 1, 2, 3], 1, [(1, 4, 1)]),
    ],
)
def test_a_step_runs_in_the_profile_that_covers_it(
    slots: list[int],
    seq: int,
    expected: list[tuple[int, int, int]],
    runs: list[tuple[int, int, int]],
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
):
    bundle = engine_bundles("qwen2", "portable")
    ids = random_ids(len(slots), seq)
    with GpuRunner(bundle, gpu, use_cuda_graphs=False) as ours, Runner(bundle) as theirs:
        assert_allclose(ours.step(ids, slots), theirs.step(ids, slots), atol=ATOL, rtol=0)
    assert runs == expected


def test_an_engine_of_two_profiles_still_runs(
    runs: list[tuple[int, int, int]],
    gpu: FakeGpu,
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Before there was a profile for batches, that of prefill took them."""

    def two(max_batch: int, max_prefill: int) -> tuple[StepLimits, ...]:
        prefill = StepLimits("prefill", max_batch, max_prefill, max_prefill)
        return prefill, StepLimits("decode", max_batch, 1, 1)

    monkeypatch.setattr(profiles, "profile_limits", two)
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundles("qwen2", "portable"), bundle)
    write_engine(bundle, **ENGINE)  # type: ignore[arg-type]
    slots, ids = [0, 1, 2], random_ids(3, 7)
    with GpuRunner(bundle, gpu, use_cuda_graphs=False) as ours, Runner(bundle) as theirs:
        assert_allclose(ours.step(ids, slots), theirs.step(ids, slots), atol=ATOL, rtol=0)
    assert runs == [(0, 3, 7)]


def test_the_step_reads_no_more_of_the_cache_than_its_bucket(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    with GpuRunner(engine_bundles("qwen2", "native"), gpu, use_cuda_graphs=False) as runner:
        seen = []
        for _ in range(70):
            runner.step(random_ids(1, 1), [1])
            shape = runner.engine._contexts["decode"]._bound
            assert shape is not None
            seen.append(shape.kv)
        assert seen == [16] * 16 + [64] * 48 + [128] * 6
        assert runner.engine.graphs_disabled == "switched off"


@pytest.mark.parametrize(("kv_read", "version"), [("full", "10.16.2.10"), ("lengths", "11.1.0.9")])
def test_other_ways_to_read_the_cache(
    kv_read: str,
    version: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    monkeypatch: pytest.MonkeyPatch,
):
    """``lengths`` is a graph that the build has edited: attention by lengths, without a mask."""
    install(monkeypatch, gpu, version=version)
    bundle = engine_bundles("qwen2", "native", kv_read=kv_read, version=version)
    ids = random_ids(2, 20)
    with GpuRunner(bundle, gpu) as ours, Runner(bundle) as theirs:
        for chunk in (slice(0, 12), slice(12, 13), slice(13, 20)):
            found = ours.step(ids[:, chunk], [0, 2])
            assert_allclose(found, theirs.step(ids[:, chunk], [0, 2]), atol=ATOL, rtol=0)


def test_a_draft_model_has_an_engine_in_its_own_bundle(
    engine_bundles: EngineBundles,
    tiny_bundles: Bundles,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
):
    target, draft = engine_bundles("qwen2"), engine_bundles("llama", max_batch=2)
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=24)

    def answers(**options: Any) -> tuple[list[Any], SchedulerStats]:
        with LLM(target, backend="tensorrt", num_slots=2, **options) as llm:
            # Stand-ins draft at a loss, which is what is tried here.
            drafting = llm.scheduler._core.drafting
            if drafting is not None:
                always = functools.partial(drafting.policy.trial, budget_s=1e9)
                monkeypatch.setattr(drafting.policy, "trial", lambda drafts, _: always(drafts))
            results = [g.result() for g in llm.submit("hello world", params, n=2)]
            return [result.tokens for result in results], llm.scheduler.stats()

    plain, _ = answers()
    drafted, stats = answers(draft=draft)
    # A step of several tokens rounds in FP16 in another order, which may decide a draw.
    assert FP16_KERNELS or drafted == plain
    assert stats.drafted_tokens > 0
    assert stats.drafts_failed is None
    with pytest.raises(BundleError, match="edge-llm build"):
        LLM(target, backend="tensorrt", draft=tiny_bundles("llama"))
    gc.collect()

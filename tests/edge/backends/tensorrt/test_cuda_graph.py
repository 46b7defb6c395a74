"""Steps as CUDA graphs."""

from __future__ import annotations

import itertools
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.backends import cuda
from edge.backends.batching import canonical_windows, prompt_lengths
from edge.backends.tensorrt import cuda_graph
from edge.errors import EdgeError
from tests.edge.backends.runner import Runner, random_ids
from tests.edge.backends.tensorrt.gpu_runner import (
    ATOL,
    BUCKETS,
    CAPACITY,
    EngineBundles,
    GpuRunner,
    allocate,
    attempt,
    both_drivers,
)
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import CONTEXT_BYTES, FakeContext


@both_drivers
def test_a_decode_step_is_a_graph_and_reads_the_buffers(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """From the first step on nothing is launched one by one, and every token counts."""
    bundle = engine_bundles("qwen2", dialect)
    with GpuRunner(bundle, gpu) as graphs, GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain:
        for step in range(12):
            ids = random_ids(2, 1, seed=step)
            before = len(gpu.calls)
            ours = graphs.step(ids, [1, 2])
            calls = gpu.calls[before:]
            assert_array_equal(ours, plain.step(ids, [1, 2]))
            append = ["cuMemcpy3DAsync"] * 2 if dialect == "portable" else []
            assert calls == [
                "cuCtxPushCurrent", "cuGraphLaunch", *append, "cuStreamSynchronize",
                "cuCtxPopCurrent",
            ]  # fmt: skip
        assert_array_equal(graphs.cache(1), plain.cache(1))


@pytest.mark.parametrize("seq", [1, 4])
def test_the_cpu_is_free_while_a_step_is_computed(
    dialect: str, seq: int, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """By then the device has been given all of the step, and nothing of it is awaited yet."""
    with GpuRunner(engine_bundles("qwen2", dialect), gpu, max_draft_tokens=3) as runner:
        runner.step(random_ids(2, 3, seed=0), [1, 2])
        before = len(gpu.calls)
        at: list[int] = []
        runner.engine.meanwhile = lambda: at.append(len(gpu.calls))
        runner.step(random_ids(2, seq, seed=1), [1, 2])
        [now] = at
        waits = ["cuStreamSynchronize", "cuCtxPopCurrent"]
        assert gpu.calls[now:] == waits
        assert "cuStreamSynchronize" not in gpu.calls[before:now]


def test_no_context_is_built_between_two_tokens(gpu: FakeGpu, engine_bundles: EngineBundles):
    """Whatever slots decode: all that a step needs is there once the engine is loaded."""
    random = np.random.default_rng(0)
    with GpuRunner(engine_bundles("qwen2", "native"), gpu, num_slots=6) as runner:
        shapes = len(canonical_windows(6, 4)) + len(prompt_lengths(24, 64)) + 1
        assert len(runner.engine._graphs) == len(BUCKETS) * shapes
        spent_s, launched = dict(gpu.spent_s), gpu.calls.count("cuGraphLaunch")
        for seed in range(150):
            slots = list(map(int, random.permutation(6)[: random.integers(1, 5)]))
            runner.lengths = [int(length) for length in random.integers(0, CAPACITY - 1, 6)]
            runner.step(random_ids(len(slots), 1, seed=seed), slots)
        assert gpu.spent_s == spent_s
        windows = gpu.calls.count("cuGraphLaunch") - launched
        assert 150 <= windows < 2 * 150  # slots that are four or five apart run in two windows
        assert gpu.calls.count("execute_async_v3") == 2 * len(runner.engine._graphs)


def test_graphs_survive_other_steps_in_between(gpu: FakeGpu, engine_bundles: EngineBundles):
    """A graph's context is its own: other shapes and a prefill must not change it."""
    bundle = engine_bundles("qwen2", "native")
    with GpuRunner(bundle, gpu) as ours, Runner(bundle) as theirs:
        for step in range(8):
            for slots, seq in (([0], 1), ([2, 3], 1), ([1], 5), ([0, 1], 1)):
                ids = random_ids(len(slots), seq, seed=step)
                assert_allclose(ours.step(ids, slots), theirs.step(ids, slots), atol=ATOL, rtol=0)


def test_a_step_runs_in_a_wider_graph_of_its_own_bucket(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    """One of a smaller bucket would not do, and the step would lose its graph."""
    with GpuRunner(engine_bundles("qwen2", "native"), gpu) as runner:
        graphs = runner.engine._graphs
        for shape in list(graphs._entries):
            if shape.kv == BUCKETS[1] and shape.batch < 3:
                graphs._close_entry(graphs._entries.pop(shape))
        graphs._covers.clear()
        runner.step(random_ids(1, 20), [0])
        gpu.calls.clear()
        runner.step(random_ids(1, 1), [0])
        assert gpu.calls.count("cuGraphLaunch") == 1


@pytest.mark.parametrize("bound", ["number", "seconds", "bytes"])
def test_capturing_is_bounded(
    bound: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """What has no graph runs in the ordinary way, without a context of its own."""
    bundle = engine_bundles("qwen2", "native")
    if bound == "seconds":
        seconds = itertools.count()
        monkeypatch.setattr(cuda_graph, "time", SimpleNamespace(perf_counter=seconds.__next__))
        monkeypatch.setattr(cuda_graph, "CAPTURE_S", 2)
    elif bound == "bytes":
        monkeypatch.setattr(cuda_graph, "CAPTURE_BYTES", 3 * CONTEXT_BYTES // 2)
    options = {"max_graphs": 2} if bound == "number" else {}
    with (
        caplog.at_level(logging.INFO),
        GpuRunner(bundle, gpu, **options) as ours,
        GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain,
    ):
        assert len(ours.engine._graphs) == gpu.alive["graph"] == 2
        assert ours.engine.graphs_disabled is None
        assert gpu.alive["execution context"] == 3 + 2 + 3  # of the profiles, and of the graphs
        said = {"number": "max_graphs is 2", "seconds": "2 s are over", "bytes": "they take"}
        assert said[bound] in caplog.text
        for slots in ([0], [1], [2], [0, 1], [0]):
            ids = random_ids(len(slots), 1)
            assert_array_equal(ours.step(ids, slots), plain.step(ids, slots))
        assert gpu.alive["execution context"] == 3 + 2 + 3


@both_drivers
@pytest.mark.parametrize("captured", [0, 1])
@pytest.mark.parametrize(
    "call",
    [
        "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphUpload",
        "execute_async_v3",
    ],
)  # fmt: skip
def test_without_a_capture_decode_goes_on(
    call: str,
    captured: int,
    dialect: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    caplog: pytest.LogCaptureFixture,
):
    """What was captured before is kept."""
    bundle = engine_bundles("qwen2", dialect)
    GpuRunner(bundle, gpu).engine.close()  # the primary context is retained only once
    before = len(gpu.calls)
    GpuRunner(bundle, gpu).engine.close()
    places = [place for place, name in enumerate(gpu.calls[before:]) if name == call]
    # A graph is run twice, once of them to record it; and a trial is captured before all others.
    number = 2 * captured + 1 if call == "execute_async_v3" else 1 + captured
    gpu.fail_at = len(gpu.calls) + places[number]
    with caplog.at_level(logging.WARNING), GpuRunner(bundle, gpu) as ours:
        assert gpu.calls[gpu.fail_at] == call
        gpu.fail_at = None
        assert len(ours.engine._graphs) == captured
        assert bool(ours.engine.graphs_disabled) == (captured == 0)
        with GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain:
            for step in range(6):
                ids = random_ids(1, 1, seed=step)
                assert_array_equal(ours.step(ids, [0]), plain.step(ids, [0]))
        assert len([r for r in caplog.records if "CUDA graphs" in r.message]) == 1
        assert ours.engine.failed is None


def test_without_memory_for_the_context_of_a_graph_decode_goes_on(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", "native")
    with GpuRunner(bundle, gpu, use_cuda_graphs=False):
        needed = gpu.used_bytes
    gpu.total_bytes = needed + CONTEXT_BYTES // 2
    with GpuRunner(bundle, gpu) as ours:
        gpu.total_bytes = 2 * needed
        with GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain:
            for step in range(5):
                ids = random_ids(1, 1, seed=step)
                assert_array_equal(ours.step(ids, [1]), plain.step(ids, [1]))
        assert "memory" in str(ours.engine.graphs_disabled)
        assert ours.engine.failed is None


@both_drivers
@pytest.mark.parametrize(
    "missing",
    [
        "the package", "libcuda", "cuStreamBeginCapture", "cuGraphInstantiate", "cuGraphUpload",
        "cuGraphLaunch", "cuGraphExecDestroy",
    ],
)  # fmt: skip
def test_graphs_are_tried_at_load(
    missing: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """cuda-bindings raise RuntimeError for what the driver's library lacks."""
    bundle = engine_bundles("qwen2", "native")
    if not gpu.with_pycuda and missing in ("the package", "libcuda"):
        return  # then nothing can be loaded: test_cuda.py
    if missing == "the package":
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    else:
        gpu.missing.add(missing)
    with caplog.at_level(logging.WARNING), GpuRunner(bundle, gpu) as ours:
        [warning] = [r.getMessage() for r in caplog.records if "CUDA graphs:" in r.message]
        assert "pip install" in warning if missing == "the package" else missing in warning
        assert ours.engine.graphs_disabled
        captures = gpu.calls.count("cuStreamBeginCapture")
        with Runner(bundle) as theirs:
            for step in range(5):
                ids = random_ids(1, 1, seed=step)
                assert_allclose(ours.step(ids, [1]), theirs.step(ids, [1]), atol=ATOL, rtol=0)
        assert gpu.calls.count("cuStreamBeginCapture") == captures
        assert len([r for r in caplog.records if "CUDA graphs" in r.message]) == 1
    gpu.missing.clear()
    gpu.live.pop("graph" if missing == "cuGraphExecDestroy" else "", None)  # it cannot be freed


@both_drivers
def test_other_threads_may_use_the_gpu_during_a_capture(
    gpu: FakeGpu, engine_bundles: EngineBundles, monkeypatch: pytest.MonkeyPatch
):
    bundle = engine_bundles("qwen2", "native")
    execute = FakeContext.execute_async_v3
    device = cuda.Device(0)
    others: list[EdgeError | None] = []

    def beside(context: FakeContext, stream_handle: int) -> bool:
        if gpu.streams[stream_handle].capturing is not None:
            with ThreadPoolExecutor(1) as other:
                others.append(other.submit(attempt, lambda: allocate(device)).result())
        return execute(context, stream_handle)

    monkeypatch.setattr(FakeContext, "execute_async_v3", beside)
    with GpuRunner(bundle, gpu) as ours, GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain:
        assert others == [None] * len(ours.engine._graphs)
        for step in range(5):
            ids = random_ids(1, 1, seed=step)
            assert_array_equal(ours.step(ids, [1]), plain.step(ids, [1]))
        assert ours.engine.graphs_disabled is None

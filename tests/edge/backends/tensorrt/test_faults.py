"""Calls that fail, contexts bound by half, other threads and interrupts."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edge.backends.cuda import Stream
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle.manifest import read_manifest
from edge.errors import BackendError, DeviceError
from tests.edge.backends.runner import random_ids
from tests.edge.backends.tensorrt.gpu_runner import EngineBundles, GpuRunner, attempt, both_drivers
from tests.standins.cuda import ILLEGAL_ADDRESS, OUT_OF_MEMORY, FakeGpu, FakeStream
from tests.standins.slot_rows import stacked
from tests.standins.tensorrt import FakeContext


def places_to_fail(calls: list[str]) -> list[int]:
    """Every call, but only the first of a run of equal ones (an address per tensor)."""
    return [i for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]


@both_drivers
@pytest.mark.parametrize(
    ("code", "dialect"),
    [(OUT_OF_MEMORY, "native"), (OUT_OF_MEMORY, "portable"), (ILLEGAL_ADDRESS, "portable")],
)
def test_every_call_of_loading_may_fail(
    code: int, dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """Nothing is left behind, the message is clear, and loading works again afterwards."""
    bundle = engine_bundles("qwen2", dialect, max_batch=2)
    manifest = read_manifest(bundle)
    # These return nothing, or fail without harm.
    quiet = {
        "CUDA_MEMCPY3D", "set_device_memory", "cuMemFree", "cuMemFreeHost", "cuStreamDestroy",
        "cuDevicePrimaryCtxGetState",
    }  # fmt: skip
    if code == OUT_OF_MEMORY:
        quiet.add("cuMemAlloc")  # the cache is then made of pieces
    num_graphs: list[int] = []
    num_blocks: list[int] = []  # of the cache, which is one here unless it cannot be had

    def load() -> None:
        backend = TensorRTBackend(bundle, manifest, max_graphs=2)
        num_graphs.append(len(backend._graphs))
        num_blocks.append(len(backend._cache.planes))
        backend.close()

    load()  # the primary context is retained only once
    before = len(gpu.calls)
    backend = TensorRTBackend(bundle, manifest, max_graphs=2)
    places = places_to_fail(gpu.calls[before:])
    backend.close()
    assert len(places) > 20
    for number in places:
        gpu.fail_at, gpu.fail_code = len(gpu.calls) + number, code
        error = attempt(load)
        if error is None:  # fewer graphs, more blocks, nothing returned, or closing failed
            lesser = num_graphs[-1] < 2 or num_blocks[-1] == manifest.model.num_layers
            assert lesser or gpu.calls[gpu.fail_at] in {*quiet, "cuCtxPopCurrent"}
        else:
            assert len(str(error)) > 20, "a sentence, not a name"
            assert error.exit_code in (69, 70, 71)
        gpu.fail_at = gpu.lost = error = None  # its traceback holds the stream
        assert gpu.depth == 0
        gc.collect()
        assert not gpu.alive, (number, gpu.calls[before + number])
    TensorRTBackend(bundle, manifest).close()


@pytest.mark.slow
@both_drivers
@pytest.mark.parametrize(
    ("code", "dialect"),
    [(OUT_OF_MEMORY, "native"), (OUT_OF_MEMORY, "portable"), (ILLEGAL_ADDRESS, "portable")],
)
def test_every_call_of_a_step_may_fail(
    code: int, dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """The next request gives the right logits, or is refused because the GPU is lost."""
    bundle = engine_bundles("qwen2", dialect)
    ids = random_ids(2, 9)

    def request(runner: GpuRunner) -> list[Any]:
        runner.lengths = [0] * 4
        tokens = [random_ids(2, 1, seed=seed) for seed in range(5)]
        return [runner.step(step, [0, 2]) for step in (ids, *tokens)]

    with GpuRunner(bundle, gpu) as reference:
        before = len(gpu.calls)
        expected = request(reference)
        places = places_to_fail(gpu.calls[before:])
    outcomes = set()
    assert len(places) > 20
    for number in places:
        found: list[Any] = []
        with GpuRunner(bundle, gpu) as runner:
            gpu.fail_at, gpu.fail_code = len(gpu.calls) + number, code
            for _ in range(2):  # the request that fails, and the next one
                error = attempt(lambda: found.extend(request(runner)))  # noqa: B023
                if error is None:
                    outcomes.add("worked")
                    assert_array_equal(np.concatenate(found[-6:], 1), np.concatenate(expected, 1))
                    continue
                assert len(str(error)) > 20, "a sentence, not a name"
                if runner.engine.failed and code == OUT_OF_MEMORY:
                    assert gpu.calls[gpu.fail_at] == "cuCtxPopCurrent"
                else:
                    outcomes.add("lost" if runner.engine.failed else "failed")
                if runner.engine.failed:
                    with pytest.raises(DeviceError, match="lost since an earlier step"):
                        request(runner)
            gpu.fail_at = gpu.lost = error = None  # its traceback holds the stream
        gc.collect()
        assert gpu.depth == 0
        assert not gpu.alive, number
    assert outcomes == ({"failed", "worked"} if code == OUT_OF_MEMORY else {"lost", "worked"})


def test_work_of_a_failed_step_is_waited_for(
    gpu: FakeGpu, engine_bundles: EngineBundles, monkeypatch: pytest.MonkeyPatch
):
    """Else it writes into the buffers of the next step, and a GPU that died is not seen."""
    with GpuRunner(engine_bundles("qwen2", "native"), gpu) as runner:
        runner.step(random_ids(1, 9), [0])
        before, waits = len(gpu.calls), []
        synchronize = Stream.synchronize

        def noted(self: Stream) -> None:
            waits.append(len(gpu.calls))
            synchronize(self)

        monkeypatch.setattr(Stream, "synchronize", noted)
        gpu.fail_at, gpu.fail_code = before + 1, OUT_OF_MEMORY
        error = attempt(lambda: runner.step(random_ids(1, 1), [0]))
        gpu.fail_at = None
        assert error is not None
        assert waits[-1] > before + 1
        error = None  # its traceback holds the stream


@pytest.mark.parametrize("kept", [0, 3, 7])  # of eight addresses
def test_a_context_that_was_bound_by_half_is_bound_anew(
    kept: int, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """Half of its cache addresses are another slot's when the step before last comes again."""
    bundle = engine_bundles("qwen2", "native")
    with (
        GpuRunner(bundle, gpu, use_cuda_graphs=False) as ours,
        GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain,
    ):
        for step in range(3):
            ids = random_ids(1, 1, seed=step)
            if step == 2:
                gpu.fail_at = len(gpu.calls) + 1 + kept
                with pytest.raises(BackendError, match="refused set_tensor_address"):
                    ours.step(ids, [3])
                gpu.fail_at = None
            assert_array_equal(ours.step(ids, [1]), plain.step(ids, [1]))
        assert_array_equal(ours.cache(1), plain.cache(1))


@both_drivers
def test_it_loads_runs_and_closes_in_three_threads(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """PyCUDA's contexts belong to threads; a server loads in one and runs in another."""
    bundle = engine_bundles("qwen2", dialect)
    ids = [random_ids(1, n, seed=n) for n in (9, 1, 1, 1, 1)]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        runner = one.submit(GpuRunner, bundle, gpu).result()
        for step in ids:
            assert np.isfinite(two.submit(runner.step, step, [2]).result()).all()
        assert two.submit(lambda: gpu.depth).result() == 0
    runner.__exit__(None, None, None)


@both_drivers
def test_an_interrupt_leaves_a_working_backend(
    gpu: FakeGpu, engine_bundles: EngineBundles, monkeypatch: pytest.MonkeyPatch
):
    bundle = engine_bundles("qwen2", "native")
    for before in range(3):  # the run before a capture, the capture, and the next run
        interrupted = interrupt_once(FakeContext.execute_async_v3, before)
        with monkeypatch.context() as patch:
            patch.setattr(FakeContext, "execute_async_v3", interrupted)
            with pytest.raises(KeyboardInterrupt):
                GpuRunner(bundle, gpu)
        assert not gpu.alive
    with GpuRunner(bundle, gpu) as ours, GpuRunner(bundle, gpu, use_cuda_graphs=False) as plain:
        for step in range(4):
            ids = random_ids(1, 1, seed=step)
            if step == 2:
                interrupted = interrupt_once(FakeStream.synchronize)
                with monkeypatch.context() as patch:
                    patch.setattr(FakeStream, "synchronize", interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        ours.step(ids, [1])
            assert_array_equal(ours.step(ids, [1]), plain.step(ids, [1]))
        assert ours.engine.failed is None


def interrupt_once(function: Callable[..., Any], before: int = 0) -> Callable[..., Any]:
    calls = itertools.count()

    def interrupted(*args: Any) -> Any:
        if next(calls) == before:
            raise KeyboardInterrupt
        return function(*args)

    return interrupted


def test_a_closed_backend_says_so(gpu: FakeGpu, engine_bundles: EngineBundles):
    with GpuRunner(engine_bundles("qwen2", "portable"), gpu) as runner:
        runner.backend.close()
        runner.backend.close()
        assert runner.engine.failed == "the backend is closed"
        with pytest.raises(BackendError, match="closed"):
            runner.step(random_ids(1, 1), [0])
        with pytest.raises(BackendError, match="closed"):
            stacked(runner.backend.read_slot(0, 1))

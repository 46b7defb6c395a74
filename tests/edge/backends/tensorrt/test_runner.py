"""The TensorRT runner itself, on the stand-ins of `fake_cuda` and `fake_tensorrt`.

The stand-ins compute with ONNX Runtime on the bound addresses, so the runner must give the tokens
and logits of the CPU backend; what they refuse, the runner must not do.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.backends import cuda
from edge.backends.step import step_after
from edge.backends.tensorrt import cuda_graph
from edge.backends.tensorrt.bound_context import BoundContext, StepShape
from edge.backends.tensorrt.device_memory import plan_engine_memory
from edge.backends.tensorrt.engine import Engine
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.backends.windows import canonical_windows
from edge.bundle import io_spec, sizes
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.engine_file import find_engines, read_engine_info
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.sizes import StepLimits
from edge.engine_config import GpuWait
from edge.errors import (
    BackendError,
    BuildError,
    BundleError,
    ConfigError,
    DependencyError,
    DeviceError,
    DeviceMemoryError,
    EdgeError,
    IntegrityError,
)
from edge.runtime.scheduler import SchedulerStats
from engines import profiles
from engines.build_plan import plan_build
from engines.config import BuildConfig
from tests.conftest import Bundles, require_kernels
from tests.edge.backends.runner import Runner, random_ids
from tests.fake_builder import OptimizationProfile
from tests.fake_cuda import (
    DRIVERS,
    ILLEGAL_ADDRESS,
    OUT_OF_MEMORY,
    CaptureMode,
    FakeGpu,
    FakeStream,
    RuleError,
)
from tests.fake_network import Planted
from tests.fake_tensorrt import (
    CONTEXT_BYTES,
    NO_CUDA,
    FakeContext,
    emptied,
    fake_plan,
    install,
    start_nothing,
    write_engine,
)
from tests.parity import FP16_KERNELS
from tests.tiny_models import KINDS

# The engine's graph is typed fp16, the reference fp32: logits of size 10 differ in the third digit.
ATOL = 0.3 if FP16_KERNELS else 0.15
CACHE_ATOL = 0.12 if FP16_KERNELS else 0.06
SHAPES_ATOL = 0.05 if FP16_KERNELS else 0.02  # the same engine, in steps of other shapes
DIALECTS = ("native", "portable")
CAPACITY = 128
BUCKETS = (16, 64, CAPACITY)
ENGINE = {"max_batch": 4, "max_prefill": 24, "kv_capacity": CAPACITY, "kv_buckets": BUCKETS}

EngineBundles = Callable[..., Path]


class GpuRunner(Runner):
    """A `Runner` on the stand-in."""

    def __init__(self, bundle: Path, gpu: FakeGpu, **options: Any) -> None:
        self.gpu = gpu
        self.manifest = read_manifest(bundle)
        self.engine: TensorRTBackend = TensorRTBackend(bundle, self.manifest, **options)
        self.backend = self.engine  # type: ignore[assignment]
        self.table = EmbeddingTable(bundle / io_spec.EMBEDDINGS_NAME)
        self.lengths = [0] * self.engine.num_slots

    def __enter__(self) -> GpuRunner:
        return self


@pytest.fixture(scope="module")
def engine_bundles(
    tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> EngineBundles:
    """Tiny bundles with one engine; treat them as read-only."""
    root = tmp_path_factory.mktemp("engines")

    @functools.cache
    def make(kind: str, dialect: str, kv_cache: str, options: tuple[tuple[str, Any], ...]) -> Path:
        bundle = root / f"{kind}-{dialect}-{kv_cache}-{abs(hash(options))}"
        shutil.copytree(tiny_bundles(kind, dialect, kv_cache=kv_cache), bundle)  # type: ignore[arg-type]
        write_engine(bundle, **dict(options))
        return bundle

    def bundle(
        kind: str = "qwen2", dialect: str = "native", kv_cache: str = "float", **options: Any
    ) -> Path:
        require_kernels(dialect)
        merged = {**ENGINE, **options}
        if merged.get("kv_read", "slice") != "slice":
            merged.pop("kv_buckets")
        return make(kind, dialect, kv_cache, tuple(sorted(merged.items())))

    return bundle


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu(with_pycuda=getattr(request, "param", "pycuda") == "pycuda")
    install(monkeypatch, device)
    with emptied(device):
        yield device
    assert device.depth == 0


both_drivers = pytest.mark.parametrize("gpu", DRIVERS, indirect=True)
"""Where the driver may matter: memory, copies, streams, graphs, threads, errors. Above the door to
CUDA (`edge.backends.cuda`) all is the same, and one is enough."""


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
        # A trial, a chunk of one token, and all decode steps.
        assert gpu.calls.count("cuGraphLaunch") == 1 + 1 + steps
        # Slot 1 was inside every decode step and holds nothing.
        assert not ours.backend.read_slot(1, ours.backend.capacity).any()


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
            rows = backend.read_slot(slot, backend.capacity)
            rows[...] = np.random.default_rng(slot).standard_normal(rows.shape)
            backend.write_slot(slot, rows)
            marks.append(rows)
        for slots in ([0, 3], [3], [1, 3], [0]):
            for _ in range(4):  # plain, warm-up, capture, replay
                runner.step(random_ids(len(slots), 1), slots)
        for slot in range(4):
            written = runner.lengths[slot]
            after = backend.read_slot(slot, backend.capacity)
            assert_array_equal(after[:, :, written:], marks[slot][:, :, written:])
        assert runner.lengths == [8, 4, 0, 12]


def test_the_last_row_is_usable_and_what_passes_it_is_refused(
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
        assert rows.shape == (2 * model.num_layers, model.num_kv_heads, 23, model.head_dim)
        assert rows.any(axis=(1, 3)).all()
        backend.write_slot(0, rows)
        backend.copy_slot(2, 3, 20)
        backend.copy_slot(1, 1, 5)
        assert_array_equal(backend.read_slot(0, 23), rows)
        assert_array_equal(backend.read_slot(3, 20), rows[:, :, :20])
        assert not backend.read_slot(0, 60)[:, :, 23:].any()
        assert not backend.read_slot(1, 60).any()
        assert backend.read_slot(1, 0).shape[2] == 0
        for wrong in (lambda: backend.read_slot(4, 1), lambda: backend.copy_slot(0, -1, 1)):
            with pytest.raises(BackendError, match="not slots of 4"):
                wrong()
        with pytest.raises(BackendError, match="do not fit a cache of"):
            backend.read_slot(0, CAPACITY + 1)
        with pytest.raises(BackendError, match="do not fit"):
            backend.write_slot(0, rows[1:])
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
        assert_allclose(few.backend.read_slot(0, 24), many.backend.read_slot(0, 24), atol=0.01)


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


# CUDA graphs


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


@pytest.mark.parametrize("seq", [1, 5])
def test_the_cpu_is_free_while_a_step_is_computed(
    dialect: str, seq: int, gpu: FakeGpu, engine_bundles: EngineBundles
):
    """By then the device has been given all of the step, and nothing of it is awaited yet."""
    with GpuRunner(engine_bundles("qwen2", dialect), gpu) as runner:
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
        assert len(runner.engine._graphs) == len(BUCKETS) * len(canonical_windows(6, 4))
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
    "call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "execute_async_v3"]
)
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
        "the package", "libcuda", "cuStreamBeginCapture", "cuGraphInstantiate", "cuGraphLaunch",
        "cuGraphExecDestroy",
    ],
)  # fmt: skip
def test_what_graphs_need_is_tried_at_load(
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


# Planted mistakes: what the stand-in refuses, so that the tests above mean something


_MISTAKES = {
    "cache at two addresses": "is not at the address of",
    "write past the capacity": "rows up to 129 of 128",
    "changed shape under a graph": "changed after the capture",
    "memory freed under a graph": "nothing is allocated at",
    "captured without a run in advance": "captured without a run in advance",
    "unset tensor": "address of logits is not set",
    "shape outside the profile": "not within",
    "no device memory": "no device memory",
    "activations too small": "255 bytes of activations, .* are written",
    "activations of two runs at once": "two runs at once write the same activations",
    "unaligned": "not aligned",
    "upload of a temporary": "freed before the copy of it ran",
    "copy of a temporary": "freed before the copy of it ran",
    "download to a temporary": "freed before the copy of it ran",
    "allocation inside a capture": "not permitted when stream is capturing",
    "allocation beside a global capture": "previous error during capture",
}


@pytest.mark.parametrize(
    ("gpu", "mistake"),
    [
        # cuda-bindings get an address, which says nothing of the life of a temporary.
        *(("pycuda", mistake) for mistake in _MISTAKES),
        *(("cuda-bindings", mistake) for mistake in _MISTAKES if "alloc" in mistake),
    ],
    indirect=["gpu"],
)
def test_the_stand_in_refuses(mistake: str, gpu: FakeGpu, engine_bundles: EngineBundles):
    with GpuRunner(engine_bundles("qwen2", "native"), gpu) as runner:
        backend = runner.engine
        with backend._device.active():
            shape = StepShape(1, 1, 1, 1, 16)
            backend._contexts["decode"].bind(shape)
            backend._put_decode(backend._contexts["decode"], shape)
            backend._stream.synchronize()
        context = backend._contexts["decode"]._context
        device, stream, positions = backend._device, backend._stream, backend._kv_positions

        def err() -> None:
            if mistake == "cache at two addresses":
                context.set_tensor_address("present.1.key", backend._cache.address(2, 3))
            elif mistake == "write past the capacity":
                backend._decode_buffers._cursor[0] = CAPACITY
            elif mistake == "unset tensor":
                context.set_tensor_address("logits", 0)
            elif mistake == "no device memory":
                context._memory = None
            elif mistake == "activations too small":
                context.set_device_memory(backend._activations.address, 255)
            elif mistake == "activations of two runs at once":
                backend._contexts["decode"].enqueue()
                context.execute_async_v3(other.handle)
            elif mistake == "memory freed under a graph":
                backend._activations.close()
                entry = next(iter(backend._graphs._entries.values()))
                entry.graph.launch(backend._stream)
            elif mistake == "shape outside the profile":
                backend._contexts["decode"].bind(StepShape(0, 1, 2, 1, 16))
            elif mistake == "unaligned":
                backend._contexts["decode"]._call("set_tensor_address", "logits", 128)
            elif mistake == "upload of a temporary":
                stream.upload(positions, np.arange(CAPACITY))
            elif mistake == "copy of a temporary":
                source = cuda.Box(np.arange(CAPACITY), 8 * CAPACITY, 1)
                target = cuda.Box(positions, 8 * CAPACITY, 1)
                copy = cuda.BoxCopy(device)
                copy.run(target, source, width=8, height=1, depth=1, stream=stream)
                del source
            elif mistake == "download to a temporary":
                stream.download(np.empty(CAPACITY, np.int64), positions)
            elif mistake == "allocation inside a capture":
                device.begin_capture(stream)
                cuda.DeviceMemory(device, 256, "a test")
            elif mistake == "allocation beside a global capture":
                mode = CaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
                device.graph_call("test", "cuStreamBeginCapture", stream.handle, mode)
                with ThreadPoolExecutor(1) as thread:
                    refused = thread.submit(attempt, lambda: allocate(device)).result()
                assert "not permitted when stream is capturing" in str(refused)
                device.end_capture(stream)
            elif mistake == "captured without a run in advance":
                context.set_input_shape("kv_positions", (16,))
                backend._device.begin_capture(backend._stream)
            else:
                entry = next(iter(backend._graphs._entries.values()))
                entry.context._context.set_input_shape("kv_positions", (16,))
                entry.graph.launch(backend._stream)
            backend._decode_buffers.upload(backend._stream, 1, 1, 1)
            backend._contexts["decode"].enqueue()
            backend._stream.synchronize()

        with backend._device.active():
            other = cuda.Stream(device)
            with pytest.raises((RuleError, BackendError), match=_MISTAKES[mistake]):
                err()
            backend._device.abandon_capture(backend._stream)
            other.close()
        gpu.streams[backend._stream.handle].pending.clear()


def allocate(device: cuda.Device) -> None:
    """And wait, and free: what any other user of the GPU does in its own thread."""
    with device.active():
        memory, stream = cuda.DeviceMemory(device, 256, "a test"), cuda.Stream(device)
        stream.synchronize()
        memory.close()


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


@both_drivers
def test_the_stand_in_poisons_what_is_read_too_early(gpu: FakeGpu, engine_bundles: EngineBundles):
    with GpuRunner(engine_bundles("qwen2", "native"), gpu) as runner:
        backend = runner.engine
        backend._stream.synchronize = lambda: None  # type: ignore[method-assign]
        assert np.isnan(runner.step(random_ids(1, 3), [1])).all()
        del backend._stream.synchronize
        with backend._device.active():
            backend._stream.synchronize()


# Which engine


def test_the_engine_of_another_machine_is_refused_with_the_command(
    gpu: FakeGpu, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    require_kernels("native")  # at the end ``auto`` falls back to it on the CPU
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundles("qwen2", "native"), bundle)
    manifest = read_manifest(bundle)
    with pytest.raises(BundleError, match=f"no TensorRT engine; .* edge-llm build {bundle}"):
        TensorRTBackend(bundle, manifest)
    write_engine(bundle, name="a", compute_capability="8.6", **ENGINE)  # type: ignore[arg-type]
    command = f"edge-llm build {bundle} --max-batch 4 --kv-capacity 128"
    with pytest.raises(BundleError, match=rf"another GPU \(sm 8.6, here sm 8.7\).*{command}"):
        TensorRTBackend(bundle, manifest)
    write_engine(bundle, name="b", version="10.15.1.2", **ENGINE)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"another TensorRT .*10.15.1.2, here tensorrt 10.16.2"):
        TensorRTBackend(bundle, manifest, bundle / "engines" / "b")
    write_engine(bundle, name="c", **{**ENGINE, "max_batch": 1})  # type: ignore[arg-type]
    write_engine(bundle, name="d", **{**ENGINE, "max_batch": 2})  # type: ignore[arg-type]
    for wanted, expected in ((None, 1), (1, 1), (2, 2), (3, 2)):
        backend = TensorRTBackend(bundle, manifest, num_slots=wanted)
        assert backend.info.max_batch == expected
        assert backend.num_slots == (wanted or 1)
        backend.close()
    with pytest.raises(BundleError, match=r"capacity of 128 tokens, 64 were asked for.* 64 "):
        TensorRTBackend(bundle, manifest, bundle / "engines" / "c", kv_capacity=64)
    write_engine(bundle, name="e", flavour="tensorrt-rtx", **ENGINE)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DependencyError, match="needs tensorrt_rtx"):
        TensorRTBackend(bundle, manifest, bundle / "engines" / "e")
    assert not gpu.alive


def test_a_damaged_plan_is_never_deserialized(gpu: FakeGpu, tiny_bundles: Bundles, tmp_path: Path):
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundles("qwen2", "portable"), bundle)
    directory = write_engine(bundle, **ENGINE)  # type: ignore[arg-type]
    plan = directory / read_engine_info(directory).plan
    data = bytearray(plan.read_bytes())
    data[-2] ^= 1
    plan.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"damaged.*edge-llm build"):
        TensorRTBackend(bundle, read_manifest(bundle))
    assert "deserialize_cuda_engine" not in gpu.calls


def test_an_engine_that_is_not_as_its_record_says(
    gpu: FakeGpu, tiny_bundles: Bundles, tmp_path: Path
):
    """A plan of three profiles and a record of one: refused before an address is set."""
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundles("qwen2", "portable"), bundle)
    directory = write_engine(bundle, **ENGINE)  # type: ignore[arg-type]
    info = read_engine_info(directory)
    wrong = msgspec.structs.replace(info, profiles=info.profiles[:1])
    (directory / "engine.json").write_bytes(msgspec.json.encode(wrong))
    with pytest.raises(BackendError, match=r"not the one that engine.json describes: 3 profiles"):
        TensorRTBackend(bundle, read_manifest(bundle))


@pytest.mark.parametrize("option", ["num_slots", "max_graphs", "max_logits"])
def test_numbers_out_of_range(option: str, gpu: FakeGpu, engine_bundles: EngineBundles):
    bundle = engine_bundles("qwen2", "portable")
    with pytest.raises(ConfigError, match=f"{option} 0 must be positive"):
        TensorRTBackend(bundle, read_manifest(bundle), **{option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("max_batch", [1, 4])
def test_slots_that_tensorrt_could_not_address(
    max_batch: int,
    gpu: FakeGpu,
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """With one slot, too, each layer's values follow its keys; a build refuses it as well."""
    monkeypatch.setattr("engines.config.check_slots", lambda *_: None)
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundles("qwen2", "portable"), bundle)
    size = {"max_batch": max_batch, "kv_capacity": 101, "kv_buckets": (16, 101)}
    write_engine(bundle, **{**ENGINE, **size})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--kv-capacity that is a multiple of 4"):
        TensorRTBackend(bundle, read_manifest(bundle))


def test_an_odd_capacity_runs_where_its_slots_are_aligned(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    """CUDA promises 256 bytes and no more, and the stand-in gives no more."""
    size = {"max_batch": 1, "kv_capacity": 100, "kv_buckets": (17, 100)}
    bundle = engine_bundles("qwen2", "portable", **size)
    with GpuRunner(bundle, gpu) as ours, Runner(bundle) as theirs:
        assert {address % 512 for address in gpu.blocks} == {256}
        for ids in (random_ids(1, 19), random_ids(1, 1), random_ids(1, 1)):
            assert_allclose(ours.step(ids), theirs.step(ids), atol=ATOL, rtol=0)


def read_from_an_input(graph: bytes) -> bytes:
    """The cache is read up to the number in an input, not up to the length of one."""
    changed = OnnxFile(graph)
    for node in changed.nodes:
        if node.op_type == "Slice":
            node.inputs[2] = io_spec.WRITE_INDICES
    return changed.serialize()


def test_a_tensor_that_tensorrt_wants_on_the_host_is_refused(
    gpu: FakeGpu, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundles("qwen2", "native"), bundle)
    manifest = read_manifest(bundle)
    size = {**ENGINE, "max_batch": 1}
    build = plan_build(BuildConfig(bundle, **size), manifest)  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="write_indices is a shape tensor without values"):
        fake_plan(build, change=read_from_an_input)
    # Some other tool has built it.
    set_shape = OptimizationProfile.set_shape

    def with_values(self: OptimizationProfile, input: str, *shapes: tuple[int, ...]) -> None:
        set_shape(self, input, *shapes)
        self.set_shape_input(input, *shapes)

    monkeypatch.setattr(OptimizationProfile, "set_shape", with_values)
    write_engine(bundle, plan=fake_plan(build, change=read_from_an_input), **size)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="write_indices is wanted on the host"):
        TensorRTBackend(bundle, manifest)
    everything = {t.name for t in io_spec.decoder_inputs(manifest.model, "native", "fp16", 128)}
    monkeypatch.setattr(Engine, "_check", lambda engine, *_: setattr(engine, "tensors", everything))
    with pytest.raises(RuleError, match="write_indices is read on the host"):
        TensorRTBackend(bundle, manifest)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("pycuda.driver", "needs PyCUDA or cuda-bindings.*pip install pycuda"),
        ("tensorrt", "needs tensorrt.*JetPack.*install .*-e .*\\[tensorrt\\]"),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(
    package: str,
    message: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    monkeypatch: pytest.MonkeyPatch,
):
    bundle = engine_bundles("qwen2", "portable")
    monkeypatch.setitem(sys.modules, package, None)
    if package == "pycuda.driver":
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DependencyError, match=message):
        TensorRTBackend(bundle, read_manifest(bundle))


def test_a_tensorrt_that_does_not_start_says_why(
    gpu: FakeGpu, engine_bundles: EngineBundles, monkeypatch: pytest.MonkeyPatch
):
    bundle = engine_bundles("qwen2", "portable")
    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", start_nothing)
    with pytest.raises(DependencyError, match=f"does not start: {NO_CUDA}; edge-llm doctor"):
        TensorRTBackend(bundle, read_manifest(bundle))


@both_drivers
@pytest.mark.parametrize("wish", ["spin", "yield", "block"])
def test_the_engine_waits_as_it_was_asked_to(
    wish: GpuWait, gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", "portable")
    with GpuRunner(bundle, gpu, gpu_wait=wish) as runner:
        assert runner.engine.gpu_wait == wish
        flags = gpu.context_flags
        with GpuRunner(bundle, gpu) as another:  # such as a draft model, which names no way
            assert another.engine.gpu_wait == wish
            another.step(random_ids(1, 1))
        assert gpu.context_flags == flags == {"spin": 1, "yield": 2, "block": 4}[wish]


# Memory


@both_drivers
def test_the_memory_plan_is_what_is_allocated(
    dialect: str, gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", dialect)
    manifest = read_manifest(bundle)
    [directory] = find_engines(bundle)
    info = read_engine_info(directory)
    with GpuRunner(bundle, gpu) as runner:
        allocated = sum(block.nbytes for block in gpu.blocks.values())
        memory = runner.engine.memory
        num_contexts = len(runner.engine._contexts) + len(runner.engine._graphs)
        # TensorRT takes the weights when it loads the plan, which has little more, and something
        # for every context.
        of_tensorrt = gpu.reserved_bytes - num_contexts * CONTEXT_BYTES
    assert 0 <= memory.weights_bytes - of_tensorrt < 16 << 10
    assert memory.device_bytes - memory.weights_bytes == allocated
    assert not memory.activations_estimated
    planned = plan_engine_memory(info, manifest, integrated=False)
    assert planned.activations_estimated
    assert planned.cache_bytes == memory.cache_bytes == runner.engine.cache_bytes
    assert (planned.io_bytes, planned.pinned_bytes) == (memory.io_bytes, memory.pinned_bytes)
    assert set(planned.to_dict()) == {
        "weights_bytes", "cache_bytes", "activations_bytes", "activations_estimated", "io_bytes",
        "pinned_bytes", "integrated", "device_bytes",
    }  # fmt: skip
    shared = plan_engine_memory(info, manifest, integrated=True)
    assert shared.io_bytes == planned.io_bytes - planned.pinned_bytes


@both_drivers
def test_too_little_memory_says_what_was_needed_and_which_knob(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", "native")
    gpu.total_bytes = 100_000
    with pytest.raises(DeviceMemoryError, match=r"MB of GPU memory, but .* free.*--kv-capacity"):
        TensorRTBackend(bundle, read_manifest(bundle))
    assert DeviceMemoryError.exit_code == 71


def test_activations_that_do_not_fit_are_refused_before_anything_is_allocated(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    """A Jetson would grant it all and kill the process later; only the engine knows its need."""
    bundle = engine_bundles("qwen2", "native", planted=Planted(scratch_bytes=64 << 20))
    manifest = read_manifest(bundle)
    [directory] = find_engines(bundle)
    info = read_engine_info(directory)
    known = plan_engine_memory(info, manifest, integrated=False, activations_bytes=0)
    gpu.total_bytes = known.device_bytes + (1 << 20)
    with pytest.raises(DeviceMemoryError, match="the rest needs"):
        TensorRTBackend(bundle, manifest)
    assert not {"cuMemAlloc", "cuMemHostAlloc"} & set(gpu.calls)


# Faults


def attempt(work: Callable[[], Any]) -> EdgeError | None:
    """The error of the product; anything else that is raised fails the test."""
    try:
        work()
    except EdgeError as error:
        return error
    return None


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
    num_graphs: list[int] = []

    def load() -> None:
        backend = TensorRTBackend(bundle, manifest, max_graphs=2)
        num_graphs.append(len(backend._graphs))
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
        if error is None:  # a graph is missing, the call returns nothing, or closing failed
            assert num_graphs[-1] < 2 or gpu.calls[gpu.fail_at] in {*quiet, "cuCtxPopCurrent"}
        else:
            assert len(str(error)) > 20, "a sentence, not a name"
            assert error.exit_code in (69, 70, 71)
        gpu.fail_at = gpu.lost = error = None  # its traceback holds the stream
        assert gpu.depth == 0
        gc.collect()
        assert not gpu.alive, (number, gpu.calls[before + number])
    TensorRTBackend(bundle, manifest).close()


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
    assert len(places) > 30
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
            runner.backend.read_slot(0, 1)


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
            policy = llm.scheduler._core.policy
            always = functools.partial(policy.trial, budget_s=1e9)
            monkeypatch.setattr(policy, "trial", lambda drafts, _: always(drafts))
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

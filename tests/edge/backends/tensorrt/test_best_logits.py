"""Engines that put out the best logits of each row by themselves."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.backends.best import BestLogits
from edge.backends.cuda import Stream
from edge.backends.step import step_after
from edge.backends.tensorrt import step_buffers
from edge.backends.tensorrt.device_memory import plan_engine_memory
from edge.bundle import io_spec
from edge.bundle.engine_file import find_engines, read_engine_info
from edge.bundle.manifest import SamplingDefaults, read_manifest
from edge.errors import BackendError, ConfigError
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from engines.build_plan import plan_build
from engines.config import BuildConfig
from engines.graph.adapt import graph_of
from engines.rules.check import check_graph
from engines.rules.table import VERSIONS
from tests.edge.backends.runner import random_ids
from tests.edge.backends.tensorrt.gpu_runner import (
    DIALECTS,
    ENGINE,
    EngineBundles,
    GpuRunner,
    both_drivers,
)
from tests.standins.cuda import FakeGpu

KEEP = 256  # as documented: a decode step's come in one copy, a prompt's in three


@pytest.fixture
def downloaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each copy from the device that is put on a stream."""
    found: list[int] = []
    download = Stream.download

    def noted(self: Stream, target: NDArray[Any], source: int) -> None:
        found.append(target.nbytes)
        download(self, target, source)

    monkeypatch.setattr(Stream, "download", noted)
    return found


def best_step(
    runner: GpuRunner, ids: NDArray[np.int64], slots: list[int]
) -> list[list[BestLogits]]:
    """As `Runner.step`."""
    starts = [runner.lengths[slot] for slot in slots]
    indices = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    assert runner.engine.forward_best is not None
    found = runner.engine.forward_best(step_after(slots, starts, runner.table[ids], indices))
    assert isinstance(found, list)
    for slot in slots:
        runner.lengths[slot] += ids.shape[1]
    return found


@both_drivers
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("integrated", [False, True])
def test_they_are_the_best_of_the_row_that_stays_on_the_device(
    dialect: str,
    integrated: bool,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    downloaded: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    """In a prompt of several logits, and in decode steps; all are graphs."""
    gpu.integrated = integrated
    if dialect == "portable":  # as where a row keeps many: values, ids and masses come one by one
        monkeypatch.setattr(step_buffers, "_ONE_COPY_BYTES", 0)
    bundle = engine_bundles("qwen2", dialect, best_logits=KEEP)
    vocab = read_manifest(bundle).model.vocab_size
    with GpuRunner(bundle, gpu) as ours, GpuRunner(bundle, gpu) as theirs:
        # The last one leaves no place of its graph idle.
        steps = [(random_ids(1, 9), [2]), (random_ids(1, 3), [0]), (random_ids(1, 24), [1])]
        steps += [(random_ids(2, 1, seed=n), [2, 0]) for n in range(5)]
        for ids, slots in steps:
            whole = theirs.step(ids, slots)
            downloaded.clear()
            found = best_step(ours, ids, slots)
            least = whole[0, 0].astype(np.float16).nbytes
            assert all(size < 8 * KEEP * 64 + 512 for size in downloaded)
            for rows, expected in zip(found, whole, strict=True):
                assert len(rows) == len(expected)
                for best, row in zip(rows, expected, strict=True):
                    assert (best.vocab_size, best.dtype) == (vocab, "fp16")
                    assert_array_equal(best.values, np.sort(row)[::-1][:KEEP])
                    assert_array_equal(row[best.ids], best.values)
                    others = np.delete(row, best.ids).astype(np.float64)
                    mass = np.exp(others - float(row.max())).sum()
                    assert abs(best.rest - mass) < 0.03 * mass
                    assert mass < best.rest_bound() < 1.1 * mass + 0.01
                    downloaded.clear()
                    assert_array_equal(best.row(), row)
                    assert downloaded == [least]  # its search read it on the GPU
        assert gpu.calls.count("cuGraphLaunch") == 2 + 2 * 8  # and one trial for each backend
        assert_array_equal(ours.cache(2), theirs.cache(2))


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.95}, {"top_k": 5}], ids=str
)
def test_answers_are_those_of_whole_rows(
    options: dict[str, Any], gpu: FakeGpu, engine_bundles: EngineBundles
):
    params = SamplingParams(**options, seed=5).resolve(SamplingDefaults())
    plain = engine_bundles("qwen2", "portable")
    chosen = engine_bundles("qwen2", "portable", best_logits=KEEP)
    with GpuRunner(chosen, gpu) as ours, GpuRunner(plain, gpu) as theirs:
        assert theirs.engine.forward_best is None
        vocab = ours.manifest.model.vocab_size
        part, whole = Sampler(params, vocab), Sampler(params, vocab)
        ids = random_ids(1, 4)
        for _ in range(20):
            token = part.sample(best_step(ours, ids, [1])[0][-1])
            assert token == whole.sample(theirs.step(ids, [1])[0, -1])
            ids = np.array([[token.id]])


def test_a_step_past_the_cache_is_refused(gpu: FakeGpu, engine_bundles: EngineBundles):
    with GpuRunner(engine_bundles("qwen2", "portable", best_logits=KEEP), gpu) as runner:
        backend, embeds = runner.engine, runner.table[random_ids(1, 1)]
        assert backend.forward_best is not None
        with pytest.raises(BackendError, match="does not fit a cache of"):
            backend.forward_best(step_after([0], [2 * backend.capacity], embeds, np.array([[0]])))


def test_rows_come_whole_where_one_run_does_not_hold_them(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", "portable", best_logits=KEEP)
    with GpuRunner(bundle, gpu, num_slots=6, max_logits=5) as runner:
        forward = runner.engine.forward_best
        assert forward is not None
        for slots, num in (([0, 5], 1), ([1], 9)):
            ids = random_ids(len(slots), num)
            wanted = np.broadcast_to(np.arange(num), ids.shape)
            step = step_after(slots, [0] * len(slots), runner.table[ids], wanted)
            found = forward(step)
            assert isinstance(found, np.ndarray)
            assert_array_equal(found, runner.engine.forward(step))


def test_a_row_of_an_earlier_step_or_of_a_closed_engine_is_refused(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    bundle = engine_bundles("qwen2", "portable", best_logits=KEEP)
    runner = GpuRunner(bundle, gpu)
    with runner:
        ((old,),) = best_step(runner, random_ids(1, 1), [0])
        old.row()
        ((new,),) = best_step(runner, random_ids(1, 1), [0])
        with pytest.raises(BackendError, match="after the engine's next step"):
            old.row()
        new.row()
    with pytest.raises(BackendError, match="closed"):
        new.row()


@pytest.mark.parametrize("integrated", [False, True])
def test_the_memory_plan_knows_them(integrated: bool, gpu: FakeGpu, engine_bundles: EngineBundles):
    gpu.integrated = integrated
    plans = []
    for options in ({}, {"best_logits": KEEP}):
        bundle = engine_bundles("qwen2", "portable", **options)
        info = read_engine_info(find_engines(bundle)[0])
        plans.append(plan_engine_memory(info, read_manifest(bundle), integrated=integrated))
        with GpuRunner(bundle, gpu) as runner:
            memory = runner.engine.memory
            assert memory.io_bytes == plans[-1].io_bytes
            assert memory.pinned_bytes == plans[-1].pinned_bytes
    assert plans[1].pinned_bytes > plans[0].pinned_bytes
    assert plans[1].activations_bytes >= plans[0].activations_bytes


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_tensorrt_of_the_rules_takes_the_graph(dialect: str, engine_bundles: EngineBundles):
    bundle = engine_bundles("qwen2", dialect)
    manifest = read_manifest(bundle)
    plain, best = (
        plan_build(BuildConfig(bundle=bundle, **ENGINE, best_logits=keep), manifest)  # type: ignore[arg-type]
        for keep in (0, KEEP)
    )
    assert best.changes_graph
    assert best.rebuild_options()["best_logits"] == KEEP
    pairs = zip(
        check_graph(graph_of(best), bundle, VERSIONS),
        check_graph(graph_of(plain), bundle, VERSIONS),
        strict=True,
    )
    for found, before in pairs:
        assert found.refusals == before.refusals


def test_the_number_is_in_range_and_for_models_that_draw(engine_bundles: EngineBundles):
    bundle = engine_bundles("qwen2", "portable")
    for number in (-1, io_spec.MOST_BEST_LOGITS + 1):
        with pytest.raises(ConfigError, match=r"--best-logits .* is out of range: 0 to 1024"):
            BuildConfig(bundle=bundle, best_logits=number)
    manifest = read_manifest(bundle)
    judge = msgspec.structs.replace(manifest.model, task="rerank")
    config = BuildConfig(bundle=bundle, best_logits=KEEP, max_prefill=24, kv_capacity=64)
    with pytest.raises(ConfigError, match="is for drawing tokens"):
        plan_build(config, msgspec.structs.replace(manifest, model=judge))


@pytest.mark.parametrize(
    ("vocab_size", "parts"), [(151_936, 128), (128_256, 334), (49_152, 192), (7919, 1), (1, 1)]
)
def test_rows_are_summed_in_parts(vocab_size: int, parts: int):
    """A prime vocabulary has one part: its bound is wide, and still a bound."""
    assert io_spec.sum_parts(vocab_size) == parts
    assert io_spec.sum_error(vocab_size) < (1.2e-4 if parts > 1 or vocab_size == 1 else 1e-3)

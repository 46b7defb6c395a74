"""Adapters on the stand-in for TensorRT: profiles at both ranks, slots and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from edge.adapters.graph_inputs import SECTION, section, slot_values
from edge.adapters.weights import AdapterWeights
from edge.backends.tensorrt.device_memory import plan_engine_memory
from edge.bundle.engine_file import read_engine_info
from edge.bundle.manifest import read_manifest
from edge.errors import BackendError, ConfigError
from engines.build_plan import plan_build
from engines.config import BuildConfig
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import Checkpoints, require_kernels
from tests.edge.backends.runner import Runner, random_ids
from tests.edge.backends.tensorrt.gpu_runner import ATOL, CAPACITY, ENGINE, GpuRunner
from tests.makers.run_time_adapters import random_adapter
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import write_engine

RANK = 8
SLOTS = 4
IDS = random_ids(SLOTS, 8, seed=5)
Engines = Callable[..., Path]


@pytest.fixture(scope="module")
def engines(tiny_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    made: dict[str, Path] = {}

    def bundle(dialect: str = "native", rank: int = RANK) -> Path:
        require_kernels(dialect)
        key = f"{dialect}-{rank}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("engines") / "bundle"
            export_checkpoint(
                ExportConfig(
                    source=str(tiny_checkpoints("qwen2")),
                    output=made[key],
                    quant="fp16",
                    dialect=dialect,  # type: ignore[arg-type]
                    adapters=rank or None,
                    kv_capacity=CAPACITY,
                )
            )
            options: dict[str, Any] = dict(ENGINE)
            write_engine(made[key], **options)
        return made[key]

    return bundle


def run(runner: Runner) -> NDArray[np.float32]:
    """Logits of a prompt of each slot, of two decode steps of all, and of one of two slots."""
    runner.lengths = [0] * SLOTS
    found = [runner.step(IDS[slot : slot + 1, :5], [slot])[:, -1] for slot in range(SLOTS)]
    steps = [runner.step(IDS[:, at : at + 1], list(range(SLOTS)))[:, 0] for at in (5, 6)]
    last = runner.step(IDS[[0, 3], 7:8], [0, 3])[:, 0]
    return np.concatenate([*found, *steps, last])


def give(runner: Runner, *adapters: AdapterWeights | None) -> None:
    for slot, adapter in enumerate(adapters):
        runner.backend.set_adapter(slot, adapter)


@pytest.mark.parametrize("graphs", [True, False])
def test_each_slot_has_its_own_adapter(graphs: bool, dialect: str, engines: Engines, gpu: FakeGpu):
    with GpuRunner(engines(dialect, 0), gpu, num_slots=SLOTS) as without:
        expected = run(without)
        with pytest.raises(BackendError, match="export it again with --adapters"):
            without.backend.set_adapter(0, None)
    bundle = engines(dialect)
    options: dict[str, Any] = {"num_slots": SLOTS, "use_cuda_graphs": graphs}
    with GpuRunner(bundle, gpu, **options) as runner, Runner(bundle) as reference:
        assert runner.backend.adapter_rank == RANK
        model = runner.manifest.model
        one, two = random_adapter(model, RANK), random_adapter(model, 3, seed=1)
        assert_array_equal(run(runner), expected)
        for adapters in (
            (None, one, None, two),
            (one, one, two, two),
            (two, None, None, None),
            (None, None, one, None),
        ):
            for each in (runner, reference):
                give(each, *adapters)
            wanted = run(reference)
            assert_allclose(run(runner), wanted, atol=ATOL)
            assert np.abs(wanted - expected).max() > 1
        give(runner, None, None, None, None)
        assert_array_equal(run(runner), expected)


def test_a_slot_that_lost_its_adapter_is_plain_beside_others(engines: Engines, gpu: FakeGpu):
    with GpuRunner(engines(rank=0), gpu, num_slots=SLOTS) as without:
        expected = run(without)
    with GpuRunner(engines(), gpu, num_slots=SLOTS) as runner:
        one = random_adapter(runner.manifest.model, RANK)
        give(runner, one, one, one, one)
        run(runner)
        give(runner, None, one, None, None)
        found = run(runner)
        plain = [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13]
        assert_array_equal(found[plain], expected[plain])


def test_steps_at_both_ranks_are_captured(engines: Engines, gpu: FakeGpu):
    with GpuRunner(engines(), gpu, num_slots=SLOTS) as runner:
        shapes = runner.engine._graphs._entries
        ranks = [shape.rank for shape in shapes]
        assert ranks.count(0) == ranks.count(RANK) > 1
        give(runner, random_adapter(runner.manifest.model, RANK))
        contexts = [context._bound for context in runner.engine._contexts.values()]
        run(runner)
        assert [context._bound for context in runner.engine._contexts.values()] == contexts


def test_profiles_come_at_rank_0_and_at_the_bundles(engines: Engines):
    bundle = engines()
    (directory,) = (bundle / "engines").iterdir()
    info = read_engine_info(directory, None)
    half = len(info.profiles) // 2
    for plain, adapted in zip(info.profiles[:half], info.profiles[half:], strict=True):
        assert adapted.name == f"{plain.name}-adapters"
        for name, shape in adapted.inputs.items():
            if not name.startswith("adapters."):
                assert plain.inputs[name] == shape
                continue
            dim = 1 if name.endswith(".a") else 2
            assert {each[dim] for each in (plain.inputs[name].min, plain.inputs[name].max)} == {0}
            assert shape.min[dim] == shape.max[dim] == shape.opt[dim]
            assert shape.max[dim] % RANK == 0 < shape.max[dim]


def test_the_plan_of_memory_has_the_adapters_of_all_slots(engines: Engines):
    sizes, model = [], read_manifest(engines()).model
    for rank in (0, RANK):
        bundle = engines(rank=rank)
        (directory,) = (bundle / "engines").iterdir()
        manifest = read_manifest(bundle)
        info = read_engine_info(directory, None)
        sizes.append(plan_engine_memory(info, manifest, num_slots=SLOTS, integrated=False).io_bytes)
    assert sizes[1] - sizes[0] == 2 * (SLOTS + 1) * slot_values(model, RANK)


def test_a_rank_with_unaligned_slots_is_refused(engines: Engines):
    bundle = engines(rank=0)
    manifest = read_manifest(bundle)
    odd = msgspec.structs.replace(manifest, extras={SECTION: section(manifest.model, 3)})
    with pytest.raises(ConfigError, match="--adapters 4, a multiple of 2"):
        plan_build(BuildConfig(bundle=bundle, max_prefill=24), odd)

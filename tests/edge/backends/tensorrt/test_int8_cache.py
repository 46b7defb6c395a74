"""The 8-bit KV cache of an engine, on the stand-ins of `cuda` and `tensorrt`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.backends.tensorrt.device_memory import (
    CachePlanes,
    StepSizes,
    cache_planes,
    new_rows_bytes,
    new_rows_stride,
    plan_engine_memory,
)
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import io_spec
from edge.bundle.engine_file import find_engines, read_engine_info
from edge.bundle.kv_scales import quantize_rows, scales_sha256
from edge.bundle.manifest import Calibration, KvCache, read_manifest
from edge.errors import BackendError, ConfigError, IntegrityError
from edge.model.cache import ElementType, Rows
from engines.build_plan import plan_build
from engines.config import BuildConfig
from tests.conftest import Bundles
from tests.edge.backends.runner import Runner, random_ids
from tests.edge.backends.tensorrt.gpu_runner import CAPACITY, EngineBundles, GpuRunner, both_drivers
from tests.makers.goldens import FP16_KERNELS
from tests.makers.manifests import as_written_before_scales, make_manifest, make_model
from tests.makers.tiny_models import KINDS
from tests.standins.cuda import FakeGpu
from tests.standins.slot_rows import by_name, stacked

# The engine rounds to 8 bits what is fp16, the reference what is fp32: a value between two integers
# may go either way, and then a row differs by a whole step.
LARGEST, MEAN = (0.6, 0.05) if not FP16_KERNELS else (0.8, 0.07)


def check(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    difference = np.abs(ours - theirs)
    assert difference.max() < LARGEST
    assert difference.mean() < MEAN


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_cpu_computes(
    kind: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
) -> None:
    """Chunks into any slot, decode over the borders of buckets with an idle slot between."""
    bundle = engine_bundles(kind, "portable", "int8")
    slots = [2, 0, 3]
    with GpuRunner(bundle, gpu) as ours, Runner(bundle) as theirs:
        for slot, length in zip(slots, (40, 7, 25), strict=True):
            prompt = random_ids(1, length, seed=length)
            for at in range(0, length, 24):
                part = prompt[:, at : at + 24]
                check(ours.step(part, [slot]), theirs.step(part, [slot]))
        for step in range(30):
            ids = random_ids(3, 1, seed=step)
            check(ours.step(ids, slots), theirs.step(ids, slots))
        for slot in slots:
            for plane, scale in ours.backend.kv_scales.items():
                one, other = (
                    quantize_rows(by_name(runner.cache(slot))[plane], scale)
                    for runner in (ours, theirs)
                )
                steps = np.abs(one.astype(int) - other)
                assert steps.max() <= (1 if plane.startswith("0.") else 6 if FP16_KERNELS else 3)
                assert steps.mean() < (0.4 if FP16_KERNELS else 0.2)
        assert not stacked(ours.backend.read_slot(1, ours.backend.capacity)).any()
        expected = io_spec.kv_bytes_per_token(
            ours.manifest.model, "fp16", ours.manifest.int8_layers
        )
        assert ours.backend.cache_bytes == expected * CAPACITY * 5  # prompts have their own slot
        assert ours.engine._cache.num_bytes == ours.backend.cache_bytes


@both_drivers
def test_slots_are_read_written_and_copied_without_loss(
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
) -> None:
    bundle = engine_bundles("qwen2", "portable", "int8")
    with GpuRunner(bundle, gpu) as runner:
        runner.step(random_ids(1, 20), [1])
        rows = runner.cache(1)
        assert rows.dtype == np.float32
        runner.backend.write_slot(3, by_name(rows))
        runner.backend.copy_slot(3, 0, 20)
        for slot in (0, 3):
            assert_array_equal(stacked(runner.backend.read_slot(slot, 20)), rows)
        spoilt = rows.copy()
        spoilt[1, 0, 3, 2] = np.inf
        with pytest.raises(BackendError, match="not finite"):
            runner.backend.write_slot(3, by_name(spoilt))
        assert_array_equal(stacked(runner.backend.read_slot(3, 20)), rows)


def test_a_bundle_without_scales_in_its_manifest_computes_the_same(
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    tmp_path: Path,
) -> None:
    newer, older = engine_bundles("qwen2", "portable", "int8"), tmp_path / "bundle"
    shutil.copytree(newer, older)
    as_written_before_scales(older)
    found = []
    for bundle in (newer, older):
        with GpuRunner(bundle, gpu) as runner:
            logits = runner.step(random_ids(1, 20), [1])
            found.append((logits, runner.cache(1), scales_sha256(runner.backend.kv_scales)))
    assert_array_equal(found[0][0], found[1][0])
    assert_array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_the_graph_that_has_the_scales_is_checked(
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(engine_bundles("qwen2", "portable", "int8"), bundle)
    as_written_before_scales(bundle)
    manifest = read_manifest(bundle)
    path = bundle / manifest.graphs.decoder
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"decoder\.onnx is damaged"):
        TensorRTBackend(bundle, manifest)


def _mixed(num_layers: int, *kept: int) -> KvCache:
    calibration = Calibration("built-in", "0" * 64, 512, 512, 0)
    return KvCache("int8", (0.1,) * num_layers, 0.25, kept, calibration)


def test_layers_in_float_have_a_block_of_their_own() -> None:
    model = make_model(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
    manifest = make_manifest(model=model, kv_cache=_mixed(3, 1), dialect="portable")
    floats, int8 = sorted(cache_planes(manifest), key=lambda planes: planes.rows.type == "int8")
    assert (floats.names, floats.rows.row_bytes) == (["1.key", "1.value"], 64)
    assert int8.names == ["0.key", "0.value", "2.key", "2.value"]
    assert int8.rows.row_bytes == 32
    per_token = io_spec.kv_bytes_per_token(model, "fp16", manifest.int8_layers)
    assert per_token == 2 * 16 * (4 * 1 + 2 * 2)


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_new_rows_of_any_size_are_aligned_and_fit(kind: ElementType) -> None:
    rows = Rows(3, 64, kind)
    planes = CachePlanes(["0.key"] * 5, rows)
    sizes = StepSizes(4, 24, 64)
    for batch, seq in ((1, 24), (4, 1), (4, 6), (2, 7), (1, 1)):
        stride = new_rows_stride(batch, seq, rows)
        assert stride % 256 == 0
        assert stride % (seq * rows.row_bytes // 3) == 0
        assert stride >= batch * seq * rows.row_bytes
        assert 5 * stride <= new_rows_bytes(sizes, planes)


def test_a_capacity_of_unaligned_slots_is_refused(tiny_bundles: Bundles) -> None:
    def plan(bundle: Path, capacity: int) -> None:
        config = BuildConfig(bundle, max_batch=2, max_prefill=8, kv_capacity=capacity)
        plan_build(config, read_manifest(bundle))

    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    plan(bundle, 64)
    with pytest.raises(ConfigError, match="multiple of 8"):
        plan(bundle, 68)
    plain = tiny_bundles("qwen2", "portable")
    plan(plain, 68)


def test_the_plan_counts_single_bytes(
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
) -> None:
    found = []
    for kv_cache in ("float", "int8"):
        bundle = engine_bundles("qwen2", "portable", kv_cache)
        (engine,) = find_engines(bundle)
        found.append(plan_engine_memory(read_engine_info(engine), read_manifest(bundle)))
    plain, int8 = found
    assert plain.cache_bytes == 2 * int8.cache_bytes
    assert plain.io_bytes > int8.io_bytes

"""The TensorRT runner on a real GPU: a tiny engine is built here and held against the CPU.

Skipped without a GPU. What is checked is what no stand-in can show: that TensorRT, PyCUDA or
cuda-bindings take these calls, that the numbers agree, and that CUDA graphs replay them.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.backends import cuda
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import io_spec
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import read_manifest
from edge.engine_config import GpuWait
from edge.errors import DependencyError, DeviceMemoryError
from tests.conftest import Bundles, require_kernels
from tests.edge.backends.runner import Runner, random_ids
from tests.standins.slot_rows import by_name, stacked

pytestmark = pytest.mark.gpu

# fp16 against fp32 on logits of size 10, with TensorRT's own order of summation.
ATOL = 0.25
CAPACITY = 128


class GpuRunner(Runner):
    """A `Runner` on the GPU."""

    def __init__(self, bundle: Path, **options: Any) -> None:
        self.manifest = read_manifest(bundle)
        self.engine = TensorRTBackend(bundle, self.manifest, **options)
        self.backend = self.engine  # type: ignore[assignment]
        self.table = EmbeddingTable(bundle / io_spec.EMBEDDINGS_NAME)
        self.lengths = [0] * self.engine.num_slots

    def __enter__(self) -> GpuRunner:
        return self


# PyCUDA need not be there, and is no test to skip then: cuda-bindings do all that it does.
DRIVERS = ["cuda-bindings"] if find_spec("pycuda") is None else ["pycuda", "cuda-bindings"]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What calls CUDA; the whole of it goes through both."""
    name: str = request.param
    if name == "cuda-bindings":
        monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    return name


@pytest.fixture(scope="module")
def built(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Bundles with an engine for the GPU that is here."""
    from engines.builder.build import build_engine
    from engines.config import BuildConfig

    root = tmp_path_factory.mktemp("built")

    @functools.cache
    def make(kind: str, dialect: str, quant: str = "fp16") -> Path:
        require_kernels(dialect)
        bundle = root / f"{kind}-{dialect}-{quant}"
        shutil.copytree(tiny_bundles(kind, dialect, quant), bundle)  # type: ignore[arg-type]
        config = BuildConfig(
            bundle=bundle, max_batch=4, max_prefill=32, kv_buckets=(32, 64, CAPACITY), force=True
        )
        try:
            build_engine(config)
        except DependencyError as error:
            pytest.skip(str(error))
        return bundle

    return make


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_the_gpu_agrees_with_the_cpu(
    kind: str, dialect: str, graphs: bool, built: Callable[[str, str], Path]
):
    """Chunked prefill into any slot, decode over idle slots and buckets, several tokens, caches."""
    bundle = built(kind, dialect)
    with GpuRunner(bundle, use_cuda_graphs=graphs) as ours, Runner(bundle) as theirs:
        for slot, prompt in ((2, 40), (0, 7), (3, 21)):
            ids = random_ids(1, prompt, seed=slot)
            for start in range(0, prompt, 32):
                chunk = ids[:, start : start + 32]
                found, expected = ours.step(chunk, [slot]), theirs.step(chunk, [slot])
                assert_allclose(found, expected, atol=ATOL, rtol=0)
        for step in range(40):
            slots = [2, 0, 3] if step % 3 else [3, 0]
            ids = random_ids(len(slots), 1, seed=step)
            assert_allclose(ours.step(ids, slots), theirs.step(ids, slots), atol=ATOL, rtol=0)
        ids = random_ids(2, 5, seed=99)
        assert_allclose(ours.step(ids, [0, 3]), theirs.step(ids, [0, 3]), atol=ATOL, rtol=0)
        for slot in (0, 2, 3):
            assert_allclose(ours.cache(slot), theirs.cache(slot), atol=0.1, rtol=0)
        assert not stacked(ours.backend.read_slot(1, ours.backend.capacity)).any()
        if graphs:
            assert ours.engine.graphs_disabled is None
            assert len(ours.engine._graphs) >= 1


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("quant", ["fp16", "bf16"])
def test_slots_are_copied_and_stay_apart(dialect: str, quant: str, built: Callable[..., Path]):
    """Also in BF16, whose engine must go on from a slot that was written as from its own."""
    with GpuRunner(built("qwen2", dialect, quant)) as runner:
        runner.step(random_ids(1, 23), [2])
        rows = runner.cache(2)
        runner.backend.write_slot(0, by_name(rows))
        runner.backend.copy_slot(2, 3, 20)
        assert_array_equal(stacked(runner.backend.read_slot(0, 23)), rows)
        assert_array_equal(stacked(runner.backend.read_slot(3, 20)), rows[:, :, :20])
        assert not stacked(runner.backend.read_slot(1, 60)).any()
        runner.lengths[0] = 23
        following = random_ids(1, 1, seed=1)
        found, expected = runner.step(following, [0]), runner.step(following, [2])
        assert_allclose(found, expected, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("driver")
def test_loading_again_and_again_leaks_nothing(built: Callable[[str, str], Path]):
    bundle = built("qwen2", "portable")
    device = cuda.Device()
    free = []
    for _ in range(6):
        with GpuRunner(bundle) as runner:
            for seed in range(5):
                runner.step(random_ids(1, 1, seed=seed), [1])
        with device.active():
            free.append(device.memory_info()[0])
    assert min(free[2:]) > free[1] - (8 << 20), free


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("wish", ["block", "yield", "spin"])
def test_the_way_to_wait_changes_though_the_context_is_there(
    wish: GpuWait, built: Callable[[str, str], Path]
):
    """By what the driver says afterwards; tests before this one made the context."""
    bundle = built("qwen2", "portable")
    with GpuRunner(bundle, gpu_wait=wish) as runner:
        assert runner.engine.gpu_wait == wish
        assert np.isfinite(runner.step(random_ids(1, 3), [0])).all()
    with GpuRunner(bundle) as runner:
        assert runner.engine.gpu_wait == wish


@pytest.mark.usefixtures("driver")
def test_memory_that_is_not_there_is_refused(built: Callable[[str, str], Path]):
    bundle = built("qwen2", "portable")
    with pytest.raises(DeviceMemoryError, match="--kv-capacity"):
        TensorRTBackend(bundle, read_manifest(bundle), num_slots=1 << 28)
    with GpuRunner(bundle) as runner:
        assert np.isfinite(runner.step(random_ids(1, 3), [0])).all()

"""ONNX Runtime CUDA on a real GPU, against the CPU backend: what no CPU can show."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.errors import DeviceMemoryError
from edge_lab.doctor.probe import probe_cuda
from tests.conftest import Bundles
from tests.edge.backends.ort.conftest import variant
from tests.edge.backends.ort.test_gpu import CudaRunner
from tests.edge.backends.runner import Runner, check_greedy_tokens, history, random_ids
from tests.makers.tiny_models import KINDS, Kind
from tests.standins.slot_rows import by_name, stacked

__all__ = ["variant"]  # a fixture

pytestmark = pytest.mark.gpu

# fp16 sums in another order than on the CPU, where the same graph differs from fp32 by 0.033.
ATOL = 0.06
# bf16 has 8 bits: eight times coarser than fp16.
ATOL_BF16 = 0.5


@pytest.fixture(autouse=True)
def cuda_provider() -> None:
    """Skip where ONNX Runtime computes on the CPU alone, as that of PyPI on JetPack 6 does."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")


def open_cuda(bundles: Bundles, kind: Kind, variant: str, quant: str = "fp16") -> CudaRunner:
    bundle = bundles(kind, variant.split()[0], quant)
    return CudaRunner(bundle, device=None, fuse_attention=variant == "native fused")


@pytest.mark.parametrize("quant", ["fp16", "int4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_cpu_computes(
    kind: Kind, quant: str, variant: str, tiny_bundles: Bundles
):
    bundle = tiny_bundles(kind, variant.split()[0], quant)
    with (
        open_cuda(tiny_bundles, kind, variant, quant) as ours,
        Runner(bundle, int8_activations=False) as theirs,
    ):
        for found, expected in zip(history(ours), history(theirs), strict=True):
            assert_allclose(found, expected, atol=ATOL, rtol=0.02)


def test_bf16(variant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles("llama", variant.split()[0], "bf16")
    with open_cuda(tiny_bundles, "llama", variant, "bf16") as ours, Runner(bundle) as theirs:
        ids = random_ids(2, 20)
        assert_allclose(ours.step(ids, [2, 1]), theirs.step(ids, [2, 1]), atol=ATOL_BF16, rtol=0)
        rows = ours.cache(2)
        ours.backend.write_slot(0, by_name(rows))
        assert_array_equal(stacked(ours.backend.read_slot(0, 20)), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_greedy_tokens(kind: Kind, variant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles(kind, variant.split()[0])
    with open_cuda(tiny_bundles, kind, variant) as ours, Runner(bundle) as theirs:
        check_greedy_tokens(ours, theirs, ATOL)


@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_no_node_falls_back_to_the_cpu(quant: str, variant: str, tiny_bundles: Bundles):
    with open_cuda(tiny_bundles, "qwen2", variant, quant) as runner:
        assert runner.backend.nodes_elsewhere == {}


def test_slots_are_moved_on_the_device(variant: str, tiny_bundles: Bundles):
    with open_cuda(tiny_bundles, "qwen2", variant) as runner:
        runner.step(random_ids(1, 33), [2])
        rows = runner.cache(2)
        runner.backend.copy_slot(2, 0, 20)
        assert_array_equal(stacked(runner.backend.read_slot(0, 20)), rows[:, :, :20])
        assert not stacked(runner.backend.read_slot(0, 33))[:, :, 20:].any()


def test_repeated_steps_give_the_same_bits(variant: str, tiny_bundles: Bundles):
    with open_cuda(tiny_bundles, "llama", variant) as runner:
        runner.step(random_ids(1, 20))
        found = []
        for _ in range(5):
            runner.lengths[0] = 20
            found.append(runner.step(random_ids(1, 1, seed=1)))
        for other in found[1:]:
            assert_array_equal(other, found[0])


def test_loading_and_closing_leaks_nothing(variant: str, tiny_bundles: Bundles):
    def used() -> int:
        gc.collect()
        probe: dict[str, Any] = probe_cuda()
        return int(probe["memory_total_bytes"]) - int(probe["memory_free_bytes"])

    def cycle() -> None:
        with open_cuda(tiny_bundles, "qwen2", variant) as runner:
            runner.step(random_ids(1, 5))

    for _ in range(3):
        cycle()
    before = used()
    for _ in range(5):
        cycle()
    assert used() - before < 8 << 20


def test_too_large_a_cache_is_one_clear_error(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    probe = probe_cuda()
    with CudaRunner(bundle, device=None, num_slots=1) as runner:
        per_slot = runner.backend.cache_bytes
    # Each of the four tensors is larger than the memory: nothing is half allocated on a Jetson.
    slots = int(probe["memory_total_bytes"]) * 5 // per_slot
    with pytest.raises(DeviceMemoryError, match="--kv-capacity"):
        CudaRunner(bundle, device=None, num_slots=slots)

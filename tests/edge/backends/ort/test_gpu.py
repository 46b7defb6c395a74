"""The CUDA backend, run for real on the CPU provider: the same class, device memory is the host's.

What only a GPU can show is in `tests/gpu/test_ort_cuda.py`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.backends import Step
from edge.backends.ort import gpu as ort_cuda
from edge.backends.ort.device import OrtDevice
from edge.backends.ort.gpu import OrtCudaBackend
from edge.backends.ort.placement import tensor_nodes_elsewhere
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.io_spec import EMBEDDINGS_NAME
from edge.bundle.manifest import read_manifest
from edge.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DependencyError,
    DeviceError,
    DeviceMemoryError,
    EdgeError,
    ResourceError,
)
from tests.conftest import TINY_KV_CAPACITY, Bundles, require_kernels
from tests.edge.backends.ort.test_cpu_attention import export_heads
from tests.edge.backends.runner import (
    Runner,
    check_greedy_tokens,
    check_slots_apart,
    history,
    random_ids,
)
from tests.makers.goldens import FP16_KERNELS
from tests.makers.tiny_models import KINDS, Kind
from tests.standins.slot_rows import by_name, stacked

HOST = OrtDevice("cpu", 0, "CPUExecutionProvider", {})
# Activations in fp16 against fp32, logits of size 1 to 5; measured 0.033, on Arm 0.11.
ATOL_FP16 = 0.15 if FP16_KERNELS else 0.04


class CudaRunner(Runner):
    """A `Runner` of the CUDA backend."""

    backend: OrtCudaBackend  # type: ignore[assignment]

    def __enter__(self) -> CudaRunner:
        return self

    def __init__(self, bundle: Path, *, num_slots: int = 4, **options: Any) -> None:
        self.manifest = read_manifest(bundle)
        options = {"device": HOST, **options}  # None is the first GPU
        self.backend = OrtCudaBackend(bundle, self.manifest, num_slots=num_slots, **options)
        self.table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
        self.lengths = [0] * num_slots


def open_runner(bundles: Bundles, kind: Kind, variant: str, **options: Any) -> CudaRunner:
    quant = options.pop("quant", "fp16")
    bundle = bundles(kind, variant.split()[0], quant)
    return CudaRunner(bundle, fuse_attention=variant == "native fused", **options)


@pytest.fixture
def runner(variant: str, tiny_bundles: Bundles) -> Iterator[CudaRunner]:
    with open_runner(tiny_bundles, "qwen2", variant) as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_cpu_backend_computes(kind: Kind, variant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles(kind, variant.split()[0])
    with open_runner(tiny_bundles, kind, variant) as ours, Runner(bundle) as theirs:
        for found, expected in zip(history(ours), history(theirs), strict=True):
            assert found.shape == expected.shape
            assert_allclose(found, expected, atol=ATOL_FP16, rtol=0.01)


def test_heads_that_the_operator_does_not_take(tmp_path: Path):
    require_kernels("native")
    bundle = export_heads(tmp_path, "llama", 20, "native")
    with CudaRunner(bundle) as ours, Runner(bundle) as theirs:
        for found, expected in zip(history(ours), history(theirs), strict=True):
            assert_allclose(found, expected, atol=ATOL_FP16, rtol=0.01)


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_quantized_weights(quant: str, variant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles("llama", variant.split()[0], quant)
    with (
        open_runner(tiny_bundles, "llama", variant, quant=quant) as ours,
        Runner(bundle, int8_activations=False) as theirs,
    ):
        ids = random_ids(2, 20)
        found, expected = ours.step(ids, [2, 1]), theirs.step(ids, [2, 1])
        assert_allclose(found, expected, atol=ATOL_FP16, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_greedy_tokens(kind: Kind, variant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles(kind, variant.split()[0])
    with open_runner(tiny_bundles, kind, variant) as ours, Runner(bundle) as theirs:
        check_greedy_tokens(ours, theirs, ATOL_FP16)


def test_slots_do_not_touch_each_other(runner: CudaRunner):
    check_slots_apart(runner)


def test_the_cache_is_updated_in_place(runner: CudaRunner):
    addresses = [block.address for block in runner.backend._cache.blocks(0, 1).values()]
    runner.step(random_ids(1, 5))
    after = [block.address for block in runner.backend._cache.blocks(0, 1).values()]
    assert after == addresses
    rows = stacked(runner.backend.read_slot(0, 6))
    assert rows[:, :, :5].any(axis=(1, 3)).all()
    assert not rows[:, :, 5:].any()


def test_read_write_and_copy_of_a_slot(runner: CudaRunner):
    backend = runner.backend
    ids = random_ids(1, 33)
    runner.step(ids, [2])
    rows = runner.cache(2)
    model = runner.manifest.model
    assert rows.shape == (
        2 * model.num_layers,
        model.attentions()[0].kv_heads,
        33,
        model.attentions()[0].dim,
    )
    assert rows.dtype == np.float16

    backend.write_slot(3, by_name(rows))
    backend.copy_slot(2, 1, 20)
    assert_array_equal(stacked(backend.read_slot(3, 33)), rows)
    assert_array_equal(stacked(backend.read_slot(1, 20)), rows[:, :, :20])
    assert not stacked(backend.read_slot(3, TINY_KV_CAPACITY))[:, :, 33:].any()
    assert not stacked(backend.read_slot(1, TINY_KV_CAPACITY))[:, :, 20:].any()

    # What was copied is as good as what was computed, and is a copy.
    runner.lengths = [0, 20, 33, 33]
    following = random_ids(1, 2, seed=1)
    expected = runner.step(following, [2])
    assert_array_equal(runner.step(following, [3]), expected)
    runner.step(ids[:, 20:], [1])
    assert_allclose(runner.step(following, [1]), expected, atol=ATOL_FP16, rtol=0)
    rows[...] = 0
    assert stacked(backend.read_slot(2, 33)).any()


def test_rows_of_the_cpu_backend_are_understood(variant: str, tiny_bundles: Bundles):
    """A prefix that was stored by one backend may be loaded by another."""
    bundle = tiny_bundles("llama", variant.split()[0])
    ids, following = random_ids(1, 30), random_ids(1, 1, seed=1)
    with open_runner(tiny_bundles, "llama", variant) as ours, Runner(bundle) as theirs:
        theirs.step(ids)
        ours.backend.write_slot(2, by_name(theirs.cache(0)))
        ours.lengths[2] = 30
        found, expected = ours.step(following, [2]), theirs.step(following)
        assert_allclose(found, expected, atol=ATOL_FP16, rtol=0)


def test_the_last_row_of_the_cache_is_usable(runner: CudaRunner):
    ids = random_ids(1, TINY_KV_CAPACITY)
    whole = runner.step(ids, [3])
    runner.lengths[3] -= 1
    last = runner.step(ids[:, -1:], [3])
    assert_allclose(last[0, 0], whole[0, -1], atol=ATOL_FP16, rtol=0)
    with pytest.raises(BackendError, match="does not fit a cache"):
        runner.step(ids[:, -1:], [3])


def test_a_longer_view_of_the_cache_changes_nothing(runner: CudaRunner):
    """The caller may round up how many rows attention sees."""
    ids = random_ids(2, 9)
    expected = runner.step(ids, [0, 1])
    positions = np.arange(9)[None].repeat(2, 0)
    step = Step([2, 3], runner.table[ids], positions, TINY_KV_CAPACITY, positions)
    found = runner.backend.forward(step)
    assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_another_capacity(variant: str, tiny_bundles: Bundles):
    ids = random_ids(1, 24)
    with (
        open_runner(tiny_bundles, "llama", variant) as plain,
        open_runner(tiny_bundles, "llama", variant, kv_capacity=200) as other,
    ):
        assert other.backend.capacity == 200
        assert other.backend.cache_bytes * TINY_KV_CAPACITY == plain.backend.cache_bytes * 200
        assert_array_equal(other.step(ids), plain.step(ids))


def test_closing(runner: CudaRunner):
    assert runner.backend.cache_bytes > 0
    runner.backend.close()
    runner.backend.close()
    assert runner.backend.cache_bytes == 0
    for call in (
        lambda: runner.step(random_ids(1, 1)),
        lambda: stacked(runner.backend.read_slot(0, 1)),
        lambda: runner.backend.copy_slot(0, 1, 1),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_numbers_out_of_range(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    manifest = read_manifest(bundle)
    for options in ({"kv_capacity": 257}, {"num_slots": 0}, {"max_step_tokens": 0}):
        with pytest.raises(ConfigError):
            OrtCudaBackend(bundle, manifest, device=HOST, **options)  # type: ignore[arg-type]


def test_quantized_bf16_is_refused_before_anything_is_loaded(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable", "int4")
    manifest = msgspec.structs.replace(read_manifest(bundle), dtype="bf16")
    with pytest.raises(DependencyError, match=r"bf16 scales.*--dtype fp16"):
        OrtCudaBackend(bundle, manifest, device=HOST)


def test_a_cache_that_is_not_updated_in_place_is_noticed(
    variant: str, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """As when a binding copies the cache: every step then begins with the old one."""
    real = OrtCudaBackend._warm_up

    def forget(backend: OrtCudaBackend, position: int) -> None:
        if position:
            rows = stacked(backend.read_slot(0, 1))
            backend.write_slot(0, by_name(np.zeros_like(rows)))
        real(backend, position)

    monkeypatch.setattr(OrtCudaBackend, "_warm_up", forget)
    with pytest.raises(BackendError, match="did not update the cache in place"):
        open_runner(tiny_bundles, "qwen2", variant)


class Failing:
    """A session whose next run fails as ONNX Runtime words it."""

    def __init__(self, session: Any, text: str) -> None:
        self.session, self.text = session, text

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        text, self.text = self.text, ""
        if text:
            raise RuntimeError(text)
        self.session.run_with_iobinding(binding)


# As reported in issues of microsoft/onnxruntime (22702, 9939) and printed by its CUDA_CALL.
NO_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
    "MatMul node. bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) "
    "Failed to allocate memory for requested buffer of size 838860800"
)
LOST = (
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=orin ; "
    "file=cuda_execution_provider.cc ; line=412 ; expr=cudaStreamSynchronize(stream)"
)


def fail_next(runner: CudaRunner, text: str) -> None:
    runner.backend._session = Failing(runner.backend._session, text)
    runner.backend._runner.forget()


def test_a_backend_that_does_not_fit_leaves_nothing(
    variant: str, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """Less is tried at once (`device_backend`), before the garbage collector comes."""
    seen: list[weakref.ref[Any]] = []

    def fail(backend: OrtCudaBackend, _position: int) -> None:
        seen.extend(map(weakref.ref, (backend._session, *backend._cache._tensors.values())))
        raise DeviceMemoryError("full")

    monkeypatch.setattr(OrtCudaBackend, "_warm_up", fail)
    gc.disable()
    try:
        with contextlib.suppress(DeviceMemoryError):
            open_runner(tiny_bundles, "qwen2", variant)
        assert seen
        assert not [each for each in seen if each() is not None]
    finally:
        gc.enable()


def test_out_of_memory_names_the_knobs_and_the_next_step_works(runner: CudaRunner):
    expected = runner.step(random_ids(1, 4))
    runner.lengths[0] = 0
    fail_next(runner, NO_MEMORY)
    with pytest.raises(ResourceError, match=r"4 slots of 128 tokens.*--kv-capacity") as caught:
        runner.step(random_ids(1, 4))
    assert "838860800" in str(caught.value)
    assert_array_equal(runner.step(random_ids(1, 4)), expected)


def test_a_lost_device_says_so_from_then_on(runner: CudaRunner):
    fail_next(runner, LOST)
    with pytest.raises(BackendError, match=r"failed on a step of \(1, 4\).*illegal memory access"):
        runner.step(random_ids(1, 4))
    with pytest.raises(BackendError, match=r"failed in an earlier step.*restart the process"):
        runner.step(random_ids(1, 4))
    with pytest.raises(BackendError, match="failed in an earlier step"):
        stacked(runner.backend.read_slot(0, 1))
    assert "illegal memory access" in str(runner.backend.failed)


def test_a_row_that_cannot_be_put_back_is_no_secret(
    runner: CudaRunner, monkeypatch: pytest.MonkeyPatch
):
    """The slot between two that decode may hold a prefix that others share."""
    backend = runner.backend
    for slot in range(3):
        runner.step(random_ids(1, 4), [slot])
    assert backend.failed is None

    def no_memory(array: Any) -> Any:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(backend._cache, "upload", no_memory)
    with pytest.raises(ResourceError, match="while writing a slot"):
        runner.step(random_ids(2, 1), [0, 2])
    assert "could not be put back" in str(backend.failed)


def test_another_failure_is_one_step_only(runner: CudaRunner):
    fail_next(runner, "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : no such thing")
    with pytest.raises(BackendError, match="no such thing"):
        runner.step(random_ids(1, 4))
    runner.step(random_ids(1, 4))


@pytest.mark.parametrize("call", ["ortvalue_from_numpy", "ortvalue_from_shape_and_type"])
def test_every_allocation_may_fail(
    call: str, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """While loading: the error is ours, whichever allocation it was."""
    import onnxruntime

    bundle = tiny_bundles("qwen2", "portable")
    manifest = read_manifest(bundle)
    real = getattr(onnxruntime.OrtValue, call)
    made = 0

    def count(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return real(*arguments)

    monkeypatch.setattr(onnxruntime.OrtValue, call, count)
    OrtCudaBackend(bundle, manifest, device=HOST).close()
    assert made >= 4
    for victim in range(made):
        left = victim

        def fail(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")
            return real(*arguments)

        monkeypatch.setattr(onnxruntime.OrtValue, call, fail)
        with pytest.raises(ResourceError, match="ran out of memory while"):
            OrtCudaBackend(bundle, manifest, device=HOST)


def test_without_the_provider_the_extra_is_named(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    missing = OrtDevice("cuda", 0, "NoSuchExecutionProvider")
    with pytest.raises(DependencyError, match=r"has no NoSuchExecutionProvider .*\[cuda\]"):
        OrtCudaBackend(bundle, read_manifest(bundle), device=missing)


def test_a_provider_that_does_not_load_is_no_silent_cpu(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """ONNX Runtime prints a warning and goes on with the CPU; we must not."""
    import onnxruntime

    bundle = tiny_bundles("qwen2", "portable")
    real = onnxruntime.InferenceSession

    def open_session(model: Any, options: Any, **_: Any) -> Any:
        return real(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    names = ["PretendedExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    device = OrtDevice("cpu", 0, "PretendedExecutionProvider")
    with pytest.raises(DependencyError, match=r"could not load Pretended.*edge-llm doctor"):
        OrtCudaBackend(bundle, read_manifest(bundle), device=device)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", DeviceMemoryError),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", DeviceError),
        ("CUDA failure 35: CUDA driver version is insufficient for ; GPU=-1", DependencyError),
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=-1", DependencyError),
        ("CUDA_PATH is set but CUDA wasn't able to be loaded", DependencyError),
    ],
)
def test_a_provider_that_fails_is_not_tried_again_elsewhere(
    message: str,
    expected: type[EdgeError],
    tiny_bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    import onnxruntime

    made = 0

    def fail(*_: Any) -> None:
        nonlocal made
        made += 1
        raise RuntimeError(message)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    bundle = tiny_bundles("qwen2", "portable")
    with pytest.raises(expected, match=message.partition(" ;")[0]) as caught:
        OrtCudaBackend(bundle, read_manifest(bundle), device=HOST)
    assert (type(caught.value), made) == (expected, 1)
    assert not capsys.readouterr().out


def test_a_graph_that_breaks_the_contract_is_refused(tiny_bundles: Bundles, tmp_path: Path):
    bundle = tiny_bundles("qwen2", "portable")
    (tmp_path / "decoder.onnx").write_bytes((bundle / "decoder.cpu.onnx").read_bytes())
    with pytest.raises(BundleError, match="does not fit the decoder's contract"):
        OrtCudaBackend(tmp_path, read_manifest(bundle), device=HOST)


def test_nodes_outside_the_device_are_counted_and_logged(
    variant: str,
    tiny_bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """The whole graph runs on the CPU here: asked for another provider, all of it is elsewhere."""
    with open_runner(tiny_bundles, "qwen2", variant) as runner:
        assert runner.backend.nodes_elsewhere == {}
    assert not caplog.records
    real = tensor_nodes_elsewhere
    monkeypatch.setattr(
        ort_cuda, "tensor_nodes_elsewhere", lambda events, _: real(events, "CUDAExecutionProvider")
    )
    with (
        caplog.at_level(logging.WARNING, "edge.backends.ort.gpu"),
        open_runner(tiny_bundles, "qwen2", variant) as runner,
    ):
        found = runner.backend.nodes_elsewhere
    layers = runner.manifest.model.num_layers
    linears = 4 * layers + 1
    if variant == "portable":
        assert found["MatMul"] > linears  # attention is written in MatMuls, too
    else:
        assert found["MatMul"] == linears
    if variant == "native fused":
        assert found["GroupQueryAttention"] == layers
    assert "Shape" not in found  # index arithmetic belongs on the host
    assert "run outside CPUExecutionProvider" in caplog.text
    assert f"{found['MatMul']} MatMul" in caplog.text


def test_errors_of_ours_pass_through(runner: CudaRunner):
    with pytest.raises(BundleError, match="mine"), runner.backend._faults.explain("x"):
        raise BundleError("mine")
    assert issubclass(ResourceError, EdgeError)

"""Which engine is opened, what is refused at load, and the memory that is taken."""

from __future__ import annotations

import contextlib
import gc
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from numpy.testing import assert_allclose

from edge.backends.tensorrt.device_memory import plan_engine_memory
from edge.backends.tensorrt.engine import Engine
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import io_spec
from edge.bundle.engine_file import find_engines, read_engine_info
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
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
from engines.build_plan import plan_build
from engines.config import BuildConfig
from tests.conftest import Bundles, require_kernels
from tests.edge.backends.runner import Runner, random_ids
from tests.edge.backends.tensorrt.gpu_runner import (
    ATOL,
    ENGINE,
    EngineBundles,
    GpuRunner,
    both_drivers,
)
from tests.standins.builder import OptimizationProfile
from tests.standins.cuda import ILLEGAL_ADDRESS, OUT_OF_MEMORY, FakeGpu, RuleError
from tests.standins.network import Planted
from tests.standins.tensorrt import CONTEXT_BYTES, NO_CUDA, fake_plan, start_nothing, write_engine

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


def test_tensorrt_has_a_logger_whichever_engine_is_closed(
    gpu: FakeGpu, engine_bundles: EngineBundles
):
    """It is the first engine's for all of them, as in a switch of models."""
    bundle = engine_bundles("qwen2", "portable")
    manifest = read_manifest(bundle)
    first, second = TensorRTBackend(bundle, manifest), TensorRTBackend(bundle, manifest)
    first.close()
    del first
    gc.collect()
    TensorRTBackend(bundle, manifest).close()
    second.close()


@pytest.mark.parametrize("call", ["deserialize_cuda_engine", "create_execution_context"])
def test_ctrl_c_that_meets_a_message_ends_the_load(
    call: str, gpu: FakeGpu, engine_bundles: EngineBundles, monkeypatch: pytest.MonkeyPatch
):
    # The runner of tests in several processes ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    bundle = engine_bundles("qwen2", "portable")
    count = gpu.code

    def interrupted(name: str, **options: Any) -> int:
        if name == call:
            with contextlib.suppress(BaseException):  # as the bindings, around the logger
                signal.raise_signal(signal.SIGINT)
        return count(name, **options)

    monkeypatch.setattr(gpu, "code", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            TensorRTBackend(bundle, read_manifest(bundle))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# Memory


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (OUT_OF_MEMORY, DeviceMemoryError, "no memory for the .* stop other programs"),
        (ILLEGAL_ADDRESS, DeviceError, "illegal memory access .* start the process anew"),
    ],
)
def test_memory_that_is_short_is_told_from_memory_that_is_lost(
    code: int,
    kind: type[EdgeError],
    words: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
):
    bundle = engine_bundles("qwen2", "portable")
    manifest = read_manifest(bundle)
    TensorRTBackend(bundle, manifest).close()
    before = len(gpu.calls)  # the primary context is retained only once
    TensorRTBackend(bundle, manifest).close()
    gpu.fail_at = len(gpu.calls) + gpu.calls[before:].index("deserialize_cuda_engine")
    gpu.fail_code = code
    with pytest.raises(kind, match=words) as refused:
        TensorRTBackend(bundle, manifest)
    assert getattr(refused.value, "fatal", False) == (code == ILLEGAL_ADDRESS)


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

"""The door to CUDA: what it says when the driver fails, and that its stand-ins are faithful."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.backends import cuda
from edge.backends.cuda import bindings as cuda_bindings
from edge.backends.cuda import waiting
from edge.backends.cuda.bindings import BindingsDriver, Calls
from edge.backends.cuda.errors import cure_for_memory, explain_init_failure
from edge.backends.cuda.pieces import Pieces
from edge.device import memory
from edge.device.nodes import find_gpu_node
from edge.engine_config import GpuWait
from edge.errors import DependencyError, DeviceError, DeviceMemoryError
from tests.standins import builder as fake_builder
from tests.standins import cuda_bindings as fake_bindings
from tests.standins import network as fake_network
from tests.standins import parser as fake_parser
from tests.standins import tensorrt as fake_tensorrt
from tests.standins.cuda import DRIVERS, CaptureMode, FakeGpu


@pytest.fixture(params=DRIVERS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu(with_pycuda=request.param == "pycuda")
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


@pytest.mark.parametrize(
    ("said", "cause", "cure"),
    [
        ("cuInit failed: no CUDA-capable device is detected", "no NVIDIA GPU", "CUDA_VISIBLE_DEV"),
        (
            "cuInit failed: system has unsupported display driver / cuda driver combination",
            "803",
            "reboot",
        ),
        (
            "cuInit failed: forward compatibility was attempted on non supported HW",
            "804",
            "LD_LIBRARY_PATH",
        ),
        (
            "CUDA driver version is insufficient for CUDA runtime version",
            "(CUDA 35)",
            "update the driver",
        ),
        ("cuInit failed: system not yet initialized", "802", "wait"),
        ("cuInit failed: operation not supported", "801", "--runtime nvidia"),
        ("cuInit failed: unknown error", "999", "dmesg"),
        ("cuInit failed: something new", "does not start", "edge-llm doctor"),
    ],
)
def test_a_driver_that_does_not_start_has_a_cause_and_a_cure(
    said: str, cause: str, cure: str, tmp_path: Path
):
    message = explain_init_failure(said, tmp_path)
    assert cause in message
    assert cure in message
    assert said in message or "does not start" in message


def test_a_device_node_that_may_not_be_opened_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a Jetson it shows as CUDA 999 or 801, which say nothing."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvmap").touch()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "nvmap")
    message = explain_init_failure("cuInit failed: unknown error", tmp_path)
    assert f"may not open {tmp_path / 'dev' / 'nvmap'}" in message
    assert "usermod -aG video,render" in message


def test_a_closed_render_node_explains_a_jetson_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "dev" / "dri").mkdir(parents=True)
    (tmp_path / "dev" / "dri" / "renderD129").touch()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "renderD129")
    assert "may not open" not in explain_init_failure("operation not supported", tmp_path)
    (tmp_path / "dev" / "nvmap").touch()
    assert "may not open" in explain_init_failure("operation not supported", tmp_path)


def test_nvmap_need_not_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some releases make it 0440."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvmap").touch()
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    assert "may not open" not in explain_init_failure("unknown error", tmp_path)


def test_opening_fails_with_the_cure_and_the_exit_code(gpu: FakeGpu):
    gpu.fail_at, gpu.fail_code = 0, 803
    with pytest.raises(DependencyError, match="different versions") as caught:
        cuda.Device()
    assert caught.value.exit_code == 69
    gpu.fail_at = None
    with pytest.raises(DependencyError, match=r"no GPU of this number .*CUDA_VISIBLE_DEVICES"):
        cuda.Device(1)
    device = cuda.Device()
    assert (device.name, device.compute_capability, device.integrated) == ("Fake", "8.7", False)


@pytest.mark.parametrize(("code", "fatal"), [(2, False), (700, True), (719, True), (999, True)])
def test_errors_are_sorted_by_whether_the_context_survives(gpu: FakeGpu, code: int, fatal: bool):
    device = cuda.Device()
    with device.active():
        stream = cuda.Stream(device)
        memory = cuda.DeviceMemory(device, 512, "test")
        gpu.fail_at, gpu.fail_code = len(gpu.calls), code
        with pytest.raises(DeviceError) as caught:
            stream.upload(memory.address, np.zeros(4, np.uint8))
        assert caught.value.fatal is fatal
        assert ("anew" in str(caught.value)) is fatal
        gpu.fail_at = gpu.lost = None
        memory.close()
        memory.close()
    assert gpu.depth == 0


def test_memory_that_does_not_fit_names_the_numbers_and_the_knobs(gpu: FakeGpu):
    device = cuda.Device()
    with device.active():
        message = "cache needs 2,147 MB of GPU memory, but 1,074 of 1,074 MB .*--kv-capacity"
        with pytest.raises(DeviceMemoryError, match=message):
            cuda.DeviceMemory(device, 2 << 30, "the KV cache")


def test_free_memory_of_a_jetson_is_what_the_kernel_can_give(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
):
    """However much the driver calls free: more or less than that."""
    available = iter([7 << 30, 1 << 20])
    monkeypatch.setattr(memory, "read_mem_available_bytes", lambda: next(available))
    with cuda.Device().active():
        assert cuda.Device().memory_info()[0] == gpu.total_bytes
        gpu.integrated = True
        assert [cuda.Device().memory_info()[0] for _ in range(2)] == [7 << 30, 1 << 20]
        monkeypatch.setattr(memory, "read_mem_available_bytes", lambda: None)
        assert cuda.Device().memory_info()[0] == gpu.total_bytes


def test_room_is_made_for_what_fits_a_jetson(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    monkeypatch.setattr(memory, "make_free", made.append)
    monkeypatch.setattr(memory, "read_mem_available_bytes", lambda: 5 << 30)
    for integrated in (False, True):
        gpu.integrated = integrated
        device = cuda.Device()
        with device.active():
            with pytest.raises(DeviceMemoryError, match="the engine needs 6,442 MB"):
                device.make_room("the engine", 6 << 30)
            device.make_room("the engine", 1 << 30)
    assert made == [1 << 30]


@pytest.mark.parametrize("available_mb", [9_000, 2_000])
def test_memory_that_is_there_and_is_refused_names_nvmap(available_mb: int, tmp_path: Path):
    (tmp_path / "proc").mkdir()
    kb = available_mb * 10**6 // 1024
    (tmp_path / "proc/meminfo").write_text(f"MemFree: 300000 kB\nMemAvailable: {kb} kB\n")
    assert cure_for_memory(4 * 10**9, "stop other programs", tmp_path) == "stop other programs"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvmap").touch()
    text = cure_for_memory(4 * 10**9, "stop other programs", tmp_path)
    if available_mb == 2_000:
        assert text == "stop other programs"
        return
    for part in ("NvMap", "9,000 MB are available, 307 of them free", "36.4.7", "CVE-2025-33177"):
        assert part in text
    assert "sync && echo 1 | sudo tee /proc/sys/vm/drop_caches" in text
    assert text.endswith("else stop other programs")


# How threads wait


WAITS = {"spin": 1, "yield": 2, "block": 4}  # CU_CTX_SCHED_*


@given(
    others=st.integers(0, 31).map(lambda bits: bits << 3),
    chosen=st.sampled_from([0, *WAITS.values()]),
    active=st.booleans(),
    wish=st.sampled_from(["auto", *WAITS]),
    cpus=st.integers(1, 16),
)
def test_an_explicit_mode_holds_and_auto_keeps_the_chosen_one(
    others: int, chosen: int, active: bool, wish: GpuWait, cpus: int
):
    """Whoever opened the context before, and with flags that say nothing of waiting kept."""
    gpu = FakeGpu()
    gpu.context_flags, gpu.context_active = others | chosen, active
    with mock.patch.object(waiting, "count_usable_cpus", return_value=cpus):
        found = waiting.set_wait(Calls(fake_bindings.make_bindings(gpu)), 0, wish)
    expected = {flag: name for name, flag in WAITS.items()}.get(chosen)
    if wish != "auto":
        expected = wish
    elif expected is None:
        expected = "spin" if cpus >= 4 else "yield"
    assert found == expected
    assert gpu.context_flags == others | WAITS[found]
    assert ("cuDevicePrimaryCtxSetFlags" in gpu.calls) == (chosen != WAITS[found])


def test_the_wait_is_chosen_before_the_context_is_made(gpu: FakeGpu):
    """Then any driver takes it."""
    gpu.flags_stay = True
    assert cuda.Device(wait="block").wait == "block"
    assert (gpu.context_flags, gpu.context_active) == (4, True)
    assert cuda.Device().wait == cuda.Device(wait="block").wait == "block"
    message = r"gpu_wait is spin, but .*cannot set while device is active.*leave gpu_wait out"
    with pytest.raises(DeviceError, match=message) as caught:
        cuda.Device(wait="spin")
    assert not caught.value.fatal
    assert gpu.context_flags == 4


def test_a_context_of_somebody_else_is_changed_where_cuda_allows_it(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture
):
    gpu.context_active = True
    caplog.set_level(logging.INFO)
    for wish in ("spin", "block", "yield"):
        assert cuda.Device(wait=wish).wait == wish
        assert f"how threads wait for the GPU: {wish}" in caplog.text
    gpu.context_flags, gpu.flags_stay = 0, True
    assert cuda.Device().wait is None  # no reason not to run
    assert "the driver chooses how threads wait for the GPU: cuDevicePrimary" in caplog.text


def test_a_driver_that_keeps_its_own_way_is_seen(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    def ignore(dev: int, flags: int) -> tuple[fake_bindings.Result]:
        return (fake_bindings.Result(0),)

    bindings: Any = sys.modules["cuda.bindings.driver"]
    monkeypatch.setattr(bindings, "cuDevicePrimaryCtxSetFlags", ignore)
    assert cuda.Device().wait == "driver"
    with pytest.raises(DeviceError, match=r"gpu_wait is block, but .* it stays at driver; leave"):
        cuda.Device(wait="block")


@pytest.mark.parametrize("name", ["cuDevicePrimaryCtxGetState", "cuDevicePrimaryCtxSetFlags"])
def test_a_driver_without_the_call_matters_only_to_who_asks(name: str, gpu: FakeGpu):
    gpu.missing.add(name)
    assert cuda.Device().wait is None
    with pytest.raises(DeviceError, match=f"gpu_wait is spin, but .*{name}.*not found"):
        cuda.Device(wait="spin")


def test_without_cuda_bindings_the_driver_chooses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    gpu = FakeGpu()
    for name, module in gpu.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    caplog.set_level(logging.INFO)
    assert cuda.Device().wait is None
    assert "the driver chooses how threads wait for the GPU: " in caplog.text
    with pytest.raises(DependencyError, match=r"gpu_wait need cuda-b.*pip install cuda-bindings"):
        cuda.Device(wait="block")


def test_a_gpu_that_is_lost_is_not_taken_for_an_old_driver(gpu: FakeGpu):
    cuda.Device()
    gpu.fail_at = len(gpu.calls) + gpu.calls.index("cuDevicePrimaryCtxGetState")
    gpu.fail_code = 719
    with pytest.raises(DeviceError, match="start the process anew") as caught:
        cuda.Device()
    assert caught.value.fatal


# The stand-ins against the real bindings


def bound_arguments(method: Any) -> list[str]:
    """Argument names of a pybind11 method, from the signatures in its docstring."""
    pattern = re.compile(r"^(?:\d+\. )?\w+\(self: [^,)]*(?:, )?(.*)\) ->", re.MULTILINE)
    signatures = pattern.findall(method.__doc__)
    assert signatures, method
    return re.findall(r"(?:^|, )(\w+):", signatures[0])


@pytest.mark.parametrize(
    ("ours", "theirs", "methods"),
    [
        (
            fake_tensorrt.FakeContext,
            "IExecutionContext",
            "set_optimization_profile_async set_device_memory set_input_shape set_tensor_address "
            "execute_async_v3",
        ),
        (
            fake_tensorrt.FakeEngine,
            "ICudaEngine",
            "get_tensor_name get_tensor_dtype get_tensor_location get_aliased_input_tensor "
            "create_execution_context get_device_memory_size_for_profile_v2",
        ),
        (
            fake_builder.Builder,
            "Builder",
            "create_network create_builder_config create_optimization_profile "
            "build_serialized_network",
        ),
        (
            fake_builder.BuilderConfig,
            "IBuilderConfig",
            "set_memory_pool_limit add_optimization_profile create_timing_cache set_timing_cache "
            "get_timing_cache",
        ),
        (fake_builder.OptimizationProfile, "IOptimizationProfile", "set_shape set_shape_input"),
        (
            fake_network.Network,
            "INetworkDefinition",
            "get_layer get_input get_output add_shape add_slice add_elementwise add_cast "
            "add_attention_v2",
        ),
        (fake_network.Layer, "ILayer", "get_input get_output set_input"),
        (fake_network.Attention11, "IAttention", "get_input get_output"),
        (fake_parser.OnnxParser, "OnnxParser", "parse get_error"),
        (fake_parser.ParserError, "ParserError", "node_name node_operator desc code file line"),
    ],
)
def test_the_stand_in_has_tensorrt_s_names_and_arguments(ours: Any, theirs: str, methods: str):
    trt = pytest.importorskip("tensorrt_rtx")
    real = getattr(trt, theirs)
    for name in methods.split():
        code = getattr(ours, name).__code__
        assert bound_arguments(getattr(real, name)) == list(
            code.co_varnames[1 : code.co_argcount]
        ), name
    public = {name for name in vars(ours) if not name.startswith("_")} - {"version"}
    assert public <= set(dir(real))


def test_the_stand_in_has_tensorrt_s_enums():
    trt = pytest.importorskip("tensorrt_rtx")
    assert {m.name for m in fake_tensorrt.ExecutionContextAllocationStrategy} == set(
        trt.ExecutionContextAllocationStrategy.__members__
    )
    assert {m.name for m in fake_tensorrt.TensorLocation} == set(trt.TensorLocation.__members__)
    assert {m.name for m in fake_network.DataType} <= set(trt.DataType.__members__)
    assert {m.name for m in fake_network.Severity} == set(trt.ILogger.Severity.__members__)
    for name in ("device_memory_size_v2", "num_io_tensors", "num_optimization_profiles"):
        assert hasattr(trt.ICudaEngine, name)


# cuda-bindings: the stand-in and the calls of the product against NVIDIA's own package


@pytest.fixture
def real_bindings() -> Any:
    return pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)


def test_the_stand_in_has_the_calls_of_cuda_bindings(real_bindings: Any):
    fake: Any = fake_bindings.make_bindings(FakeGpu())
    names = [name for name in vars(fake) if name.startswith("cu")]
    assert len(names) > 25
    for name in names:
        signature = getattr(real_bindings, name).__doc__.splitlines()[0]
        arguments = re.findall(r"(\w+)(?::[^,)]*)?[,)]", signature)
        code = getattr(fake, name).__wrapped__.__code__
        assert arguments == list(code.co_varnames[: code.co_argcount]), name
    enums = {
        "CUresult": fake_bindings.Result,
        "CUstreamCaptureMode": CaptureMode,
        "CUdevice_attribute": fake_bindings.DeviceAttribute,
        "CUmemorytype": fake_bindings.MemoryType,
        "CUfunction_attribute": fake_bindings.FunctionAttribute,
        "CUmemAllocationType": fake_bindings.AllocationType,
        "CUmemLocationType": fake_bindings.LocationType,
        "CUmemAccess_flags": fake_bindings.AccessFlags,
        "CUmemAllocationGranularity_flags": fake_bindings.GranularityFlags,
    }
    for name, ours in enums.items():
        for member in ours:
            assert getattr(real_bindings, name).__members__[member.name] == member.value
    assert set(fake.CUDA_MEMCPY3D.__slots__) <= set(dir(real_bindings.CUDA_MEMCPY3D()))
    for name in ("CUmemAllocationProp", "CUmemAccessDesc"):
        ours, theirs = getattr(fake, name)(), getattr(real_bindings, name)()
        assert set(ours.__slots__) <= set(dir(theirs))
        assert set(ours.location.__slots__) <= set(dir(theirs.location))
        theirs.location.id = 3  # a part of the struct, no copy of it
        assert theirs.location.id == 3
    for flag, name in {0: "AUTO", 1: "SPIN", 2: "YIELD", 4: "BLOCKING_SYNC", 7: "MASK"}.items():
        assert real_bindings.CUctx_flags.__members__[f"CU_CTX_SCHED_{name}"] == flag
    assert real_bindings.CU_MEMHOSTALLOC_DEVICEMAP == fake.CU_MEMHOSTALLOC_DEVICEMAP


@pytest.mark.skipif(find_gpu_node() is not None, reason="there is a GPU here")
def test_cuda_bindings_take_every_argument_of_ours(real_bindings: Any):
    """Without a driver each call ends in RuntimeError, after its arguments were converted."""
    driver, calls = BindingsDriver(real_bindings), Calls(real_bindings)
    stream = object.__new__(cuda_bindings._Stream)
    stream._call, stream.stream = calls, real_bindings.CUstream(0x10)
    copy = cuda_bindings._Memcpy3D(calls)
    array = np.zeros(16, np.uint8)
    copy.set_src_host(array)
    copy.set_dst_device(0x1000)
    copy.src_pitch = copy.dst_pitch = copy.width_in_bytes = 16
    copy.src_height = copy.dst_height = copy.height = copy.depth = 1
    assert (copy.fields.srcHost, int(copy.fields.dstDevice)) == (array.ctypes.data, 0x1000)
    gpu, context = object.__new__(cuda_bindings._Device), cuda_bindings._Context(calls, 0x10)
    gpu._call, gpu._device = calls, 0
    attempts: list[Callable[[], Any]] = [
        driver.init,
        lambda: driver.Device(0),
        gpu.name,
        gpu.compute_capability,
        lambda: gpu.get_attribute(driver.device_attribute.INTEGRATED),
        gpu.retain_primary_context,
        context.push,
        context.pop,
        driver.Stream,
        stream.synchronize,
        lambda: driver.mem_alloc(512),
        driver.mem_get_info,
        lambda: driver.pagelocked_empty(512, np.uint8, mem_flags=driver.host_alloc_flags.DEVICEMAP),
        lambda: driver.memcpy_htod_async(0x1000, array, stream),
        lambda: driver.memcpy_dtoh_async(array, 0x1000, stream),
        lambda: driver.memset_d8_async(0x1000, 0, 16, stream),
        lambda: copy(stream),
        lambda: Pieces(calls, 0, 100 << 20),
        *(
            functools.partial(calls, name, *args)
            for name, args in {
                "cuStreamDestroy": (stream.stream,),
                "cuMemFree": (0x1000,),
                "cuMemFreeHost": (0x1000,),
                "cuMemHostGetDevicePointer": (0x1000, 0),
                "cuStreamBeginCapture": (0x10, calls.capture_mode),
                "cuStreamEndCapture": (0x10,),
                "cuGraphInstantiate": (real_bindings.CUgraph(0x10), 0),
                "cuGraphDestroy": (real_bindings.CUgraph(0x10),),
                "cuGraphUpload": (real_bindings.CUgraphExec(0x10), 0x10),
                "cuGraphLaunch": (real_bindings.CUgraphExec(0x10), 0x10),
                "cuGraphExecDestroy": (real_bindings.CUgraphExec(0x10),),
                "cuCtxGetCurrent": (),
                "cuModuleLoadData": (b"\x7fELF",),
                "cuModuleGetFunction": (real_bindings.CUmodule(0x10), b"name"),
                "cuFuncSetAttribute": (
                    real_bindings.CUfunction(0x10),
                    real_bindings.CUfunction_attribute(8),
                    65536,
                ),
                "cuLaunchKernel": (
                    *(real_bindings.CUfunction(0x10), 4, 2, 1, 128, 1, 1, 1024, 0x10),
                    ((0x1000, -3, 0), (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)),
                    0,
                ),
                "cuModuleUnload": (real_bindings.CUmodule(0x10),),
                "cuEventCreate": (0,),
                "cuEventRecord": (real_bindings.CUevent(0x10), 0x10),
                "cuEventSynchronize": (real_bindings.CUevent(0x10),),
                "cuEventElapsedTime": (real_bindings.CUevent(0x10), real_bindings.CUevent(0x20)),
                "cuEventDestroy": (real_bindings.CUevent(0x10),),
                "cuMemcpyDtoDAsync": (0x1000, 0x2000, 16, 0x10),
                "cuDevicePrimaryCtxGetState": (0,),
                "cuMemAddressReserve": (4 << 20, 0, 0, 0),
                "cuMemCreate": (2 << 20, real_bindings.CUmemAllocationProp(), 0),
                "cuMemMap": (0x200000, 2 << 20, 0, 0x10, 0),
                "cuMemRelease": (0x10,),
                "cuMemSetAccess": (0x200000, 2 << 20, [real_bindings.CUmemAccessDesc()], 1),
                "cuMemUnmap": (0x200000, 2 << 20),
                "cuMemAddressFree": (0x200000, 4 << 20),
                "cuCtxSynchronize": (),
                "cuDevicePrimaryCtxSetFlags": (0, 4),
            }.items()
        ),
    ]
    for attempt in attempts:
        with pytest.raises(cuda_bindings.Error, match=r"failed: .*(libcuda|driver lib|not found)"):
            attempt()


@pytest.mark.skipif(find_gpu_node() is not None, reason="there is a GPU here")
def test_without_a_driver_cuda_bindings_name_the_cure(
    real_bindings: Any, monkeypatch: pytest.MonkeyPatch
):
    """Twice: version 12 says something else the second time."""
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    for _ in range(2):
        with pytest.raises(DependencyError, match=r"libcuda.so.1 does not load.*nvidia-l4t-cuda"):
            cuda.Device()


# Which of the two


def test_pycuda_comes_first_and_why_it_is_not_used_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fake = FakeGpu()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    caplog.set_level(logging.INFO)
    assert vars(cuda.Device())["driver"] is sys.modules["pycuda.driver"]
    assert "through PyCUDA" in caplog.text
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    assert isinstance(cuda.Device().driver, BindingsDriver)
    assert "through cuda-bindings: " in caplog.text
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(
        DependencyError, match=r"PyCUDA or cuda-bindings: .*pip install pycuda.*<13"
    ):
        cuda.Device()

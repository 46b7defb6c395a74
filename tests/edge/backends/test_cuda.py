"""The door to CUDA: what it says when the driver fails, and that its stand-ins are faithful."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.backends import cuda
from edge.errors import DependencyError, DeviceError, DeviceMemoryError
from tests import fake_tensorrt
from tests.fake_cuda import CaptureMode, FakeGpu, Result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
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
    message = cuda.explain_init_failure(said, tmp_path)
    assert cause in message
    assert cure in message
    assert said in message or "does not start" in message


def test_a_device_node_that_may_not_be_opened_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a Jetson it shows as CUDA 999 or 801, which say nothing."""
    (tmp_path / "nvmap").touch()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "nvmap")
    message = cuda.explain_init_failure("cuInit failed: unknown error", tmp_path)
    assert f"may not open {tmp_path / 'nvmap'}" in message
    assert "usermod -aG video,render" in message


def test_opening_fails_with_the_cure_and_the_exit_code(gpu: FakeGpu):
    gpu.fail_at, gpu.fail_code = 0, 803
    with pytest.raises(DependencyError, match="different versions") as caught:
        cuda.Device()
    assert caught.value.exit_code == 69
    gpu.fail_at = None
    with pytest.raises(DependencyError, match="GPU 1 is not here, the driver shows 1"):
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


def test_free_memory_of_a_jetson_counts_what_the_kernel_gives_up(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda, "read_available_memory_bytes", lambda: 7 << 30)
    with cuda.Device().active() as _:
        assert cuda.Device().memory_info()[0] == gpu.total_bytes
        gpu.integrated = True
        assert cuda.Device().memory_info()[0] == 7 << 30
        monkeypatch.setattr(cuda, "read_available_memory_bytes", lambda: None)
        assert cuda.Device().memory_info()[0] == gpu.total_bytes


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
            "create_execution_context",
        ),
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
    assert {m.name for m in fake_tensorrt.DataType} <= set(trt.DataType.__members__)
    assert {m.name for m in fake_tensorrt.Severity} == set(trt.ILogger.Severity.__members__)
    for name in ("device_memory_size_v2", "num_io_tensors", "num_optimization_profiles"):
        assert hasattr(trt.ICudaEngine, name)


def test_the_stand_in_has_the_calls_of_cuda_bindings(gpu: FakeGpu):
    fake: Any = sys.modules.pop("cuda.bindings.driver")
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    for name in vars(fake):
        if name.startswith(("cuGraph", "cuStream")):
            signature = getattr(real, name).__doc__.splitlines()[0]
            arguments = re.findall(r"(\w+)(?::[^,)]*)?[,)]", signature)
            code = getattr(fake, name).__code__
            assert arguments == list(code.co_varnames[: code.co_argcount])
    for ours, theirs in ((Result, real.CUresult), (CaptureMode, real.CUstreamCaptureMode)):
        for member in ours:
            assert theirs.__members__[member.name] == member.value

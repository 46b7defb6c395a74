"""The only door to CUDA: PyCUDA for all that it has, ``cuda.bindings`` for graphs, which it lacks.

Nothing here computes or knows a model. Addresses are plain integers, all copies are asynchronous on
one `Stream`, and every call that fails raises one clear `EdgeError`.

Memory and streams belong to a context, and PyCUDA frees them only in a thread where that context is
current: whoever calls here stands inside ``with device.active()``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.device.telemetry import read_available_memory_bytes
from edge.errors import DependencyError, DeviceError, DeviceMemoryError, EdgeError

# PyCUDA's exceptions carry no number, only the driver's sentence for it (cuGetErrorString).
# After these the context is lost: every later call fails in the same way (cuda.h, CUresult).
_FATAL = (
    "illegal memory access",  # 700
    "launch timed out",  # 702
    "context is destroyed",  # 709
    "device-side assert",  # 710
    "hardware stack error",  # 714
    "illegal instruction",  # 715
    "misaligned address",  # 716
    "not supported on global/shared address space",  # 717
    "invalid program counter",  # 718
    "unspecified launch failure",  # 719
    "uncorrectable ECC error",  # 214
    "uncorrectable NVLink error",  # 220
    "external device asserted",  # 719 in another unit
    "invalid device context",  # 201
    "driver shutting down",  # 4
    "unknown error",  # 999
)
# Cause and cure of what cuInit answers; the first that fits counts.
_INIT_CURES = (
    (
        "no CUDA-capable device",
        "no NVIDIA GPU is visible here; check nvidia-smi (on a Jetson: "
        "tegrastats) and CUDA_VISIBLE_DEVICES, in a container start it with --runtime nvidia",
    ),
    (
        "unsupported display driver",
        "the kernel's driver and the user-space driver are of "
        "different versions (CUDA 803); reboot after a driver update, in a container use an image "
        "that fits the host",
    ),
    (
        "forward compatibility",
        "the CUDA forward-compatibility package does not work on this GPU "
        "(CUDA 804); remove cuda-compat from LD_LIBRARY_PATH",
    ),
    (
        "driver version is insufficient",
        "the driver is older than the CUDA libraries (CUDA 35); "
        "update the driver (on a Jetson: JetPack)",
    ),
    ("not yet initialized", "the GPU is not ready yet (CUDA 802); wait and try again"),
    (
        "operation not supported",
        "the driver does not take this GPU (CUDA 801); in a container "
        "start it with --runtime nvidia, on a Jetson use libraries of its own JetPack",
    ),
    ("unknown error", "the driver failed without a reason (CUDA 999); look at dmesg, then reboot"),
)
# What a process opens on a Jetson; both belong to the group video (render from JetPack 7 on).
_DEVICE_NODES = (
    "nvmap", "nvhost-gpu", "nvhost-as-gpu", "nvhost-ctrl-gpu", "nvgpu/igpu0/ctrl", "nvidiactl",
    "nvidia0",
)  # fmt: skip


def explain_init_failure(text: str, dev: Path = Path("/dev")) -> str:
    """What is wrong when the driver does not start, and what to do.

    Args:
        text: what the driver said.
        dev: directory of the device nodes.
    """
    for name in _DEVICE_NODES:
        node = dev / name
        if node.exists() and not os.access(node, os.R_OK | os.W_OK):
            return (
                f"this user may not open {node}; add the user to the groups video and render "
                "(sudo usermod -aG video,render $USER), log in again, in a service set "
                f"SupplementaryGroups=video render (CUDA said: {text})"
            )
    for sign, cure in _INIT_CURES:
        if sign in text:
            return f"{cure} (CUDA said: {text})"
    return f"CUDA does not start: {text}; edge-llm doctor looks for the cause"


class Stream:
    """A CUDA stream: what is put on it runs in that order, and apart from the host.

    Attributes:
        handle: its address, as TensorRT takes it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = device.call("create a stream", device.driver.Stream)
        self.handle = int(self._stream.handle)

    def synchronize(self) -> None:
        """Wait until everything on it has run.

        Raises:
            DeviceError: something that was put on it failed.
        """
        try:
            self._stream.synchronize()
        except self._device.driver.Error as error:
            raise self._device.error("run a step", error) from error

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy a contiguous, pinned host array to the device; it must not change until it ran."""
        try:
            self._device.driver.memcpy_htod_async(target, source, self._stream)
        except self._device.driver.Error as error:
            raise self._device.error("copy to the GPU", error) from error

    def download(self, target: NDArray[Any], source: int) -> None:
        """Fill a contiguous, pinned host array; its values are there after `synchronize`."""
        try:
            self._device.driver.memcpy_dtoh_async(target, source, self._stream)
        except self._device.driver.Error as error:
            raise self._device.error("copy from the GPU", error) from error

    def clear(self, target: int, num_bytes: int) -> None:
        """Fill device memory with zeros."""
        self._device.call(
            "clear memory", self._device.driver.memset_d8_async, target, 0, num_bytes, self._stream
        )

    def close(self) -> None:
        """Destroy it; work that is on it is waited for by the driver."""
        self._stream = None


class Box(NamedTuple):
    """One side of a `BoxCopy`: rows ``pitch`` bytes apart, in layers of ``rows`` of them.

    Attributes:
        base: a device address, or a contiguous host array.
        pitch: bytes from one row to the next.
        rows: rows from one layer to the next.
    """

    base: int | NDArray[Any]
    pitch: int
    rows: int


class BoxCopy:
    """Copies a box out of one strided memory into another by a single ``cuMemcpy3DAsync``.

    The object is made once and run with other addresses: nothing is allocated in a step.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._copy = device.call("prepare a copy", device.driver.Memcpy3D)

    def run(
        self, target: Box, source: Box, *, width: int, height: int, depth: int, stream: Stream
    ) -> None:
        """Put ``depth`` layers of ``height`` rows of ``width`` bytes on a stream.

        Raises:
            DeviceError: the driver refuses.
        """
        copy = self._copy
        try:
            if isinstance(source.base, int):
                copy.set_src_device(source.base)
            else:
                copy.set_src_host(source.base)
            if isinstance(target.base, int):
                copy.set_dst_device(target.base)
            else:
                copy.set_dst_host(target.base)
            copy.src_pitch, copy.src_height = source.pitch, source.rows
            copy.dst_pitch, copy.dst_height = target.pitch, target.rows
            copy.width_in_bytes, copy.height, copy.depth = width, height, depth
            copy(stream._stream)
        except self._device.driver.Error as error:
            raise self._device.error("copy rows of the cache", error) from error


class DeviceMemory:
    """A block of device memory.

    Attributes:
        address: 256-byte aligned (cuMemAlloc).
        num_bytes: its size.
    """

    def __init__(self, device: Device, num_bytes: int, purpose: str) -> None:
        self.num_bytes = num_bytes
        self._block = device.allocate(purpose, num_bytes, device.driver.mem_alloc, num_bytes)
        self.address = int(self._block)

    def close(self) -> None:
        """Give it back; twice is harmless."""
        block, self._block, self.address = self._block, None, 0
        if block is not None:
            block.free()


class PinnedMemory:
    """Host memory that the GPU reaches by itself.

    Attributes:
        array: ``[num_bytes]`` uint8; never use it after `close`.
        address: where the device sees it, or 0 if it was not mapped.
    """

    def __init__(self, device: Device, num_bytes: int, purpose: str, *, mapped: bool) -> None:
        driver = device.driver
        flags = driver.host_alloc_flags.DEVICEMAP if mapped else 0
        self.array: NDArray[np.uint8] = device.allocate(
            purpose, num_bytes, driver.pagelocked_empty, num_bytes, np.uint8, mem_flags=flags
        )
        self._block = self.array.base
        self.address = 0
        if mapped:
            try:
                self.address = int(device.call("map memory", self._block.get_device_pointer))
            except EdgeError:
                self.close()
                raise
        self.array[...] = 0

    def close(self) -> None:
        """Give it back; twice is harmless."""
        block, self._block, self.address = self._block, None, 0
        self.array = np.empty(0, np.uint8)
        if block is not None:
            block.free()


class GraphExec:
    """A captured CUDA graph, ready to be launched."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device = device
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Put one run of it on a stream.

        Raises:
            DeviceError: the driver refuses.
        """
        graphs = self._device.graphs
        _check(graphs, "launch a CUDA graph", graphs.cuGraphLaunch(self._handle, stream.handle))

    def close(self) -> None:
        """Destroy it; twice is harmless."""
        handle, self._handle = self._handle, None
        if handle is not None:
            graphs = self._device.graphs
            _check(graphs, "destroy a CUDA graph", graphs.cuGraphExecDestroy(handle))


class Device:
    """One GPU, through its primary context, which TensorRT's own runtime calls use too.

    Args:
        ordinal: number of the GPU.

    Attributes:
        driver: the module ``pycuda.driver``.
        name: of the GPU.
        compute_capability: e.g. ``8.7``.
        integrated: whether it shares the host's memory, as on a Jetson.

    Raises:
        DependencyError: PyCUDA is missing, or the driver does not start; the message has the cure.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.driver = _load_driver()
        driver = self.driver
        try:
            driver.init()
            count = driver.Device.count()
            if ordinal >= count:
                raise DependencyError(
                    f"GPU {ordinal} is not here, the driver shows {count}; check "
                    "CUDA_VISIBLE_DEVICES"
                )
            gpu = driver.Device(ordinal)
            self.name = str(gpu.name())
            self.compute_capability = "{}.{}".format(*gpu.compute_capability())
            self.integrated = bool(gpu.get_attribute(driver.device_attribute.INTEGRATED))
            self._context = _primary_context(driver, ordinal)
        except driver.Error as error:
            raise DependencyError(explain_init_failure(_reason(error))) from error

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make its context the thread's own for as long as the block lasts."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Make its context current; `leave` must follow in the same thread."""
        self.call("enter the context", self._context.push)

    def leave(self) -> None:
        """Undo `enter`. A context that stays current would abort the process at its end."""
        self.call("leave the context", self._context.pop)

    @functools.cached_property
    def graphs(self) -> Any:
        """The module ``cuda.bindings.driver``.

        Raises:
            DependencyError: it is missing.
        """
        try:
            return importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise DependencyError(
                "CUDA graphs need cuda-bindings; install it with: pip install cuda-bindings, or "
                "load without CUDA graphs"
            ) from error

    def memory_info(self) -> tuple[int, int]:
        """Free and all bytes of device memory.

        On an integrated GPU the driver counts the page cache as used, though the kernel gives it
        up on demand (NVIDIA, CUDA for Tegra): there the free bytes are at least ``MemAvailable``.
        """
        free, total = self.call("ask for free memory", self.driver.mem_get_info)
        if self.integrated:
            free = max(int(free), read_available_memory_bytes() or 0)
        return int(free), int(total)

    def allocate(self, purpose: str, num_bytes: int, function: Any, *args: Any, **kw: Any) -> Any:
        """Call an allocator of PyCUDA.

        Raises:
            DeviceMemoryError: it did not fit.
            DeviceError: the driver failed in another way.
        """
        try:
            return function(*args, **kw)
        except (self.driver.Error, MemoryError) as error:
            if not isinstance(error, (self.driver.MemoryError, MemoryError)):
                raise self.error(f"allocate {purpose}", error) from error
            free, total = self.memory_info()
            raise DeviceMemoryError(
                f"{purpose} needs {num_bytes / 1e6:,.0f} MB of GPU memory, but {free / 1e6:,.0f} "
                f"of {total / 1e6:,.0f} MB are free; stop other programs, or build the engine "
                "with a smaller --kv-capacity or --max-batch"
            ) from error

    def call(self, doing: str, function: Any, *args: Any) -> Any:
        """Call PyCUDA.

        Raises:
            DeviceError: it failed.
        """
        try:
            return function(*args)
        except self.driver.Error as error:
            raise self.error(doing, error) from error

    def error(self, doing: str, error: BaseException) -> DeviceError:
        """Make PyCUDA's exception one of ours."""
        reason = _reason(error)
        fatal = any(sign in reason for sign in _FATAL)
        cure = "start the process anew" if fatal else "try again"
        return DeviceError(f"the GPU could not {doing}: {reason}; {cure}", fatal)

    def begin_capture(self, stream: Stream) -> None:
        """Record what is put on the stream from now on instead of running it.

        Other threads may go on with what a capture forbids (mode THREAD_LOCAL).
        """
        graphs = self.graphs
        mode = graphs.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        result = graphs.cuStreamBeginCapture(stream.handle, mode)
        _check(graphs, "begin a capture", result)

    def end_capture(self, stream: Stream) -> GraphExec:
        """End the recording and make it runnable.

        Raises:
            DeviceError: what was recorded cannot be a graph; the stream is usable again.
        """
        graphs = self.graphs
        graph = _check(graphs, "end a capture", graphs.cuStreamEndCapture(stream.handle))
        result = graphs.cuGraphInstantiate(graph, 0)
        released = graphs.cuGraphDestroy(graph)
        ready = GraphExec(self, _check(graphs, "instantiate a CUDA graph", result))
        try:
            _check(graphs, "destroy a captured graph", released)
        except DeviceError:
            with contextlib.suppress(DeviceError):  # the first error is the one to tell
                ready.close()
            raise
        return ready

    def abandon_capture(self, stream: Stream) -> None:
        """End a recording that failed, whatever it holds; harmless if none is open."""
        graphs = self.graphs
        error, graph = graphs.cuStreamEndCapture(stream.handle)
        if error == graphs.CUresult.CUDA_SUCCESS:
            _check(graphs, "destroy a captured graph", graphs.cuGraphDestroy(graph))


def _check(graphs: Any, doing: str, result: tuple[Any, ...]) -> Any:
    """Value of a call of ``cuda.bindings``, which returns its error first."""
    error, *values = result
    if error != graphs.CUresult.CUDA_SUCCESS:
        _, text = graphs.cuGetErrorString(error)
        reason = text.decode() if isinstance(text, bytes) else str(text)
        fatal = any(sign in reason for sign in _FATAL)
        raise DeviceError(f"the GPU could not {doing}: {reason} (CUDA {int(error)})", fatal)
    return values[0] if values else None


def _load_driver() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("pycuda")
        problem = "" if missing else f" (importing it failed: {error})"
        raise DependencyError(
            f"running on the GPU needs PyCUDA, which is not here{problem}; install it with: "
            "pip install pycuda (it compiles against the CUDA toolkit)"
        ) from error


@functools.cache
def _primary_context(driver: Any, ordinal: int) -> Any:
    """The context of a GPU, kept until the process ends, as CUDA's own runtime keeps it.

    PyCUDA gives it back only in the thread that retained it, which need not be alive by then.
    """
    return driver.Device(ordinal).retain_primary_context()


def _reason(error: BaseException) -> str:
    """The driver's sentence; PyCUDA writes ``cuFunction failed: sentence``."""
    return str(error).replace("\n", " ").strip() or type(error).__name__

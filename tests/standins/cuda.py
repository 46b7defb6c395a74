"""A stand-in for the GPU and for PyCUDA's calls that `edge.backends.cuda` makes.

Those of cuda-bindings, on the same device, are in `cuda_bindings`.

Device memory is host memory behind made-up addresses. Work on a stream runs as late as CUDA allows,
when the host waits; until then what it will write is poison. So a test fails when the product reads
too early, changes staging memory too early, lets a host array go before its copy ran, relies on
values instead of buffers in a graph, touches memory that it does not own, or leaves something
allocated. What a thread may not do during a capture is refused and spoils the capture, in other
threads too where the mode is global. Every call can be made to fail.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Op = Callable[[], None]
DRIVERS = ("pycuda", "cuda-bindings")
POISON = 0xFF  # a NaN in fp16, bf16 and fp32; -1 in integers
OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN = 2, 700, 999
TEXTS = {
    1: "invalid argument",
    2: "out of memory",
    200: "device kernel image is invalid",
    201: "invalid device context",
    209: "no kernel image is available for execution on the device",
    500: "named symbol not found",
    708: "cannot set while device is active in this process",
    700: "an illegal memory access was encountered",
    101: "invalid device ordinal",
    801: "operation not supported",
    803: "system has unsupported display driver / cuda driver combination",
    900: "operation not permitted when stream is capturing",
    901: "operation failed due to a previous error during capture",
    999: "unknown error",
    100: "no CUDA-capable device is detected",
    719: "unspecified launch failure",
}
_STICKY = {700, 719, 999}
# Calls that may wait for the device, which no graph can hold.
_UNSAFE = {"cuMemAlloc", "cuMemHostAlloc", "cuStreamSynchronize", "cuModuleLoadData"}


class RuleError(AssertionError):
    """The product broke a documented rule whose breach CUDA or TensorRT need not notice."""


class Error(Exception):
    """As ``pycuda.driver.Error``: the message is all that the product may use.

    Attributes:
        code: the CUDA error, for `cuda_bindings`.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class OutOfMemoryError(Error):
    """As ``pycuda.driver.MemoryError``."""


class LogicError(Error):
    """As ``pycuda.driver.LogicError``."""


class LaunchError(Error):
    """As ``pycuda.driver.LaunchError``."""


@dataclass
class Work:
    """Something on a stream.

    Attributes:
        run: does it.
        poison: marks what it will write as not there yet.
        valid: asked when a graph replays it.
        scratch: address and bytes of memory that it needs for itself.
    """

    run: Op
    poison: Op = field(default=lambda: None)
    valid: Op = field(default=lambda: None)
    scratch: tuple[int, int] = (0, 0)


class HostBytes:
    """One end of an asynchronous copy in host memory, which the copy does not keep alive.

    Args:
        array: contiguous. Pinned memory has an owner of its own; of any other only the address is
            known to the driver.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        pinned = isinstance(owner.base, _HostBlock)
        self._owner = (lambda: owner) if pinned else weakref.ref(owner)
        self._address, self.nbytes = array.ctypes.data, array.nbytes

    def view(self) -> NDArray[np.uint8]:
        """Its bytes, now."""
        if self._owner() is None:
            raise RuleError("host memory was freed before the copy of it ran")
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self._address))


Side = tuple[int | HostBytes, int, int]
"""One end of a 3-D copy: a device address or host memory, its pitch, and rows per layer."""


class FakeGpu:
    """The device: memory, streams, faults, and the books of what is alive.

    Args:
        total_bytes: of device memory.
        integrated: as on a Jetson.
        compute_capability: e.g. ``(8, 7)``.
        num_sms: streaming multiprocessors that are on.
        with_pycuda: whether PyCUDA can be imported.

    Attributes:
        largest_block_bytes: the most that one allocation gets, as where memory lies in pieces; None
            is all of it.
        calls: names of all calls so far.
        fail_at: number of the call that fails, counted from 0; None fails none.
        fail_code: the CUDA error it fails with.
        reserved_bytes: of device memory that no call has shown: weights, execution contexts.
        spent_s: seconds that calls would have taken, by name; nothing waits for them.
        lost: the error that every call returns from now on.
        kernels: what a kernel computes, by its entry point: given this device, the grid and its
            parameters' values.
        context_flags: of the primary context.
        context_active: whether somebody has retained it.
        flags_stay: the driver refuses other flags for a context that is active, as before CUDA 11.
        missing: functions of cuda-bindings that the driver's library does not have; ``libcuda`` is
            the whole library.
    """

    def __init__(
        self,
        *,
        total_bytes: int = 1 << 30,
        integrated: bool = False,
        compute_capability: tuple[int, int] = (8, 7),
        num_sms: int = 16,
        with_pycuda: bool = True,
    ) -> None:
        self.with_pycuda = with_pycuda
        self.total_bytes, self.integrated = total_bytes, integrated
        self.compute_capability, self.num_sms = compute_capability, num_sms
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.reserved_bytes = 0
        self.largest_block_bytes: int | None = None
        self.spent_s: dict[str, float] = {}
        self.live: dict[str, int] = {}
        self.streams: weakref.WeakValueDictionary[int, FakeStream] = weakref.WeakValueDictionary()
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.fail_code = OUT_OF_MEMORY
        self.lost: int | None = None
        self.context_flags = 0
        self.context_active = self.flags_stay = False
        self.missing: set[str] = set()
        self.kernels: dict[str, Callable[[FakeGpu, tuple[int, ...], tuple[int, ...]], None]] = {}
        self.broken: list[str] = []  # rules, where an exception would not be seen
        self.eager = False
        self._next = 0x7F00_0000_0000
        self._current = threading.local()

    # Books

    def born(self, kind: str) -> None:
        self.live[kind] = self.live.get(kind, 0) + 1

    def dead(self, kind: str) -> None:
        self.live[kind] -= 1
        assert self.live[kind] >= 0, kind

    @property
    def alive(self) -> dict[str, int]:
        return {kind: count for kind, count in self.live.items() if count}

    # Faults

    def code(self, name: str, *, context: bool = True) -> int:
        """Count a call and say what it returns; 0 is success."""
        index = len(self.calls)
        self.calls.append(name)
        if self.lost is not None and not name.startswith("cuCtx"):  # these ask no device
            return self.lost
        if index == self.fail_at:
            if self.fail_code in _STICKY:
                self.lost = self.fail_code
                for stream in self.streams.values():
                    stream.pending.clear()  # nothing runs any more
            return self.fail_code
        if context and self.depth < 1:
            return 201
        return self._refuse_in_captures() if name in _UNSAFE else 0

    def _refuse_in_captures(self) -> int:
        me, code = threading.get_ident(), 0
        for stream in self.streams.values():
            mode = stream.mode
            forbidden = mode is CaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL or (
                mode is CaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL and stream.thread == me
            )
            if stream.capturing is not None and forbidden:
                stream.invalidated, code = True, 900
        return code

    def call(self, name: str, *, context: bool = True) -> None:
        """Count a call of PyCUDA and raise if it fails."""
        self.fail(name, self.code(name, context=context))

    def fail(self, name: str, code: int) -> None:
        if code:
            kind = {2: OutOfMemoryError, 700: LaunchError, 719: LaunchError, 999: Error}
            raise kind.get(code, LogicError)(f"{name} failed: {TEXTS[code]}", code)

    @property
    def depth(self) -> int:
        return getattr(self._current, "depth", 0)

    def push(self) -> None:
        self.call("cuCtxPushCurrent", context=False)
        self._current.depth = self.depth + 1

    def pop(self) -> None:
        self._current.depth = self.depth - 1
        self.call("cuCtxPopCurrent", context=False)

    def retain(self) -> None:
        self.call("cuDevicePrimaryCtxRetain", context=False)
        self.context_active = True

    # Memory

    @property
    def used_bytes(self) -> int:
        return self.reserved_bytes + sum(block.nbytes for block in self.blocks.values())

    def reserve(self, num_bytes: int) -> bool:
        """Take device memory, or give it back; False if there is not as much."""
        if num_bytes > 0 and self.used_bytes + num_bytes > self.total_bytes:
            return False
        self.reserved_bytes += num_bytes
        return True

    def spend(self, name: str, seconds: float) -> None:
        self.spent_s[name] = self.spent_s.get(name, 0.0) + seconds

    def fits(self, num_bytes: int) -> bool:
        largest = self.total_bytes if self.largest_block_bytes is None else self.largest_block_bytes
        return num_bytes <= min(largest, self.total_bytes - self.used_bytes)

    def allocate(self, num_bytes: int) -> int:
        if not self.fits(num_bytes):
            raise OutOfMemoryError("cuMemAlloc failed: out of memory", OUT_OF_MEMORY)
        # No better aligned than CUDA promises, which is 256 bytes.
        return self.register(np.full(num_bytes, POISON, np.uint8), 256)

    def register(self, array: NDArray[np.uint8], offset: int = 0) -> int:
        address = self._next + offset
        self._next += -(-array.nbytes // 4096) * 4096 + 4096
        self.blocks[address] = array
        return address

    def holds(self, address: int) -> bool:
        """Whether an address is of the device."""
        return any(base <= address < base + len(block) for base, block in self.blocks.items())

    def still(self, address: int, before: NDArray[np.uint8]) -> None:
        """An address must be of the block that it was of when a graph was captured."""
        if self.memory(address, len(before)).ctypes.data != before.ctypes.data:
            raise RuleError(f"memory at {address:#x} was freed after the capture")

    def memory(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        """The bytes at an address; all of them must lie in one live block."""
        for base, block in self.blocks.items():
            if base <= address < base + block.nbytes:
                if address + num_bytes > base + block.nbytes:
                    raise RuleError(
                        f"{num_bytes} bytes at {address - base} pass a block of {block.nbytes}"
                    )
                return block[address - base : address - base + num_bytes]
        raise RuleError(f"nothing is allocated at {address:#x}")

    def memory_info(self) -> tuple[int, int]:
        self.call("cuMemGetInfo")
        return self.total_bytes - self.used_bytes, self.total_bytes

    # Work

    def put(self, handle: int, work: Work) -> None:
        stream = self.streams[handle]
        if stream.capturing is not None:
            stream.capturing.append(work)
            return
        self._check_scratch(handle, work)
        work.poison()
        if self.eager:
            work.run()
        else:
            stream.pending.append(work)

    def _check_scratch(self, handle: int, work: Work) -> None:
        first, size = work.scratch
        for other, stream in self.streams.items():
            for each in stream.pending if other != handle else ():
                if first < sum(each.scratch) and each.scratch[0] < first + size:
                    raise RuleError("two runs at once write the same activations")

    def upload(self, dest: int, source: HostBytes, handle: int) -> None:
        self.call("cuMemcpyHtoDAsync")
        target = self.memory(dest, source.nbytes)

        def run() -> None:
            target[...] = source.view()

        self.put(handle, Work(run, valid=lambda: self.still(dest, target)))

    def download(self, target: HostBytes, src: int, handle: int) -> None:
        self.call("cuMemcpyDtoHAsync")
        source = self.memory(src, target.nbytes)

        def run() -> None:
            target.view()[...] = source

        poison = functools.partial(_poison, target)
        self.put(handle, Work(run, poison, lambda: self.still(src, source)))

    def fill(self, dest: int, value: int, num_bytes: int, handle: int) -> None:
        self.call("cuMemsetD8Async")
        target = self.memory(dest, num_bytes)
        self.put(handle, Work(lambda: target.fill(value), valid=lambda: self.still(dest, target)))

    def copy_box(self, target: Side, source: Side, size: tuple[int, int, int], handle: int) -> None:
        """One 3-D copy; ``size`` is width in bytes, height and depth."""
        self.call("cuMemcpy3DAsync")
        width, height, depth = size
        views: list[Callable[[], NDArray[np.uint8]]] = []
        for base, pitch, rows in (source, target):
            if pitch < width or rows < height:
                self.fail("cuMemcpy3DAsync", 201)
            span = ((depth - 1) * rows + height - 1) * pitch + width
            if isinstance(base, int):
                view: Callable[[], NDArray[np.uint8]] = functools.partial(
                    np.asarray, self.memory(base, span)
                )
            elif base.nbytes < span:
                raise RuleError("a copy passes the end of a host array")
            else:
                view = base.view
            shape, strides = (depth, height, width), (rows * pitch, pitch, 1)
            views.append(functools.partial(_strided, view, shape, strides))
        read, write = views

        def run() -> None:
            write()[...] = read()

        host = not isinstance(target[0], int)
        self.put(handle, Work(run, lambda: write().fill(POISON) if host else None))

    def modules(self) -> dict[str, types.ModuleType | None]:
        """For ``sys.modules``: what the product imports."""
        from .cuda_bindings import make_bindings

        bindings = make_bindings(self)
        if not self.with_pycuda:
            return {"pycuda": None, "pycuda.driver": None, "cuda.bindings.driver": bindings}
        driver = _make_driver(self)
        package = types.ModuleType("pycuda")
        package.driver = driver  # type: ignore[attr-defined]
        return {"pycuda": package, "pycuda.driver": driver, "cuda.bindings.driver": bindings}


class FakeStream:
    """``pycuda.driver.Stream``."""

    def __init__(self, gpu: FakeGpu) -> None:
        gpu.call("cuStreamCreate")
        self._gpu = gpu
        self.handle = 0x1000 + 16 * len(gpu.calls)
        self.pending: list[Work] = []
        self.capturing: list[Work] | None = None
        self.mode: CaptureMode | None = None
        self.thread = 0  # which began the capture
        self.invalidated = False
        gpu.streams[self.handle] = self
        gpu.born("stream")

    def synchronize(self) -> None:
        code = self._gpu.code("cuStreamSynchronize")
        if self.capturing is not None:
            self._gpu.fail("cuStreamSynchronize", 900)
        pending, queue = list(self.pending), self.pending
        queue.clear()
        self._gpu.fail("cuStreamSynchronize", code)
        for work in pending:
            work.run()
        self._gpu.fail("cuStreamSynchronize", self._gpu.lost or 0)

    def __del__(self) -> None:
        if "capturing" in self.__dict__:  # it was made
            self._gpu.dead("stream")


class _Block:
    """``pycuda.driver.DeviceAllocation``."""

    def __init__(self, gpu: FakeGpu, num_bytes: int) -> None:
        gpu.call("cuMemAlloc")
        self._gpu, self._address = gpu, gpu.allocate(num_bytes)
        gpu.born("device memory")

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        if self._gpu.depth < 1:
            raise RuleError("PyCUDA frees memory only where its context is current")
        del self._gpu.blocks[self._address]
        self._gpu.dead("device memory")


class _HostBlock:
    """``pycuda.driver.PagelockedHostAllocation``, the base of an array."""

    def __init__(self, gpu: FakeGpu, shape: Any, dtype: Any, mapped: bool) -> None:
        gpu.call("cuMemHostAlloc")
        self._gpu, self._mapped = gpu, mapped
        self._array: NDArray[Any] = np.full(shape, POISON, dtype)
        self._address = 0
        gpu.born("pinned memory")

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._array.__array_interface__

    def get_device_pointer(self) -> int:
        self._gpu.call("cuMemHostGetDevicePointer")
        if not self._mapped:
            raise RuleError("memory that was not mapped has no device address")
        if not self._address:
            self._address = self._gpu.register(self._array.view(np.uint8))
        return self._address

    def free(self) -> None:
        if self._gpu.depth < 1:
            raise RuleError("PyCUDA frees memory only where its context is current")
        self._gpu.blocks.pop(self._address, None)
        self._array.view(np.uint8)[...] = 0xEE
        self._gpu.dead("pinned memory")


class FakeMemcpy3D:
    """``pycuda.driver.Memcpy3D``: the fields of CUDA_MEMCPY3D that PyCUDA shows."""

    _fields = ("src_pitch", "src_height", "dst_pitch", "dst_height", "width_in_bytes", "height",
               "depth")  # fmt: skip
    src_pitch = src_height = dst_pitch = dst_height = width_in_bytes = height = depth = 0

    def __init__(self, gpu: FakeGpu) -> None:
        gpu.code("CUDA_MEMCPY3D")
        self._gpu = gpu
        self._source: Any = None
        self._target: Any = None

    def set_src_device(self, address: int) -> None:
        self._source = int(address)

    def set_dst_device(self, address: int) -> None:
        self._target = int(address)

    def set_src_host(self, array: NDArray[Any]) -> None:
        self._source = HostBytes(array)

    def set_dst_host(self, array: NDArray[Any]) -> None:
        self._target = HostBytes(array)

    def __call__(self, stream: FakeStream) -> None:
        self._gpu.copy_box(
            (self._target, self.dst_pitch, self.dst_height),
            (self._source, self.src_pitch, self.src_height),
            (self.width_in_bytes, self.height, self.depth),
            stream.handle,
        )


def _poison(target: HostBytes) -> None:
    target.view().fill(POISON)


def _strided(
    view: Callable[[], NDArray[np.uint8]], shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[np.uint8]:
    return np.lib.stride_tricks.as_strided(view(), shape, strides)


def _make_driver(gpu: FakeGpu) -> Any:
    driver: Any = types.ModuleType("pycuda.driver")
    driver.Error, driver.MemoryError = Error, OutOfMemoryError
    driver.LogicError, driver.LaunchError = LogicError, LaunchError
    driver.host_alloc_flags = types.SimpleNamespace(PORTABLE=1, DEVICEMAP=2)
    driver.device_attribute = types.SimpleNamespace(
        INTEGRATED="integrated", MULTIPROCESSOR_COUNT="num_sms"
    )
    driver.init = lambda flags=0: gpu.call("cuInit", context=False)

    class Context:
        def push(self) -> None:
            gpu.push()

        @staticmethod
        def pop() -> None:
            gpu.pop()

    context = Context()

    class Device:
        def __init__(self, ordinal: int) -> None:
            gpu.call("cuDeviceGet", context=False)
            gpu.fail("cuDeviceGet", 101 if ordinal else 0)

        def name(self) -> str:
            return "Fake"

        def compute_capability(self) -> tuple[int, int]:
            return gpu.compute_capability

        def get_attribute(self, attribute: str) -> int:
            return int(getattr(gpu, attribute))

        def retain_primary_context(self) -> Context:
            gpu.retain()
            return context

    driver.Device, driver.Context = Device, Context
    driver.Memcpy3D = lambda: FakeMemcpy3D(gpu)
    driver.mem_alloc = lambda num_bytes: _Block(gpu, num_bytes)

    class Stream(FakeStream):
        def __init__(self, flags: int = 0) -> None:
            super().__init__(gpu)

    driver.Stream = Stream

    def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        return np.asarray(_HostBlock(gpu, shape, dtype, bool(mem_flags & 2)))

    def memcpy_htod_async(dest: int, src: NDArray[Any], stream: FakeStream) -> None:
        gpu.upload(dest, HostBytes(src), stream.handle)

    def memcpy_dtoh_async(dest: NDArray[Any], src: int, stream: FakeStream) -> None:
        gpu.download(HostBytes(dest), src, stream.handle)

    def memset_d8_async(dest: int, data: int, size: int, stream: FakeStream) -> None:
        gpu.fill(dest, data, size, stream.handle)

    driver.pagelocked_empty, driver.mem_get_info = pagelocked_empty, gpu.memory_info
    driver.memcpy_htod_async, driver.memcpy_dtoh_async = memcpy_htod_async, memcpy_dtoh_async
    driver.memset_d8_async = memset_d8_async
    return driver


class CaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2

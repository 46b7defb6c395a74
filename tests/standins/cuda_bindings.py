"""A stand-in for ``cuda.bindings.driver`` on a `FakeGpu`.

Every call returns its error first; what `FakeGpu.missing` names raises RuntimeError, as the real
one does where the driver's library, or a function of it, is not there. Host memory is known by its
address alone, so only pinned memory is known to have been freed too early.
"""

from __future__ import annotations

import ctypes
import enum
import re
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda import (
    TEXTS,
    CaptureMode,
    Error,
    FakeGpu,
    FakeStream,
    HostBytes,
    RuleError,
    Side,
    Work,
    _Block,
    _HostBlock,
)


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE = 708
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_UNKNOWN = 999


class DeviceAttribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class FunctionAttribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class MemoryType(enum.IntEnum):
    CU_MEMORYTYPE_HOST = 1
    CU_MEMORYTYPE_DEVICE = 2


class AllocationType(enum.IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class LocationType(enum.IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class AccessFlags(enum.IntEnum):
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


class GranularityFlags(enum.IntEnum):
    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0


class Location:
    """``CUmemLocation``."""

    __slots__ = ("id", "type")

    def __init__(self) -> None:
        self.id, self.type = -1, 0

    def check(self) -> None:
        assert (self.id, self.type) == (0, LocationType.CU_MEM_LOCATION_TYPE_DEVICE)


class AllocationProp:
    """``CUmemAllocationProp``, the fields in use."""

    __slots__ = ("location", "type")

    def __init__(self) -> None:
        self.location, self.type = Location(), 0


class AccessDesc:
    """``CUmemAccessDesc``."""

    __slots__ = ("flags", "location")

    def __init__(self) -> None:
        self.location, self.flags = Location(), 0


class Memcpy3DParameters:
    """``CUDA_MEMCPY3D``; a field that the real one has not is an error."""

    __slots__ = (
        "Depth",
        "Height",
        "WidthInBytes",
        "dstDevice",
        "dstHeight",
        "dstHost",
        "dstMemoryType",
        "dstPitch",
        "srcDevice",
        "srcHeight",
        "srcHost",
        "srcMemoryType",
        "srcPitch",
    )  # fmt: skip

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)


class _RawHost(HostBytes):
    """Host memory by its address; what lies in a live pinned block is that block's."""

    def __init__(self, blocks: dict[int, _HostBlock], address: int, num_bytes: int) -> None:
        self._pinned = False
        for base, block in blocks.items():
            if base <= address < base + block._array.nbytes:
                assert address + num_bytes <= base + block._array.nbytes, "past pinned memory"
                self._pinned = True
        self._blocks, self._address, self.nbytes = blocks, address, num_bytes

    def view(self) -> NDArray[np.uint8]:
        alive = any(
            base <= self._address < base + block._array.nbytes
            for base, block in self._blocks.items()
        )
        if self._pinned and not alive:
            raise RuleError("host memory was freed before the copy of it ran")
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self._address))


def make_bindings(gpu: FakeGpu) -> Any:
    """The module."""
    module: Any = types.ModuleType("cuda.bindings.driver")
    module.CUresult, module.CUstreamCaptureMode = Result, CaptureMode
    module.CUdevice_attribute, module.CUmemorytype = DeviceAttribute, MemoryType
    module.CUfunction_attribute = FunctionAttribute
    module.CUmemAllocationType, module.CUmemLocationType = AllocationType, LocationType
    module.CUmemAccess_flags = AccessFlags
    module.CUmemAllocationGranularity_flags = GranularityFlags
    module.CUmemAllocationProp, module.CUmemAccessDesc = AllocationProp, AccessDesc
    module.CUDA_MEMCPY3D, module.CU_MEMHOSTALLOC_DEVICEMAP = Memcpy3DParameters, 2
    functions = [*_devices(gpu), *_memory(gpu), *_ranges(gpu), *_streams(gpu), *_graphs(gpu),
                 *_kernels(gpu), *_events(gpu)]  # fmt: skip
    for function in functions:
        setattr(module, function.__name__, _returns_its_error(gpu, function))
    return module


def _returns_its_error(gpu: FakeGpu, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> tuple[Any, ...]:
        if "libcuda" in gpu.missing:
            raise RuntimeError("Failed to dlopen libcuda.so.1")
        if function.__name__ in gpu.missing:
            raise RuntimeError(f'Function "{function.__name__}" not found')
        try:
            values = function(*args)
        except Error as error:
            return Result(error.code), None
        if values is None:
            return (Result(0),)
        return (Result(0), *(values if isinstance(values, tuple) else (values,)))

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def _devices(gpu: FakeGpu) -> list[Callable[..., Any]]:
    def cuInit(Flags: int) -> None:
        gpu.call("cuInit", context=False)

    def cuGetErrorString(error: Result) -> bytes:
        return TEXTS[int(error)].encode()

    def cuDeviceGet(ordinal: int) -> int:
        gpu.call("cuDeviceGet", context=False)
        gpu.fail("cuDeviceGet", 101 if ordinal else 0)
        return ordinal

    def cuDeviceGetName(length: int, dev: int) -> bytes:
        return b"Fake".ljust(length, b"\0")

    def cuDeviceGetAttribute(attrib: DeviceAttribute, dev: int) -> int:
        numbers = (gpu.num_sms, int(gpu.integrated), *gpu.compute_capability)
        return dict(zip(DeviceAttribute, numbers, strict=True))[attrib]

    def cuDevicePrimaryCtxRetain(dev: int) -> str:
        gpu.retain()
        return "context"

    def cuDevicePrimaryCtxGetState(dev: int) -> tuple[int, int]:
        gpu.call("cuDevicePrimaryCtxGetState", context=False)
        return gpu.context_flags, int(gpu.context_active)

    def cuDevicePrimaryCtxSetFlags(dev: int, flags: int) -> None:
        gpu.call("cuDevicePrimaryCtxSetFlags", context=False)
        gpu.fail("cuDevicePrimaryCtxSetFlags", 0 if flags & 7 in (0, 1, 2, 4) else 1)
        if gpu.context_active and gpu.flags_stay:
            gpu.fail("cuDevicePrimaryCtxSetFlags", 708)
        gpu.context_flags = flags

    def cuCtxPushCurrent(ctx: str) -> None:
        gpu.push()

    def cuCtxGetCurrent() -> int:
        gpu.call("cuCtxGetCurrent", context=False)
        return 0x77 if gpu.depth else 0

    def cuCtxPopCurrent() -> str:
        gpu.pop()
        return "context"

    return [
        cuInit, cuGetErrorString, cuDeviceGet, cuDeviceGetName, cuDeviceGetAttribute,
        cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxGetState, cuDevicePrimaryCtxSetFlags,
        cuCtxPushCurrent, cuCtxGetCurrent, cuCtxPopCurrent,
    ]  # fmt: skip


def _memory(gpu: FakeGpu) -> list[Callable[..., Any]]:
    blocks: dict[int, _Block] = {}
    pinned: dict[int, _HostBlock] = {}

    def release(name: str, block: _Block | _HostBlock) -> None:
        code = gpu.code(name)
        block.free()
        gpu.fail(name, code)

    def cuMemAlloc(bytesize: int) -> int:
        block = _Block(gpu, bytesize)
        blocks[int(block)] = block
        return int(block)

    def cuMemFree(dptr: int) -> None:
        release("cuMemFree", blocks.pop(dptr))

    def cuMemGetInfo() -> tuple[int, int]:
        return gpu.memory_info()

    def cuMemHostAlloc(bytesize: int, Flags: int) -> int:
        block = _HostBlock(gpu, bytesize, np.uint8, bool(Flags & 2))
        pinned[block._array.ctypes.data] = block
        return block._array.ctypes.data

    def cuMemHostGetDevicePointer(p: int, Flags: int) -> int:
        return pinned[p].get_device_pointer()

    def cuMemFreeHost(p: int) -> None:
        release("cuMemFreeHost", pinned.pop(p))

    def cuMemcpyHtoDAsync(dstDevice: int, srcHost: int, ByteCount: int, hStream: int) -> None:
        gpu.upload(dstDevice, _RawHost(pinned, srcHost, ByteCount), hStream)

    def cuMemcpyDtoHAsync(dstHost: int, srcDevice: int, ByteCount: int, hStream: int) -> None:
        gpu.download(_RawHost(pinned, dstHost, ByteCount), srcDevice, hStream)

    def cuMemsetD8Async(dstDevice: int, uc: int, N: int, hStream: int) -> None:
        gpu.fill(dstDevice, uc, N, hStream)

    def cuMemcpyDtoDAsync(dstDevice: int, srcDevice: int, ByteCount: int, hStream: int) -> None:
        gpu.call("cuMemcpyDtoDAsync")
        target, source = gpu.memory(dstDevice, ByteCount), gpu.memory(srcDevice, ByteCount)

        def run() -> None:
            target[...] = source

        gpu.put(hStream, Work(run, valid=lambda: gpu.still(dstDevice, target)))

    def cuMemcpy3DAsync(pCopy: Memcpy3DParameters, hStream: int) -> None:
        copy: Any = pCopy

        def side(kind: str) -> Side:
            pitch, rows = getattr(copy, f"{kind}Pitch"), getattr(copy, f"{kind}Height")
            if getattr(copy, f"{kind}MemoryType") == MemoryType.CU_MEMORYTYPE_DEVICE:
                return getattr(copy, f"{kind}Device"), pitch, rows
            assert getattr(copy, f"{kind}MemoryType") == MemoryType.CU_MEMORYTYPE_HOST
            span = ((copy.Depth - 1) * rows + copy.Height - 1) * pitch + copy.WidthInBytes
            return _RawHost(pinned, getattr(copy, f"{kind}Host"), span), pitch, rows

        size = (copy.WidthInBytes, copy.Height, copy.Depth)
        gpu.copy_box(side("dst"), side("src"), size, hStream)

    return [
        cuMemAlloc, cuMemFree, cuMemGetInfo, cuMemHostAlloc, cuMemHostGetDevicePointer,
        cuMemFreeHost, cuMemcpyHtoDAsync, cuMemcpyDtoHAsync, cuMemsetD8Async, cuMemcpyDtoDAsync,
        cuMemcpy3DAsync,
    ]  # fmt: skip


UNIT_BYTES = 2 << 20
"""What pieces of a range are multiples of."""


def _ranges(gpu: FakeGpu) -> list[Callable[..., Any]]:
    """Ranges of addresses, and the memory that is put behind them."""
    pieces: dict[int, int] = {}  # bytes by handle
    ranges: dict[int, int] = {}  # bytes by address
    mapped: dict[int, int] = {}  # bytes by address
    in_use: set[int] = set()  # handles of what is or was mapped

    def range_of(address: int) -> int:
        return next(base for base, size in ranges.items() if base <= address < base + size)

    def refuse(name: str, wrong: bool) -> None:
        gpu.fail(name, 1 if wrong else 0)

    def cuMemGetAllocationGranularity(prop: AllocationProp, option: GranularityFlags) -> int:
        gpu.call("cuMemGetAllocationGranularity")
        prop.location.check()
        assert option is GranularityFlags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return UNIT_BYTES

    def cuMemAddressReserve(size: int, alignment: int, addr: int, flags: int) -> int:
        gpu.call("cuMemAddressReserve")
        refuse("cuMemAddressReserve", size % UNIT_BYTES != 0 or not size)
        assert (alignment, addr, flags) == (0, 0, 0)
        address = gpu.register(np.empty(0, np.uint8))
        del gpu.blocks[address]
        gpu._next += size
        ranges[address] = size
        gpu.born("range of addresses")
        return address

    def cuMemCreate(size: int, prop: AllocationProp, flags: int) -> int:
        gpu.call("cuMemCreate")
        prop.location.check()
        assert (prop.type, flags) == (AllocationType.CU_MEM_ALLOCATION_TYPE_PINNED, 0)
        refuse("cuMemCreate", size % UNIT_BYTES != 0 or not size)
        gpu.fail("cuMemCreate", 0 if gpu.fits(size) else 2)
        gpu.reserve(size)
        gpu.born("piece")
        handle = 0x4000 + len(gpu.calls)
        pieces[handle] = size
        return handle

    def cuMemMap(ptr: int, size: int, offset: int, handle: int, flags: int) -> None:
        gpu.call("cuMemMap")
        base = range_of(ptr)
        inside = ptr + size <= base + ranges[base] and (offset, flags) == (0, 0)
        free = all(ptr + size <= at or ptr >= at + num_bytes for at, num_bytes in mapped.items())
        refuse("cuMemMap", not (inside and free and pieces[handle] == size))
        mapped[ptr] = size
        in_use.add(handle)
        gpu.born("mapping")

    def cuMemRelease(handle: int) -> None:
        code = gpu.code("cuMemRelease")
        size = pieces.pop(handle)
        if handle not in in_use:
            gpu.reserve(-size)
        gpu.dead("piece")
        gpu.fail("cuMemRelease", code)

    def cuMemSetAccess(ptr: int, size: int, desc: list[AccessDesc], count: int) -> None:
        gpu.call("cuMemSetAccess")
        assert count == len(desc) == 1
        desc[0].location.check()
        assert desc[0].flags is AccessFlags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        inside = sum(num for at, num in mapped.items() if ptr <= at and at + num <= ptr + size)
        refuse("cuMemSetAccess", inside != size)
        gpu.reserve(-size)  # it is counted as a block from now on
        gpu.blocks[ptr] = np.full(size, 0xFF, np.uint8)

    def cuMemUnmap(ptr: int, size: int) -> None:
        gpu.call("cuMemUnmap")
        if any(stream.pending for stream in gpu.streams.values()):
            raise RuleError("memory is unmapped while work may use it")
        base = range_of(ptr)
        if base in gpu.blocks:
            gpu.reserved_bytes += len(gpu.blocks.pop(base))
        refuse("cuMemUnmap", mapped.get(ptr) != size)
        gpu.reserve(-mapped.pop(ptr))
        gpu.dead("mapping")

    def cuMemAddressFree(ptr: int, size: int) -> None:
        gpu.call("cuMemAddressFree")
        refuse(
            "cuMemAddressFree",
            ranges.get(ptr) != size or any(ptr <= at < ptr + size for at in mapped),
        )
        del ranges[ptr]
        gpu.dead("range of addresses")

    def cuCtxSynchronize() -> None:
        gpu.call("cuCtxSynchronize")
        for stream in list(gpu.streams.values()):
            stream.synchronize()

    return [
        cuMemGetAllocationGranularity, cuMemAddressReserve, cuMemCreate, cuMemMap, cuMemRelease,
        cuMemSetAccess, cuMemUnmap, cuMemAddressFree, cuCtxSynchronize,
    ]  # fmt: skip


def _streams(gpu: FakeGpu) -> list[Callable[..., Any]]:
    streams: dict[int, FakeStream] = {}

    def cuStreamCreate(Flags: int) -> int:
        stream = FakeStream(gpu)
        streams[stream.handle] = stream
        return stream.handle

    def cuStreamSynchronize(hStream: int) -> None:
        streams[hStream].synchronize()

    def cuStreamDestroy(hStream: int) -> None:
        code = gpu.code("cuStreamDestroy")
        del streams[hStream]
        gpu.fail("cuStreamDestroy", code)

    return [cuStreamCreate, cuStreamSynchronize, cuStreamDestroy]


def _graphs(gpu: FakeGpu) -> list[Callable[..., Any]]:
    def cuStreamBeginCapture(hStream: int, mode: CaptureMode) -> None:
        gpu.call("cuStreamBeginCapture")
        stream = gpu.streams[hStream]
        stream.capturing, stream.invalidated = [], False
        stream.mode, stream.thread = mode, threading.get_ident()

    def cuStreamEndCapture(hStream: int) -> list[Work]:
        code = gpu.code("cuStreamEndCapture")
        stream = gpu.streams[hStream]
        works, stream.capturing = stream.capturing, None
        if works is None or stream.invalidated:
            code = code or 901
        gpu.fail("cuStreamEndCapture", code)
        gpu.born("captured graph")
        assert works is not None
        return works

    uploaded: set[int] = set()

    def cuGraphInstantiate(hGraph: list[Work], flags: int) -> list[Work]:
        gpu.call("cuGraphInstantiate")
        gpu.born("graph")
        handle = list(hGraph)
        uploaded.discard(id(handle))
        return handle

    def cuGraphUpload(hGraphExec: list[Work], hStream: int) -> None:
        gpu.call("cuGraphUpload")
        assert gpu.streams[hStream].capturing is None
        uploaded.add(id(hGraphExec))

    def cuGraphDestroy(hGraph: list[Work]) -> None:
        gpu.dead("captured graph")
        gpu.call("cuGraphDestroy")

    def cuGraphExecDestroy(hGraphExec: list[Work]) -> None:
        gpu.dead("graph")
        gpu.call("cuGraphExecDestroy")

    def cuGraphLaunch(hGraphExec: list[Work], hStream: int) -> None:
        gpu.call("cuGraphLaunch")
        if id(hGraphExec) not in uploaded:  # as CUDA does, and the step waits for it
            gpu.calls.append("upload at the first launch")
            uploaded.add(id(hGraphExec))
        for work in hGraphExec:
            work.valid()
            gpu.put(hStream, work)

    return [
        cuStreamBeginCapture, cuStreamEndCapture, cuGraphInstantiate, cuGraphDestroy,
        cuGraphExecDestroy, cuGraphUpload, cuGraphLaunch,
    ]  # fmt: skip


_PTX = b".version "
_ELF_OF_CUDA = 190  # e_machine
_PARAMETER_BYTES = b"\x03\x19"  # EIATTR_CBANK_PARAM_SIZE in .nv.info


class _Function:
    """A kernel in a module that is loaded."""

    def __init__(self, image: bytes, entry: str) -> None:
        self.image, self.entry, self.shared_bytes = image, entry, 48 * 1024

    def takes(self, num_bytes: int) -> bool:
        """Whether that is the size of its parameters."""
        if not self.image.startswith(_PTX):
            return _PARAMETER_BYTES + num_bytes.to_bytes(2, "little") in self.image
        head = self.image.split(f".entry {self.entry}(".encode())[1].split(b")")[0]
        end = 0
        for width in re.findall(rb"\.param \.u(\d+)", head):
            size = int(width) // 8
            end = -(-end // size) * size + size
        return end == num_bytes


def _kernels(gpu: FakeGpu) -> list[Callable[..., Any]]:
    modules: dict[int, bytes] = {}

    def cuModuleLoadData(image: bytes) -> int:
        gpu.call("cuModuleLoadData")
        if image.startswith(_PTX):
            if not image.endswith(b"\0"):
                raise RuleError("PTX without a zero byte at its end: the driver reads on")
            # It stays as long as the process: nobody counts it.
            handle = 0x2000 + len(gpu.calls)
            modules[handle] = bytes(image)
            return handle
        machine = int.from_bytes(image[18:20], "little")
        valid = image[:4] == b"\x7fELF" and machine == _ELF_OF_CUDA
        gpu.fail("cuModuleLoadData", 0 if valid else 200)
        major, minor = gpu.compute_capability
        built_for = divmod(image[48], 10)  # the lowest byte of e_flags, as of cubins for 8.7
        runs = major == built_for[0] and minor >= built_for[1]
        gpu.fail("cuModuleLoadData", 0 if runs else 209)
        gpu.born("module")
        handle = 0x2000 + len(gpu.calls)
        modules[handle] = bytes(image)
        return handle

    def cuModuleGetFunction(hmod: int, name: bytes) -> _Function:
        gpu.call("cuModuleGetFunction")
        image = modules[hmod]
        found = b".text." + name + b"\0" in image or b".entry " + name + b"(" in image
        gpu.fail("cuModuleGetFunction", 0 if found else 500)
        return _Function(image, name.decode())

    def cuFuncSetAttribute(hfunc: _Function, attrib: FunctionAttribute, value: int) -> None:
        gpu.call("cuFuncSetAttribute")
        assert attrib is FunctionAttribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        hfunc.shared_bytes = value

    def cuLaunchKernel(
        f: _Function,
        gridDimX: int,
        gridDimY: int,
        gridDimZ: int,
        blockDimX: int,
        blockDimY: int,
        blockDimZ: int,
        sharedMemBytes: int,
        hStream: int,
        kernelParams: tuple[tuple[int, ...], tuple[type[Any], ...]],
        extra: int,
    ) -> None:
        gpu.call("cuLaunchKernel")
        threads = blockDimX * blockDimY * blockDimZ
        fits = sharedMemBytes <= f.shared_bytes and 0 < threads <= 1024
        fits &= 0 < gridDimX < 1 << 31 and 0 < gridDimY < 1 << 16 and 0 < gridDimZ < 1 << 16
        gpu.fail("cuLaunchKernel", 0 if fits else 1)
        values, types = kernelParams
        end = 0
        for each in types:  # as a C compiler lays them out
            size = ctypes.sizeof(each)
            end = -(-end // size) * size + size
        if not f.takes(end):
            raise RuleError(
                f"{f.entry} does not take {end} bytes of parameters: the driver reads on"
            )
        assert extra == 0
        assert len(values) == len(types)
        grid = (gridDimX, gridDimY, gridDimZ)
        if not gpu.kernels:  # what engines have computes elsewhere
            gpu.put(hStream, Work(lambda: None))
        else:
            gpu.put(hStream, Work(lambda: gpu.kernels[f.entry](gpu, grid, values)))

    def cuModuleUnload(hmod: int) -> None:
        code = gpu.code("cuModuleUnload")
        del modules[hmod]
        gpu.dead("module")
        gpu.fail("cuModuleUnload", code)

    return [
        cuModuleLoadData, cuModuleGetFunction, cuFuncSetAttribute, cuLaunchKernel, cuModuleUnload,
    ]  # fmt: skip


def _events(gpu: FakeGpu) -> list[Callable[..., Any]]:
    streams: dict[int, int] = {}

    def cuEventCreate(Flags: int) -> int:
        gpu.call("cuEventCreate")
        gpu.born("event")
        return 0x3000 + len(gpu.calls)

    def cuEventRecord(hEvent: int, hStream: int) -> None:
        gpu.call("cuEventRecord")
        streams[hEvent] = hStream

    def cuEventSynchronize(hEvent: int) -> None:
        gpu.call("cuEventSynchronize")
        gpu.streams[streams[hEvent]].synchronize()

    def cuEventElapsedTime(hStart: int, hEnd: int) -> float:
        gpu.call("cuEventElapsedTime")
        assert streams[hStart] == streams[hEnd]
        return 0.5

    def cuEventDestroy(hEvent: int) -> None:
        gpu.dead("event")
        gpu.call("cuEventDestroy")

    return [cuEventCreate, cuEventRecord, cuEventSynchronize, cuEventElapsedTime, cuEventDestroy]

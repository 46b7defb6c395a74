"""Provides PyCUDA's functions for `cuda` by ``cuda.bindings.driver``, NVIDIA's binary package.

Names and meanings are PyCUDA's. The functions of ``cuda.bindings`` return
their error first, and raise RuntimeError if the driver's library or a symbol of it is missing.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NAME_BYTES = 256


class Error(Exception):
    """A call failed; the message is ``cuFunction failed: the driver's sentence``."""


class OutOfMemoryError(Error):
    """There is not enough memory."""


class Calls:
    """The functions of ``cuda.bindings.driver``; their errors are raised.

    Args:
        module: ``cuda.bindings.driver``.

    Attributes:
        Error: exception of a call that fails.
        capture_mode: mode in which a capture restricts only its own thread.
    """

    Error: type[Exception] = Error

    def __init__(self, module: Any) -> None:
        self.module = module
        self._success = module.CUresult.CUDA_SUCCESS
        self.capture_mode = module.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

    def __call__(self, name: str, *args: Any) -> Any:
        """Call a function; return its value, or a list of its values if there are several.

        Raises:
            Error: it failed, or the driver's library lacks it.
        """
        try:
            code, *values = getattr(self.module, name)(*args)
            if code != self._success:
                self._fail(name, code)
        except RuntimeError as error:
            raise Error(f"{name} failed: {error}") from error
        return values[0] if len(values) == 1 else values

    def _fail(self, name: str, code: Any) -> None:
        _, text = self.module.cuGetErrorString(code)
        reason = text.decode() if isinstance(text, bytes) else "unknown error"
        kind = OutOfMemoryError if code == _OUT_OF_MEMORY else Error
        raise kind(f"{name} failed: {reason} (CUDA {int(code)})")


class BindingsDriver:
    """The functions that `cuda` calls, named as in ``pycuda.driver``, which fits as it is.

    Addresses are integers. A call that fails raises ``Error``, or ``MemoryError`` out of memory;
    the message is the driver's sentence.

    Args:
        module: ``cuda.bindings.driver``.

    Attributes:
        Device: a GPU by its number: ``name()``, ``compute_capability()``, ``get_attribute(of)`` and
            ``retain_primary_context()``, whose result has ``push()`` and ``pop()``.
        Stream: a new stream with ``handle`` and ``synchronize()``, destroyed with the object.
        Memcpy3D: a copy of a box, called with the stream.
        device_attribute: has ``INTEGRATED`` and ``MULTIPROCESSOR_COUNT``.
        host_alloc_flags: has ``DEVICEMAP``.
    """

    Error: type[Exception] = Error
    MemoryError: type[Exception] = OutOfMemoryError

    def __init__(self, module: Any) -> None:
        self._call = call = Calls(module)
        attributes = module.CUdevice_attribute
        self.Device: Callable[[int], Any] = functools.partial(_Device, call)
        self.Stream: Callable[[], Any] = functools.partial(_Stream, call)
        self.Memcpy3D: Callable[[], Any] = functools.partial(_Memcpy3D, call)
        self.device_attribute: Any = SimpleNamespace(
            INTEGRATED=attributes.CU_DEVICE_ATTRIBUTE_INTEGRATED,
            MULTIPROCESSOR_COUNT=attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
        self.host_alloc_flags: Any = SimpleNamespace(DEVICEMAP=module.CU_MEMHOSTALLOC_DEVICEMAP)

    def init(self) -> None:
        """Start the driver."""
        self._call("cuInit", 0)

    def mem_alloc(self, num_bytes: int) -> _DeviceBlock:
        """Allocate device memory; ``int()`` is its address, ``free()`` frees it."""
        return _DeviceBlock(self._call, num_bytes)

    def pagelocked_empty(self, shape: int, dtype: type[np.uint8], *, mem_flags: int) -> Any:
        """Make a pinned array; its ``base`` has ``get_device_pointer()`` and ``free()``."""
        return np.asarray(_HostBlock(self._call, shape * np.dtype(dtype).itemsize, mem_flags))

    def mem_get_info(self) -> tuple[int, int]:
        """Return free and total device memory, in bytes."""
        free, total = self._call("cuMemGetInfo")
        return free, total

    def memcpy_htod_async(self, dest: int, src: NDArray[Any], stream: _Stream) -> None:
        """Put a copy to the device on a stream."""
        self._call("cuMemcpyHtoDAsync", dest, src.ctypes.data, src.nbytes, stream.stream)

    def memcpy_dtoh_async(self, dest: NDArray[Any], src: int, stream: _Stream) -> None:
        """Put a copy from the device on a stream."""
        self._call("cuMemcpyDtoHAsync", dest.ctypes.data, src, dest.nbytes, stream.stream)

    def memset_d8_async(self, dest: int, data: int, size: int, stream: _Stream) -> None:
        """Put a fill with one byte's value on a stream."""
        self._call("cuMemsetD8Async", dest, data, size, stream.stream)


class _Device:
    """Stands in for ``pycuda.driver.Device``."""

    def __init__(self, call: Calls, ordinal: int) -> None:
        self._call = call
        self._device = call("cuDeviceGet", ordinal)

    def name(self) -> str:
        name: bytes = self._call("cuDeviceGetName", _NAME_BYTES, self._device)
        return name.split(b"\0")[0].decode(errors="replace")

    def compute_capability(self) -> tuple[int, int]:
        of = self._call.module.CUdevice_attribute
        return (
            self.get_attribute(of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self.get_attribute(of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )

    def get_attribute(self, attribute: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", attribute, self._device))

    def retain_primary_context(self) -> _Context:
        return _Context(self._call, self._call("cuDevicePrimaryCtxRetain", self._device))


class _Context:
    """Stands in for ``pycuda.driver.Context``."""

    def __init__(self, call: Calls, handle: Any) -> None:
        self._call, self._handle = call, handle

    def push(self) -> None:
        self._call("cuCtxPushCurrent", self._handle)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent")


class _Stream:
    """Stands in for ``pycuda.driver.Stream``."""

    def __init__(self, call: Calls) -> None:
        self._call = call
        self.stream = call("cuStreamCreate", 0)
        self.handle = int(self.stream)
        # At the end of the process no context is current, and the driver cleans up by itself.
        weakref.finalize(self, release, call, "cuStreamDestroy", self.stream).atexit = False

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.stream)


def release(call: Calls, name: str, *args: Any) -> None:
    """Release a handle; a failure on a lost device is ignored, as PyCUDA does."""
    try:
        call(name, *args)
    except Error as error:
        _log.warning("something of the GPU could not be freed: %s", str(error))


class _DeviceBlock:
    """Stands in for ``pycuda.driver.DeviceAllocation``."""

    def __init__(self, call: Calls, num_bytes: int) -> None:
        self._call = call
        self._address = int(call("cuMemAlloc", num_bytes))

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        release(self._call, "cuMemFree", self._address)


class _HostBlock:
    """Stands in for ``pycuda.driver.PagelockedHostAllocation``, the base of an array of bytes."""

    def __init__(self, call: Calls, num_bytes: int, flags: int) -> None:
        self._call = call
        self._pointer = int(call("cuMemHostAlloc", num_bytes, flags))
        self.__array_interface__ = {
            "version": 3,
            "data": (self._pointer, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
        }

    def get_device_pointer(self) -> int:
        return int(self._call("cuMemHostGetDevicePointer", self._pointer, 0))

    def free(self) -> None:
        release(self._call, "cuMemFreeHost", self._pointer)


def _field(name: str) -> Any:
    """Make a property for a field of CUDA_MEMCPY3D under another name."""

    def read(copy: _Memcpy3D) -> Any:
        return getattr(copy.fields, name)

    def write(copy: _Memcpy3D, value: int) -> None:
        setattr(copy.fields, name, value)

    return property(read, write)


class _Memcpy3D:
    """Stands in for ``pycuda.driver.Memcpy3D``."""

    src_pitch, src_height = _field("srcPitch"), _field("srcHeight")
    dst_pitch, dst_height = _field("dstPitch"), _field("dstHeight")
    width_in_bytes, height, depth = _field("WidthInBytes"), _field("Height"), _field("Depth")

    def __init__(self, call: Calls) -> None:
        self._call = call
        self._types = call.module.CUmemorytype
        self.fields = call.module.CUDA_MEMCPY3D()

    def set_src_device(self, address: int) -> None:
        self.fields.srcMemoryType = self._types.CU_MEMORYTYPE_DEVICE
        self.fields.srcDevice = address

    def set_dst_device(self, address: int) -> None:
        self.fields.dstMemoryType = self._types.CU_MEMORYTYPE_DEVICE
        self.fields.dstDevice = address

    def set_src_host(self, array: NDArray[Any]) -> None:
        self.fields.srcMemoryType = self._types.CU_MEMORYTYPE_HOST
        self.fields.srcHost = array.ctypes.data

    def set_dst_host(self, array: NDArray[Any]) -> None:
        self.fields.dstMemoryType = self._types.CU_MEMORYTYPE_HOST
        self.fields.dstHost = array.ctypes.data

    def __call__(self, stream: _Stream) -> None:
        self._call("cuMemcpy3DAsync", self.fields, stream.stream)

"""Loads and launches compiled kernels by the driver alone, through cuda-bindings."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .bindings import Calls
from .driver import load_bindings
from .errors import device_error

if TYPE_CHECKING:
    from . import Stream

_FREE_SHARED_BYTES = 48 * 1024  # per program; more must be requested (CUDA programming guide)


class ForeignStream(NamedTuple):
    """A stream that other code made, by its address."""

    handle: int


class Caller(Protocol):
    """Calls the driver in the context that is current: a `Device`, or a `CurrentContext`."""

    @property
    def function_attribute(self) -> Any:
        """See `Device.function_attribute`."""

    def graph_call(self, doing: str, name: str, *args: Any) -> Any:
        """See `Device.graph_call`."""


class CurrentContext:
    """The driver in whatever context is current, as in a function that TensorRT calls.

    Args:
        needed: first words of the message if cuda-bindings is missing; they say who needs it.
    """

    def __init__(self, needed: str) -> None:
        self._needed = needed

    @functools.cached_property
    def _calls(self) -> Calls:
        return load_bindings(self._needed)

    def check(self) -> None:
        """Raise now the error that the first call would raise.

        Raises:
            DependencyError: cuda-bindings is missing.
        """
        _ = self._calls

    @property
    def function_attribute(self) -> Any:
        """See `Device.function_attribute`."""
        return self._calls.module.CUfunction_attribute

    def graph_call(self, doing: str, name: str, *args: Any) -> Any:
        """See `Device.graph_call`."""
        calls = self._calls
        try:
            return calls(name, *args)
        except calls.Error as error:
            raise device_error(doing, error) from error

    @property
    def handle(self) -> int:
        """Return the address of the context.

        Raises:
            DependencyError: cuda-bindings is missing.
            DeviceError: the driver fails.
        """
        return int(self.graph_call("name its context", "cuCtxGetCurrent"))


class Kernel:
    """A kernel from a cubin, or from PTX that the driver compiles.

    Args:
        device: device whose context is current.
        image: the cubin, or PTX with a zero byte at its end.
        entry: name of the function.
        threads: threads of a program.
        shared_bytes: dynamic shared memory of a program.

    Raises:
        DependencyError: cuda-bindings is missing.
        DeviceError: the cubin is for another GPU, PTX does not compile, or the driver fails.
    """

    def __init__(
        self, device: Caller, image: bytes, entry: str, *, threads: int, shared_bytes: int
    ) -> None:
        self._device, self._threads, self._shared_bytes = device, threads, shared_bytes
        self._module: Any = device.graph_call("load a kernel", "cuModuleLoadData", image)
        try:
            self._function = device.graph_call(
                "find a kernel", "cuModuleGetFunction", self._module, entry.encode()
            )
            if shared_bytes > _FREE_SHARED_BYTES:
                device.graph_call(
                    "give a kernel its shared memory",
                    "cuFuncSetAttribute",
                    self._function,
                    device.function_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes,
                )
        except BaseException:
            self.close()
            raise

    def launch(
        self,
        stream: Stream | ForeignStream,
        grid: tuple[int, int, int],
        pointers_and_numbers: tuple[tuple[int, bool], ...],
    ) -> None:
        """Put one run of it on a stream.

        Args:
            stream: stream to run on.
            grid: programs along x, y and z.
            pointers_and_numbers: a value per parameter, and whether it is a device address; other
                numbers are INT32.

        Raises:
            DeviceError: the driver refuses.
        """
        values = tuple(value for value, _ in pointers_and_numbers)
        types = tuple(
            ctypes.c_void_p if is_address else ctypes.c_int
            for _, is_address in pointers_and_numbers
        )
        # The driver copies the values before it returns (cuda.h, cuLaunchKernel).
        self._device.graph_call(
            "launch a kernel", "cuLaunchKernel", self._function, *grid, self._threads, 1, 1,
            self._shared_bytes, stream.handle, (values, types), 0,
        )  # fmt: skip

    def close(self) -> None:
        """Unload it; calling it twice is harmless."""
        module, self._module = self._module, None
        if module is not None:
            self._device.graph_call("unload a kernel", "cuModuleUnload", module)

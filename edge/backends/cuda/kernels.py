"""Loads and launches compiled kernels by the driver alone, through cuda-bindings."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

from .driver import CurrentContext

if TYPE_CHECKING:
    from . import Stream

_FREE_SHARED_BYTES = 48 * 1024  # per program; more must be requested (CUDA programming guide)


class ForeignStream(NamedTuple):
    """A stream that other code made, by its address."""

    handle: int


class Kernel:
    """A kernel from a cubin, or from PTX that the driver compiles.

    Args:
        device: the device whose context is current, or whatever context is.
        image: the cubin, or PTX with a zero byte at its end.
        entry: name of the function.
        threads: threads of a program.
        shared_bytes: dynamic shared memory of a program.

    Raises:
        DependencyError: cuda-bindings is missing.
        DeviceError: the cubin is for another GPU, PTX does not compile, or the driver fails.
    """

    def __init__(
        self, device: CurrentContext, image: bytes, entry: str, *, threads: int, shared_bytes: int
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

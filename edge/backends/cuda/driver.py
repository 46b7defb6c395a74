"""Chooses the library that calls the CUDA driver: PyCUDA, else cuda-bindings."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import DependencyError

from .bindings import BindingsDriver, Calls

_log = logging.getLogger(__name__)
_CURE = (
    "install one of them: pip install pycuda, which compiles against the CUDA toolkit (with "
    "CUDA_ROOT=/usr/local/cuda and /usr/local/cuda/bin on the PATH), or pip install cuda-bindings "
    "('cuda-bindings>=12.9.1,<13' on JetPack 6), which compiles nothing"
)


class Driver(Protocol):
    """The functions that `cuda` calls, named as in ``pycuda.driver``, which fits as it is.

    Addresses are integers. A call that fails raises ``Error``, or ``MemoryError`` out of memory;
    the message is the driver's sentence.

    Attributes:
        Device: a GPU by its number: ``name()``, ``compute_capability()``, ``get_attribute(of)`` and
            ``retain_primary_context()``, whose result has ``push()`` and ``pop()``.
        Stream: a new stream with ``handle`` and ``synchronize()``, destroyed with the object.
        Memcpy3D: a copy of a box, called with the stream.
        device_attribute: has ``INTEGRATED`` and ``MULTIPROCESSOR_COUNT``.
        host_alloc_flags: has ``DEVICEMAP``.
    """

    Error: type[Exception]
    MemoryError: type[Exception]
    Device: Callable[[int], Any]
    Stream: Callable[[], Any]
    Memcpy3D: Callable[[], Any]
    device_attribute: Any
    host_alloc_flags: Any

    def init(self) -> None:
        """Start the driver."""

    def mem_alloc(self, num_bytes: int) -> Any:
        """Allocate device memory; ``int()`` is its address, ``free()`` frees it."""

    def pagelocked_empty(self, shape: int, dtype: type[np.uint8], *, mem_flags: int) -> Any:
        """Make a pinned array; its ``base`` has ``get_device_pointer()`` and ``free()``."""

    def mem_get_info(self) -> tuple[int, int]:
        """Return free and total device memory, in bytes."""
        ...

    def memcpy_htod_async(self, dest: int, src: NDArray[Any], stream: Any) -> None:
        """Put a copy to the device on a stream."""

    def memcpy_dtoh_async(self, dest: NDArray[Any], src: int, stream: Any) -> None:
        """Put a copy from the device on a stream."""

    def memset_d8_async(self, dest: int, data: int, size: int, stream: Any) -> None:
        """Put a fill with one byte's value on a stream."""


def load_driver() -> Driver:
    """Import PyCUDA, or else cuda-bindings; why PyCUDA is not used is logged.

    Raises:
        DependencyError: neither can be imported.
    """
    try:
        driver: Driver = importlib.import_module("pycuda.driver")
    except ImportError as error:
        problem = _problem("PyCUDA", "pycuda", error)
    else:
        _log.info("CUDA is called through PyCUDA")
        return driver
    try:
        module = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        second = _problem("cuda-bindings", "cuda", error)
        raise DependencyError(
            f"running on the GPU needs PyCUDA or cuda-bindings: {problem}, {second}; {_CURE}"
        ) from error
    _log.info("CUDA is called through cuda-bindings: %s", problem)
    return _driver_of(module)


def load_bindings(needed: str = "CUDA graphs and gpu_wait need cuda-bindings") -> Calls:
    """Import the calls of cuda-bindings, for functions that PyCUDA lacks.

    Args:
        needed: first words of the message, which say who needs it.

    Raises:
        DependencyError: it cannot be imported.
    """
    try:
        return Calls(importlib.import_module("cuda.bindings.driver"))
    except ImportError as error:
        problem = _problem("cuda-bindings", "cuda", error)
        raise DependencyError(
            f"{needed}: {problem}; install it: pip install cuda-bindings "
            "('cuda-bindings>=12.9.1,<13' on JetPack 6)"
        ) from error


def _problem(name: str, package: str, error: ImportError) -> str:
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package
    return f"{name} is not installed" if missing else f"importing {name} failed ({error})"


@functools.cache
def _driver_of(module: ModuleType) -> BindingsDriver:
    """Return the one driver of this process, since each retains a primary context once."""
    return BindingsDriver(module)

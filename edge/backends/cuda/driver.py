"""Chooses the library that calls the CUDA driver: PyCUDA, else cuda-bindings."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

from edge.errors import DependencyError

from .bindings import BindingsDriver, Calls

_log = logging.getLogger(__name__)
_CURE = (
    "install one of them: pip install pycuda, which compiles against the CUDA toolkit (with "
    "CUDA_ROOT=/usr/local/cuda and /usr/local/cuda/bin on the PATH), or pip install cuda-bindings "
    "('cuda-bindings>=12.9.1,<13' on JetPack 6), which compiles nothing"
)


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
        """Return ``CUfunction_attribute`` of cuda-bindings."""
        return self._calls.module.CUfunction_attribute

    def graph_call(self, doing: str, name: str, *args: Any) -> Any:
        """Call a function of cuda-bindings, which has the graphs that PyCUDA lacks.

        Raises:
            DependencyError: cuda-bindings is missing.
            DeviceError: the call failed, or the driver's library lacks the function.
        """
        calls = self._calls
        try:
            return calls(name, *args)
        except calls.Error as error:
            from .errors import device_error

            raise device_error(doing, error) from error

    @property
    def handle(self) -> int:
        """Return the address of the context.

        Raises:
            DependencyError: cuda-bindings is missing.
            DeviceError: the driver fails.
        """
        return int(self.graph_call("name its context", "cuCtxGetCurrent"))


def load_driver() -> Any:
    """Import PyCUDA, or else cuda-bindings; why PyCUDA is not used is logged.

    ``pycuda.driver`` has all functions of `BindingsDriver`, under the same names.

    Raises:
        DependencyError: neither can be imported.
    """
    try:
        driver = importlib.import_module("pycuda.driver")
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


def load_bindings(needed: str) -> Calls:
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

"""Loads own kernels that Python launches, as ``engine.json`` has them.

They are PTX in ``engine.json``, and a field of each plugin in the plan names them by a number. The
PTX itself cannot be in the fields: the bindings are compiled for NumPy 1, and with NumPy 2 the data
of a field reads as its first element repeated (``PluginField.data``; seen with the wheels of 10.3
and 10.13, not of 10.16). `tools/trt/plugin_v3.py` checks that single numbers come through.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edge.backends.cuda.driver import CurrentContext
from edge.backends.cuda.kernels import Kernel
from edge.errors import BackendError, BundleError, EdgeError
from edge.files import MALFORMED

from .launch_rules import PluginRule

_log = logging.getLogger(__name__)
_MOST_BYTES = 1 << 24  # of unpacked kernels; a longer text is cut and cannot be read


@dataclass(frozen=True)
class PluginKernel:
    """A kernel that computes a plugin's outputs, of any size.

    Its parameters are those of `launch_rules.PluginRule`.

    Attributes:
        text: PTX; empty with ``cubin``.
        entry: name of the function in it.
        threads: threads of a program.
        shared_bytes: dynamic shared memory of a program.
        rows, columns: size of the output that a program computes.
        cubin: machine code for the engine's GPU.
    """

    text: str
    entry: str
    threads: int
    shared_bytes: int
    rows: int
    columns: int
    cubin: bytes = b""


def pack(kernels: Sequence[PluginKernel]) -> bytes:
    """Encode the kernels of a plugin for ``engine.json``, in the order of their tactics."""
    return zlib.compress(msgspec.json.encode(kernels), 9)


@functools.lru_cache(maxsize=16)
def unpack(packed: bytes) -> tuple[PluginKernel, ...]:
    """Decode the kernels of `pack`; hundreds of plugins of an engine have the same ones.

    Raises:
        BundleError: they are damaged.
    """
    try:
        text = zlib.decompressobj().decompress(packed, _MOST_BYTES)
        return msgspec.json.decode(text, type=tuple[PluginKernel, ...])
    except (zlib.error, *MALFORMED) as error:
        raise BundleError(
            f"the own kernels in engine.json are damaged ({error}); build the engine again"
        ) from error


def number_of(packed: bytes) -> int:
    """Return the number by which a plugin in a plan names its kernels, from their SHA-256."""
    return int.from_bytes(hashlib.sha256(packed).digest()[:4], "little", signed=True)


class OwnKernels:
    """Kernels and errors that all plugins of a process share.

    Attributes:
        for_build: makes a plugin for TensorRT's builder, given a rule and the value of its
            attribute; set by code that builds engines.
    """

    def __init__(self) -> None:
        self.for_build: Callable[[PluginRule, int], Any] = _cannot_build
        self._known: dict[int, bytes] = {}
        self._failure: BaseException | None = None
        self._context = CurrentContext(
            "an engine with own kernels for TensorRT < 10.13 needs cuda-bindings"
        )
        self._loaded: dict[tuple[int, PluginKernel], Kernel] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Check that cuda-bindings, which launches kernels, is there.

        Raises:
            DependencyError: cuda-bindings is missing.
        """
        self._context.check()

    def add(self, packed: bytes) -> None:
        """Make these kernels of `pack` available to plugins.

        Raises:
            BundleError: they are damaged.
        """
        unpack(packed)
        self._known[number_of(packed)] = packed

    def find(self, number: int) -> bytes:
        """Return the kernels whose `number_of` is this number.

        Raises:
            BundleError: nobody added them.
        """
        if number not in self._known:
            raise BundleError(
                f"a plugin in the plan has own kernels of number {number}, which engine.json does "
                "not have; build the engine again"
            )
        return self._known[number]

    @property
    def in_context(self) -> bool:
        """Whether a CUDA context is current."""
        return self._context.handle != 0

    def load(self, packed: bytes) -> tuple[Kernel, ...]:
        """Load kernels of `pack` in the current context, where each stays until the process ends.

        Raises:
            DependencyError: cuda-bindings is missing.
            DeviceError: the driver does not compile them, or fails.
        """
        context, found = self._context.handle, []
        with self._lock:
            for each in unpack(packed):
                kernel = self._loaded.get((context, each))
                if kernel is None:
                    image = each.cubin or each.text.encode("ascii") + b"\0"
                    kernel = Kernel(
                        self._context,
                        image,
                        each.entry,
                        threads=each.threads,
                        shared_bytes=each.shared_bytes,
                    )
                    self._loaded[context, each] = kernel
                found.append(kernel)
        return tuple(found)

    def keep(self, error: BaseException) -> None:
        """Keep the first error for `raise_failure`; the later ones follow from it."""
        if self._failure is not None:
            return
        _log.debug("a plugin raised: %s", "".join(traceback.format_exception(error)))
        failure = error
        if isinstance(error, Exception) and not isinstance(error, EdgeError):
            failure = BackendError(
                f"a plugin with own kernels failed: {type(error).__name__}: {error}; build with "
                "--kernels tensorrt, and please report this"
            )
            failure.__cause__ = error
        self._failure = failure
        # The error's frames hold the plugin, which Python must not hold longer than TensorRT does.
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__  # type: ignore[assignment]

    def raise_failure(self) -> None:
        """Raise the error that was kept, and forget it."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _cannot_build(rule: PluginRule, value: int) -> Any:
    raise BackendError("a plugin with own kernels is built by edge-llm build only")

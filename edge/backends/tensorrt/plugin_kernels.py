"""Own kernels that Python launches: as ``engine.json`` has them, and loaded.

They are PTX in ``engine.json``, which a field of each plugin in the plan names by a number. The PTX
itself cannot be in the fields: with NumPy 2 the data of a field read as its first element again and
again, as the bindings are compiled for NumPy 1 (``PluginField.data``; seen with the wheels of 10.3
and 10.13, not of 10.16). That single numbers come through holds `scripts/trt_plugin_v3.py`.
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

from edge.backends.cuda.kernels import CurrentContext, Kernel
from edge.errors import BackendError, BundleError, EdgeError
from edge.files import MALFORMED

from .launch_rules import PluginRule

_log = logging.getLogger(__name__)
_MOST_BYTES = 1 << 24  # of kernels that are unpacked; what is longer is cut, so does not read


@dataclass(frozen=True)
class PluginKernel:
    """A kernel that computes what a plugin does, of any size.

    Its parameters are those of `launch_rules.PluginRule`.

    Attributes:
        text: PTX; empty with ``cubin``.
        entry: name of the function in it.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
        rows, columns: of the output, that a program computes.
        cubin: machine code of the GPU that the engine is for.
    """

    text: str
    entry: str
    threads: int
    shared_bytes: int
    rows: int
    columns: int
    cubin: bytes = b""


def pack(kernels: Sequence[PluginKernel]) -> bytes:
    """The kernels of a plugin, in the order of their tactics, as ``engine.json`` has them."""
    return zlib.compress(msgspec.json.encode(kernels), 9)


@functools.lru_cache(maxsize=16)
def unpack(packed: bytes) -> tuple[PluginKernel, ...]:
    """The kernels of `pack`; hundreds of plugins of an engine have the same ones.

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
    """The number by which a plugin in a plan names its kernels: of their SHA-256."""
    return int.from_bytes(hashlib.sha256(packed).digest()[:4], "little", signed=True)


class OwnKernels:
    """What all plugins of a process share.

    Attributes:
        for_build: makes a plugin that TensorRT can build with, of a rule and the value of its
            attribute; what builds engines sets it.
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
        """Look for what launches kernels.

        Raises:
            DependencyError: cuda-bindings is missing.
        """
        self._context.check()

    def add(self, packed: bytes) -> None:
        """Let plugins have these kernels of `pack`.

        Raises:
            BundleError: they are damaged.
        """
        unpack(packed)
        self._known[number_of(packed)] = packed

    def find(self, number: int) -> bytes:
        """The kernels that `number_of` gives this number.

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
        """Kernels of `pack` in the current context, where each stays until the process ends.

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
        """Keep an error for `raise_failure`; the first one, which the others follow from."""
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
        # Its frames have the plugin, which Python must not hold longer than TensorRT does.
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__  # type: ignore[assignment]

    def raise_failure(self) -> None:
        """Raise what was kept, and forget it."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _cannot_build(rule: PluginRule, value: int) -> Any:
    raise BackendError("a plugin with own kernels is built by edge-llm build only")

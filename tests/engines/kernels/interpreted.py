"""Runs the kernels by Triton's interpreter, on NumPy arrays and without a GPU.

Every element that a kernel loads is noted, so that a test can say which bytes were read how often.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

os.environ["TRITON_INTERPRET"] = "1"  # read when the sources are imported
triton = pytest.importorskip(
    "triton", reason="needs Triton: python3 -m tools kernels --check has it"
)
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from engines.kernels.launch import Launch  # noqa: E402

GUARD = 64  # elements before and after each array, which no kernel may read or write


class _Storage:
    """The few methods of a torch storage that the interpreter calls."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def cpu(self) -> _Storage:
        return self

    def copy_(self, other: _Storage) -> None:
        assert other is self


class Buffer:
    """An array in device memory, as the interpreter takes it: the few methods of a torch tensor."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._guarded = np.full(array.size + 2 * GUARD, 77, array.dtype)
        self.array = self._guarded[GUARD : GUARD + array.size].reshape(array.shape)
        self.array[...] = array
        self.dtype = str(array.dtype)
        self._storage = _Storage(self._guarded)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Storage:
        return self._storage

    def new_empty(self, *_: Any, **__: Any) -> Buffer:
        return self

    def set_(self, *_: Any) -> None:
        return None

    def storage_offset(self) -> int:
        return GUARD

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def holds(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        first = self.data_ptr()
        return (addresses >= first) & (addresses < first + self.array.nbytes)

    def check_guards(self) -> None:
        for side in (self._guarded[:GUARD], self._guarded[-GUARD:]):
            assert (side == 77).all(), "a kernel wrote past an array"


class Trace:
    """Addresses of all elements that were loaded or stored, in one array per call."""

    def __init__(self) -> None:
        self.loads: list[NDArray[np.uint64]] = []
        self.stores: list[NDArray[np.uint64]] = []

    def reads(self, buffer: Buffer) -> NDArray[np.int64]:
        """How often each element of a buffer was loaded."""
        return _count(buffer, self.loads)

    def writes(self, buffer: Buffer) -> NDArray[np.int64]:
        """How often each element of a buffer was stored."""
        return _count(buffer, self.stores)


def _count(buffer: Buffer, calls: list[NDArray[np.uint64]]) -> NDArray[np.int64]:
    addresses = np.concatenate([each[buffer.holds(each)] for each in calls])
    at = (addresses - np.uint64(buffer.data_ptr())) // np.uint64(buffer.array.itemsize)
    return np.bincount(at.astype(np.int64), minlength=buffer.array.size).reshape(buffer.array.shape)


@contextmanager
def traced() -> Iterator[Trace]:
    """Note every load and store."""
    trace, module = Trace(), interpreter._interpreter
    load, store = module.load, module.store

    def noted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        trace.loads.append(np.asarray(pointers)[np.asarray(mask, bool)].ravel())
        return load(pointers, mask, *rest)

    def noted_store(pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        trace.stores.append(np.asarray(pointers)[np.asarray(mask, bool)].ravel())
        return store(pointers, values, mask, *rest)

    module.load, module.store = noted_load, noted_store
    try:
        yield trace
    finally:
        module.load, module.store = load, store


TRITONS_OWN_SORT = tl.sort


def _sort(keys: Any, descending: Any = False) -> Any:
    """As ``tl.sort``, whose network of comparisons takes the interpreter half a minute a call."""
    assert descending
    falling = np.sort(keys.handle.data)[::-1].copy()
    return tl.tensor(interpreter.TensorHandle(falling, keys.handle.dtype), keys.type)


def run(launches: list[Launch], buffers: dict[str, Buffer], *, own_sort: bool = False) -> Trace:
    """Run kernels one after the other; every access must lie in a buffer.

    Args:
        launches: what to run.
        buffers: by name.
        own_sort: whether NumPy sorts, and not Triton's own ``tl.sort``.
    """
    tl.sort = _sort if own_sort else TRITONS_OWN_SORT
    with traced() as trace, np.errstate(all="ignore"):  # infinities are none of NumPy's concern
        for launch in launches:
            source = importlib.import_module(f"engines.kernels.sources.{launch.variant.source}")
            function: Callable[..., Any] = getattr(source, launch.variant.function)
            arguments = [
                buffers[value] if isinstance(value, str) else value for value in launch.arguments
            ]
            function[launch.grid](*arguments, **launch.variant.constants)  # type: ignore[index]
    for addresses in (*trace.loads, *trace.stores):
        inside = np.zeros(addresses.shape, bool)
        for buffer in buffers.values():
            inside |= buffer.holds(addresses)
        assert inside.all(), "a kernel touches memory that is not its own"
    for buffer in buffers.values():
        buffer.check_guards()
    return trace

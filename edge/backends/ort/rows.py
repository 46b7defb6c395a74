"""Moves rows of a KV cache in device memory by ONNX Runtime's own kernels.

ONNX Runtime's Python API copies whole tensors only, but a slot's rows are a strided part of each
cache tensor. So two tiny graphs do the work on the session's device: ``ScatterND`` writes rows in
place, ``Slice`` reads them. No other access to the device's memory is needed. Each graph has one
node per cache tensor, so one call moves all layers. Elements are opaque: two bytes are uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.onnx_file import ELEMENT_NUMBERS, Node, small_model, tensor_info


class Block:
    """A contiguous tensor in device memory, as a binding needs it.

    Attributes:
        address: address of its first element.
        shape: its dimensions.
        owner: keeps the memory alive.
    """

    def __init__(self, address: int, shape: Sequence[int], owner: Any) -> None:
        self.address = address
        self.shape = tuple(shape)
        self.owner = owner


class RowMover:
    """Writes and reads rows of ``[batch, kv_heads, capacity, head_dim]`` blocks.

    Args:
        open_session: makes a session of a model's bytes on the device.
        allocate: makes an uninitialized block of a shape there.
        device: name and index of the device in ONNX Runtime's bindings.
        num_tensors: cache tensors, keys and values of all layers.
        dtype: type of the elements, two or four bytes each.
    """

    def __init__(
        self,
        open_session: Callable[[bytes], Any],
        allocate: Callable[[Sequence[int]], Block],
        device: tuple[str, int],
        num_tensors: int,
        dtype: np.dtype[Any],
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._allocate = allocate
        self._names = [f"cache.{index}" for index in range(num_tensors)]
        self._bits = np.uint16 if dtype.itemsize == 2 else np.float32
        element = ELEMENT_NUMBERS["uint16" if dtype.itemsize == 2 else "fp32"]
        self._scatter: Any = open_session(_scatter_model(self._names, element))
        self._slice: Any = open_session(_slice_model(self._names, element))

    def writer(self, caches: Sequence[Block], rows: Sequence[Block]) -> RowWriter:
        """Prepare writes from one set of blocks to another; it may be used many times.

        Args:
            caches: ``[batch, kv_heads, capacity, head_dim]`` each.
            rows: ``[batch, kv_heads, length, head_dim]`` each, on the same device.
        """
        binding = self._scatter.io_binding()
        for name, cache, new in zip(self._names, caches, rows, strict=True):
            self._bind(binding.bind_input, name, cache)
            self._bind(binding.bind_input, f"{name}.rows", new)
            self._bind(binding.bind_output, f"{name}.out", cache)
        return RowWriter(self._scatter, binding, rows[0].shape)

    def read(self, caches: Sequence[Block], length: int) -> list[Block]:
        """Copy the first rows of each block to new blocks on the device."""
        found = [self._allocate((*cache.shape[:2], length, cache.shape[3])) for cache in caches]
        self._run_slice(caches, length, found, self._device)
        return found

    def read_to_host(self, caches: Sequence[Block], length: int) -> NDArray[Any]:
        """Copy the first rows of each block: ``[tensors, batch, kv_heads, length, head_dim]``."""
        batch, heads, _, dim = caches[0].shape
        found = np.empty((len(caches), batch, heads, length, dim), dtype=self._dtype)
        targets = [Block(array.ctypes.data, array.shape, array) for array in found]
        self._run_slice(caches, length, targets, ("cpu", 0))
        return found

    def close(self) -> None:
        """Free the sessions, which hold device memory, too."""
        self._scatter = self._slice = None

    def _run_slice(
        self,
        caches: Sequence[Block],
        length: int,
        targets: Sequence[Block],
        device: tuple[str, int],
    ) -> None:
        binding = self._slice.io_binding()
        binding.bind_cpu_input("length", np.array([length], dtype=np.int64))
        for name, cache, target in zip(self._names, caches, targets, strict=True):
            self._bind(binding.bind_input, name, cache)
            self._bind(binding.bind_output, f"{name}.rows", target, device)
        self._slice.run_with_iobinding(binding)

    def _bind(
        self, bind: Any, name: str, block: Block, device: tuple[str, int] | None = None
    ) -> None:
        bind(name, *(device or self._device), self._bits, block.shape, block.address)


class RowWriter:
    """Writes the current rows of some blocks; made by `RowMover.writer`."""

    def __init__(self, session: Any, binding: Any, shape: Sequence[int]) -> None:
        self._session = session
        self._binding = binding
        batch, heads, self._length, _ = shape
        self._indices = np.empty((batch, heads, self._length, 3), dtype=np.int64)
        self._indices[..., 0] = np.arange(batch)[:, None, None]
        self._indices[..., 1] = np.arange(heads)[:, None]

    def write(self, starts: Sequence[int] | NDArray[np.int64]) -> None:
        """Overwrite cache rows in place, from ``starts[b]`` on in sequence ``b``."""
        rows = np.asarray(starts)[:, None] + np.arange(self._length)
        self._indices[..., 2] = rows[:, None]
        self._binding.bind_cpu_input("indices", self._indices)
        self._session.run_with_iobinding(self._binding)


def _scatter_model(names: Sequence[str], element: int) -> bytes:
    cache, rows = ("batch", "heads", "capacity", "dim"), ("batch", "heads", "length", "dim")
    inputs = [tensor_info("indices", ELEMENT_NUMBERS["int64"], ("batch", "heads", "length", 3))]
    for name in names:
        inputs += [tensor_info(name, element, cache), tensor_info(f"{name}.rows", element, rows)]
    nodes = [
        Node("ScatterND", [name, "indices", f"{name}.rows"], [f"{name}.out"], name)
        for name in names
    ]
    return small_model(
        nodes, inputs, [tensor_info(f"{name}.out", element, cache) for name in names]
    )


def _slice_model(names: Sequence[str], element: int) -> bytes:
    cache, rows = ("batch", "heads", "capacity", "dim"), ("batch", "heads", "length", "dim")
    inputs = [tensor_info("length", ELEMENT_NUMBERS["int64"], (1,))]
    inputs += [tensor_info(name, element, cache) for name in names]
    nodes = [
        Node("Slice", [name, "zero", "length", "axis"], [f"{name}.rows"], name) for name in names
    ]
    outputs = [tensor_info(f"{name}.rows", element, rows) for name in names]
    return small_model(nodes, inputs, outputs, {"zero": 0, "axis": 2})

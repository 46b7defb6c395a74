"""Moves rows of a KV cache in device memory by ONNX Runtime's own kernels.

ONNX Runtime's Python API copies whole tensors only, but a slot's rows are a strided part of each
cache tensor. So two tiny graphs do the work on the session's device: ``ScatterND`` writes rows in
place, ``Slice`` reads them. No other access to the device's memory is needed. Each graph has one
node per cache tensor, so one call moves all layers. Elements are opaque: two bytes are uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
        heads: heads of each cache tensor.
        dtype: type of the elements, two or four bytes each.
    """

    def __init__(
        self,
        open_session: Callable[[bytes], Any],
        allocate: Callable[[Sequence[int]], Block],
        device: tuple[str, int],
        heads: Mapping[str, int],
        dtype: np.dtype[Any],
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._allocate = allocate
        self._bits = np.uint16 if dtype.itemsize == 2 else np.float32
        element = ELEMENT_NUMBERS["uint16" if dtype.itemsize == 2 else "fp32"]
        self._scatter: Any = open_session(_scatter_model(heads, element))
        self._slice: Any = open_session(_slice_model(heads, element))

    def writer(self, caches: Mapping[str, Block], rows: Mapping[str, Block]) -> RowWriter:
        """Prepare writes from one set of blocks to another; it may be used many times.

        Args:
            caches: ``[batch, kv_heads, capacity, head_dim]`` each.
            rows: ``[batch, kv_heads, length, head_dim]`` each, on the same device.
        """
        binding = self._scatter.io_binding()
        for name, cache in caches.items():
            self._bind(binding.bind_input, name, cache)
            self._bind(binding.bind_input, f"{name}.rows", rows[name])
            self._bind(binding.bind_output, f"{name}.out", cache)
        return RowWriter(self._scatter, binding, {new.shape[:3] for new in rows.values()})

    def read(
        self, caches: Mapping[str, Block], length: int, *, to_host: bool = False
    ) -> dict[str, Block]:
        """Copy the first rows of each block to new blocks, ``[batch, kv_heads, length, head_dim]``.

        They are on the device, or in arrays on the host, which are their owners.
        """
        allocate, device = self._allocate, self._device
        if to_host:
            allocate, device = self._allocate_on_host, ("cpu", 0)
        binding, found = self._slice.io_binding(), {}
        binding.bind_cpu_input("length", np.array([length], dtype=np.int64))
        for name, cache in caches.items():
            found[name] = allocate((*cache.shape[:2], length, cache.shape[3]))
            self._bind(binding.bind_input, name, cache)
            self._bind(binding.bind_output, f"{name}.rows", found[name], device)
        self._slice.run_with_iobinding(binding)
        return found

    def _allocate_on_host(self, shape: Sequence[int]) -> Block:
        array = np.empty(shape, self._dtype)
        return Block(array.ctypes.data, array.shape, array)

    def close(self) -> None:
        """Free the sessions, which hold device memory, too."""
        self._scatter = self._slice = None

    def _bind(
        self, bind: Any, name: str, block: Block, device: tuple[str, int] | None = None
    ) -> None:
        bind(name, *(device or self._device), self._bits, block.shape, block.address)


class RowWriter:
    """Writes the current rows of some blocks; made by `RowMover.writer`."""

    def __init__(self, session: Any, binding: Any, shapes: Collection[tuple[int, ...]]) -> None:
        self._session = session
        self._binding = binding
        self._indices: dict[int, NDArray[np.int64]] = {}
        for batch, heads, self._length in shapes:
            indices = np.empty((batch, heads, self._length, 3), dtype=np.int64)
            indices[..., 0] = np.arange(batch)[:, None, None]
            indices[..., 1] = np.arange(heads)[:, None]
            self._indices[heads] = indices

    def write(self, starts: Sequence[int] | NDArray[np.int64]) -> None:
        """Overwrite cache rows in place, from ``starts[b]`` on in sequence ``b``."""
        rows = np.asarray(starts)[:, None] + np.arange(self._length)
        for heads, indices in self._indices.items():
            indices[..., 2] = rows[:, None]
            self._binding.bind_cpu_input(f"indices.{heads}", indices)
        self._session.run_with_iobinding(self._binding)


def _shape(heads: int, length: str, name: str) -> tuple[int | str, ...]:
    return "batch", heads, length, f"{name}.dim"


def _scatter_model(tensors: Mapping[str, int], element: int) -> bytes:
    int64 = ELEMENT_NUMBERS["int64"]
    inputs = [
        tensor_info(f"indices.{heads}", int64, ("batch", heads, "length", 3))
        for heads in sorted(set(tensors.values()))
    ]
    nodes, outputs = [], []
    for name, heads in tensors.items():
        cache, rows = (_shape(heads, length, name) for length in ("capacity", "length"))
        inputs += [tensor_info(name, element, cache), tensor_info(f"{name}.rows", element, rows)]
        read = [name, f"indices.{heads}", f"{name}.rows"]
        nodes.append(Node("ScatterND", read, [f"{name}.out"], name))
        outputs.append(tensor_info(f"{name}.out", element, cache))
    return small_model(nodes, inputs, outputs)


def _slice_model(tensors: Mapping[str, int], element: int) -> bytes:
    inputs, nodes, outputs = [tensor_info("length", ELEMENT_NUMBERS["int64"], (1,))], [], []
    for name, heads in tensors.items():
        inputs.append(tensor_info(name, element, _shape(heads, "capacity", name)))
        nodes.append(Node("Slice", [name, "zero", "length", "axis"], [f"{name}.rows"], name))
        outputs.append(tensor_info(f"{name}.rows", element, _shape(heads, "length", name)))
    return small_model(nodes, inputs, outputs, {"zero": 0, "axis": 2})

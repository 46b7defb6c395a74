"""Holds the KV cache in device memory that ONNX Runtime allocated, at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.device.process import choose_num_threads

from .device import OrtDevice, open_on_device
from .rows import Block, RowMover, RowWriter


class OrtDeviceCache:
    """Zeroed tensors ``[slots, kv_heads, capacity, head_dim]`` on a device.

    Args:
        ort: the module ``onnxruntime``.
        device: device of the tensors.
        num_tensors: keys and values of all layers.
        shape: shape of each tensor.
        dtype: NumPy's type of the elements; bf16 is held as uint16.

    Attributes:
        device: device of the tensors.
        dtype: NumPy's type of the elements.
        positions: 0, 1, 2, ... up to the capacity.
    """

    def __init__(
        self,
        ort: ModuleType,
        device: OrtDevice,
        num_tensors: int,
        shape: tuple[int, int, int, int],
        dtype: np.dtype[Any],
    ) -> None:
        self._ort, self.device, self.dtype = ort, device, dtype
        self._slot_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        # Zeros instead of old memory: a masked row is multiplied by 0, and NaN times 0 is NaN.
        self._tensors = [self.upload(np.zeros(shape, dtype)) for _ in range(num_tensors)]
        self.positions = self.upload(np.arange(shape[2], dtype=np.int64))
        self._mover = RowMover(
            self._open_session, self.allocate, (device.name, device.index), num_tensors, dtype
        )

    @property
    def num_bytes(self) -> int:
        """Return the memory of the tensors, in bytes."""
        return sum(tensor.shape[0] * self._slot_bytes for tensor in self._tensors)

    def blocks(self, first: int, batch: int) -> list[Block]:
        """Return the part of each tensor that holds ``batch`` slots from ``first`` on."""
        offset = first * self._slot_bytes
        return [
            Block(tensor.address + offset, (batch, *tensor.shape[1:]), tensor.owner)
            for tensor in self._tensors
        ]

    def read(self, slot: int, length: int) -> NDArray[Any]:
        """Copy the first rows of a slot: ``[num_tensors, kv_heads, length, head_dim]``."""
        rows: NDArray[Any] = self._mover.read_to_host(self.blocks(slot, 1), length)[:, 0]
        return rows

    def write(self, slot: int, rows: NDArray[Any]) -> None:
        """Overwrite the first rows of a slot with rows that `read` returned."""
        new = [self.upload(array[None]) for array in rows]
        self.writer(self.blocks(slot, 1), new).write([0])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first rows of one slot to another; nothing leaves the device."""
        rows = self._mover.read(self.blocks(source, 1), length)
        self.writer(self.blocks(target, 1), rows).write([0])

    def writer(self, caches: Sequence[Block], rows: Sequence[Block]) -> RowWriter:
        """Prepare writes of rows by `RowMover.writer`."""
        return self._mover.writer(caches, rows)

    def allocate(self, shape: Sequence[int]) -> Block:
        """Allocate an uninitialized tensor on the device, of the cache's type."""
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), self.dtype.type, self.device.name, self.device.index
        )
        return Block(value.data_ptr(), shape, value)

    def upload(self, array: NDArray[Any]) -> Block:
        """Copy an array to the device."""
        value = self._ort.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(array), self.device.name, self.device.index
        )
        return Block(value.data_ptr(), array.shape, value)

    def close(self) -> None:
        """Free the memory and the sessions that move rows."""
        self._tensors = []
        self._mover.close()

    def _open_session(self, model: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = choose_num_threads()
        return open_on_device(self._ort, self.device, model, options)

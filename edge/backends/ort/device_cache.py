"""Holds the KV cache in device memory that ONNX Runtime allocated, at fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.device.process import choose_num_threads
from edge.model.cache import CacheSpec
from edge.model.slot_rows import SlotRows

from .device import OrtDevice, open_on_device
from .rows import Block, RowMover, RowWriter


class OrtDeviceCache:
    """Zeroed tensors ``[slots, kv_heads, capacity, head_dim]`` on a device.

    Args:
        ort: the module ``onnxruntime``.
        device: device of the tensors.
        tensors: the tensors.
        num_slots, capacity: slots, and rows of each.
        dtype: NumPy's type of the elements; bf16 is held as uint16.

    Attributes:
        device, tensors: the arguments.
        dtype: NumPy's type of the elements.
        positions: 0, 1, 2, ... up to the capacity.
    """

    def __init__(
        self,
        ort: ModuleType,
        device: OrtDevice,
        tensors: Mapping[str, CacheSpec],
        num_slots: int,
        capacity: int,
        dtype: np.dtype[Any],
    ) -> None:
        self._ort, self.device, self.dtype, self.tensors = ort, device, dtype, tensors
        # Zeros instead of old memory: a masked row is multiplied by 0, and NaN times 0 is NaN.
        self._tensors = {
            name: self.upload(np.zeros(spec.shape(num_slots, capacity), dtype))
            for name, spec in tensors.items()
        }
        self.positions = self.upload(np.arange(capacity, dtype=np.int64))
        self._mover = RowMover(
            self._open_session,
            self.allocate,
            (device.name, device.index),
            {name: block.shape[1] for name, block in self._tensors.items()},
            dtype,
        )

    @property
    def num_bytes(self) -> int:
        """Return the memory of the tensors, in bytes."""
        return self.dtype.itemsize * sum(math.prod(t.shape) for t in self._tensors.values())

    def blocks(self, first: int, batch: int) -> dict[str, Block]:
        """Return the part of each tensor that holds ``batch`` slots from ``first`` on."""
        found = {}
        for name, tensor in self._tensors.items():
            slot = tensor.shape[1:]
            address = tensor.address + first * math.prod(slot) * self.dtype.itemsize
            found[name] = Block(address, (batch, *slot), tensor.owner)
        return found

    def read(self, slot: int, length: int) -> SlotRows:
        """Copy the first rows of a slot."""
        rows = self._mover.read(self.blocks(slot, 1), length, to_host=True)
        return SlotRows((name, block.owner[0]) for name, block in rows.items())

    def write(self, slot: int, rows: SlotRows) -> None:
        """Overwrite the first rows of a slot with rows that `read` returned."""
        new = {name: self.upload(array[None]) for name, array in rows.items()}
        self.writer(self.blocks(slot, 1), new).write([0])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first rows of one slot to another; nothing leaves the device."""
        rows = self._mover.read(self.blocks(source, 1), length)
        self.writer(self.blocks(target, 1), rows).write([0])

    def writer(self, caches: Mapping[str, Block], rows: Mapping[str, Block]) -> RowWriter:
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
        self._tensors = {}
        self._mover.close()

    def _open_session(self, model: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = choose_num_threads()
        return open_on_device(self._ort, self.device, model, options)

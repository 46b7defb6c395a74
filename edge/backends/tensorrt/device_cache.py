"""The KV cache in device memory: one block, so that one strided copy moves a slot of all layers.

Layout ``[2 * layers, slots, kv_heads, rows, head_dim]``: entry ``2 * i`` holds the keys of layer
``i``, entry ``2 * i + 1`` its values. A slot of an entry is what an engine with that batch binds.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from edge.backends import cuda
from edge.backends.step import Floats
from edge.bundle.manifest import FloatType, ModelSpec
from edge.bundle.sizes import check_slots

from .device_memory import StepSizes, new_rows_bytes, new_rows_stride
from .step_buffers import round_to_bf16

_ELEMENT_BYTES = 2


class DeviceCache:
    """Keys and values of all slots.

    Args:
        device, stream: where, and on what its copies run.
        resources: what is allocated is pushed here.
        model: the decoder's numbers.
        dtype: of the rows.
        num_slots: sequences.
        rows: per slot.

    Raises:
        ConfigError: slots of this size would not start at addresses that TensorRT takes.
        DeviceMemoryError: it does not fit.
    """

    def __init__(
        self,
        device: cuda.Device,
        stream: cuda.Stream,
        resources: ExitStack,
        model: ModelSpec,
        dtype: FloatType,
        num_slots: int,
        rows: int,
    ) -> None:
        self._stream, self._dtype = stream, dtype
        self._layers, self._heads, self._dim = (
            2 * model.num_layers,
            model.num_kv_heads,
            model.head_dim,
        )
        self._slots, self._rows = num_slots, rows
        self._row_bytes = self._dim * _ELEMENT_BYTES
        self.slot_bytes = self._heads * rows * self._row_bytes
        check_slots(model, rows)
        num_bytes = self._layers * num_slots * self.slot_bytes
        block = cuda.DeviceMemory(device, num_bytes, f"the KV cache of {num_slots} x {rows} tokens")
        resources.callback(block.close)
        self._address, self.num_bytes = block.address, num_bytes
        self._copy = cuda.BoxCopy(device)
        # Rows that were never written are masked, but 0 times NaN would still be NaN.
        stream.clear(block.address, num_bytes)

    def address(self, entry: int, slot: int) -> int:
        """Where a slot of an entry starts."""
        return self._address + (entry * self._slots + slot) * self.slot_bytes

    def read(self, slot: int, length: int) -> Floats:
        """The first rows of a slot: ``[2 * layers, kv_heads, length, head_dim]``, fp16 or fp32."""
        found = np.empty((self._layers, self._heads, length, self._dim), np.uint16)
        if found.size:
            self._run(self._host_box(found), self._box(slot), length)
            self._stream.synchronize()
        if self._dtype == "bf16":
            widened: Floats = (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return widened
        return found.view(np.float16)

    def write(self, slot: int, rows: Floats) -> None:
        """Overwrite the first rows of a slot; waits, since ``rows`` belongs to the caller."""
        bits: NDArray[np.uint16]
        if self._dtype == "bf16":
            bits = round_to_bf16(rows)
        else:
            bits = np.ascontiguousarray(rows, dtype=np.float16).view(np.uint16)
        if bits.size:
            self._run(self._box(slot), self._host_box(bits), rows.shape[2])
            self._stream.synchronize()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first rows of one slot to another."""
        if length:
            self._run(self._box(target), self._box(source), length)

    def append(self, new: NewRows, place: int, batch: int, seq: int, slot: int, start: int) -> None:
        """Copy a step's new rows of one sequence into its slot, all layers at once.

        Args:
            new: where the engine left them.
            place: of the sequence in the batch.
            batch: of the step.
            seq: tokens per sequence of the step.
            slot: of the sequence.
            start: the first row that is written.
        """
        self._run(self._box(slot, start), new.box(place, batch, seq), seq)

    def _run(self, target: cuda.Box, source: cuda.Box, rows: int) -> None:
        self._copy.run(
            target,
            source,
            width=rows * self._row_bytes,
            height=self._heads,
            depth=self._layers,
            stream=self._stream,
        )

    def _box(self, slot: int, start: int = 0) -> cuda.Box:
        address = self._address + slot * self.slot_bytes + start * self._row_bytes
        return cuda.Box(address, self._rows * self._row_bytes, self._slots * self._heads)

    def _host_box(self, array: NDArray[np.uint16]) -> cuda.Box:
        return cuda.Box(array, array.shape[2] * self._row_bytes, self._heads)


class NewRows:
    """Where an engine of dialect ``portable`` leaves the step's keys and values."""

    def __init__(
        self, device: cuda.Device, resources: ExitStack, model: ModelSpec, sizes: StepSizes
    ) -> None:
        self._model = model
        num_bytes = new_rows_bytes(sizes, model)
        block = cuda.DeviceMemory(device, num_bytes, "the step's keys and values")
        resources.callback(block.close)
        self._address = block.address

    def address(self, entry: int, batch: int, seq: int) -> int:
        """Where the rows ``[batch, kv_heads, seq, head_dim]`` of an entry go."""
        return self._address + entry * new_rows_stride(batch, seq, self._model)

    def box(self, place: int, batch: int, seq: int) -> cuda.Box:
        """The rows of one sequence, of all entries."""
        pitch = seq * self._model.head_dim * _ELEMENT_BYTES
        rows = new_rows_stride(batch, seq, self._model) // pitch
        return cuda.Box(self._address + place * self._model.num_kv_heads * pitch, pitch, rows)

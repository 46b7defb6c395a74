"""Holds the KV cache in device memory: one block for each size of element.

So one strided copy moves a slot of all layers of a block. If a block of that size is not available,
not even in pieces, each layer has its own block and its own copy. The layout of a block is
``[tensors, slots, kv_heads, rows, head_dim]``. Tensor ``2 * i`` of the cache holds the keys of
layer ``i``, and tensor ``2 * i + 1`` its values. In an 8-bit cache they are INT8, except for layers
that stay in float. An engine binds the slots of its batch in each tensor.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import cuda
from edge.backends.step import Floats
from edge.bundle.manifest import FloatType, Manifest
from edge.bundle.sizes import cache_element_bytes, check_slots
from edge.errors import DeviceMemoryError
from edge.model.spec import ModelSpec

from .device_memory import CachePlanes, StepSizes, cache_planes, new_rows_bytes, new_rows_stride
from .step_buffers import round_to_bf16

if TYPE_CHECKING:
    from edge.bundle.kv_scales import Scales

_log = logging.getLogger(__name__)


class DeviceCache:
    """Keys and values of all slots.

    Args:
        device, stream: device of the cache, and stream of its copies.
        resources: gets all allocations, to free them.
        manifest: manifest of the bundle.
        scales: scales of the tensors in INT8, by number.
        num_slots: number of slots.
        rows: rows per slot.

    Raises:
        ConfigError: slots of this size would not start at addresses that TensorRT takes.
        DeviceMemoryError: it does not fit.
    """

    def __init__(
        self,
        device: cuda.Device,
        stream: cuda.Stream,
        resources: ExitStack,
        manifest: Manifest,
        scales: Scales,
        num_slots: int,
        rows: int,
    ) -> None:
        self._stream, self._scales = stream, scales
        self._dtype: FloatType = manifest.dtype
        model = manifest.model
        self._shape = (2 * model.num_layers, model.num_kv_heads, model.head_dim)
        check_slots(model, rows, cache_element_bytes(manifest))

        def allocate(planes: list[CachePlanes]) -> list[_Block]:
            with ExitStack() as taken:
                blocks = [
                    _Block(device, stream, taken, each, model, num_slots, rows) for each in planes
                ]
                resources.push(taken.pop_all())
            return blocks

        whole = cache_planes(manifest)
        try:
            self._blocks = allocate(whole)
        except DeviceMemoryError as error:
            try:
                self._blocks = allocate(split_by_layer(whole))
            except DeviceMemoryError:
                raise error from None
            _log.warning(
                "the KV cache has a block for each layer, since none of its whole size could be "
                "had: rows are copied %d times where once was enough (%s)",
                len(self._blocks) // len(whole),
                error,
            )
        self._of_tensor = {
            number: (block, index)
            for block in self._blocks
            for index, number in enumerate(block.planes.numbers)
        }

    @property
    def planes(self) -> list[CachePlanes]:
        """Return the tensors of each block."""
        return [block.planes for block in self._blocks]

    @property
    def num_bytes(self) -> int:
        """Return the memory of all blocks, in bytes."""
        return sum(block.num_bytes for block in self._blocks)

    def address(self, entry: int, slot: int) -> int:
        """Return the address of a slot of a tensor."""
        block, index = self._of_tensor[entry]
        return block.address(index, slot)

    def read(self, slot: int, length: int) -> Floats:
        """Read a slot's first rows: ``[2 * layers, kv_heads, length, head_dim]``, fp16 or fp32."""
        entries, heads, dim = self._shape
        plain = self._dtype == "fp16" and not self._scales
        rows: Floats = np.empty((entries, heads, length, dim), np.float16 if plain else np.float32)
        for block in self._blocks:
            bits = block.read(slot, length)
            for number, found in zip(block.planes.numbers, bits, strict=True):
                if block.planes.is_int8:
                    from edge.bundle.kv_scales import dequantize_rows

                    rows[number] = dequantize_rows(found, self._scales[number])
                elif self._dtype == "bf16":
                    rows[number] = (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
                else:
                    rows[number] = found.view(np.float16)
        return rows

    def write(self, slot: int, rows: Floats) -> None:
        """Overwrite the first rows of a slot; waits, since ``rows`` belongs to the caller.

        Raises:
            BackendError: a value for INT8 is not finite; nothing is written then.
        """
        stored = [self._stored(block, rows) for block in self._blocks]
        for block, bits in zip(self._blocks, stored, strict=True):
            block.write(slot, bits)

    def _stored(self, block: _Block, rows: Floats) -> NDArray[Any]:
        numbers = block.planes.numbers
        if block.planes.is_int8:
            from edge.bundle.kv_scales import quantize_rows

            return np.stack([quantize_rows(rows[each], self._scales[each]) for each in numbers])
        chosen = rows if len(numbers) == len(rows) else rows[list(numbers)]
        if self._dtype == "bf16":
            return round_to_bf16(chosen)
        return np.ascontiguousarray(chosen, dtype=np.float16).view(np.uint16)

    def clear(self, slot: int | None = None) -> None:
        """Zero every row of a slot, or of every slot."""
        for block in self._blocks:
            block.clear(slot)

    def copy(self, source: int, target: int, end: int, first: int = 0) -> None:
        """Copy rows ``first`` to ``end`` of one slot to the same rows of another."""
        for block in self._blocks:
            block.copy(source, target, end, first)

    def append(
        self, new: NewRows, place: int, batch: int, seq: int, slot: int, start: int, rows: int
    ) -> None:
        """Copy a step's new rows of one sequence into its slot, all layers at once.

        Args:
            new: memory in which the engine left them.
            place: place of the sequence in the batch.
            batch: sequences that the engine ran.
            seq: tokens of each, with padding.
            slot: slot of the sequence.
            start: the first row to write.
            rows: number of rows; rows of padding after them are not copied.
        """
        for block, source in zip(self._blocks, new.boxes(place, batch, seq), strict=True):
            block.append(source, rows, slot, start)


def split_by_layer(blocks: list[CachePlanes]) -> list[CachePlanes]:
    """Give each layer's keys and values a block of their own."""
    return [
        CachePlanes(tuple(numbers), block.element_bytes, block.is_int8)
        for block in blocks
        for _, numbers in groupby(block.numbers, lambda number: number // 2)
    ]


class _Block:
    """Tensors with elements of one size, for `DeviceCache`."""

    def __init__(
        self,
        device: cuda.Device,
        stream: cuda.Stream,
        resources: ExitStack,
        planes: CachePlanes,
        model: ModelSpec,
        num_slots: int,
        rows: int,
    ) -> None:
        self.planes, self._stream = planes, stream
        self._heads, self._dim = model.num_kv_heads, model.head_dim
        self._slots, self._rows = num_slots, rows
        self._row_bytes = model.head_dim * planes.element_bytes
        self._slot_bytes = model.num_kv_heads * rows * self._row_bytes
        self.num_bytes = planes.num_planes * num_slots * self._slot_bytes
        name = f"the KV cache of {num_slots} x {rows} tokens"
        memory = cuda.DeviceMemory(device, self.num_bytes, name)
        resources.callback(memory.close)
        self._address = memory.address
        self._copy = cuda.BoxCopy(device)
        self.clear()

    def clear(self, slot: int | None = None) -> None:
        # Rows that were never written are masked, but 0 times NaN would still be NaN.
        if slot is None:
            self._stream.clear(self._address, self.num_bytes)
            return
        for index in range(self.planes.num_planes):
            self._stream.clear(self.address(index, slot), self._slot_bytes)

    def address(self, index: int, slot: int) -> int:
        return self._address + (index * self._slots + slot) * self._slot_bytes

    def read(self, slot: int, length: int) -> NDArray[Any]:
        kind = np.int8 if self.planes.is_int8 else np.uint16
        found = np.empty((self.planes.num_planes, self._heads, length, self._dim), kind)
        if found.size:
            self._run(self._host_box(found), self._box(slot), length)
            self._stream.synchronize()
        return found

    def write(self, slot: int, bits: NDArray[Any]) -> None:
        if bits.size:
            self._run(self._box(slot), self._host_box(bits), bits.shape[2])
            self._stream.synchronize()

    def copy(self, source: int, target: int, end: int, first: int) -> None:
        if end > first:
            self._run(self._box(target, first), self._box(source, first), end - first)

    def append(self, source: cuda.Box, rows: int, slot: int, start: int) -> None:
        self._run(self._box(slot, start), source, rows)

    def _run(self, target: cuda.Box, source: cuda.Box, rows: int) -> None:
        self._copy.run(
            target,
            source,
            width=rows * self._row_bytes,
            height=self._heads,
            depth=self.planes.num_planes,
            stream=self._stream,
        )

    def _box(self, slot: int, start: int = 0) -> cuda.Box:
        address = self._address + slot * self._slot_bytes + start * self._row_bytes
        return cuda.Box(address, self._rows * self._row_bytes, self._slots * self._heads)

    def _host_box(self, array: NDArray[Any]) -> cuda.Box:
        return cuda.Box(array, array.shape[2] * self._row_bytes, self._heads)


class NewRows:
    """Memory in which an engine of dialect ``portable`` leaves the step's keys and values."""

    def __init__(
        self,
        device: cuda.Device,
        resources: ExitStack,
        model: ModelSpec,
        sizes: StepSizes,
        blocks: list[CachePlanes],
    ) -> None:
        self._model = model
        self._parts: list[tuple[CachePlanes, int]] = []
        self._of_tensor: dict[int, tuple[int, int, int]] = {}
        for planes in blocks:
            num_bytes = new_rows_bytes(sizes, model, planes.num_planes, planes.element_bytes)
            block = cuda.DeviceMemory(device, num_bytes, "the step's keys and values")
            resources.callback(block.close)
            self._parts.append((planes, block.address))
            for index, number in enumerate(planes.numbers):
                self._of_tensor[number] = block.address, index, planes.element_bytes

    def address(self, entry: int, batch: int, seq: int) -> int:
        """Return the address for the rows ``[batch, kv_heads, seq, head_dim]`` of a tensor."""
        base, index, element_bytes = self._of_tensor[entry]
        return base + index * new_rows_stride(batch, seq, self._model, element_bytes)

    def boxes(self, place: int, batch: int, seq: int) -> list[cuda.Box]:
        """Return the rows of one sequence, for each block of the cache."""
        boxes = []
        for planes, base in self._parts:
            pitch = seq * self._model.head_dim * planes.element_bytes
            rows = new_rows_stride(batch, seq, self._model, planes.element_bytes) // pitch
            boxes.append(cuda.Box(base + place * self._model.num_kv_heads * pitch, pitch, rows))
        return boxes

"""Holds the KV cache in device memory: one block for all tensors that have rows of one kind.

So one strided copy moves a slot of all layers of a block. If a block of that size is not available,
not even in pieces, each layer has its own block and its own copy. The layout of a block is
``[tensors, slots, kv_heads, rows, dim]``. In an 8-bit cache tensors are INT8, except for layers
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
from edge.bundle.manifest import FloatType, Manifest
from edge.bundle.sizes import cache_element_bytes, check_slots
from edge.errors import BackendError, DeviceMemoryError
from edge.model.cache import Rows, cache_tensors
from edge.model.slot_rows import SlotRows

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
        scales: scales of the tensors in INT8.
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
        self._stream, self._scales, self._rows = stream, scales, rows
        self._dtype: FloatType = manifest.dtype
        check_slots(manifest.model, rows, cache_element_bytes(manifest))

        def allocate(planes: list[CachePlanes]) -> list[_Block]:
            with ExitStack() as taken:
                blocks = [_Block(device, stream, taken, each, num_slots, rows) for each in planes]
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
        tensors = cache_tensors(manifest.model, manifest.dtype, manifest.int8_layers)
        places = {
            name: (block, index)
            for block in self._blocks
            for index, name in enumerate(block.planes.names)
        }
        self._of_tensor = {name: places[name] for name in tensors}

    @property
    def planes(self) -> list[CachePlanes]:
        """Return the tensors of each block."""
        return [block.planes for block in self._blocks]

    @property
    def num_bytes(self) -> int:
        """Return the memory of all blocks, in bytes."""
        return sum(block.num_bytes for block in self._blocks)

    def address(self, name: str, slot: int) -> int:
        """Return the address of a slot of a tensor."""
        block, index = self._of_tensor[name]
        return block.address(index, slot)

    def shape(self, name: str, batch: int) -> tuple[int, ...]:
        """Return the shape of some slots of a tensor."""
        return self._of_tensor[name][0].planes.rows.shape(batch, self._rows)

    def check(self, rows: SlotRows) -> None:
        """Refuse rows of other tensors or shapes.

        Raises:
            BackendError: they do not fit.
        """
        specs = {name: block.planes.rows for name, (block, _) in self._of_tensor.items()}
        expected = {name: spec.shape(1, rows.length)[1:] for name, spec in specs.items()}
        if (found := {name: array.shape for name, array in rows.items()}) != expected:
            raise BackendError(f"rows of shapes {found} do not fit a cache of {expected}")

    def read(self, slot: int, length: int) -> SlotRows:
        """Read a slot's first rows, fp32 where they are not fp16 in the cache."""
        found: dict[str, NDArray[Any]] = {}
        for block in self._blocks:
            bits = block.read(slot, length)
            if block.planes.rows.type == "int8":
                from edge.bundle.kv_scales import dequantize_rows

                scales = np.stack([self._scales[name] for name in block.planes.names])
                floats: NDArray[Any] = dequantize_rows(bits, scales)
            elif self._dtype == "bf16":
                floats = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
            else:
                floats = bits.view(np.float16)
            found.update(zip(block.planes.names, floats, strict=True))
        return SlotRows((name, found[name]) for name in self._of_tensor)

    def write(self, slot: int, rows: SlotRows) -> None:
        """Overwrite the first rows of a slot; waits, since ``rows`` belongs to the caller.

        Raises:
            BackendError: a value for INT8 is not finite; nothing is written then.
        """
        stored = {name: self._stored(name, array) for name, array in rows.items()}
        for name, bits in stored.items():
            block, index = self._of_tensor[name]
            block.write(index, slot, bits)
        self._stream.synchronize()

    def _stored(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        if name in self._scales:
            from edge.bundle.kv_scales import quantize_rows

            return quantize_rows(rows, self._scales[name])
        if self._dtype == "bf16":
            return round_to_bf16(rows)
        return np.ascontiguousarray(rows, dtype=np.float16).view(np.uint16)

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
        CachePlanes(list(names), block.rows)
        for block in blocks
        for _, names in groupby(block.names, lambda name: name.partition(".")[0])
    ]


class _Block:
    """Tensors with rows of one kind, for `DeviceCache`."""

    def __init__(
        self,
        device: cuda.Device,
        stream: cuda.Stream,
        resources: ExitStack,
        planes: CachePlanes,
        num_slots: int,
        rows: int,
    ) -> None:
        self.planes, self._stream = planes, stream
        self._heads, self._dim = planes.rows.kv_heads, planes.rows.dim
        self._slots, self._rows, self._num = num_slots, rows, len(planes.names)
        self._row_bytes = planes.rows.row_bytes // self._heads
        self._slot_bytes = rows * planes.rows.row_bytes
        self.num_bytes = self._num * num_slots * self._slot_bytes
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
        for index in range(self._num):
            self._stream.clear(self.address(index, slot), self._slot_bytes)

    def address(self, index: int, slot: int) -> int:
        return self._address + (index * self._slots + slot) * self._slot_bytes

    def read(self, slot: int, length: int) -> NDArray[Any]:
        kind = np.int8 if self.planes.rows.type == "int8" else np.uint16
        found = np.empty((self._num, self._heads, length, self._dim), kind)
        if found.size:
            self._run(self._host_box(found), self._box(slot), length)
            self._stream.synchronize()
        return found

    def write(self, index: int, slot: int, bits: NDArray[Any]) -> None:
        if length := bits.shape[1]:
            target = self._box(index * self._slots + slot)
            self._run(target, self._host_box(bits[None]), length, tensors=1)

    def copy(self, source: int, target: int, end: int, first: int) -> None:
        if end > first:
            self._run(self._box(target, first), self._box(source, first), end - first)

    def append(self, source: cuda.Box, rows: int, slot: int, start: int) -> None:
        self._run(self._box(slot, start), source, rows)

    def _run(self, target: cuda.Box, source: cuda.Box, rows: int, tensors: int = 0) -> None:
        self._copy.run(
            target,
            source,
            width=rows * self._row_bytes,
            height=self._heads,
            depth=tensors or self._num,
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
        sizes: StepSizes,
        blocks: list[CachePlanes],
    ) -> None:
        self._parts: list[tuple[Rows, int]] = []
        self._of_tensor: dict[str, tuple[int, int, Rows]] = {}
        for planes in blocks:
            num_bytes = new_rows_bytes(sizes, planes)
            block = cuda.DeviceMemory(device, num_bytes, "the step's keys and values")
            resources.callback(block.close)
            self._parts.append((planes.rows, block.address))
            for index, name in enumerate(planes.names):
                self._of_tensor[name] = block.address, index, planes.rows

    def address(self, name: str, batch: int, seq: int) -> int:
        """Return the address for the rows ``[batch, kv_heads, seq, dim]`` of a tensor."""
        base, index, rows = self._of_tensor[name]
        return base + index * new_rows_stride(batch, seq, rows)

    def boxes(self, place: int, batch: int, seq: int) -> list[cuda.Box]:
        """Return the rows of one sequence, for each block of the cache."""
        boxes = []
        for rows, base in self._parts:
            pitch = seq * rows.row_bytes // rows.kv_heads
            count = new_rows_stride(batch, seq, rows) // pitch
            boxes.append(cuda.Box(base + place * rows.kv_heads * pitch, pitch, count))
        return boxes

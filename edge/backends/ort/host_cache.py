"""Holds a KV cache in host memory that costs only what is written into it.

Where the kernel gives huge pages freely, the first row of a sequence makes 2 MB resident in every
head of every layer: eight slots of 40 tokens took as much as eight full ones. (numpy asks for huge
pages above 4 MB, and some systems always give them.) With small pages alone, attention over 3,000
rows takes 3 to 5 % longer. So pages are small at first, and made huge once they are half full: at
most twice the used memory is resident.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.step import Floats
from edge.device.huge_pages import HUGE_PAGE_BYTES, MADV_COLLAPSE
from edge.model.cache import CacheSpec, alike
from edge.model.slot_rows import SlotRows

if TYPE_CHECKING:
    from edge.bundle.kv_scales import Scales

_CHECK_ROWS = 256  # a slot grows by this many rows before its pages are checked again
_TOKENS_PER_PAGE = 16  # copying a page takes 0.6 ms or more: no step may wait for all of them


class HostCaches:
    """Tensors in `HostCache` of which some hold INT8 and the others float32.

    Args:
        tensors: the tensors.
        num_slots, capacity: slots, and rows of each.
        scales: scales of the tensors in INT8.

    Attributes:
        arrays: the tensors by name, in graph order.

    Raises:
        MemoryError: the system does not grant so much address space.
    """

    def __init__(
        self, tensors: Mapping[str, CacheSpec], num_slots: int, capacity: int, scales: Scales
    ) -> None:
        self._scales = scales
        self._parts: list[HostCache] = []
        self.arrays: dict[str, NDArray[Any]] = dict.fromkeys(tensors, np.empty(0))
        for names, spec in alike(tensors):
            dtype = np.dtype(np.int8 if spec.type == "int8" else np.float32)
            part = HostCache(len(names), spec.shape(num_slots, capacity), dtype)
            self._parts.append(part)
            self.arrays.update(zip(names, part.arrays, strict=True))

    def read(self, slot: int, length: int) -> SlotRows:
        """Copy the first rows of a slot, in float32."""
        rows = SlotRows()
        for name, array in self.arrays.items():
            part = array[slot, :, :length]
            if name in self._scales:
                from edge.bundle.kv_scales import dequantize_rows

                rows[name] = dequantize_rows(part, self._scales[name])
            else:
                rows[name] = part.copy()
        return rows

    def write(self, slot: int, rows: SlotRows) -> None:
        """Overwrite the first rows of a slot with rows that `read` returned.

        Raises:
            BackendError: a value for INT8 is not finite; nothing is written then.
        """
        stored: dict[str, NDArray[Any]] = dict(rows)
        if self._scales:
            from edge.bundle.kv_scales import quantize_rows

            for name, scale in self._scales.items():
                stored[name] = quantize_rows(rows[name], scale)
        for name, array in self.arrays.items():
            array[slot, :, : rows.length] = stored[name]
        self.wrote(slot, rows.length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first rows of one slot to another."""
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]
        self.wrote(target, length)

    def close(self) -> None:
        """Drop the memory, which lives on while anyone else holds a tensor."""
        self.arrays, self._parts = {}, []

    def wrote(self, slot: int, num_rows: int) -> None:
        """Note that the first ``num_rows`` rows of a slot may have been written."""
        for part in self._parts:
            part.wrote(slot, num_rows)

    def settle(self, num_tokens: int) -> None:
        """Make some half-full pages huge, after a step of ``num_tokens`` tokens."""
        for part in self._parts:
            part.settle(num_tokens)


class HostCache:
    """Zeroed tensors ``[slots, kv_heads, capacity, head_dim]`` in memory of their own.

    Args:
        num_tensors: number of tensors.
        shape: shape of each tensor.
        dtype: type of its elements.

    Attributes:
        arrays: the tensors. They keep their memory alive, also without this object.

    Raises:
        MemoryError: the system does not grant so much address space.
    """

    def __init__(self, num_tensors: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        slots, self._heads, capacity, head_dim = shape
        self._row_bytes = head_dim * dtype.itemsize
        self._block_bytes = capacity * self._row_bytes  # all rows of one slot and head
        num_bytes = slots * self._heads * self._block_bytes
        self._rows = np.zeros(slots, np.int64)  # rows ever written, counted from the first
        self._check_at = [1] * slots
        # Every tensor begins at a huge page, so that one list of pages is valid for all.
        self._huge = np.zeros(num_bytes // HUGE_PAGE_BYTES, np.bool_)
        self._pending: deque[tuple[mmap.mmap, int]] = deque()
        self._blocks: list[tuple[mmap.mmap, int]] = []
        self.arrays: list[Floats] = []
        for _ in range(num_tensors):
            block, start = _reserve(num_bytes)
            self._blocks.append((block, start))
            tensor = np.frombuffer(block, dtype, int(np.prod(shape)), start).reshape(shape)
            self.arrays.append(tensor)

    def wrote(self, slot: int, num_rows: int) -> None:
        """Note that the first ``num_rows`` rows of a slot may have been written."""
        if num_rows < self._check_at[slot]:
            return
        self._check_at[slot] = num_rows + _CHECK_ROWS
        self._rows[slot] = num_rows
        full = 2 * self._used_bytes() >= HUGE_PAGE_BYTES
        for page in np.flatnonzero(full & ~self._huge).tolist():
            offset = page * HUGE_PAGE_BYTES
            self._pending.extend((block, start + offset) for block, start in self._blocks)
        self._huge |= full

    def settle(self, num_tokens: int) -> None:
        """Make some half-full pages huge, after a step of ``num_tokens`` tokens."""
        for _ in range(min(1 + num_tokens // _TOKENS_PER_PAGE, len(self._pending))):
            block, offset = self._pending.popleft()
            _advise(block, "MADV_HUGEPAGE", offset, HUGE_PAGE_BYTES)
            # An older kernel refuses, or no 2 MB are free in one piece: then the page stays small.
            with contextlib.suppress(OSError):
                block.madvise(MADV_COLLAPSE, offset, HUGE_PAGE_BYTES)

    def _used_bytes(self) -> NDArray[np.int64]:
        """Return the bytes of written rows in each whole huge page of a tensor."""
        used = np.repeat(self._rows * self._row_bytes, self._heads)  # per slot and head
        before = np.concatenate([[0], np.cumsum(used)])
        edges = np.arange(len(self._huge) + 1, dtype=np.int64) * HUGE_PAGE_BYTES
        index, within = np.divmod(edges, self._block_bytes)
        padded = np.append(used, 0)  # the last edge may be the tensor's end
        result: NDArray[np.int64] = np.diff(before[index] + np.minimum(within, padded[index]))
        return result


def _reserve(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Reserve private zeros in small pages; also return the offset of their first huge page."""
    try:
        block = mmap.mmap(
            -1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError as error:
        raise MemoryError(str(error)) from error
    _advise(block, "MADV_NOHUGEPAGE", 0, len(block))
    address = np.frombuffer(block, np.uint8, 1).ctypes.data
    return block, -address % HUGE_PAGE_BYTES


def _advise(block: mmap.mmap, name: str, offset: int, num_bytes: int) -> None:
    """Advise the kernel; a system without huge pages lacks such advice, or refuses it."""
    advice: int | None = getattr(mmap, name, None)
    if advice is not None:
        with contextlib.suppress(OSError):
            block.madvise(advice, offset, num_bytes)

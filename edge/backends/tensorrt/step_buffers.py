"""Holds the fixed memory through which a step's inputs go in and its logits come out.

The host writes and reads pinned memory, and the engine reads and writes device memory. On an
integrated GPU both are the same bytes and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import cuda
from edge.backends.batching import Window
from edge.backends.step import Floats, Step
from edge.bundle import io_spec
from edge.bundle.manifest import FloatType
from edge.model.spec import ModelSpec

from .device_memory import Arrays, StepSizes, best_arrays, input_arrays, logits_arrays, placed

_SIGN_AND_MAGNITUDE = np.int32(0x8FFFE000 - (1 << 32))
_ONE_COPY_BYTES = 1 << 14
_EXPONENT_SHIFT = np.float32(2.0 ** (127 - 15))


class StepBuffers:
    """Staging memory of one optimization profile.

    Args:
        device: device of the memory.
        resources: gets all allocations, for the owner to free.
        sizes: the most that a step takes.
        model: the decoder's dimensions.
        dtype: type of the engine's floats.
        cursor_name: ``write_indices`` or ``past_lengths``.
        best_logits: number of best logits per row with outputs of their own; 0 for none.

    Attributes:
        addresses: address of each input and output for the engine.
    """

    def __init__(
        self,
        device: cuda.Device,
        resources: ExitStack,
        sizes: StepSizes,
        model: ModelSpec,
        dtype: FloatType,
        cursor_name: str,
        best_logits: int = 0,
    ) -> None:
        self._hidden_size, self._best_logits = model.hidden_size, best_logits
        self._out_width = io_spec.output_width(model)
        self._bf16 = dtype == "bf16"
        self._mapped = device.integrated
        # The search for the best reads the rows on the GPU, which does not cache host memory.
        self._rows_mapped = self._mapped and not best_logits
        # NumPy does not know bf16, so its bits are handled as uint16.
        floats: Any = np.uint16 if self._bf16 else np.float16
        stage = partial(_Staging, device, resources)
        # Decode's regions are small, so one copy of all is faster than four.
        decodes = sizes.tokens == sizes.batch
        inputs = input_arrays(sizes, model, cursor_name, floats)
        self._inputs = stage("step inputs", inputs, mapped=self._mapped, one_copy=decodes)
        rows = logits_arrays(sizes, model, floats)
        self._rows = stage("logits", rows, mapped=self._rows_mapped, one_copy=True)
        self._parts = [self._inputs, self._rows]
        if best_logits:
            best = best_arrays(sizes, best_logits, floats)
            # A decode step takes one copy, since the gaps between its regions are small.
            small = placed(best)[1] <= _ONE_COPY_BYTES
            self._best = stage("best logits", best, mapped=self._mapped, one_copy=small)
            self._parts.append(self._best)
        self.addresses = {name: at for part in self._parts for name, at in part.addresses.items()}

    def clear(self, *, idle_cursor: int) -> None:
        """Write inputs with which every slot idles, as in `fill`."""
        self._inputs.block[:] = 0
        cursor, *_ = self._inputs.arrays.values()
        cursor[...] = idle_cursor

    def fill(self, window: Window, step: Step, *, idle_cursor: int) -> None:
        """Write a window's inputs into the staging memory.

        Args:
            window: places of the sequences; idle places get zeros and ``idle_cursor``.
            step: all of the caller's sequences.
            idle_cursor: the cache row that an idle slot writes.
        """
        batch, seq, num = window.batch, step.seq, step.num_logits
        cursor, indices, wanted, rows = self._inputs.arrays.values()
        rows = rows[: batch * seq * self._hidden_size].reshape(batch, seq, -1)
        wanted = wanted[: batch * seq].reshape(batch, seq)
        indices = indices[: batch * num].reshape(batch, num)
        cursor = cursor[:batch]
        source = round_to_bf16(step.embeds) if self._bf16 else step.embeds
        if window.whole and batch == step.batch:
            rows[...] = source
            wanted[...] = step.positions
            cursor[...] = step.starts
            indices[...] = step.logits_indices
            return
        places, chosen = list(window.places), list(window.rows)
        if len(places) < batch:
            # The last sequence here may have overflowed, and its token's rows would overflow again.
            rows[...] = 0
            wanted[...] = 0
            cursor[...] = idle_cursor
            indices[...] = 0
        rows[places] = source[chosen]
        wanted[places] = step.positions[chosen]
        cursor[places] = [step.starts[row] for row in chosen]
        indices[places] = step.logits_indices[chosen]

    def upload(self, stream: cuda.Stream, batch: int, seq: int, num_logits: int) -> None:
        """Put the copies of the inputs on a stream; none if the memory is shared."""
        if self._mapped:
            return
        tokens = batch * seq
        counts = batch, batch * num_logits, tokens, tokens * self._hidden_size
        for address, part in self._inputs.first(counts):
            stream.upload(address, part)

    def download(self, stream: cuda.Stream, num_rows: int) -> None:
        """Put the copy of a run's first rows of logits on a stream; none if memory is shared.

        If the engine has outputs for the best of each row, only these are copied; `fetch` copies
        whole rows.
        """
        if not self._best_logits:
            self.fetch(stream, 0, num_rows)
        elif not self._mapped:
            count = num_rows * self._best_logits
            for address, part in self._best.first((count, count, num_rows)):
                stream.download(part, address)

    def fetch(self, stream: cuda.Stream, first: int, num_rows: int) -> None:
        """Put the copy of whole rows of logits on a stream; none if their memory is shared."""
        if not self._rows_mapped:
            start, end = (row * self._out_width for row in (first, first + num_rows))
            ((name, logits),) = self._rows.arrays.items()
            stream.download(logits[start:end], self._rows.addresses[name] + 2 * start)

    def best(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.int32], float]:
        """Return the best logits of a row, their tokens, and the mass of all others.

        The arrays may be the staging memory itself, valid until the next run.
        """
        values, ids, rest = self._best.arrays.values()
        found = slice(row * self._best_logits, (row + 1) * self._best_logits)
        if self._bf16:
            wide = (values[found].astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            wide = values[found].astype(np.float32)
        return wide, ids[found], float(rest[row])

    def read_logits(self, first: int, target: NDArray[np.float32]) -> None:
        """Convert rows of logits to float32; call it after waiting for the stream.

        Args:
            first: the first row.
            target: ``[rows, width]``, contiguous.
        """
        start = first * self._out_width
        (logits,) = self._rows.arrays.values()
        bits = logits[start : start + target.size].view(np.uint16)
        flat = target.reshape(-1)
        if self._bf16:
            np.left_shift(bits, 16, out=flat.view(np.uint32), dtype=np.uint32)
        else:
            widen_fp16(bits, flat)

    def close(self) -> None:
        """Drop every view of the pinned memory, which its owner frees now."""
        for part in self._parts:
            part.block = np.empty(0, np.uint8)
            part.arrays.clear()


class _Staging:
    """Arrays in a block of pinned memory, and in one of the engine's, if that is another.

    Args:
        device: device of the memory.
        resources: gets all allocations, for the owner to free.
        purpose: what is in it, for messages.
        arrays: the arrays.
        mapped: whether the engine uses the pinned memory itself.
        one_copy: whether the gaps between the arrays are copied with them, all at once.

    Attributes:
        addresses: the engine's address of each array, by the name of its tensor.
        arrays: the host's arrays.
        block: the bytes of them all.
    """

    def __init__(
        self,
        device: cuda.Device,
        resources: ExitStack,
        purpose: str,
        arrays: Arrays,
        *,
        mapped: bool,
        one_copy: bool,
    ) -> None:
        offsets, num_bytes = placed(arrays)
        memory: Any = cuda.PinnedMemory(device, num_bytes, purpose, mapped=mapped)
        resources.callback(memory.close)
        self.block: NDArray[np.uint8] = memory.array
        if not mapped:
            memory = cuda.DeviceMemory(device, num_bytes, purpose)
            resources.callback(memory.close)
        self._one_copy, self._start = one_copy, memory.address
        self.addresses = {name: self._start + offset for name, offset in offsets.items()}
        self.arrays: dict[str, NDArray[Any]] = {
            name: self.block[offsets[name] :][: count * np.dtype(kind).itemsize].view(kind)
            for name, (count, kind) in arrays.items()
        }

    def first(self, counts: Sequence[int]) -> list[tuple[int, NDArray[Any]]]:
        """Return address and memory of what has the first elements of each array, for copies."""
        used = zip(self.addresses.values(), self.arrays.values(), counts, strict=True)
        parts = [(address, array[:count]) for address, array, count in used]
        if not self._one_copy:
            return parts
        address, last = parts[-1]
        return [(self._start, self.block[: address - self._start + last.nbytes])]


def widen_fp16(bits: NDArray[np.uint16], target: NDArray[np.float32]) -> None:
    """Convert fp16 to fp32 exactly, five times as fast as NumPy on x86: 0.05 ms per 150,000 logits.

    The bits move to their places in a float32, whose exponent is then off by 127 - 15. One
    multiplication corrects it, also for subnormal numbers. Infinities and NaN would become large
    numbers, so NumPy converts them.

    Args:
        bits: ``[n]``.
        target: ``[n]``.
    """
    signed = bits.view(np.int16)
    if int(bits.max(initial=0)) >= 0xFC00 or int(signed.max(initial=0)) >= 0x7C00:
        np.copyto(target, bits.view(np.float16))
        return
    moved = target.view(np.int32)
    np.left_shift(signed, 13, out=moved, dtype=np.int32)
    np.bitwise_and(moved, _SIGN_AND_MAGNITUDE, out=moved)  # the sign was spread over four bits
    np.multiply(target, _EXPONENT_SHIFT, out=target)


def round_to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Return the bits of the nearest bf16, ties to even; the input must be finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    result: NDArray[np.uint16] = (rounded >> np.uint32(16)).astype(np.uint16)
    return result

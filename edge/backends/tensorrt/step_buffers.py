"""Holds the fixed memory through which a step's inputs go in and its logits come out.

The host writes and reads pinned memory, and the engine reads and writes device memory. On an
integrated GPU both are the same bytes and nothing is copied.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import cuda
from edge.backends.batching import Window
from edge.backends.step import Floats, Step
from edge.bundle import io_spec
from edge.bundle.manifest import FloatType
from edge.model.spec import ModelSpec

from .device_memory import BestLayout, StepSizes, best_layout, input_layout, logits_bytes

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
        self._hidden_size = model.hidden_size
        self._out_width = io_spec.output_width(model)
        self._bf16 = dtype == "bf16"
        layout = input_layout(sizes, model.hidden_size)
        out_bytes = logits_bytes(sizes, self._out_width)
        self._mapped = device.integrated
        # The search for the best reads the rows on the GPU, which does not cache host memory.
        self._rows_mapped = self._mapped and not best_logits
        best = best_layout(sizes, best_logits)
        blocks = []
        wanted = [(layout.num_bytes, "step inputs"), (out_bytes, "logits")]
        if best_logits:
            wanted.append((best.num_bytes, "best logits"))
        for num_bytes, purpose in wanted:
            mapped = self._rows_mapped if purpose == "logits" else self._mapped
            pinned = cuda.PinnedMemory(device, num_bytes, purpose, mapped=mapped)
            resources.callback(pinned.close)
            address = pinned.address
            if not mapped:
                memory = cuda.DeviceMemory(device, num_bytes, purpose)
                resources.callback(memory.close)
                address = memory.address
            blocks.append((pinned.array, address))
        (self._inputs, self._input_address), (output, output_address), *more = blocks
        self.addresses = {
            io_spec.INPUTS_EMBEDS: self._input_address + layout.embeds,
            io_spec.POSITION_IDS: self._input_address + layout.positions,
            cursor_name: self._input_address + layout.cursor,
            io_spec.LOGITS_INDICES: self._input_address + layout.indices,
            io_spec.output_name(model): output_address,
        }
        self._best: _Best | None = None
        if best_logits:
            ((block, address),) = more
            self._best = _Best(block, address, best, sizes.logits, best_logits, dtype)
            self.addresses |= {
                io_spec.BEST_VALUES: address + best.values,
                io_spec.BEST_IDS: address + best.ids,
                io_spec.BEST_REST: address + best.rest,
            }
        self._layout = layout
        self._compact = sizes.tokens == sizes.batch
        # NumPy does not know bf16, so its bits are handled as uint16.
        floats: Any = np.uint16 if self._bf16 else np.float16
        self._cursor = self._region(layout.cursor, sizes.batch, np.int64)
        self._indices = self._region(layout.indices, sizes.logits, np.int64)
        self._positions = self._region(layout.positions, sizes.tokens, np.int64)
        self._embeds = self._region(layout.embeds, sizes.tokens * model.hidden_size, floats)
        self._logits = output[: 2 * sizes.logits * self._out_width].view(floats)
        self._output_address = output_address

    def _region(self, offset: int, count: int, dtype: Any) -> NDArray[Any]:
        return self._inputs[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)

    def clear(self, *, idle_cursor: int) -> None:
        """Write inputs with which every slot idles, as in `fill`."""
        self._inputs[:] = 0
        self._cursor[...] = idle_cursor

    def fill(self, window: Window, step: Step, *, idle_cursor: int) -> None:
        """Write a window's inputs into the staging memory.

        Args:
            window: places of the sequences; idle places get zeros and ``idle_cursor``.
            step: all of the caller's sequences.
            idle_cursor: the cache row that an idle slot writes.
        """
        batch, seq, num = window.batch, step.seq, step.num_logits
        rows = self._embeds[: batch * seq * self._hidden_size].reshape(batch, seq, -1)
        wanted = self._positions[: batch * seq].reshape(batch, seq)
        indices = self._indices[: batch * num].reshape(batch, num)
        cursor = self._cursor[:batch]
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
        tokens, layout = batch * seq, self._layout
        if self._compact:
            # Decode's regions are small, so one copy of all is faster than four.
            end = layout.embeds + tokens * self._hidden_size * 2
            stream.upload(self._input_address, self._inputs[:end])
            return
        for offset, num_bytes in (
            (layout.cursor, batch * 8),
            (layout.indices, batch * num_logits * 8),
            (layout.positions, tokens * 8),
            (layout.embeds, tokens * self._hidden_size * 2),
        ):
            stream.upload(self._input_address + offset, self._inputs[offset : offset + num_bytes])

    def download(self, stream: cuda.Stream, num_rows: int) -> None:
        """Put the copy of a run's first rows of logits on a stream; none if memory is shared.

        If the engine has outputs for the best of each row, only these are copied; `fetch` copies
        whole rows.
        """
        if self._mapped:
            return
        if self._best is None:
            self.fetch(stream, 0, num_rows)
        else:
            self._best.download(stream, num_rows)

    def fetch(self, stream: cuda.Stream, first: int, num_rows: int) -> None:
        """Put the copy of whole rows of logits on a stream; none if their memory is shared."""
        if not self._rows_mapped:
            start, end = (row * self._out_width for row in (first, first + num_rows))
            stream.download(self._logits[start:end], self._output_address + 2 * start)

    def best(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.int32], float]:
        """Return the best logits of a row, their tokens, and the mass of all others.

        The arrays may be the staging memory itself, valid until the next run.
        """
        assert self._best is not None, "the engine has no such outputs"
        return self._best.row(row)

    def read_logits(self, first: int, target: NDArray[np.float32]) -> None:
        """Convert rows of logits to float32; call it after waiting for the stream.

        Args:
            first: the first row.
            target: ``[rows, width]``, contiguous.
        """
        start = first * self._out_width
        bits = self._logits[start : start + target.size].view(np.uint16)
        flat = target.reshape(-1)
        if self._bf16:
            np.left_shift(bits, 16, out=flat.view(np.uint32), dtype=np.uint32)
        else:
            widen_fp16(bits, flat)

    def close(self) -> None:
        """Drop every view of the pinned memory, which its owner frees now."""
        empty = np.empty(0, np.uint8)
        self._inputs = self._cursor = self._indices = self._positions = empty
        self._embeds = self._logits = empty
        self._best = None


class _Best:
    """Copies the outputs of `io_spec.best_outputs` of one run to the host, and reads them.

    Args:
        block: pinned memory.
        address: address of the engine's block.
        layout: layout of both blocks.
        num_rows: most rows of logits.
        keep: best logits of each row.
        dtype: type of the logits.
    """

    def __init__(
        self,
        block: NDArray[np.uint8],
        address: int,
        layout: BestLayout,
        num_rows: int,
        keep: int,
        dtype: FloatType,
    ) -> None:
        count = num_rows * keep
        kind: Any = np.uint16 if dtype == "bf16" else np.float16
        self._values = block[layout.values :][: 2 * count].view(kind).reshape(-1, keep)
        self._ids = block[layout.ids :][: 4 * count].view(np.int32).reshape(-1, keep)
        self._rest = block[layout.rest :][: 4 * num_rows].view(np.float32)
        # A decode step takes one copy, since the gaps between its regions are small.
        self._whole = block if layout.num_bytes <= _ONE_COPY_BYTES else None
        self._places = address, layout

    def download(self, stream: cuda.Stream, num_rows: int) -> None:
        address, layout = self._places
        if self._whole is not None:
            stream.download(self._whole[: layout.num_bytes], address)
            return
        stream.download(self._values[:num_rows], address + layout.values)
        stream.download(self._ids[:num_rows], address + layout.ids)
        stream.download(self._rest[:num_rows], address + layout.rest)

    def row(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.int32], float]:
        values = self._values[row]
        if values.dtype == np.float16:
            wide = values.astype(np.float32)
        else:
            wide = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide, self._ids[row], float(self._rest[row])


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

"""Plans which neighbouring slots run together: an engine computes a contiguous part of the cache.

Decode is bound by reading the weights, so few wide runs beat many narrow ones: a window may span
idle slots. The results of an idle slot are thrown away. Its writes must go where nobody reads, or
be put back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .step import Step, positions_from

UNBOUNDED = sys.maxsize
_WASTE = 0.1  # the most of a step's time that its padding may take
# Reading the weights takes an Orin as long as multiplying by 40 to 80 tokens (docs/planner.md).
_READ_TOKENS = 40
_TILE = 128  # rows that a product computes at once; padding never adds a whole tile


class Window(NamedTuple):
    """One run.

    Attributes:
        first: the first slot.
        batch: slots, idle ones included.
        rows: the caller's sequences that run, by index.
        places: their places in the batch.
    """

    first: int
    batch: int
    rows: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether the caller's sequences are the batch, in order, and no slot is idle."""
        return self.rows == self.places == tuple(range(self.batch))

    @property
    def idle(self) -> list[int]:
        """Return the places in the batch that hold none of the caller's sequences."""
        return [place for place in range(self.batch) if place not in self.places]


@dataclass(frozen=True)
class Batching:
    """The limits of one run of an engine.

    Attributes:
        decode_gap: idle slots that a window may span between two neighbours, if each sequence has
            one token.
        chunk_gap: the same if sequences have several tokens.
        max_batch: most slots of a window, with idle ones.
        max_shared_seq: most tokens of each sequence if several sequences run together.
        max_tokens, max_logits: most tokens and logits of all sequences together, if one has
            several tokens.
        alone_after_past: whether sequences run one at a time as soon as several tokens of one
            follow others.
        min_decode: least slots of a window in which each sequence has one token; a lone sequence
            then runs beside an idle neighbour. Needs ``num_slots``.
        num_slots: slots of the cache.
    """

    decode_gap: int
    chunk_gap: int
    max_batch: int = UNBOUNDED
    max_shared_seq: int = UNBOUNDED
    max_tokens: int = UNBOUNDED
    max_logits: int = UNBOUNDED
    alone_after_past: bool = False
    min_decode: int = 1
    num_slots: int = UNBOUNDED

    def plan(self, step: Step) -> list[Window]:
        """Cover a step's slots by windows that the engine can run, in slot order."""
        seq, num, width = step.seq, step.num_logits, self.max_batch
        if seq > 1 or num > 1:
            width = min(width, self.max_tokens // seq, self.max_logits // max(num, 1))
        if seq > self.max_shared_seq or (seq > 1 and self.alone_after_past and any(step.starts)):
            width = 1
        gap = self.decode_gap if seq == 1 else self.chunk_gap
        windows = plan_windows(step.slots, max(width, 1), gap)
        if seq > 1 or self.min_decode == 1:
            return windows
        return [self._widened(window) for window in windows]

    def _widened(self, window: Window) -> Window:
        """Widen a window by idle slots after it, or before it at the end of the cache."""
        batch = max(window.batch, min(self.min_decode, self.num_slots))
        return placed_in(window, min(window.first, self.num_slots - batch), batch)


def canonical_windows(num_slots: int, max_batch: int) -> list[tuple[int, int]]:
    """Return few windows that together cover any other one, so that all have CUDA graphs at load.

    Widths are powers of two and ``max_batch``. A window may begin at every half of its width, and
    the widest anywhere. So a window of ``n`` slots lies in one of less than ``4 * n``, and two
    neighbours run alone.

    Returns:
        First slot and batch of each: lone slots, then the widest windows down to pairs.
    """
    widest = min(max_batch, num_slots)
    widths = {widest, *(1 << power for power in range(widest.bit_length()))}
    windows = []
    for width in sorted(widths, key=lambda width: (width > 1, -width)):
        step = 1 if width == widest else max(width // 2, 1)
        last = num_slots - width
        windows += [(first, width) for first in sorted({*range(0, last + 1, step), last})]
    return windows


def prompt_lengths(longest: int, most: int) -> list[int]:
    """Return few lengths to which a prompt's steps are padded, so that an engine has few shapes.

    Padding takes at most a tenth of a step's time, or more if that makes too many lengths.

    Args:
        longest: most tokens of a step.
        most: most lengths, 1 or more.

    Returns:
        Lengths from 2 on, ascending; the last one is ``longest``. A lone token is a decode step.
    """
    lengths = list(range(2, longest + 1))
    factor = 0
    while len(lengths) > most or not factor:
        factor += 1
        tile, lengths, least = _TILE * factor, [], 2
        while least <= longest:
            length = least + int(factor * _WASTE * (least + _READ_TOKENS))
            lengths.append(min(length, -(-least // tile) * tile, longest))
            least = lengths[-1] + 1
    return lengths


def spread(values: Sequence[int]) -> list[int]:
    """Reorder values: the last one first, then those that halve the gaps, from coarse to fine."""
    order, gaps = list(values[-1:]), [(0, len(values) - 1)]
    for low, high in gaps:  # the list grows meanwhile
        if low < high:
            middle = (low + high) // 2
            order.append(values[middle])
            gaps += [(low, middle), (middle + 1, high)]
    return order


def padded_step(step: Step, seq: int, num_logits: int) -> Step:
    """Return the same step with more tokens per sequence, and more logits of each.

    The last token is repeated after itself, at the positions that follow. Its values are as finite
    as the step's, no other token sees it, and its rows belong to nobody.
    """
    if (seq, num_logits) == (step.seq, step.num_logits):
        return step
    positions = positions_from(step.starts, seq)
    return Step(
        step.slots,
        _repeat_last(step.embeds, seq),
        positions,
        max(step.kv_len, max(step.starts) + seq),
        _repeat_last(step.logits_indices, num_logits),
    )


def placed_in(window: Window, first: int, batch: int) -> Window:
    """Place the same sequences in a wider window that begins at ``first``."""
    shift = window.first - first
    return Window(first, batch, window.rows, tuple(place + shift for place in window.places))


def plan_windows(slots: Sequence[int], max_width: int, max_gap: int) -> list[Window]:
    """Cover distinct slots by as few windows as possible, in slot order.

    Args:
        slots: slots of the caller's sequences, in any order.
        max_width: slots per window.
        max_gap: idle slots that a window may hold between two neighbours of ``slots``.
    """
    if len(slots) == 1:
        return [Window(slots[0], 1, (0,), (0,))]
    windows: list[Window] = []
    rows: list[int] = []
    for row in sorted(range(len(slots)), key=slots.__getitem__):
        if rows:
            first, last = slots[rows[0]], slots[rows[-1]]
            if slots[row] - last - 1 <= max_gap and slots[row] - first < max_width:
                rows.append(row)
                continue
            windows.append(_window(slots, rows))
        rows = [row]
    if rows:
        windows.append(_window(slots, rows))
    return windows


def window_step(window: Window, step: Step) -> Step:
    """Make the step of a window's slots, in their order; idle ones run a token at position 0."""
    if window.whole and window.batch == step.batch:
        return step
    slots = range(window.first, window.first + window.batch)
    at, starts = [-1] * window.batch, [0] * window.batch
    for place, row in zip(window.places, window.rows, strict=True):
        at[place], starts[place] = row, step.starts[row]
    rows = np.array(at)  # an idle slot runs the tokens of another sequence
    positions = positions_from(starts, step.seq)
    return Step(slots, step.embeds[rows], positions, step.kv_len, step.logits_indices[rows])


def _repeat_last(values: NDArray[Any], count: int) -> NDArray[Any]:
    """Repeat the last entry of axis 1 until there are ``count``."""
    more = np.repeat(values[:, -1:], count - values.shape[1], axis=1)
    return np.concatenate([values, more], axis=1)


def _window(slots: Sequence[int], rows: list[int]) -> Window:
    first, last = slots[rows[0]], slots[rows[-1]]
    return Window(first, last - first + 1, tuple(rows), tuple(slots[row] - first for row in rows))

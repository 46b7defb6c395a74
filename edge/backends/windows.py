"""Which neighbouring slots run together: the batch of an engine is a contiguous part of the cache.

Decode is bound by reading the weights, so few wide runs beat many narrow ones: a window may span
slots that are idle. What an idle slot computes is thrown away, and what it writes must land where
nobody reads (see `TensorRTBackend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """One run.

    Attributes:
        first: the first slot.
        batch: slots, idle ones included.
        rows: which of the caller's sequences run.
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


def plan_windows(slots: Sequence[int], max_width: int, *, span_idle: bool) -> list[Window]:
    """Cover distinct slots by as few windows as possible, in slot order.

    Args:
        slots: of the caller's sequences, in any order.
        max_width: slots per window.
        span_idle: whether a window may hold slots that are not in ``slots``.
    """
    if len(slots) == 1:
        return [Window(slots[0], 1, (0,), (0,))]
    windows: list[Window] = []
    rows: list[int] = []
    for row in sorted(range(len(slots)), key=slots.__getitem__):
        if rows:
            first, last = slots[rows[0]], slots[rows[-1]]
            adjacent = slots[row] == last + 1 or span_idle
            if adjacent and slots[row] - first < max_width:
                rows.append(row)
                continue
            windows.append(_window(slots, rows))
        rows = [row]
    if rows:
        windows.append(_window(slots, rows))
    return windows


def _window(slots: Sequence[int], rows: list[int]) -> Window:
    first, last = slots[rows[0]], slots[rows[-1]]
    return Window(first, last - first + 1, tuple(rows), tuple(slots[row] - first for row in rows))

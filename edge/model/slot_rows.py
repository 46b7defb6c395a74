"""Holds the rows of one slot of a cache, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SlotRows(dict[str, NDArray[Any]]):
    """The first rows of a slot by name, in graph order: floats ``[kv_heads, length, dim]`` each.

    Arrays may be views of one block.
    """

    @property
    def length(self) -> int:
        """Return the number of rows."""
        return int(next(iter(self.values())).shape[1])

    def each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> SlotRows:
        """Change every array by a function."""
        return SlotRows((name, change(array)) for name, array in self.items())

    def cut(self, start: int, end: int) -> SlotRows:
        """Return the rows from ``start`` to ``end``, as views."""
        return self.each(lambda array: array[:, start:end])

    def without(self, start: int, count: int) -> SlotRows:
        """Copy all rows but ``count`` from ``start`` on."""
        return self.each(
            lambda array: np.concatenate((array[:, :start], array[:, start + count :]), axis=1)
        )

    def zeroed(self, start: int, end: int) -> SlotRows:
        """Copy the first ``start`` rows, with zeros behind them up to row ``end``."""
        return self.each(lambda array: np.pad(array[:, :start], ((0, 0), (0, end - start), (0, 0))))

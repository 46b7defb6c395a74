"""Tables of figures that lose nothing on a narrow terminal."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_NAME = 32  # columns: a name up to this long, such as a model and its precision, is never broken
_FIGURE = 12  # columns for a figure beside the name
_GAP = 2  # columns that rich adds to each column, the last included


class FigureTable:
    """A plain table for rich's console.

    Nothing is cut off. Where the columns do not fit side by side, headings are broken at spaces. If
    that is not enough, the table is split into several, each with the key columns first.

    Args:
        title: printed above.
        columns: their headings; all but the first hold figures.
        keys: number of first columns that say what a row is about.
        left: headings of columns that hold words.
    """

    def __init__(
        self, title: str, columns: tuple[str, ...], keys: int = 1, left: Collection[str] = ()
    ) -> None:
        self._title = title
        self._columns = columns
        self._keys = keys
        self._left = left
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row of as many cells as there are columns."""
        assert len(cells) == len(self._columns), cells
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.cells import cell_len
        from rich.table import Table

        cells = list(zip(self._columns, *self._rows, strict=True))
        # A column is at least as wide as its longest word, a key column as its longest cell.
        least = [
            max(
                cell_len(word)
                for cell in column
                for word in ([cell] if index < self._keys else cell.split(" "))
            )
            for index, column in enumerate(cells)
        ]
        wishes = [max(map(cell_len, column)) for column in cells]
        room = options.max_width
        # A longer cell, such as the name of a kernel, is broken within a word.
        most_key = max(room // 2, min(_NAME, room - _FIGURE)) // self._keys - _GAP
        keys = [min(width, most_key) for width in least[: self._keys]]
        most = max(room - sum(keys) - _GAP * (self._keys + 1), 1)
        least = [*keys, *(min(width, most) for width in least[self._keys :])]
        for number, group in enumerate(self._groups(least, room)):
            widths = _fit(group, least, wishes, room)
            if number:
                yield ""
            table = Table(
                title=self._title if not number else None,
                title_justify="left",
                box=None,
                pad_edge=False,
            )
            for index in group:
                is_left = index == 0 or self._columns[index] in self._left
                table.add_column(
                    self._columns[index],
                    justify="left" if is_left else "right",
                    width=widths[index],
                    no_wrap=widths[index] == wishes[index],
                    overflow="fold",
                )
            for row in self._rows:
                table.add_row(*(row[index] for index in group))
            yield table

    def _groups(self, widths: list[int], room: int) -> list[list[int]]:
        """Return the columns of each table that this one is split into."""
        keys = list(range(self._keys))
        groups: list[list[int]] = []
        used = room
        for index in range(self._keys, len(widths)):
            needed = widths[index] + _GAP
            if not groups or used + needed > room:
                groups.append([*keys])
                used = sum(widths[key] + _GAP for key in keys)
            groups[-1].append(index)
            used += needed
        return groups


def _fit(group: list[int], least: list[int], wishes: list[int], room: int) -> dict[int, int]:
    """Return the column widths of one table: the wishes, shrunk to the room that there is."""
    widths = {index: wishes[index] for index in group}
    excess = sum(widths.values()) + _GAP * len(group) - room
    for index in sorted(group, key=lambda index: least[index] - wishes[index]):
        if excess > 0:
            widths[index] = least[index]
            excess -= wishes[index] - least[index]
    return widths


def make_table(title: str, *columns: str, keys: int = 1, left: Collection[str] = ()) -> FigureTable:
    """Make a `FigureTable`."""
    return FigureTable(title, columns, keys, left)

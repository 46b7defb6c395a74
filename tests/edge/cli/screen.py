"""A terminal's screen, as far as the command line uses one."""

from __future__ import annotations

import re

_STEP = re.compile(r"\x1b\[\??([\d;]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|.", re.DOTALL)


class Screen:
    """What a terminal of some rows shows after all that was written to it, scrolled lines included.

    Attributes:
        lines: the text of each line, from the first that was ever written.
        colours: every SGR sequence that was seen, such as ``1;36``.
    """

    def __init__(self, rows: int = 24) -> None:
        self.rows = rows
        self.lines = [""]
        self.colours: set[str] = set()
        self._row = self._column = 0

    def write(self, text: str) -> None:
        """Take output; sequences that the command line does not write are refused."""
        for step in _STEP.finditer(text):
            numbers, letter = step[1], step[2]
            if letter == "m":
                self.colours.add(numbers)
            elif letter == "A":  # no further up than the screen's first row
                top = max(len(self.lines) - self.rows, 0)
                self._row = max(self._row - int(numbers or 1), top)
            elif letter == "K":
                line = self.lines[self._row]
                self.lines[self._row] = "" if numbers == "2" else line[: self._column]
            elif letter in ("h", "l"):  # show and hide the cursor, bracketed paste
                continue
            elif letter is not None:
                raise AssertionError(f"the screen does not know {step[0]!r}")
            elif step[0] == "\r":
                self._column = 0
            elif step[0] == "\n":
                self._row += 1
                self._column = 0
                if self._row == len(self.lines):
                    self.lines.append("")
            elif step[0] >= " ":
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + step[0] + line[self._column + 1 :]
                self._column += 1

    @property
    def text(self) -> str:
        """All lines without spaces at their ends."""
        return "\n".join(line.rstrip() for line in self.lines)

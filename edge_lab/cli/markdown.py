"""Shows an answer as Markdown while it streams: headings, lists, tables, code in colour.

A block that can no longer change is printed once and stays. Only the last block, which may still
grow, is drawn again. If it is taller than the screen, only its last lines are drawn, since a
terminal can redraw only what it shows.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING

from edge.cli.screen import StreamPrinter, is_dumb

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.markdown import Markdown

_REDRAW_S = 0.1
_MARGIN = 2  # rows kept free: writing into the last row scrolls


def shows_markdown() -> bool:
    """Whether standard output is a terminal that may be coloured (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not is_dumb()


def answer_printer() -> StreamPrinter:
    """Make the printer for this standard output."""
    return MarkdownPrinter() if shows_markdown() else StreamPrinter()


class MarkdownPrinter(StreamPrinter):
    """A printer that shows the answer as Markdown, and the reasoning as it comes.

    Args:
        console: the console to print to; by default standard output, which must be a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._is_terminal = True
        from rich.console import Console

        # Highlighting would colour every number of an answer.
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._tail = _Tail("", is_first=True)
        self._drawn_s = 0.0

    def _write(self, text: str) -> None:
        from rich.live import Live

        self._tail.text += text
        if self._live is None:
            self._live = Live(
                self._tail,
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        if time.monotonic() - self._drawn_s >= _REDRAW_S:
            self._print_finished()
            self._live.refresh()
            self._drawn_s = time.monotonic()

    def _print_finished(self) -> None:
        """Print all blocks except the last, which may still grow."""
        # An unfinished line may still change its block: "2" may become "2. b".
        whole, newline, begun = self._tail.text.rpartition("\n")
        *finished, last = _blocks(whole + newline)
        if not finished:
            return
        done = _Tail("".join(finished), is_first=self._tail.is_first, is_whole=True)
        self._tail.text = last + begun
        self._tail.is_first = False
        self._console.print(done)  # above the tail, which is drawn again

    def end(self, note: str = "") -> None:
        """Print what is left, give the terminal back, and note how the answer ended."""
        if self._live is None:
            super().end(note)
            return
        live, self._live = self._live, None
        live.stop()  # being transient, it erases what it has drawn
        self._tail.is_whole = True
        self._console.print(self._tail)
        if note:
            self._console.print(note, style="dim", markup=False)


class _Tail:
    """A piece of Markdown; while it is unfinished, only its last lines that fit on the screen."""

    def __init__(self, text: str, *, is_first: bool, is_whole: bool = False) -> None:
        self.text = text
        self.is_first = is_first
        self.is_whole = is_whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        lines: list[list[Segment]] = []
        for block in _blocks(self.text):
            rows = console.render_lines(_parse(block), options, pad=False)
            filled = [
                number
                for number, row in enumerate(rows)
                if "".join(segment.text for segment in row).strip()
            ]
            if not filled:
                continue
            rows = rows[filled[0] : filled[-1] + 1]
            # Put exactly one empty line between two blocks, whatever spacing each asks for.
            lines += [[], *rows] if lines or not self.is_first else rows
        if not self.is_whole:
            lines = lines[-max(options.size.height - _MARGIN, 1) :]
        for line in lines:
            yield from line
            yield Segment.line()


def _blocks(text: str) -> list[str]:
    """Cut Markdown into its top-level blocks: paragraphs, whole lists, whole tables and so on."""
    lines = text.split("\n")
    starts = [
        token.map[0]
        for token in _parse(text).parsed
        if token.level == 0 and token.map is not None and token.nesting >= 0
    ]
    edges = [0, *starts[1:], len(lines)]
    blocks = ["\n".join(lines[start:end]) for start, end in pairwise(edges)]
    return [*(f"{block}\n" for block in blocks[:-1]), blocks[-1]]


def _parse(text: str) -> Markdown:
    """Read Markdown without HTML: a tag is text like any other, and must not vanish."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    # Use the terminal's own colours for code, and print a link's address beside its text.
    markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    markdown.markup = text
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    markdown.parsed = parser.parse(text)
    return markdown

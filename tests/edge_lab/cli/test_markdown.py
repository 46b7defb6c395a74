"""Answers as Markdown: whatever pieces they come in, the screen ends up the same."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from edge.cli.screen import StreamPrinter
from edge.runtime.stream import GenerationChunk
from edge_lab.cli import markdown
from edge_lab.cli.markdown import MarkdownPrinter
from tests.edge.cli.screen import Screen

ANSWER = """# Primes

There are **two** kinds: `odd` ones and 2. A tag <b>is text</b>, 4 \\* 5 is 20.

1. first

2. second

   ```python
   def f(x):
       return x + 1
   ```

- a
- b

| n | prime |
|---|---|
| 4 | no |

```python
for n in range(30):
    print(n)

print("end")
```

> quoted

See [here](https://example.org). \x1b[31mred

Title
=====
last"""
SHOWN = """\
                      Primes

There are two kinds: odd ones and 2. A tag <b>is
text</b>, 4 * 5 is 20.

 1 first
 2 second

    def f(x):
        return x + 1

 • a
 • b

 n  prime
 ────────
 4  no

 for n in range(30):
     print(n)

 print("end")

▌ quoted

See here (https://example.org). ␛[31mred

                      Title

last
"""


@pytest.fixture(autouse=True)
def _every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_REDRAW_S", 0.0)


def show(pieces: list[str], *, rows: int = 24, note: str = "") -> tuple[Screen, str]:
    written = io.StringIO()
    console = Console(
        file=written,
        force_terminal=True,
        width=50,
        height=rows,
        color_system="standard",
        highlight=False,
        _environ={},
    )
    printer = MarkdownPrinter(console)
    for piece in pieces:
        printer.show(GenerationChunk(text=piece))
    printer.end(note)
    screen = Screen(rows)
    screen.write(written.getvalue())
    assert printer.text == "".join(pieces)
    return screen, written.getvalue()


def test_an_answer_is_shown_as_what_it_means():
    screen, written = show([ANSWER])
    assert screen.text.rstrip() == SHOWN.rstrip()
    assert any(code.startswith("1") for code in screen.colours)  # bold
    assert {"33", "35"} & screen.colours  # the code's own
    assert written.endswith("\n")
    assert written.index("\x1b[?25l") < written.rindex("\x1b[?25h")  # the cursor is back


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(1, len(ANSWER) - 1), max_size=30, unique=True), st.integers(4, 40))
def test_pieces_and_height_change_nothing(cuts: list[int], rows: int):
    edges = [0, *sorted(cuts), len(ANSWER)]
    pieces = [ANSWER[start:end] for start, end in pairwise(edges)]
    screen, _ = show(pieces, rows=rows)
    assert screen.text.rstrip() == SHOWN.rstrip()


def test_single_characters():
    screen, _ = show(list(ANSWER), rows=8)
    assert screen.text.rstrip() == SHOWN.rstrip()


def test_the_last_block_is_seen_before_it_ends():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=50, height=9, _environ={})
    printer = MarkdownPrinter(console)
    code = "".join(f"line {number}\n" for number in range(20))
    for piece in ("before\n\n", "```\n", code):
        printer.show(GenerationChunk(text=piece))
    screen = Screen(9)
    screen.write(written.getvalue())
    assert "before" in screen.text
    assert "line 19" in screen.text
    assert "line 3" not in screen.text  # it has no room, and comes when the block is whole
    printer.end()
    screen = Screen(9)
    screen.write(written.getvalue())
    assert "line 3" in screen.text


def test_the_printer_notes_how_an_answer_ended():
    screen, _ = show(["some *words*"], note="[stopped]")
    assert screen.text.rstrip() == "some words\n[stopped]"


def test_a_redraw_costs_no_more_for_a_long_answer(monkeypatch: pytest.MonkeyPatch):
    """Blocks that are done are not parsed again."""
    parsed: list[int] = []
    parse = markdown._parse

    def counted(text: str) -> Markdown:
        parsed.append(len(text))
        return parse(text)

    monkeypatch.setattr(markdown, "_parse", counted)
    paragraph = "word " * 20 + "\n\n"
    show([paragraph] * 50)
    assert max(parsed) <= 3 * len(paragraph)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("make", [StreamPrinter, MarkdownPrinter])
def test_control_characters_of_an_answer_are_not_executed(
    make: type[StreamPrinter], term: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", term)
    mine, theirs = os.openpty()
    # 8-bit CSI, the clipboard (OSC 52), and a line that is overwritten.
    text = "a\x9b31mb\x1b]52;c;eA==\x07c\rd\te\x7f"
    shown = "a\N{REPLACEMENT CHARACTER}31mb␛]52;c;eA==␇c␍d"
    with os.fdopen(theirs, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        printer = make()
        for piece in text:
            printer.show(GenerationChunk(reasoning=piece))
        printer.show(GenerationChunk(text=f"{text}\n"))
        printer.end()
    data = b""
    with (
        os.fdopen(mine, "rb", buffering=0) as terminal,
        suppress(OSError),
    ):  # at the end of a terminal
        while some := terminal.read(1 << 12):
            data += some
    written = data.decode()
    assert printer.text == f"{text}\n"
    screen = Screen()
    screen.write(written)
    assert screen.text.count(shown) == 2
    assert not {"\x9b", "\x07", "\x7f"} & set(written)
    assert "\x1b]52" not in written
    assert ("\x1b[2m" in written) == (term == "xterm")


def test_markdown_is_only_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert not markdown.shows_markdown()
    printer = markdown.answer_printer()
    printer.show(GenerationChunk(text="**as it is**"))
    printer.end()
    assert capsys.readouterr().out == "**as it is**\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert markdown.shows_markdown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not markdown.shows_markdown()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not markdown.shows_markdown()

"""Markdown pages taken apart: fenced code, inline code, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def blocks(path: Path, language: str) -> list[str]:
    """Fenced code of a language."""
    return [body for name, body in FENCE.findall(path.read_text("utf-8")) if name == language]


def spans(path: Path) -> list[str]:
    """Inline code outside fences."""
    return SPAN.findall(FENCE.sub("", path.read_text("utf-8")))


def rows(text: str) -> Iterator[list[str]]:
    """Cells of every table row that is no header or rule."""
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        is_header = following.startswith("|---")
        if line.startswith("|") and not line.startswith("|---") and not is_header:
            yield [cell.strip() for cell in line.strip("|").split("|")]

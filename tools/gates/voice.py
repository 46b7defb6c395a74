"""Name docstrings that read like a translation; `scripts/check` prints them and goes on.

usage: python3 -m tools voice [DIRECTORY ...]

Three faults are found, since a linter can see them: an entry such as ``name: of what follows``,
whose subject is in another line; a docstring that begins with *What*, *Of* or *Likewise* instead
of a verb or a noun; and a sentence of more than 30 words. The rest is for the reader.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES: tuple[str, ...] = (
    "edge",
    "edge_fleet",
    "edge_lab",
    "edge_make",
    "edge_serve",
    "engines",
    "export",
    "scripts",
)
"""Packages whose docstrings `scripts/check` reads."""
MOST_WORDS = 30
_ENTRY = re.compile(r"^\s*(?:\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*|``[^`]+``(?:, ``[^`]+``)*): +(\w+)")
_FRAGMENT = {"of", "that", "as", "see"}
_OPENING = {"what", "of", "likewise"}
_LIST = re.compile(r"^\s*(?:[-*|]|\d+\.) ")
_COLUMNS = re.compile(r"\S {2,}\S")
_HEADING = re.compile(r"^\s*\w+:$")
_END = re.compile(r"(?<=[.!?:;])[)\"'`]*\s+")


def main() -> None:
    """Print every fault of the directories given, or of all packages."""
    faults = [
        fault
        for directory in sys.argv[1:] or PACKAGES
        for path in sorted(Path(directory).rglob("*.py"))
        for fault in check(path)
    ]
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults of voice")


def check(path: Path) -> Iterator[str]:
    """Yield ``FILE:LINE: FAULT`` for each fault in the docstrings of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            # A text alone in a line is a docstring: of a module, class, function, or attribute.
            case ast.Expr(value=ast.Constant(value=str(text))):
                for line, fault in faults_of(text):
                    yield f"{path}:{node.lineno + line}: {fault}"
            case _:
                pass


def faults_of(docstring: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each fault of a docstring, lines counted from 0."""
    first = re.match(r"\w+", docstring.strip())
    if first is not None and first[0].lower() in _OPENING:
        yield 0, f"begins with {first[0]!r}; begin with a verb or a noun"
    for at, line in enumerate(docstring.splitlines()):
        entry = _ENTRY.match(line)
        if entry is not None and entry[1] in _FRAGMENT:
            yield at, f"an entry begins with {entry[1]!r}; name its subject"
    for at, sentence in sentences(docstring):
        words = sum(bool(re.search(r"\w", word)) for word in sentence.split())
        if words > MOST_WORDS:
            yield at, f"a sentence has {words} words, {MOST_WORDS} at most: {sentence[:60]}..."


def sentences(docstring: str) -> Iterator[tuple[int, str]]:
    """Yield each sentence of a docstring with the line on which its paragraph begins."""
    start, paragraph = 0, list[str]()
    indent = 0
    for at, line in enumerate([*docstring.splitlines(), ""]):
        width = len(line) - len(line.lstrip())
        is_new = (
            not line.strip()
            or bool(_LIST.match(line) or _ENTRY.match(line) or _COLUMNS.search(line))
            or (paragraph and width < indent)
        )
        if is_new or _HEADING.match(line):
            for sentence in _END.split(" ".join(paragraph)):
                yield start, sentence
            paragraph = []
        if line.strip() and not _HEADING.match(line):
            start = start if paragraph else at
            paragraph.append(line.strip())
            indent = width


if __name__ == "__main__":
    main()

"""Count the words of the manual, and name what has grown too long to read.

usage: python3 -m tools words [DIRECTORY]

The manual is the README, the changelog, the pages on contributing and security, and every page
under ``docs/``. Tables and code count, since a reader reads them; addresses of links do not. A
Chinese page (``NAME.zh-CN.md``) is counted apart and may be as long as its English twin.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_WORDS = 45_000
MOST_WORDS_OF_README = 1_400
CHARACTERS_PER_WORD = 1.6
"""Chinese characters that say as much as an English word, as translators reckon."""
PAGES = ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")
_CHINESE = ".zh-CN"
_HAN = re.compile(r"[\u3400-\u9fff]")
_TARGET = re.compile(r"(?<=\])\([^()\s]*\)")
_TAG = re.compile(r"</?[a-z][^<>]*>")


def main() -> None:
    """Print the words of every page, and what is too long."""
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    words = count(root)
    if not words:
        sys.exit(f"{root}: there is no README.md and no docs/; name the root of a checkout")
    for page, number in sorted(words.items(), key=lambda item: (_CHINESE in item[0], -item[1])):
        print(f"{number:7,}  {page}")
    print(f"{total(words):7,}  in English, {MOST_WORDS:,} at most")
    for fault in faults_of(words):
        print(f"words: {fault}")


def count(root: Path) -> dict[str, int]:
    """Return the words of each page of a checkout, by its path from the root."""
    names = [f"{page}{language}.md" for page in PAGES for language in ("", _CHINESE)]
    paths = [path for name in names if (path := root / name).exists()]
    paths += sorted((root / "docs").rglob("*.md"))
    return {
        path.relative_to(root).as_posix(): words_of(path.read_text(encoding="utf-8"))
        for path in paths
    }


def words_of(text: str) -> int:
    """Return how many words a reader meets in Markdown, in English or Chinese."""
    text = _TARGET.sub("", text)
    text = _TAG.sub(" ", text)
    characters = len(_HAN.findall(text))
    others = sum(bool(re.search(r"\w", word)) for word in _HAN.sub(" ", text).split())
    return others + round(characters / CHARACTERS_PER_WORD)


def total(words: dict[str, int]) -> int:
    """Return the words of all English pages together."""
    return sum(number for page, number in words.items() if _CHINESE not in page)


def faults_of(words: dict[str, int]) -> Iterator[str]:
    """Yield a line for each bound that is missed: the sum, the README, and each Chinese page."""
    if (together := total(words)) > MOST_WORDS:
        yield f"the manual has {together:,} words, {MOST_WORDS:,} at most; shorten long pages"
    if (readme := words.get("README.md", 0)) > MOST_WORDS_OF_README:
        yield f"README.md has {readme:,} words, {MOST_WORDS_OF_README:,} at most; shorten it"
    for page, number in words.items():
        twin = page.replace(_CHINESE, "")
        if twin == page:
            continue
        if twin not in words:
            yield f"{page} has no English twin {twin}; add it, or remove the page"
        elif number > words[twin]:
            yield f"{page} has {number:,} words, and {twin} has {words[twin]:,}; shorten it"


if __name__ == "__main__":
    main()

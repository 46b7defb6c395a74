"""The texts of `lab quality`: calibration saw none of them, and of five not even the kind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from edge.bundle.manifest import read_manifest
from edge_make.read_tokenizer import read_tokenizer

from .score import FORMER_TEXTS, TEXTS, TOKENS

CALIBRATION = Path("export/sources/calibration_text")
FOLDER = Path("lab/quality/texts")
ALL = {**TEXTS, **FORMER_TEXTS}


class Kind(NamedTuple):
    """What a kind of text is known by, and pieces of it by other hands than the text's."""

    mark: str
    marks: int
    examples: tuple[str, ...]


# Calibration has no piece of these. Whoever adds one takes the text out of the ten.
UNKNOWN_KINDS = {
    "play": Kind(
        r"^[*_]*[A-Z][A-Z'\u2019 -]{2,24}(?:\([^)\n]*\) ?)?[*_]*[.:][*_]* [*_]*[\w(\"\u201c]"
        r"|^[*_]*[A-Z]\w+(?: [A-Z]\w+)?[*_]*[.:][*_]* [*_]*\([a-z]|^ *(?:INT|EXT)\. [A-Z]",
        2,
        (
            "SERVANT. My lord, the horses wait.\nDUKE. Let them. (He sits.)\nSERVANT: They freeze.",
            "**Anna:** *(laughing)* Not again.\n**Old Tom:** (from the cellar) Yes, again.",
            "EXT. HARBOUR - DAWN\n\nNobody.\n\nINT. CABIN - LATER\n\n        IDA\n    Gone.\n",
        ),
    ),
    "assembler": Kind(
        r"^[^#;/\n]{0,48}\b(?:mov|lea|add|sub|xor|cmp|test|imul|ldr|ldp|ldrb|str|stp|strb)[.\w]{0,6}"
        r"[ \t]+[$%#\w.()\[\]{}-]+, *\S",
        2,
        (
            "f:\tpush\trbp\n\tmov\trbp, rsp\n\tlea eax, [rdi+rdi*2]\n\tpop\trbp\n\tret\n",
            "  movl $1, %eax\n  addq %rcx, %rdx\n  syscall\n",
            "    ldr w1, [x0, #4]\n    add w0, w1, w2\n    ret\n",
        ),
    ),
    "chess": Kind(
        r"\b\d+\.(?:\.\.)? ?(?:O-O|[KQRBN]?[a-h1-8]?x?[a-h][1-8])\b",
        3,
        (
            "1.d4 d5 2.c4 e6 3.Nc3 Nf6 4.Bg5 Nbd7 5.cxd5 exd5 6.Nxd5? Nxd5! wins a piece.",
            "Black should answer 12...Qd7 13. Rfe1 Nxe4, since 14. Bxh7+ fails.",
        ),
    ),
    "ship-log": Kind(
        r"(?i:\b(?:lat|long)(?:itude|\.)? \d|\bbar(?:ometer|\.) \d)"
        r"|\b(?i:wind|course|airs|breeze|gale)\b[^.\n\d]{0,12}\b[NSEW](?:\.?[NSEW]){0,2}\b",
        2,
        (
            "June 4th. Light airs from NNE. Latitude 12 S. Two sail in sight; tacked twice.",
            "0400 Wind SW 5, course NW. 0800 Bar. 1009, falling. Reefed main. Log 214.",
        ),
    ),
    "dictionary": Kind(
        r"^[^\W\d_][\w'() \u00b2\u00b3\u00b9\u2074-]{0,30}(?: [/\[][^/\n]{2,30}[/\]])?,? "
        r"(?:n|v|adj|adv|prep|pron)\. "
        r"|/[^/\n]{0,20}[\u02c8\u02d0\u0254\u0259\u025b\u026a\u028a\u0283\u00e6][^/\n]{0,20}/",
        1,
        (
            "quay n. a landing place for ships.\nqueasy adj. feeling sick; uneasy.",
            "**quell** (verb) /kw\u025bl/: to put an end to a revolt, usually by force.",
        ),
    ),
}


def is_of(kind: Kind, text: str) -> bool:
    return len(re.findall(kind.mark, text, re.MULTILINE)) >= kind.marks


def pieces(text: str, size: int = 600) -> Iterable[str]:
    """Whole lines, as many as make a piece as short as many of the calibration text's."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            yield piece
            piece = ""


def runs(text: str, words_in_a_row: int = 8) -> set[tuple[str, ...]]:
    """Every eight words in a row, without case and punctuation; a Chinese character is a word."""
    words = re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text.lower())
    return {tuple(words[at : at + words_in_a_row]) for at in range(len(words) - words_in_a_row + 1)}


def strings(value: object) -> Iterable[str]:
    """Every text inside of a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module")
def calibration_strings() -> list[str]:
    files = sorted(CALIBRATION.glob("*.jsonl"))
    assert [file.name for file in files] == ["mixed.jsonl", "problems.jsonl"]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return [text for line in lines for text in strings(json.loads(line))]


@pytest.fixture(scope="module")
def calibration(calibration_strings: list[str]) -> set[tuple[str, ...]]:
    found = {run for text in calibration_strings for run in runs(text)}
    assert len(found) > 5000
    return found


def test_every_text_is_read_and_its_origin_told():
    files = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert {path.name for path in ALL.values()} == files
    assert [*TEXTS][5:] == [*UNKNOWN_KINDS]
    assert len(TEXTS) == 10
    told = re.findall(
        r"^\| `(\S+)` \|.+\|.+\|.+\|$", (FOLDER / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(told) == sorted(files)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_calibration_has_seen_nothing_of_it(path: Path, calibration: set[tuple[str, ...]]):
    found = runs(path.read_text("utf-8"))
    assert len(found) > 300
    assert calibration.isdisjoint(found)


@pytest.mark.parametrize("name", UNKNOWN_KINDS)
def test_calibration_has_no_piece_of_its_kind(name: str, calibration_strings: list[str]):
    kind = UNKNOWN_KINDS[name]
    assert not [text for text in calibration_strings if is_of(kind, text)]


@pytest.mark.parametrize("name", UNKNOWN_KINDS)
def test_a_short_piece_of_its_kind_would_be_seen(name: str):
    kind = UNKNOWN_KINDS[name]
    parts = list(pieces(TEXTS[name].read_text("utf-8")))
    assert len(parts) > 2
    assert not [part for part in parts if not is_of(kind, part)]
    assert not [example for example in kind.examples if not is_of(kind, example)]


@pytest.mark.parametrize("name", UNKNOWN_KINDS)
def test_no_other_text_is_of_its_kind(name: str):
    kind = UNKNOWN_KINDS[name]
    others = [path for each, path in ALL.items() if each != name]
    assert not [path.name for path in others if is_of(kind, path.read_text("utf-8"))]
    foreign = [
        each for other, its in UNKNOWN_KINDS.items() if other != name for each in its.examples
    ]
    assert not [example for example in foreign if is_of(kind, example)]


def test_a_sentence_of_the_calibration_text_would_be_seen(calibration: set[tuple[str, ...]]):
    line = (CALIBRATION / "mixed.jsonl").read_text("utf-8").splitlines()[0]
    for text in strings(json.loads(line)):
        if len(text) > 60:
            assert not calibration.isdisjoint(runs(f"Before it, {text.upper()}"))


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_a_text_has_as_many_tokens_as_are_read(path: Path, smollm2_bundle: Path):
    tokens = read_manifest(smollm2_bundle).tokens
    tokenizer = read_tokenizer(smollm2_bundle / "tokenizer.json", tokens)
    assert len(tokenizer.encode(path.read_text("utf-8"))) >= TOKENS

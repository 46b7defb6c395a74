"""The texts of `scripts/quality`: calibration has seen nothing of them, and each is long enough."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from edge.bundle.manifest import read_manifest
from edge.text.tokenizer import Tokenizer
from scripts.quality_score import TEXTS, TOKENS

CALIBRATION = Path("export/sources/calibration_text")
FOLDER = Path("scripts/quality_texts")


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
def calibration() -> set[tuple[str, ...]]:
    files = sorted(CALIBRATION.glob("*.jsonl"))
    assert [file.name for file in files] == ["mixed.jsonl", "problems.jsonl"]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    found = {run for line in lines for text in strings(json.loads(line)) for run in runs(text)}
    assert len(found) > 5000
    return found


def test_every_text_is_read_and_its_origin_told():
    files = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert {path.name for path in TEXTS.values()} == files
    assert len(TEXTS) == 10
    told = re.findall(
        r"^\| `(\S+)` \|.+\|.+\|.+\|$", (FOLDER / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(told) == sorted(files)


@pytest.mark.parametrize("path", TEXTS.values(), ids=TEXTS)
def test_calibration_has_seen_nothing_of_it(path: Path, calibration: set[tuple[str, ...]]):
    found = runs(path.read_text("utf-8"))
    assert len(found) > 300
    assert calibration.isdisjoint(found)


def test_a_sentence_of_the_calibration_text_would_be_seen(calibration: set[tuple[str, ...]]):
    line = (CALIBRATION / "mixed.jsonl").read_text("utf-8").splitlines()[0]
    for text in strings(json.loads(line)):
        if len(text) > 60:
            assert not calibration.isdisjoint(runs(f"Before it, {text.upper()}"))


@pytest.mark.parametrize("path", TEXTS.values(), ids=TEXTS)
def test_it_has_as_many_tokens_as_are_read(path: Path, smollm2_bundle: Path):
    tokens = read_manifest(smollm2_bundle).tokens
    tokenizer = Tokenizer.from_file(smollm2_bundle / "tokenizer.json", tokens)
    assert len(tokenizer.encode(path.read_text("utf-8"))) >= TOKENS

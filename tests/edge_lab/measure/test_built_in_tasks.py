"""The questions that come with the project: readable, no doubles, not to be won by a place."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from edge_lab.measure.defaults import EVAL_TEXT
from edge_lab.measure.tasks import ChoiceItem, NumberItem, read_task
from export.sources.documents import read_calibration_text
from tools.goldens.tasks import make_problems

TASKS = EVAL_TEXT.parent / "tasks"


@pytest.mark.parametrize(("name", "count"), [("choices", 150), ("chinese", 60)])
def test_choices_are_fair(name: str, count: int):
    items = [item for _, item in read_task(TASKS / f"{name}.jsonl")]
    assert len(items) == len({item.question for item in items}) == count
    places: Counter[str] = Counter()
    for item in items:
        assert isinstance(item, ChoiceItem)
        assert len(set(item.choices)) == 4
        places[item.expected] += 1
    # Who always says the same letter is right by chance only.
    assert set(places) == set("ABCD")
    assert max(places.values()) - min(places.values()) <= 1


def test_arithmetic_is_what_its_script_makes():
    items = [item for _, item in read_task(TASKS / "arithmetic.jsonl")]
    made = [(each["question"], each["answer"]) for each in make_problems()]
    found = [(item.question, item.answer) for item in items if isinstance(item, NumberItem)]
    assert found == made
    assert len({question for question, _ in made}) == 150


def test_arithmetic_by_hand():
    """The first of each kind, worked out with pencil and paper."""
    items = [item for _, item in read_task(TASKS / "arithmetic.jsonl", limit=15)]
    expected = [92, 525, 192, 11, 30, 2150, 160, 3, 765, 72, 100, 1152, 46, 48, 16]
    assert all(isinstance(item, NumberItem) for item in items)
    assert [item.expected for item in items] == [str(answer) for answer in expected]


def strings(value: object) -> Iterator[str]:
    """Every text inside of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def runs(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Every twelve words in a row; a Chinese character is a word."""
    found = set()
    for text in texts:
        words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text)
        found |= {tuple(words[at : at + 12]) for at in range(len(words) - 11)}
    return found


def lines_of(path: Path) -> Iterator[str]:
    for line in path.read_text("utf-8").splitlines():
        yield from strings(json.loads(line))


HELD_OUT = sorted(EVAL_TEXT.parent.rglob("*.*"))
CALIBRATION = Path("export/sources/calibration_text")


def test_the_held_out_files_are_all_there():
    texts = {"chinese.txt", "code.txt", "eval_text.txt", "golden.jsonl", "prose.txt"}
    tasks = {"arithmetic.jsonl", "chinese.jsonl", "choices.jsonl", "programs.jsonl"}
    assert texts | tasks <= {path.name for path in HELD_OUT}
    assert len(HELD_OUT) >= len(texts) + len(tasks)


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.stem)
def test_calibration_has_seen_nothing_of_what_is_held_out(path: Path):
    texts = sorted(CALIBRATION.glob("*.jsonl"))
    assert [text.name for text in texts] == ["mixed.jsonl", "problems.jsonl"]
    calibration = runs(line for text in texts for line in lines_of(text))
    assert len(calibration) > 5000
    held_out = runs(lines_of(path) if path.suffix == ".jsonl" else [path.read_text("utf-8")])
    assert held_out
    assert calibration.isdisjoint(held_out)


def test_the_mixed_text_is_the_built_in_one_and_much_else():
    built_in = (CALIBRATION / "problems.jsonl").read_text("utf-8")
    mixed = (CALIBRATION / "mixed.jsonl").read_text("utf-8")
    assert mixed.startswith(built_in)
    added = mixed[len(built_in) :].splitlines()
    han = [line for line in added if len(re.findall(r"[\u3400-\u9fff]", line)) > 30]
    chinese = [line for line in han if not re.search(r"[\u3040-\u30ff]", line)]
    assert (len(chinese), len(added)) == (34, 84)
    for mark in ("def ", "#include", "package ", "export async function", "#!/bin/sh", "fn "):
        assert any(mark in line for line in added)
    for mark in ("Mietvertrag", "devolver", "Поезд", "할머니", "の", "الطبيب"):  # languages
        assert any(mark in line for line in added)
    for mark in ("kernel:", "CREATE TABLE", "diff --git", "|---|", "MUST NOT", "NT-proBNP", "<td>"):
        assert any(mark in line for line in added)
    assert len(read_calibration_text(CALIBRATION / "mixed.jsonl").documents) == 140

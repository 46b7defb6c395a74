"""The questions that come with the project: readable, no doubles, not to be won by a place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from edge.measure.evaluate import EVAL_TEXT
from edge.measure.tasks import ChoiceItem, NumberItem, read_task
from scripts.make_tasks import make_problems

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


def test_no_question_is_in_the_calibration_text():
    lines = Path("export/sources/calibration_text/problems.jsonl").read_text("utf-8").splitlines()
    calibration = [json.dumps(json.loads(line), ensure_ascii=False) for line in lines]
    assert len(calibration) > 20
    for path in TASKS.glob("*.jsonl"):
        for _, item in read_task(path):
            question = json.dumps(item.question, ensure_ascii=False)[1:-1]
            assert not any(question in text for text in calibration)

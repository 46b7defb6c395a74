"""The pool of answers: its problems, its files, and what it keeps of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import LLM
from tests.conftest import Bundles
from tools.goldens.tasks import KINDS, further_problems, make_problems

from . import answer_pool

WORDS = "the world is what the world is, and that is what the others said to an inner one."


def test_further_problems_are_new_and_of_each_kind_in_turn():
    further = further_problems(600)
    questions = [each["question"] for each in further]
    assert len(set(questions)) == 600
    assert not set(questions) & {each["question"] for each in make_problems()}
    assert further_problems(60) == further[:60], "a problem's number depends on how many there are"
    starts = [text.split("{")[0] for text, *_ in KINDS]
    for at, question in enumerate(questions[: len(KINDS)]):
        assert question.startswith(starts[at])
    assert all(each["answer"].removeprefix("#### ").isdigit() for each in further)


@pytest.mark.parametrize(("size", "count"), [("1.5b", 150), ("0.5b", 600)])
def test_problems_have_their_number_in_any_order(size: str, count: int):
    numbered = answer_pool.problems(size)
    assert numbered == answer_pool.problems(size)
    assert sorted(number for number, _ in numbered) == list(range(count))
    assert [number for number, _ in numbered] != list(range(count))
    plain = make_problems() if size == "1.5b" else further_problems(count)
    assert all(plain[number] == problem for number, problem in numbered)


def test_a_line_that_was_cut_off_is_answered_again(tmp_path: Path):
    file = tmp_path / "0.5b.jsonl"
    file.write_text('{"number": 3}\n{"number": 4}\n{"num')
    assert [line["number"] for line in answer_pool.read_lines(file)] == [3, 4]
    assert file.read_text() == '{"number": 3}\n{"number": 4}\n'
    assert list(answer_pool.read_lines(tmp_path / "none.jsonl")) == []


def test_the_weakest_stretch_is_found_wherever_it_is():
    logprobs = np.full(200, -0.1, np.float32)
    logprobs[100:164] = -2.0
    assert answer_pool.weakest(logprobs) == pytest.approx(-2.0)
    assert answer_pool.weakest(logprobs[:10]) == pytest.approx(-0.1)
    assert answer_pool.weakest(logprobs[:0]) == 0.0


@pytest.fixture
def llm(tiny_bundles: Bundles) -> Any:
    with LLM(tiny_bundles("qwen2"), num_slots=4, kv_capacity=256, num_threads=1) as opened:
        yield opened


def test_boundaries_are_paragraphs_apart_from_each_other_and_from_the_end(llm: LLM):
    encode = llm.tokenizer.encode
    paragraph = encode(f"{WORDS}\n\n", goes_on=True)
    assert len(paragraph) > 20
    end = encode("so it is", goes_on=True)
    ids = [*paragraph, *encode("no.\n\n", goes_on=True), *paragraph, *end]
    (first, *rest) = answer_pool.boundaries(llm, ids)
    assert first == len(paragraph)
    assert rest == ([len(ids) - len(end)] if len(end) > answer_pool.TRIAL_TOKENS else [])


def test_answers_are_drawn_by_fixed_seeds_and_packed(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answer_pool, "LIMIT", 24)
    monkeypatch.setattr(answer_pool, "ANSWERS", 3)
    problem = {"question": "How many is 2 and 2?", "answer": "#### 4"}
    one, again = (answer_pool.answer(llm, 7, problem) for _ in range(2))
    for each, other in zip(one["answers"], again["answers"], strict=True):
        assert each["ids"] == other["ids"]  # probabilities end in other digits beside other rows
    ids = [answer_pool.unpacked(each["ids"], np.uint32).tolist() for each in one["answers"]]
    assert len({tuple(each) for each in ids}) == 3, "the seeds are the same"
    assert [len(each) for each in ids] == [each["tokens"] for each in one["answers"]]
    logprobs = answer_pool.unpacked(one["greedy"]["logprobs"], np.float16)

    output, raw = tmp_path / "pool.jsonl.xz", tmp_path / "0.5b.jsonl"
    raw.write_text(json.dumps(one) + "\n")
    answer_pool.pack(tmp_path, output)
    raw.write_text(raw.read_text() + json.dumps({**one, "number": 8}) + "\n")
    answer_pool.pack(tmp_path, output)
    packed = answer_pool.read_packed(output)
    assert [(each["size"], each["number"]) for each in packed] == [("0.5b", 7), ("0.5b", 8)]
    greedy = packed[0]["greedy"]
    assert greedy["logprob"] == pytest.approx(logprobs.astype(np.float32).mean(), abs=1e-3)
    assert not {"ids", "logprobs", "margins"} & greedy.keys()

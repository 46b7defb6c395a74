from __future__ import annotations

import codecs
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import ConfigError
from edge.runtime.generation import GenerationStats
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.stream import GenerationResult
from edge.votes.numbers import find_number, parse_number
from edge_lab.measure.programs import ProgramItem
from edge_lab.measure.tasks import (
    ChoiceItem,
    ItemResult,
    NumberItem,
    answer_item,
    choice_scores,
    compare_task,
    loss_interval,
    mcnemar_exact,
    read_task,
    summarize_task,
    wilson_interval,
)
from edge_lab.measure.watch import BundleAnswerer, GoldenItem, run_golden

CHOICE = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "subject": "sums"}
NUMBER = {"question": "2 + 2?", "answer": "It is 2 + 2 = 4.\n#### 4"}
PROGRAM = {"question": "def four():\n    '''2 + 2.'''", "tests": "assert four() == 4"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_layouts(tmp_path: Path):
    (first, item), (last, _) = read_task(
        write(tmp_path / "t", CHOICE, "", {**CHOICE, "answer": "b"})
    )
    assert (first, last, item.expected) == (1, 3, "B")
    ((_, number),) = read_task(write(tmp_path / "t", NUMBER, NUMBER), limit=1)
    assert number.expected == "4"
    ((_, program),) = read_task(write(tmp_path / "t", PROGRAM))
    assert program == ProgramItem(PROGRAM["question"], PROGRAM["tests"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2"),
        ([1], "line 2"),
        (NUMBER, "another layout"),
        ({**CHOICE, "answer": 2}, "none of 2 choices"),
        ({**CHOICE, "answer": -1}, "none of 2 choices"),
        ({**CHOICE, "choices": ["3"], "answer": 0}, "2 to 26"),
        ({"choices": ["a", "b"], "answer": 0}, "question"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row, message):
    with pytest.raises(ConfigError, match=message) as info:
        read_task(write(tmp_path / "t", CHOICE, row))
    assert "line 2" in str(info.value)


def test_a_byte_order_mark_is_no_part_of_a_question(tmp_path: Path):
    plain, marked = write(tmp_path / "t", CHOICE, CHOICE), tmp_path / "marked"
    marked.write_bytes(codecs.BOM_UTF8 + plain.read_bytes())
    assert read_task(marked) == read_task(plain)


def test_other_bad_files(tmp_path: Path):
    with pytest.raises(ConfigError, match="no question"):
        read_task(write(tmp_path / "t", ""))
    with pytest.raises(ConfigError, match="end in a number"):
        read_task(write(tmp_path / "t", {**NUMBER, "answer": "four"}))
    for change, message in (
        ({"question": "four"}, "begins with 'def '"),
        ({"tests": " "}, "any program would pass"),
        ({"tests": "assert four( == 4"}, "no Python"),
        ({"tests": 4}, "tests"),
    ):
        with pytest.raises(ConfigError, match=f"line 1: .*{message}"):
            read_task(write(tmp_path / "t", {**PROGRAM, **change}))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", "2469/2"), ("$3", "3"), ("-7 apples", "-7"), ("50\\%", "50"), (".5", "1/2"),
        ("\\frac{1}{2}", "1/2"), ("-\\dfrac{3}{4}", "-3/4"), ("1/0", None), ("none", None),
        ("1{,}234", "1234"), ("1,\\!234", "1234"), ("\\frac{1,000}{2}", "500"),
        ("\\frac{1}{2.5}", "2/5"), ("\\frac{1}{0}", None), (f"\\frac{{{'1' * 5000}}}{{2}}", None),
        ("1\\frac{1}{2}", "3/2"), ("-2 \\tfrac{1}{4}", "-9/4"), ("- 5", "-5"), ("\u22125", "-5"),
        ("x = - 5", "-5"), ("20 - 5", "20"), ("3 \\times 10^4", "30000"), ("10^{-2}", "1/100"),
        ("1.5\\cdot10^{3}", "1500"), ("110^2", "110"), ("10^5000", "10"),
        ("x_1 = 4", "4"), ("S_{10} = 55", "55"), ("f(2)=7", "7"), ("7 - 2 = 5", "5"),
        ("5 \\times 4 = 20", "20"), ("x \\approx 3.5", "7/2"), ("2 + 5 = \\(7\\)", "7"),
        ("4 = x", "4"),
        ("18 (since 20 - 2 = 18, 9 = 9)", "18"), ("18. Check: 18 + 2 = 20", "18"),
        ("x = 5, y = 6", "5"), ("\\frac12", "1/2"), ("-\\tfrac34", "-3/4"), ("3\\frac12", "7/2"),
        ("\\frac{1}2", "1/2"), ("\\frac1{20}", "1/20"), ("\\frac 1 2", "1/2"),
        ("10\\,000", "10000"), ("1\\ 234\\,567.5", "2469135/2"), ("3\u202f000", "3000"),
    ],
)  # fmt: skip
def test_numbers(text, value):
    found = parse_number(text)
    assert (None if found is None else str(found)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 3, then \\boxed{42}. Check: 43", "42"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("first \\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{x}", None),
        ("\\boxed{4} is within \\boxed{}.", "4"),
        ("It is 5, not \\boxed{ }", "5"),
        ("#### 5 + 3 = 8\nbye 9", "5 + 3 = 8"),
        ("The answer is 10\\,000.", "10000"),
        ("2 + 3\n#### 5\nbye 9", "5"),
        ("#### 42", "42"),
        ("#### **$ -42**\n7", "**$ -42**"),
        ("#### \\frac{1}{2}, 3", "\\frac{1}{2}, 3"),
        ("#### Step 1: add\n2+3=5\n#### Step 2: multiply\nThe answer is **30**.", "30"),
        ("#### 1. Add\n2+3=5\n#### 2) Multiply\nThe answer is **30**.", "30"),
        ("The total is 42.\n\n#### Final answer\n**42**", "42"),
        ("#### 42\n\n#### Check\n6 * 7", "42"),
        ("#### **Answer:** 12\nCheck: 12-7 = 5", "**Answer:** 12"),
        ("#### The answer is 18 dollars.\n(9 eggs x $2)", "The answer is 18 dollars."),
        ("#### Total: US$18\n\nShe worked 3 days.", "Total: US$18"),
        ("#### = \u00a318\nas 9*2", "= \u00a318"),
        ("#### \\(18\\)\n9*2", "\\(18\\)"),
        ("#### 18. Thus 3 remain", "18. Thus 3 remain"),
        ("It is 7 or 8.", "8"),
        ("The answer is 20-5", "5"),
        ("It is -5, or \u22126.", "-6"),
        ("- 7 apples", "7"),  # an item of a list
        ("f(2)-3", "3"),
        ("1{,}234 and 1\\frac{1}{2}", "3/2"),
        ("The roots are 1, \\frac{3}{4}", "3/4"),
        ("In step 2, \\frac{1}{2} is left", "1/2"),
        ("x=1\n\\frac{3}{4}", "3/4"),
        ("no idea", None),
    ],
)
def test_the_final_number(text, value):
    assert find_number(text) == value


def test_wilson_by_hand():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(5, 0) == 2 / 32
    assert mcnemar_exact(1, 5) == 2 * 7 / 64


def test_the_interval_of_a_loss_by_hand():
    # 150 lost and 86 won of 1600: 64 / 1602, and 1.96 * sqrt(237 - 64**2 / 1602) / 1602 = 0.01873.
    assert loss_interval(150, 86, 1600) == pytest.approx((0.02122, 0.05868), abs=5e-5)
    low, high = loss_interval(0, 0, 60)
    assert low == -high < 0  # nothing flipped, and yet nothing is proven
    assert loss_interval(1, 0, 1)[1] == 1
    with pytest.raises(ValueError, match="no counts"):
        loss_interval(3, 2, 4)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_symmetric(lost, won):
    p = mcnemar_exact(lost, won)
    assert p == mcnemar_exact(won, lost)
    assert 0 <= p <= 1


def test_paired_comparison():
    def results(*answers: str) -> list[ItemResult]:
        return [ItemResult(i, "A", a, a == "A") for i, a in enumerate(answers, start=1)]

    ours, theirs = results("A", "B", "B", "A"), results("A", "A", "A", "B")
    assert summarize_task(ours)["accuracy"] == 0.5
    found = compare_task(ours, theirs)
    assert (found["lost"], found["won"], found["accuracy_loss"]) == (2, 1, 0.25)
    assert [flip["line"] for flip in found["flips"]] == [2, 3, 4]  # type: ignore[attr-defined]
    assert found["accuracy_loss_interval"] == loss_interval(2, 1, 4)
    assert summarize_task(ours)["wrong"] == [2, 3]


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_choices_score_like_the_whole_text(tiny_bundles, scoring):
    item = ChoiceItem("what is the world", ("hello", "the world and the sea", "and"), 0)
    with LLM(tiny_bundles("qwen2", "portable")) as llm:
        scores = choice_scores(llm, item, scoring)
        prompt = "Question: what is the world\n"
        if scoring == "letter":
            prompt += "A. hello\nB. the world and the sea\nC. and\n"
        texts = ["A", "B", "C"] if scoring == "letter" else list(item.choices)
        rows = [llm.encode(f"{prompt}Answer: {text}") for text in texts]
        shared = 0
        while len({row[shared] for row in rows}) == 1:
            shared += 1
        whole = [
            llm.score(row)[shared - 1 :].sum() / (1 if scoring == "letter" else len(text))
            for row, text in zip(rows, texts, strict=True)
        ]
    assert scores == pytest.approx(whole, abs=1e-3)


def test_generation_ends_and_counts(tiny_bundles, tmp_path: Path):
    items = read_task(write(tmp_path / "t", NUMBER, NUMBER))
    with LLM(tiny_bundles("qwen2", "portable")) as llm:
        params = SamplingParams(temperature=0, max_tokens=3)
        results = [answer_item(llm, *item, params=params) for item in items]
    assert [result.line for result in results] == [1, 2]
    assert results[0].answer == results[1].answer
    assert summarize_task(results)["cut"] == 2


class BaseModel:
    """An `LLM` without a chat template, which writes the next question after its answer."""

    template = None

    def generate(self, prompt: str, params: SamplingParams) -> GenerationResult:
        assert prompt.startswith("Question: ")
        text = " 18.\n\nQuestion: A man has 3 dogs\nAnswer: 99"
        for stop in params.stop:
            text = text.partition(stop)[0]
        return GenerationResult(text, "", (), "stop", GenerationStats())


def test_a_base_model_is_not_judged_by_the_question_that_it_asks_next():
    llm: Any = BaseModel()
    item = NumberItem("How many?", "#### 18")
    for params in (None, SamplingParams(max_tokens=9, stop=("!",))):
        assert answer_item(llm, 1, item, params=params) == ItemResult(1, "18", "18", True)
    golden = [GoldenItem("a", "How many?", answer="18")]
    assert run_golden(BundleAnswerer(llm), golden)[0].correct


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_programs_are_written_run_and_judged(tiny_bundles, monkeypatch, kind):
    """A tiny model writes no Python, so what it writes is replaced; all else is as it is."""
    item = ProgramItem(PROGRAM["question"], PROGRAM["tests"])
    with LLM(tiny_bundles(kind, "portable")) as llm:
        plain = answer_item(llm, 1, item, params=SamplingParams(temperature=0, max_tokens=8))
        assert (plain.correct, plain.cut) == (False, True)
        asked: list[Any] = []
        result = plain
        for text in ("    return 4", "    return 5"):

            def generate(prompt, params, text=text):
                asked.append(prompt)
                fenced = f"```python\n{text}\n```"
                answer = text if isinstance(prompt, str) else fenced
                return SimpleNamespace(text=answer, finish_reason="stop")

            monkeypatch.setattr(llm, "generate", generate)
            result = answer_item(llm, 1, item)
            assert (result.correct, result.cut) == (text == "    return 4", False)
        assert result.answer is not None
        assert "AssertionError" in result.answer
        shown = asked[0] if isinstance(asked[0], str) else asked[0][0]["content"]
        assert item.question in shown

r"""What counts as a sample's answer."""

import time

import pytest

from edge.errors import RequestError
from edge.votes.answers import answer_finder


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("number", r"So 6 * 7 = 42.\n\boxed{42}", "42"),
        ("number", r"\boxed{\frac{1}{2}}", "0.5"),
        ("number", r"\boxed{0.50}", "0.5"),
        ("number", r"\boxed{1/3}", "1/3"),
        ("number", "It is $1,200.", "1200"),
        ("number", "That makes 1.2e", "1.2"),
        ("number", "I cannot tell.", None),
        ("number", r"\boxed{-40}", "-40"),
        ("choice", "The answer is (B).", "B"),
        ("choice", r"\boxed{C}", "C"),
        ("choice", "A dog is an animal, so **D**", "D"),
        ("choice", "I think that a cat is meant.", None),
        ("choice", "Answer: A, not B", "A"),
        ("choice", "所以答案是 C。", "C"),
        ("choice", "(B) it is", "B"),
        ("boxed", r"\boxed{x + 1} then \boxed{x  +  2}", "x + 2"),
        ("boxed", r"\boxed{\frac{a}{b}}", r"\frac{a}{b}"),
        ("boxed", r"x = 2, \boxed{}", None),
        ("json:city", '{"city": "Bern"} or {"city": " Paris "}', "Paris"),
        ("json:n", 'Sure: {"n": [2, {"b": 1, "a": 0}]}', '[2, {"a": 0, "b": 1}]'),
        ("json:n", '{"n": null} {"m": 1} {oops', None),
        ("regex:TOTAL=(\\d+)", "TOTAL=4 TOTAL=17", "17"),
        ("regex:[a-z]+!", "go! stop!", "stop!"),
        ("regex:\\d+", "none", None),
    ],
)
def test_an_answer_is_found(rule: str, text: str, answer: str | None):
    assert answer_finder(rule)(text) == answer


@pytest.mark.parametrize("same", ["0.5", r"\frac{1}{2}", "1/2", ".50"])
def test_equal_numbers_are_equal_texts(same: str):
    assert answer_finder("number")(rf"\boxed{{{same}}}") == "0.5"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("regex:(", "is wrong: missing"),
        ("regex:" + "a" * 1025, "more than 1024 characters"),
        ("regex:", "answers must be"),
        ("json:", "answers must be"),
        ("number:x", "answers must be"),
    ],
)
def test_a_wrong_rule_is_refused(rule: str, message: str):
    with pytest.raises(RequestError, match=message):
        answer_finder(rule)


def test_a_pattern_that_takes_exponential_time_is_ended():
    find = answer_finder("regex:(a+)+$")
    began = time.monotonic()
    with pytest.raises(RequestError, match="takes more than 1 s of CPU time"):
        find("a" * 40 + "!")
    assert time.monotonic() - began < 60
    assert find("aa") == "aa"  # another child takes its place

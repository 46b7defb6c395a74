from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.text.reasoning import ReasoningSplitter


def split(chunks: list[str], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    pairs = [*map(splitter.push, chunks), splitter.flush()]
    return "".join(reasoning for reasoning, _ in pairs), "".join(answer for _, answer in pairs)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("hm\n</think>\n\n42", True, "hm", "42"),
        ("\n\nhm\n\nso</think>42\n", True, "hm\n\nso", "42\n"),
        ("<think>\nhm\n</think>\n\n42", True, "hm", "42"),
        ("<think>\nhm\n</think>\n\n42", False, "hm", "42"),
        (" \n<think>hm</think>42", False, "hm", "42"),
        ("<think>\n\n</think>\n\n42", False, "", "42"),
        ("</think>\n\n42", True, "", "42"),
        ("42", False, "", "42"),
        ("\n 42 <think> </think>", False, "", "\n 42 <think> </think>"),
        ("</think>42", False, "", "</think>42"),
        ("hm</think>4</think><think>2", True, "hm", "4</think><think>2"),
        ("hm\n", True, "hm\n", ""),
        ("hm\n</thin", True, "hm\n</thin", ""),
        ("<thin", False, "", "<thin"),
        ("<thin", True, "<thin", ""),
        (" \n", False, "", " \n"),
        ("", True, "", ""),
    ],
)
def test_splitting(text, opened, reasoning, answer):
    assert split([text], opened) == (reasoning, answer)


tagged = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", "\n\n", " ", "a", "<", "</", "think>", "<th"]),
    max_size=9,
)


@settings(deadline=None, max_examples=400)
@given(tagged.map("".join), st.booleans(), st.data())
def test_splitting_does_not_depend_on_chunks(text, opened, data):
    expected = split([text], opened)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(chunks, opened) == expected
    assert split(list(text), opened) == expected
    # Nothing but tags and white space is ever lost.
    joined = "".join(expected)
    for tag in ("<think>", "</think>"):
        text, joined = text.replace(tag, ""), joined.replace(tag, "")
    if "<" not in text:
        assert re.sub(r"\s", "", joined) == re.sub(r"\s", "", text)


def test_splitting_is_prompt():
    splitter = ReasoningSplitter(opened=True)
    assert splitter.push("hm") == ("hm", "")
    assert splitter.push(" <") == (" ", "")
    assert splitter.push("b>\n") == ("<b>", "")
    assert splitter.push("so") == ("\nso", "")
    assert splitter.push("\n</think>\n") == ("", "")
    assert splitter.push("\n42") == ("", "42")
    assert splitter.push("\n") == ("", "\n")

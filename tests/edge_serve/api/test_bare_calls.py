"""Calls without marks: found however the text is cut, and nothing else is taken for one."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_serve.api.bare_calls import BareCallParser
from edge_serve.api.tools import HERMES, ToolParser

NAMES = {"population", "popul"}
CALL = {"name": "population", "arguments": {"city": "Bern", "of": ["}", "```", '"']}}
# As Qwen2.5-Coder-1.5B-Instruct answered the agents SDK.
RECORDED = '```json\n{\n  "name": "population",\n  "arguments": {\n    "city": "Bern"\n  }\n}\n```'


def parse(pieces: list[str], parser: ToolParser | None = None) -> tuple[str, list[Any]]:
    parser = parser or BareCallParser(HERMES, NAMES)
    text, calls = "", []
    for plain, found in (*map(parser.push, pieces), parser.flush()):
        text += plain
        calls += [(c.index, c.function.name, json.loads(c.function.arguments)) for c in found]
    return text, calls


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(bounds)]


@given(
    form=st.sampled_from(["{}", "  \n{}\n", "```json\n{}\n```", "```\n{}```\n"]),
    indent=st.sampled_from([None, 2]),
    places=st.lists(st.integers(0, 200)),
)
def test_a_bare_object_is_a_call(form: str, indent: int | None, places: list[int]):
    text = form.replace("{}", json.dumps(CALL, indent=indent))
    assert parse(cut(text, places)) == ("", [(0, CALL["name"], CALL["arguments"])])


def test_the_recorded_answer():
    assert parse(list(RECORDED)) == ("", [(0, "population", {"city": "Bern"})])


@given(
    text=st.sampled_from(
        [
            "plain", "", "{", "```", "```json", "```json\n{", '{"name": "population"',
            '{"name": "population"}', '{"name": "other", "arguments": {}}',
            '{"name": "population", "arguments": []}', '{"name": "population", "arguments": "{}"}',
            '{"name": "population", "arguments": {}, "id": 1}', '```json\n{"name": "population", '
            '"arguments": {}}', '```json\n[1]\n```', '```python\nprint(1)\n```', '{"a": 1}',
            'See: {"name": "population", "arguments": {}}', "{}", '{"name": "populations"}',
            '{"name": "population", "arguments": {"city": "\\ud800"}}',
            '{"name": "population", "arguments": {"of": NaN}}',
        ]
    ),
    places=st.lists(st.integers(0, 80)),
)  # fmt: skip
@example(text='{"name": "population", "arguments": {"of": -1e400}}', places=[])
def test_anything_else_stays_text(text: str, places: list[int]):
    assert parse(cut(text, places)) == (text, [])


@given(places=st.lists(st.integers(0, 200)))
def test_marked_calls_are_found_as_before(places: list[int]):
    text = f"I look.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    pieces = cut(text, places)
    assert parse(pieces) == parse(pieces, ToolParser(HERMES))
    after = f"{json.dumps(CALL)}\n<tool_call>{json.dumps(CALL)}</tool_call>"
    one = (CALL["name"], CALL["arguments"])
    assert parse(cut(after, places)) == ("", [(0, *one), (1, *one)])


OTHER = {"name": "popul", "arguments": {}}
BOTH = [(0, CALL["name"], CALL["arguments"]), (1, "popul", {})]


@given(
    form=st.sampled_from(
        [
            "{}\n{}", "{}{}", "{}\n</tool_call>\n{}\n</tool_call>",
            "{}</tool_call>{}</tool_call>\n",
            "```json\n{}\n```\n```json\n{}\n```", "```\n{}\n```\n</tool_call>\n\n{}",
            "{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>",
        ]
    ),
    places=st.lists(st.integers(0, 300)),
)  # fmt: skip
def test_each_bare_object_directly_after_one_is_a_call(form: str, places: list[int]):
    first, between, last = form.split("{}")
    text = f"{first}{json.dumps(CALL)}{between}{json.dumps(OTHER)}{last}"
    assert parse(cut(text, places)) == ("", BOTH)


@given(
    rest=st.sampled_from(
        [
            "Done.",
            '{"name": "other", "arguments": {}}',
            "```python\nx\n```",
            "</tool",
            "<tool_",
            "{",
        ]
    ),
    gap=st.sampled_from(["", "\n", "\n</tool_call>\n\n"]),
    places=st.lists(st.integers(0, 200)),
)
def test_other_text_after_a_bare_call_stays_text(rest: str, gap: str, places: list[int]):
    assert parse(cut(f"{json.dumps(CALL)}{gap}{rest}", places)) == (rest, BOTH[:1])


@pytest.mark.parametrize("text", ["Hello there.", "```python\nx = 1\n```", "{}"])
def test_other_text_is_not_held_back(text: str):
    """What cannot become a call is streamed on as soon as that is clear."""
    parser = BareCallParser(HERMES, NAMES)
    shown = next(i for i in range(1, len(text) + 1) if parser.push(text[i - 1])[0])
    assert shown <= 12

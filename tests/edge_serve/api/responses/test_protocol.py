"""No field of the Responses API is accepted and ignored, but for those that a list names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_serve.api.responses.protocol import IGNORED, REFUSED, Item, ResponsesRequest
from tests.edge_serve.api.fields import PICTURE_FIELDS, Pair, check_field, fields_of
from tests.edge_serve.api.responses.test_responses import WEATHER
from tests.edge_serve.api.weather import CALL, CALLING, THINKING
from tests.edge_serve.api.weather import WEATHER as CHAT_WEATHER
from tests.edge_serve.scripted import Live, running

BASE = {"model": "tiny", "input": "what", "max_output_tokens": 4, "temperature": 0}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "name": "f", **fields}]}


def choose(kind: str, name: str) -> dict[str, Any]:
    tools = [tool(name=each)["tools"][0] for each in ("f", "g")]
    return {"tools": tools, "tool_choice": {"type": kind, "name": name}}


def calls(parallel: bool) -> dict[str, Any]:
    return {"input": CALLING, "max_output_tokens": 200, "tools": [WEATHER],
            "parallel_tool_calls": parallel}  # fmt: skip


def form(**fields: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "name": "a", "schema": {"type": "integer"}, **fields}
    return {"text": {"format": wanted}}


def thinks(**fields: Any) -> dict[str, Any]:
    return {"input": THINKING, "max_output_tokens": 200, "reasoning": fields}


def items(kind: str, field: str, one: Any, other: Any, **base: Any) -> Pair:
    """Two inputs with an item that differs in a field."""
    return tuple(  # type: ignore[return-value]
        {"input": [{"type": kind, **base, field: value}, {"role": "user", "content": "go on"}]}
        for value in (one, other)
    )


def past(field: str, one: Any, other: Any, kind: str = "output_text", **base: Any) -> Pair:
    """Two inputs with a part of a past answer that differs in a field."""
    parts = [[{"type": kind, **base, field: value}] for value in (one, other)]
    return items("message", "content", *parts, role="assistant")


def thought(field: str, one: Any, other: Any) -> Pair:
    """Two inputs with a past reasoning, of which the template keeps nothing."""
    parts = [[{"type": "reasoning_text", "text": "a", field: value}] for value in (one, other)]
    return items("reasoning", "content", *parts)


MESSAGE = {"role": "user", "content": "a"}
USE = {"call_id": "1", "name": "f", "arguments": "{}"}
OUTPUT = {"call_id": "1", "output": "a"}
LONG = "x" * 200_000  # refused, also where the template would drop it
PAIRS: dict[str, Pair] = {
    "input": ({"input": "a"}, {"input": "b"}),
    "model": ({}, {"model": "other"}),
    "instructions": ({"instructions": "a"}, {"instructions": "b"}),
    "max_output_tokens": ({"max_output_tokens": 2}, {"max_output_tokens": 3}),
    "temperature": ({"temperature": 0}, {"temperature": 1}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.9}),
    "presence_penalty": ({"presence_penalty": 0.5}, {"presence_penalty": 1}),
    "frequency_penalty": ({"frequency_penalty": 0.5}, {"frequency_penalty": 1}),
    "tools": ({}, tool()),
    "tools[].type": (tool(), tool(type="web_search")),
    "tools[].name": (tool(), tool(name="g")),
    "tools[].description": (tool(description="a"), tool(description="b")),
    "tools[].parameters": (tool(), tool(parameters={"type": "object"})),
    "tools[].strict": (tool(strict=True), tool(strict=False)),
    "tool_choice": ({**tool(), "tool_choice": "none"}, {**tool(), "tool_choice": "auto"}),
    "tool_choice.type": (choose("function", "f"), choose("other", "f")),
    "tool_choice.name": (choose("function", "f"), choose("function", "g")),
    "parallel_tool_calls": (calls(True), calls(False)),
    "text": ({}, form()),
    "text.format": (form(), form(schema={"type": "null"})),
    "text.format.type": ({"text": {"format": {"type": "text"}}}, form()),
    "text.format.name": (form(name="a"), form(name="b")),
    "text.format.schema": (form(), form(schema={"type": "null"})),
    "text.format.description": (form(description="a"), form(description="b")),
    "text.format.strict": (
        form(schema={"format": "x"}, strict=False),
        form(schema={"format": "x"}, strict=True),
    ),
    "text.verbosity": ({"text": {"verbosity": "medium"}}, {"text": {"verbosity": "high"}}),
    "reasoning": ({}, thinks(effort="low")),
    "reasoning.effort": (thinks(effort="low"), thinks(effort="medium")),
    "reasoning.summary": (thinks(), thinks(summary="auto")),
    "metadata": ({"metadata": {"a": "b"}}, {"metadata": {"a": "c"}}),
    "user": ({"user": "a"}, {"user": "b"}),
    "stream": ({"stream": True}, {"stream": False}),
    "stream_options": ({}, {"stream_options": {}}),
    "stream_options.include_obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
    ),
    "truncation": ({"truncation": "disabled"}, {"truncation": "auto"}),
    "background": ({"background": False}, {"background": True}),
    "top_logprobs": ({"top_logprobs": 0}, {"top_logprobs": 1}),
    "top_k": ({"top_k": -1}, {"top_k": 5}),
    "min_p": ({"min_p": 0}, {"min_p": 0.5}),
    "repetition_penalty": ({"repetition_penalty": 1}, {"repetition_penalty": 1.5}),
    "priority": ({"priority": 0}, {"priority": 1}),
    "include": ({"include": []}, {"include": ["reasoning.encrypted_content"]}),
    "previous_response_id": ({}, {"previous_response_id": "resp_1"}),
    "conversation": ({}, {"conversation": "conv_1"}),
    "prompt": ({}, {"prompt": {"id": "a"}}),
    "store": ({"store": True}, {"store": False}),
    "service_tier": ({"service_tier": "auto"}, {"service_tier": "flex"}),
    "safety_identifier": ({"safety_identifier": "a"}, {"safety_identifier": "b"}),
    "client_metadata": ({"client_metadata": {"a": "b"}}, {"client_metadata": {"a": "c"}}),
    "prompt_cache_key": ({"prompt_cache_key": "a"}, {"prompt_cache_key": "b"}),
    "prompt_cache_retention": ({"prompt_cache_retention": "24h"}, {"prompt_cache_retention": "a"}),
    "prompt_cache_options": (
        {"prompt_cache_options": {"mode": "implicit"}},
        {"prompt_cache_options": {"mode": "explicit"}},
    ),
    "moderation": ({"moderation": None}, {"moderation": {"model": "a"}}),
    "max_tool_calls": ({"max_tool_calls": 1}, {"max_tool_calls": 2}),
}
# Fields of items, by the path that `fields_of` gives; those of the same name are of one kind.
ITEMS: dict[str, Pair] = {
    "input[].role": items("message", "role", "user", "assistant", content="a"),
    "input[].content": items("message", "content", "a", "b", role="user"),
    "input[].id": items("message", "id", "a", "b", **MESSAGE),
    "input[].status": items("message", "status", "completed", "incomplete", **MESSAGE),
    "input[].phase": items("message", "phase", "commentary", "final_answer", **MESSAGE),
    "input[].content[].text": past("text", "a", "b"),
    "input[].content[].prompt_cache_breakpoint": items(
        "message",
        "content",
        *(
            [{"type": "input_text", "text": "a", "prompt_cache_breakpoint": hint}]
            for hint in ({}, {"ttl": "30m"})
        ),
        role="user",
    ),
    "input[].content[].annotations": past("annotations", [], [{"type": "x"}], text="a"),
    "input[].content[].logprobs": past("logprobs", [], [1], text="a"),
    "input[].content[].refusal": past("refusal", "a", "b", "refusal"),
    "input[].call_id": items("function_call", "call_id", "1", 1, **USE),
    "input[].name": items("function_call", "name", "f", "g", **USE),
    "input[].arguments": items("function_call", "arguments", "{}", '{"a": 1}', **USE),
    "input[].caller": items("function_call", "caller", None, {"type": "direct"}, **USE),
    "input[].namespace": items("function_call", "namespace", None, "a", **USE),
    "input[].output": items("function_call_output", "output", "a", "b", **OUTPUT),
    "input[].summary": items("reasoning", "summary", [], [{"type": "summary_text", "text": LONG}]),
    "input[].summary[].type": thought("type", "reasoning_text", "other"),
    "input[].summary[].text": thought("text", "a", LONG),
    "input[].encrypted_content": items("reasoning", "encrypted_content", "a", "b"),
}


def test_every_field_is_tried_and_documented():
    seen: set[type] = set()
    assert set(fields_of(ResponsesRequest, seen)) == PAIRS.keys()
    fields = {f"input[].{name}" for kind in Item.__args__ for name in fields_of(kind, seen)}
    assert fields - PICTURE_FIELDS == ITEMS.keys()
    assert PAIRS.keys() | ITEMS.keys() | PICTURE_FIELDS >= IGNORED.keys() | REFUSED.keys()
    page = (Path(__file__).parents[4] / "docs" / "protocols.md").read_text("utf-8")
    (section,) = [part for part in page.split("\n## ") if part.startswith("OpenAI's Responses")]
    named = {*IGNORED, *(path.split(".")[0].split("[")[0] for path in PAIRS)}
    assert not [name for name in named if f"`{name}`" not in section]


@pytest.fixture(scope="module")
def service(tool_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One that stores responses."""
    pytest.importorskip("llguidance")
    llm = {"kv_capacity": 1024, "reuse_prefix": False}
    with running(tool_bundle, llm=llm, responses_dir=tmp_path_factory.mktemp("stored")) as live:
        live.engine.say(CALLING, f"{CALL}\n{CALL}", tools=[CHAT_WEATHER])
        live.engine.say(THINKING, "<think>hm hm hm</think>yes")
        yield live


# These come back as they were taken, and change nothing else.
SHOWN = {"text.format.name", "text.format.description"}


@pytest.mark.live
@pytest.mark.parametrize("field", [*PAIRS, *ITEMS])
def test_a_field_makes_a_difference_or_the_list_says_why_not(
    service: Live, field: str, monkeypatch: pytest.MonkeyPatch
):
    first, second = ({**BASE, **changes} for changes in {**PAIRS, **ITEMS}[field])
    check_field(
        service, "/v1/responses", ResponsesRequest, (first, second), monkeypatch,
        is_ignored=field in IGNORED and field not in SHOWN,
    )  # fmt: skip

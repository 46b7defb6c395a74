"""No field of Anthropic's API is accepted and ignored, but for those that a list names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_serve.api.anthropic.protocol import IGNORED, CountTokensRequest, MessagesRequest
from tests.edge_serve.api.anthropic.test_messages import WEATHER
from tests.edge_serve.api.fields import PICTURE_FIELDS, Pair, check_field, fields_of
from tests.edge_serve.api.weather import CALLING, THINKING
from tests.edge_serve.scripted import Live

pytestmark = pytest.mark.live

SHARED = {"model": "tiny", "messages": [{"role": "user", "content": "what"}]}
BASE = {**SHARED, "max_tokens": 4, "temperature": 0}


def block(kind: str, **fields: Any) -> dict[str, Any]:
    """A conversation with this block."""
    role = "user" if kind in ("text", "tool_result", "image") else "assistant"
    message = {"role": role, "content": [{"type": kind, **fields}]}
    return {"messages": [message, {"role": "user", "content": "go on"}]}


def blocks(kind: str, field: str, one: Any, other: Any, **base: Any) -> Pair:
    return block(kind, **{**base, field: one}), block(kind, **{**base, field: other})


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"name": "f", "input_schema": {"type": "object"}, **fields}]}


def choose(kind: str, **fields: Any) -> dict[str, Any]:
    tools = [tool(name=name)["tools"][0] for name in ("f", "weather")]
    return {"tools": tools, "tool_choice": {"type": kind, **fields}}


def calls(kind: str, disabled: bool) -> dict[str, Any]:
    choice = {"type": kind, "disable_parallel_tool_use": disabled}
    if kind == "tool":
        choice["name"] = "weather"
    return {"messages": CALLING, "max_tokens": 200, "tools": [WEATHER], "tool_choice": choice}


def form(**fields: Any) -> dict[str, Any]:
    return {"format": {"type": "json_schema", "schema": {"type": "integer"}, **fields}}


def thinks(kind: str, **fields: Any) -> dict[str, Any]:
    return {"messages": THINKING, "max_tokens": 200, "thinking": {"type": kind, **fields}}


def configured(**fields: Any) -> dict[str, Any]:
    return {"output_config": fields}


CACHED: tuple[Any, Any] = ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"})
USE = {"id": "1", "name": "f", "input": {}}
RESULT = {"tool_use_id": "1", "content": "a"}
EDIT = {"type": "clear_thinking_20251015"}
PAIRS: dict[str, Pair] = {
    "model": ({}, {"model": "other"}),
    "messages": ({}, {"messages": THINKING}),
    "messages[].role": (
        {},
        {"messages": [{"role": "system", "content": "what"}, *SHARED["messages"]]},
    ),
    "messages[].content": ({}, {"messages": THINKING}),
    "messages[].content[].text": blocks("text", "text", "a", "b"),
    "messages[].content[].citations": blocks("text", "citations", None, [], text="a"),
    "messages[].content[].cache_control": blocks("text", "cache_control", *CACHED, text="a"),
    "messages[].content[].thinking": blocks("thinking", "thinking", "a", "x" * 200_000),
    "messages[].content[].signature": blocks("thinking", "signature", "a", "b", thinking="c"),
    "messages[].content[].data": blocks("redacted_thinking", "data", "a", "b"),
    "messages[].content[].id": blocks("tool_use", "id", "a", 1, **USE),
    "messages[].content[].name": blocks("tool_use", "name", "f", "g", **USE),
    "messages[].content[].input": blocks("tool_use", "input", {}, {"a": 1}, **USE),
    "messages[].content[].caller": blocks("tool_use", "caller", {"type": "direct"}, "x", **USE),
    "messages[].content[].caller.type": blocks(
        "tool_use", "caller", {"type": "direct"}, {"type": "other"}, **USE
    ),
    "messages[].content[].toolset_name": blocks("tool_use", "toolset_name", None, "a", **USE),
    "messages[].content[].tool_use_id": blocks("tool_result", "tool_use_id", "1", 1, **RESULT),
    "messages[].content[].content": blocks("tool_result", "content", "a", "b", **RESULT),
    "messages[].content[].is_error": blocks("tool_result", "is_error", True, False, **RESULT),
    "system": ({"system": "a"}, {"system": "b"}),
    "thinking": ({}, {"thinking": {"type": "disabled"}}),
    "thinking.budget_tokens": (
        thinks("enabled", budget_tokens=1),
        thinks("enabled", budget_tokens=2),
    ),
    "thinking.display": (
        thinks("adaptive", display="summarized"),
        thinks("adaptive", display="omitted"),
    ),
    "tools": ({}, tool()),
    "tools[].name": (tool(name="f"), tool(name="g")),
    "tools[].input_schema": (tool(), tool(input_schema={"properties": {}})),
    "tools[].description": (tool(description="a"), tool(description="b")),
    "tools[].type": (tool(type="custom"), tool(type="bash_20250124")),
    "tools[].strict": (tool(strict=True), tool(strict=False)),
    "tools[].eager_input_streaming": (
        tool(eager_input_streaming=True),
        tool(eager_input_streaming=False),
    ),
    "tools[].cache_control": (tool(cache_control=CACHED[0]), tool(cache_control=CACHED[1])),
    "tool_choice": (choose("auto"), choose("any")),
    "tool_choice.disable_parallel_tool_use": (calls("auto", False), calls("auto", True)),
    "tool_choice.name": (choose("tool", name="f"), choose("tool", name="weather")),
    "output_config": ({}, configured(**form())),
    "output_config.effort": (configured(effort="low"), configured(effort="medium")),
    "output_config.format": (configured(**form()), configured(**form(schema={"type": "null"}))),
    "output_config.format.type": (configured(**form()), configured(**form(type="other"))),
    "output_config.format.schema": (
        configured(**form()),
        configured(**form(schema={"type": "null"})),
    ),
    "context_management": ({}, {"context_management": {"edits": [EDIT]}}),
    "context_management.edits": (
        {"context_management": {"edits": []}},
        {"context_management": {"edits": [EDIT]}},
    ),
    "context_management.edits[].type": (
        {"context_management": {"edits": [EDIT]}},
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
    ),
    "context_management.edits[].keep": (
        {"context_management": {"edits": [{**EDIT, "keep": "all"}]}},
        {"context_management": {"edits": [{**EDIT, "keep": {"type": "thinking_turns"}}]}},
    ),
    "cache_control": ({"cache_control": CACHED[0]}, {"cache_control": CACHED[1]}),
    "max_tokens": ({"max_tokens": 2}, {"max_tokens": 3}),
    "temperature": ({"temperature": 0}, {"temperature": 1}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.9}),
    "top_k": ({"top_k": 2}, {"top_k": 5}),
    "stop_sequences": ({"stop_sequences": ["a"]}, {"stop_sequences": ["b"]}),
    "stream": ({"stream": True}, {"stream": False}),
    "metadata": ({"metadata": {"user_id": "a"}}, {"metadata": {"user_id": "b"}}),
    "metadata.user_id": ({"metadata": {"user_id": "a"}}, {"metadata": {"user_id": "b"}}),
    "service_tier": ({"service_tier": "auto"}, {"service_tier": "standard_only"}),
    "container": ({"container": None}, {"container": "a"}),
    "diagnostics": ({"diagnostics": None}, {"diagnostics": {}}),
    "inference_geo": ({"inference_geo": None}, {"inference_geo": "us"}),
    "speed": ({"speed": None}, {"speed": "fast"}),
}
# The others are of a type that is also elsewhere.
SYSTEM: dict[str, Pair] = {
    "system[].cache_control": (
        {"system": [{"type": "text", "text": "a", "cache_control": CACHED[0]}]},
        {"system": [{"type": "text", "text": "a", "cache_control": CACHED[1]}]},
    )
}
# Only what the edit keeps; that it is one that is known matters.
WITHOUT_EFFECT = {
    *IGNORED,
    "context_management.edits",
    "context_management.edits[].keep",
}


def test_every_field_is_tried_and_documented():
    # A picture in the result of a tool, which comes first, is refused as a whole.
    fields = {
        name.replace("content[].content[]", "content[]")
        for name in fields_of(MessagesRequest, set())
    }
    assert fields - PICTURE_FIELDS == PAIRS.keys()
    counting = set(fields_of(CountTokensRequest, set()))
    assert PAIRS.keys() - counting == {
        "max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "stream", "metadata",
        "metadata.user_id", "service_tier", "container", "diagnostics", "inference_geo", "speed",
    }  # fmt: skip
    assert PAIRS.keys() | SYSTEM.keys() | PICTURE_FIELDS >= IGNORED.keys()
    page = (Path(__file__).parents[4] / "docs" / "protocols.md").read_text("utf-8")
    section = page.split("\n## ")[1]
    assert section.startswith("Anthropic's Messages")
    assert not [name for name in IGNORED if f"`{name}`" not in section]
    own = {path.split(".")[0].split("[")[0] for path in PAIRS}
    assert not [name for name in own if f"`{name}`" not in section]


@pytest.mark.parametrize("field", [*PAIRS, *SYSTEM])
def test_a_field_makes_a_difference_or_the_list_says_why_not(
    service: Live, field: str, monkeypatch: pytest.MonkeyPatch
):
    first, second = ({**BASE, **changes} for changes in {**PAIRS, **SYSTEM}[field])
    check_field(
        service, "/v1/messages", MessagesRequest, (first, second), monkeypatch,
        is_ignored=field in WITHOUT_EFFECT,
    )  # fmt: skip


# A reasoning that no context holds is refused, but not counted by this template, which drops it.
@pytest.mark.parametrize(
    "field",
    sorted(
        name
        for name in fields_of(CountTokensRequest, set())
        if name != "messages[].content[].thinking" and ".source" not in name  # a picture's
    ),
)
def test_a_count_takes_the_fields_of_a_message(service: Live, field: str):
    for changes in PAIRS[field.replace("content[].content[]", "content[]")]:
        body = {**BASE, **changes}
        status = service.ask("/v1/messages", body).status
        own = {key: body[key] for key in body if key in CountTokensRequest.__struct_fields__}
        assert service.ask("/v1/messages/count_tokens", own).status == status, field

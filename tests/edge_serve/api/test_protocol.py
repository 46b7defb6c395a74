"""No field is accepted and ignored: two values of it make a difference, or a list says why not."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.bundle.manifest import Tokens
from edge.runtime.sampling_params import KNOBS
from edge.text.chat_template import ChatTemplate
from edge_serve.api.protocol import (
    IGNORED,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from tests.edge_serve.api.fields import PICTURE_FIELDS, Pair, check_field, fields_of
from tests.edge_serve.scripted import Live, running

pytest.importorskip("llguidance")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KINDS: dict[str, type[msgspec.Struct]] = {
    CHAT: ChatRequest,
    TEXT: CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
WHAT, CALLING, THINKING = "what", "two calls", "think"
ANSWER = {"max_tokens": 200, "temperature": 0}


def votes(**options: Any) -> dict[str, Any]:
    return {"temperature": 1, "seed": 3, "vote": {"most": 4, **options}}


def asks(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


BEGUN = [*asks(WHAT), {"role": "assistant", "content": "so"}]


def cached(hint: Any) -> list[dict[str, Any]]:
    part = {"type": "text", "text": WHAT, "prompt_cache_breakpoint": hint}
    return [{"role": "user", "content": [part]}]


def tool(kind: str = "function", /, **function: Any) -> dict[str, Any]:
    return {"tools": [{"type": kind, "function": {"name": "f", **function}}]}


def schema(value: Any = None, /, **fields: Any) -> dict[str, Any]:
    named = {"name": "x", "schema": value or {"type": "integer"}, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def form(kind: str, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind, **fields}}


def choose(kind: str, name: str) -> dict[str, Any]:
    tools = [*tool(name="f")["tools"], *tool(name="g")["tools"]]
    return {"tools": tools, "tool_choice": {"type": kind, "function": {"name": name}}}


BASES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": asks(WHAT), "max_tokens": 4, "temperature": 0, "seed": 7},
    TEXT: {"model": "tiny", "prompt": WHAT, "max_tokens": 4, "temperature": 0, "seed": 7},
    "/tokenize": {"model": "tiny"},
    "/detokenize": {"model": "tiny", "tokens": [5]},
}

# Two values of each field that must not mean the same, as changes of the endpoint's base.
SAMPLING: dict[str, Pair] = {
    name: ({name: one}, {name: other})
    for name, one, other in (
        ("model", "tiny", "other"),
        ("temperature", 0.5, 1),
        ("top_p", 0.5, 0.9),
        ("top_k", 2, 5),
        ("min_p", 0.1, 0.2),
        ("repetition_penalty", 1.1, 1.5),
        ("presence_penalty", 0.5, 1),
        ("frequency_penalty", 0.5, 1),
        ("logit_bias", {"5": 1}, {"5": 2}),
        ("seed", 1, 2),
        ("max_tokens", 2, 3),
        ("n", 1, 2),
        ("stop", "a", "b"),
        ("stop_token_ids", [5], [6]),
        ("ignore_eos", True, False),
        ("stream", True, False),
        ("cache_salt", "a", "b"),
        ("no_stop_trim", False, True),
        ("skip_special_tokens", True, False),
        ("return_hidden_states", False, True),
        ("user", "a", "b"),
        ("metadata", {"a": "b"}, {"c": "d"}),
        ("store", True, False),
        ("service_tier", "auto", "flex"),
        ("safety_identifier", "a", "b"),
        ("prompt_cache_key", "a", "b"),
        ("prompt_cache_retention", "24h", "in-memory"),
        ("prompt_cache_options", {"mode": "implicit"}, {"mode": "explicit"}),
    )
}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SAMPLING["stream_options"] = (USAGE, {"stream": True})
SAMPLING["return_progress"] = ({"stream": True, "return_progress": True}, {"stream": True})
PAIRS: dict[str, dict[str, Pair]] = {
    CHAT: {
        **SAMPLING,
        "stream_options.include_usage": (
            USAGE,
            {"stream": True, "stream_options": {"include_usage": False}},
        ),
        "stream_options.include_obfuscation": (
            {"stream": True, "stream_options": {"include_obfuscation": False}},
            {"stream": True, "stream_options": {"include_obfuscation": True}},
        ),
        "messages": ({"messages": asks("a")}, {"messages": asks("b")}),
        "max_completion_tokens": (
            {"max_tokens": None, "max_completion_tokens": 2},
            {"max_tokens": None, "max_completion_tokens": 3},
        ),
        "logprobs": ({"logprobs": True}, {"logprobs": False}),
        "top_logprobs": (
            {"logprobs": True, "top_logprobs": 1},
            {"logprobs": True, "top_logprobs": 2},
        ),
        "response_format": (form("text"), form("json_object")),
        "response_format.type": (form("text"), form("json_object")),
        "response_format.json_schema": (schema(), schema({"type": "null"})),
        "response_format.json_schema.name": (schema(name="a"), schema(name="b")),
        "response_format.json_schema.schema": (schema(), schema({"type": "null"})),
        "response_format.json_schema.description": (
            schema(description="a"),
            schema(description="b"),
        ),
        "response_format.json_schema.strict": (
            schema({"format": "x"}, strict=False),
            schema({"format": "x"}, strict=True),
        ),
        "response_format.regex": (form("regex", regex="a"), form("regex", regex="b")),
        "response_format.grammar": (
            form("grammar", grammar='start: "a"'),
            form("grammar", grammar='start: "b"'),
        ),
        "tools": ({}, tool()),
        "tools[].type": (tool(), tool("other")),
        "tools[].function": (tool(name="f"), tool(name="g")),
        "tools[].function.name": (tool(name="f"), tool(name="g")),
        "tools[].function.description": (tool(description="a"), tool(description="b")),
        "tools[].function.parameters": (
            tool(parameters={"type": "object"}),
            tool(parameters={"type": "object", "properties": {}}),
        ),
        "tools[].function.strict": (tool(strict=True), tool(strict=False)),
        "tool_choice": ({**tool(), "tool_choice": "none"}, {**tool(), "tool_choice": "auto"}),
        "tool_choice.type": (choose("function", "f"), choose("other", "f")),
        "tool_choice.function": (choose("function", "f"), choose("function", "g")),
        "tool_choice.function.name": (choose("function", "f"), choose("function", "g")),
        "parallel_tool_calls": (
            {**tool(), **ANSWER, "messages": asks(CALLING), "parallel_tool_calls": True},
            {**tool(), **ANSWER, "messages": asks(CALLING), "parallel_tool_calls": False},
        ),
        "enable_thinking": ({"enable_thinking": True}, {"enable_thinking": False}),
        "thinking_token_budget": ({"thinking_token_budget": 1}, {"thinking_token_budget": 2}),
        "stop_when_sure": ({"stop_when_sure": 0}, {"stop_when_sure": 0.9}),
        "vote": ({}, votes()),
        "vote.answers": (votes(answers="boxed"), votes(answers="word")),
        "vote.first": (votes(first=2), votes(first=5)),
        "vote.most": (votes(most=2), votes(most=3)),
        "vote.error": (votes(error=0.1), votes(error=0.6)),
        "reasoning_effort": ({"reasoning_effort": "low"}, {"reasoning_effort": "medium"}),
        "include_reasoning": (
            {**ANSWER, "messages": asks(THINKING), "include_reasoning": True},
            {**ANSWER, "messages": asks(THINKING), "include_reasoning": False},
        ),
        "separate_reasoning": ({"separate_reasoning": True}, {"separate_reasoning": False}),
        "stream_reasoning": ({"stream_reasoning": True}, {"stream_reasoning": False}),
        "chat_template_kwargs": (
            {"chat_template_kwargs": {"enable_thinking": True}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        "chat_template_kwargs.enable_thinking": (
            {"chat_template_kwargs": {"enable_thinking": True}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        "continue_final_message": (
            {"messages": BEGUN, "continue_final_message": True},
            {"messages": BEGUN, "continue_final_message": False},
        ),
        "add_generation_prompt": (
            {"messages": BEGUN, "continue_final_message": True},
            {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True},
        ),
        "modalities": ({"modalities": ["text"]}, {"modalities": None}),
        "verbosity": ({"verbosity": "medium"}, {"verbosity": "low"}),
        "moderation": ({"moderation": None}, {"moderation": {"model": "a"}}),
        "messages[].content[].prompt_cache_breakpoint": (
            {"messages": cached({})},
            {"messages": cached({"ttl": "30m"})},
        ),
        "messages[].name": (
            {"messages": [{**asks(WHAT)[0], "name": "Ann"}]},
            {"messages": [{**asks(WHAT)[0], "name": "Bob"}]},
        ),
    },
    TEXT: {
        **SAMPLING,
        "prompt": ({"prompt": "a"}, {"prompt": "b"}),
        "suffix": ({}, {"suffix": ""}),
        "echo": ({"echo": True}, {"echo": False}),
        "logprobs": ({"logprobs": 1}, {"logprobs": 2}),
    },
    "/tokenize": {
        "model": ({"prompt": "a"}, {"prompt": "a", "model": "other"}),
        "prompt": ({"prompt": "a"}, {"prompt": "b"}),
        "messages": ({"messages": asks("a")}, {"messages": asks("b")}),
        "tools": ({"messages": asks("a")}, {"messages": asks("a"), **tool()}),
        "add_special_tokens": ({"prompt": "a"}, {"prompt": "a", "add_special_tokens": False}),
        "add_generation_prompt": (
            {"messages": asks("a")},
            {"messages": asks("a"), "add_generation_prompt": False},
        ),
        "continue_final_message": (
            {"messages": BEGUN},
            {"messages": BEGUN, "continue_final_message": True},
        ),
        "return_token_strs": ({"prompt": "a"}, {"prompt": "a", "return_token_strs": True}),
    },
    "/detokenize": {
        "model": ({}, {"model": "other"}),
        "tokens": ({"tokens": [5]}, {"tokens": [6]}),
    },
}


def test_every_field_of_every_struct_is_tried_below():
    seen: set[type] = set()
    for path, kind in KINDS.items():
        messages = {"messages[].name", "messages[].content[].prompt_cache_breakpoint"}
        free = messages if path == CHAT else set()  # they are no structs
        assert set(fields_of(kind, seen)) == PAIRS[path].keys() - free
    assert set().union(*PAIRS.values()) | PICTURE_FIELDS >= IGNORED.keys()
    page = (Path(__file__).parents[3] / "docs" / "server.md").read_text("utf-8")
    assert not [name for name in (*IGNORED, *NEUTRAL) if f"`{name}`" not in page]


def test_every_sampling_knob_is_a_field_of_its_type():
    """In the range of the table but for two, which say why."""
    for name, knob in KNOBS.items():
        hint = typing.get_type_hints(Sampling)[name]
        assert hint == knob.kind | None
        for value in (knob.low, min(knob.high, 2**63 - 1)):
            assert getattr(msgspec.convert({name: value}, Sampling), name) == value
        for value in (knob.low - (2 if name == "top_k" else 1), knob.high + 1):
            with pytest.raises(msgspec.ValidationError):
                msgspec.convert({name: value}, Sampling)


@pytest.fixture(scope="module")
def service(tool_bundle: Path) -> Iterator[Live]:
    with running(tool_bundle, llm={"kv_capacity": 1024, "reuse_prefix": False}) as live:
        call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
        live.engine.say(asks(CALLING), f"{call}\n{call}", **tool())
        live.engine.say(asks(THINKING), "<think>hm</think>yes")
        yield live


@pytest.mark.live
@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, pairs in PAIRS.items() for field in pairs]
)
def test_a_field_makes_a_difference_or_the_list_says_why_not(
    service: Live, path: str, field: str, monkeypatch: pytest.MonkeyPatch
):
    first, second = ({**BASES[path], **changes} for changes in PAIRS[path][field])
    check_field(
        service, path, KINDS[path], (first, second), monkeypatch, is_ignored=field in IGNORED
    )


@pytest.mark.live
@pytest.mark.parametrize(
    ("path", "added"),
    [
        # As vllm-router 0.1.17 and sglang-router 0.3.2 write a request that names none of these.
        (
            CHAT,
            '{"stream":false,"logprobs":false,"no_stop_trim":false,"ignore_eos":false,'
            '"continue_final_message":false,"skip_special_tokens":true,"separate_reasoning":true,'
            '"stream_reasoning":true,"return_hidden_states":false,"include_reasoning":true}',
        ),
        (
            TEXT,
            '{"stream":false,"echo":false,"no_stop_trim":false,"ignore_eos":false,'
            '"skip_special_tokens":true,"return_hidden_states":false}',
        ),
        (
            "/v1/responses",
            '{"store":true,"stream":null,"temperature":1.0,"top_p":1.0,"priority":0,"top_k":-1,'
            '"min_p":0.0,"repetition_penalty":1.0}',
        ),
    ],
    ids=["chat", "text", "responses"],
)
def test_what_routers_add_changes_nothing(service: Live, path: str, added: str):
    responses = {"input": WHAT, "max_output_tokens": 4, "temperature": 1.0, "top_p": 1.0}
    base = {"model": "tiny", **responses} if path == "/v1/responses" else BASES[path]
    answers = [service.ask(path, body) for body in (base, {**base, **json.loads(added)})]
    assert [answer.status for answer in answers] == [200, 200], answers[1].body


@pytest.mark.live
@pytest.mark.parametrize(
    ("field", "value"), [("no_stop_trim", True), ("skip_special_tokens", False), ("stream_x", 1)]
)
def test_another_value_of_what_routers_add_is_refused_by_name(
    service: Live, field: str, value: Any
):
    answer = service.ask(CHAT, {**BASES[CHAT], field: value})
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["param"] == field


@pytest.mark.live
def test_unknown_fields_are_ignored_and_counted_where_the_operator_says_so(tool_bundle: Path):
    with running(tool_bundle, unknown_fields="ignore") as live:
        given = {**BASES[CHAT], "added_by_a_gateway": [1], "and_this": None}
        assert live.ask(CHAT, given).status == 200
        metrics = live.ask("/metrics").body.decode()
        assert "edgellm_ignored_fields_total 2.0" in metrics
        # What is known is held to its type all the same.
        wrong = live.ask(CHAT, {**given, "temperature": "warm"})
        assert wrong.status == 400
        assert json.loads(wrong.body)["error"]["param"] == "temperature"


def test_a_template_that_reads_names_gets_them():
    source = "{% for m in messages %}{{ m.name or '-' }}: {{ m.content }};{% endfor %}"
    tokens = Tokens(bos=None, bos_text="", eos=(0,), eos_text="", add_bos=False)
    messages = [
        {"role": "system", "content": "a", "name": "Rules"},
        {"role": "user", "content": "b", "name": "Ann-1"},
        {"role": "assistant", "content": "c", "name": "小明"},
        {"role": "user", "content": "d"},
    ]
    assert ChatTemplate(source, tokens).render(messages) == "Rules: a;Ann-1: b;小明: c;-: d;"

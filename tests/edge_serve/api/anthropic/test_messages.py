"""Anthropic's messages over HTTP."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from edge.errors import RequestError
from edge.runtime.ask import Ask
from edge_serve.api.anthropic.errors import NAMES
from edge_serve.http.errors import APIError, renamed
from tests.conftest import write_secret
from tests.edge_serve.api.weather import ANSWER, CALL, QUESTION, SCHEMA
from tests.edge_serve.api.weather import WEATHER as CHAT_WEATHER
from tests.edge_serve.scripted import Answer, Live, running

WEATHER = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
pytestmark = pytest.mark.usefixtures("says_answer")


def message(live: Live, messages: Any = QUESTION, /, **fields: Any) -> Answer:
    body = {"model": "tiny", "max_tokens": 200, "temperature": 0, "messages": messages}
    return live.ask("/v1/messages", {**body, **fields})


def named(answer: Answer) -> list[tuple[str, Any]]:
    """The events of a stream with their names; comments are none."""
    parts = answer.body.decode().split("\n\n")
    events = [part.split("\n") for part in parts if part and not part.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in events]


def rebuilt(events: list[tuple[str, Any]]) -> Any:
    """The message that a stream comes to, by Anthropic's rules; the order is checked."""
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    (first, start), *middle, (delta_name, delta), (last, _) = events
    assert (first, delta_name, last) == ("message_start", "message_delta", "message_stop")
    result = start["message"]
    assert result["content"] == []
    open_block: dict[str, Any] | None = None
    arguments = ""
    for name, data in middle:
        if name == "content_block_start":
            assert open_block is None
            assert data["index"] == len(result["content"])
            open_block = data["content_block"]
            result["content"].append(open_block)
            arguments = ""
            continue
        assert open_block is not None
        assert data["index"] == len(result["content"]) - 1
        if name == "content_block_stop":
            if open_block["type"] == "tool_use":
                open_block["input"] = json.loads(arguments)
            open_block = None
            continue
        kind, value = data["delta"].pop("type"), data["delta"]
        if kind == "input_json_delta":
            arguments += value["partial_json"]
        else:
            ((key, text),) = value.items()
            assert kind == f"{key}_delta"
            open_block[key] += text
    assert open_block is None
    return {**result, **delta["delta"], "usage": {**result["usage"], **delta["usage"]}}


def same(one: Any, other: Any) -> bool:
    """Whether two messages are the same but for their ids, and what was cached for the second."""

    def known(answer: Any) -> Any:
        usage = dict(answer["usage"])
        usage["input_tokens"] += usage.pop("cache_read_input_tokens")
        content = [{**block, "id": None} for block in answer["content"]]
        return {**answer, "id": None, "usage": usage, "content": content}

    return bool(known(one) == known(other))


def test_a_whole_answer_has_the_reasoning_as_a_block(live: Live):
    answer = message(live)
    assert answer.status == 200
    body = answer.json
    assert body["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": "unsigned"},
        {"type": "text", "text": "Héllo 🙂", "citations": None},
    ]
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    tokenizer = live.engine.llm.tokenizer
    usage = body["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert prompt == len(live.engine.llm.encode(QUESTION))
    assert usage["output_tokens"] == len(tokenizer.encode(ANSWER, control=True)) + 1
    reasoning = tokenizer.encode("Let me see.\n</think>\n\n", control=True)
    assert usage["output_tokens_details"] == {"thinking_tokens": len(reasoning)}
    again = message(live).json["usage"]
    assert again["cache_read_input_tokens"] == prompt - 1
    assert again["input_tokens"] == 1


@pytest.mark.parametrize("fields", [{}, {"stop_sequences": ["llo"]}, {"max_tokens": 3}])
def test_a_stream_is_the_same_answer(live: Live, fields: dict[str, Any]):
    streamed = message(live, stream=True, **fields)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = named(streamed)
    start = events[0][1]["message"]["usage"]
    assert start["input_tokens"] == len(live.engine.llm.encode(QUESTION))
    assert same(rebuilt(events), message(live, **fields).json)


def test_why_an_answer_ended(live: Live):
    stopped = message(live, stop_sequences=["x", "llo"]).json
    assert stopped["content"][-1]["text"] == "Hé"
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "llo")
    cut = message(live, max_tokens=2).json
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 2)
    long = [{"role": "user", "content": "long"}]
    room = live.engine.llm.kv_capacity - len(live.engine.llm.encode(long))
    live.engine.say(long, "x" * (room + 20), ends=False)
    filled = message(live, long, max_tokens=100_000).json
    assert filled["stop_reason"] == "model_context_window_exceeded"


def test_how_the_reasoning_is_shown(live: Live):
    blocks = message(live, thinking={"type": "adaptive", "display": "omitted"}).json["content"]
    assert [block.get("thinking") for block in blocks] == ["", None]
    streamed = message(live, thinking={"type": "adaptive", "display": "omitted"}, stream=True)
    assert rebuilt(named(streamed))["content"] == blocks
    live.engine.say(QUESTION, "At once.", thinking=False)
    blocks = message(live, thinking={"type": "disabled"}).json["content"]
    assert [block["type"] for block in blocks] == ["text"]
    budget = {"type": "enabled", "budget_tokens": 1}
    assert message(live, thinking=budget).json["content"] != message(live).json["content"]


def ids_of(live: Live, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The token ids of the prompt that a request comes to."""
    seen: list[list[int]] = []
    queue = type(live.engine.llm).answer

    def spy(self: Any, ask: Ask, n: int = 1) -> Any:
        seen.append(list(ask.ids or ()))
        return queue(self, ask, n)

    with monkeypatch.context() as patch:
        patch.setattr(type(live.engine.llm), "answer", spy)
        answer = live.ask(path, {"model": "tiny", "max_tokens": 1, **body})
    assert answer.status == 200, answer.body
    return seen[0]


@pytest.mark.live
def test_a_history_is_the_prompt_that_a_chat_has(tools: Live, monkeypatch: pytest.MonkeyPatch):
    cached = {"cache_control": {"type": "ephemeral"}}
    ours = {
        "system": [{"type": "text", "text": "Be", **cached}, {"type": "text", "text": "brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "sun?", **cached}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "anything"},
                    {"type": "redacted_thinking", "data": "secret"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Bern"}},
                    {"type": "tool_use", "id": "2", "name": "weather", "input": {"city": "Rom"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": "sun"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "2",
                        "content": [
                            {"type": "text", "text": "rain"},
                            {"type": "text", "text": "!"},
                        ],
                        "is_error": False,
                    },
                    {"type": "text", "text": "And?"},
                ],
            },
            {"role": "system", "content": "Now."},
            {"role": "user", "content": "Go."},
        ],
        "tools": [{**WEATHER, "type": "custom", **cached}],
        "tool_choice": {"type": "auto"},
    }
    calls = [
        {"id": id_, "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for id_, arguments in (("1", '{"city": "Bern"}'), ("2", '{"city": "Rom"}'))
    ]
    chat = {
        "messages": [
            {"role": "system", "content": "Be\nbrief."},
            {"role": "user", "content": "sun?"},
            {"role": "assistant", "content": "I look.", "reasoning": "hm", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
            {"role": "tool", "tool_call_id": "2", "content": "rain\n!"},
            {"role": "user", "content": "And?"},
            {"role": "system", "content": "Now."},
            {"role": "user", "content": "Go."},
        ],
        "tools": [CHAT_WEATHER],
    }
    ids = ids_of(tools, "/v1/messages", ours, monkeypatch)
    assert ids == ids_of(tools, "/v1/chat/completions", chat, monkeypatch)
    counted = tools.ask("/v1/messages/count_tokens", {"model": "tiny", **ours})
    assert counted.json == {"input_tokens": len(ids)}


def test_more_than_the_context_is_counted_but_not_answered(live: Live):
    messages = [{"role": "user", "content": "hello world " * 400}]
    counted = live.ask("/v1/messages/count_tokens", {"model": "tiny", "messages": messages}).json
    tokens, capacity = counted["input_tokens"], live.engine.llm.kv_capacity
    assert tokens == len(live.engine.llm.encode(messages)) > capacity
    error = message(live, messages).json["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("prompt is too long: ")
    assert f" > {capacity} maximum" in error["message"]


@pytest.mark.live
def test_calls(tools: Live):
    tools.engine.say(QUESTION, f"I look.\n{CALL}\n{CALL}", tools=[CHAT_WEATHER])
    body = message(tools, tools=[WEATHER]).json
    text, *calls = body["content"]
    assert text["text"] == "I look."
    assert [(c["type"], c["name"], c["input"]) for c in calls] == [
        ("tool_use", "weather", {"city": "Bern"})
    ] * 2
    assert len({call["id"] for call in calls}) == 2
    assert body["stop_reason"] == "tool_use"
    assert same(rebuilt(named(message(tools, tools=[WEATHER], stream=True))), body)
    one = {"type": "auto", "disable_parallel_tool_use": True}
    for stream in (False, True):
        answer = message(tools, tools=[WEATHER], tool_choice=one, stream=stream)
        body = rebuilt(named(answer)) if stream else answer.json
        assert [block["type"] for block in body["content"]] == ["text", "tool_use"]
        assert body["stop_reason"] == "tool_use"
    none = message(tools, tools=[WEATHER], tool_choice={"type": "none"}, max_tokens=1)
    assert none.json["content"][0]["type"] == "text"


@pytest.mark.live
def test_a_stop_sequence_that_ends_a_call_is_not_named(tools: Live):
    tools.engine.say(QUESTION, CALL, tools=[CHAT_WEATHER])
    fields: dict[str, Any] = {"tools": [WEATHER], "stop_sequences": ["</tool_call>"]}
    for body in (
        message(tools, **fields).json,
        rebuilt(named(message(tools, **fields, stream=True))),
    ):
        assert [block["type"] for block in body["content"]] == ["tool_use"]
        assert (body["stop_reason"], body["stop_sequence"]) == ("tool_use", None)


@pytest.mark.live
def test_a_call_without_an_object_stays_text(tools: Live):
    wrong = '<tool_call>{"name": "weather", "arguments": "Bern"}</tool_call>'
    tools.engine.say(QUESTION, wrong, tools=[CHAT_WEATHER])
    body = message(tools, tools=[WEATHER]).json
    assert body["content"] == [{"type": "text", "text": wrong, "citations": None}]
    assert body["stop_reason"] == "end_turn"


@pytest.mark.live
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_that_must_come(tools: Live, choice: dict[str, Any]):
    pytest.importorskip("llguidance")
    tools.engine.default = "Bern"
    try:
        body = message(tools, tools=[WEATHER], tool_choice=choice).json
    finally:
        tools.engine.default = None
    (call,) = body["content"]
    assert call["type"] == "tool_use"
    assert call["input"].keys() == {"city"}
    assert body["stop_reason"] == "tool_use"


def test_a_last_answer_is_continued(live: Live):
    begun = [*QUESTION, {"role": "assistant", "content": "One two"}]
    live.engine.say(begun, " three.", continue_final_message=True)
    for content in ("One two", [{"type": "text", "text": "One two"}]):
        messages = [*QUESTION, {"role": "assistant", "content": content}]
        body = message(live, messages=messages, temperature=0).json
        assert [block["text"] for block in body["content"]] == [" three."]
        counted = live.ask("/v1/messages/count_tokens", {"model": "tiny", "messages": messages})
        assert counted.json["input_tokens"] == len(
            live.engine.llm.encode(begun, continue_final_message=True)
        )


def test_an_answer_of_a_form(live: Live):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "schema": {"enum": ["a", "bc"]}}
    config = {"format": form, "effort": "low"}
    body = message(live, output_config=config, thinking={"type": "disabled"}).json
    assert json.loads(body["content"][-1]["text"]) in ("a", "bc")


def bodies() -> dict[str, dict[str, Any]]:
    def user(*blocks: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": list(blocks)}]}

    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    image = {"type": "image", "source": source}
    result = {"type": "tool_result", "tool_use_id": "1"}
    past = {"role": "assistant", "content": "Because"}
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    calling = {"role": "assistant", "content": [use]}
    return {
        "messages[0].content[0].source.data: the model 'tiny' reads text only": user(image),
        "messages[0].content[1]: a block of type document": user(
            {"type": "text", "text": "a"}, {"type": "document", "source": source}
        ),
        "messages[0].content[0].content[0]: a block of type image": user(
            {**result, "content": [image]}
        ),
        "messages[0].content[0]: a block of type thinking has no place in user": user(
            {"type": "thinking", "thinking": "a", "signature": ""}
        ),
        "messages[0].content[0].type: ": user({"type": "server_tool_use", "id": "1"}),
        "messages[1].tool_calls: an answer that calls tools has ended": {
            "messages": [*QUESTION, calling]
        },
        "messages: the answer to continue has nothing before it": {"messages": [past]},
        "max_tokens: this field is required": {"max_tokens": ...},
        "temperature: ": {"temperature": -1},
        "mcp_servers: unknown field": {"mcp_servers": []},
        "tools[0].input_schema: ": {"tools": [{"name": "f", "input_schema": {"type": "array"}}]},
        "tool_choice: there are no tools": {"tool_choice": {"type": "any"}},
        "context_management.edits[0].type: ": {
            "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}
        },
        "stop_sequences[0]: ": {"stop_sequences": [""]},
    }


@pytest.mark.parametrize("said", bodies())
def test_what_is_refused_is_named(live: Live, said: str):
    changes = bodies()[said]
    fields = {"model": "tiny", "max_tokens": 9, "messages": QUESTION, **changes}
    answer = live.ask("/v1/messages", {k: v for k, v in fields.items() if v is not ...})
    assert answer.status == 400
    body = answer.json
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["message"].startswith(said), body
    assert body["request_id"] == answer.headers["x-request-id"]


def test_the_version_of_the_api(live: Live):
    body = {"model": "tiny", "max_tokens": 2, "messages": QUESTION}
    for version, status in (
        ("2026-10-21", 200),
        ("2023-06-01", 200),
        ("2023-01-01", 400),
        ("", 400),
    ):
        answer = live.ask("/v1/messages", body, headers={"anthropic-version": version})
        assert answer.status == status


@pytest.mark.live
def test_errors_of_the_guard_are_in_anthropics_form(tool_bundle: Path, tmp_path: Path):
    write_secret(tmp_path / "keys", "alice:sk-the-key-of-alice\nbob:sk-the-key-of-bobby\n")
    with running(
        tool_bundle, api_key_file=tmp_path / "keys", rate_limit_rpm=4, max_body_bytes=2000
    ) as live:
        body = {"model": "tiny", "max_tokens": 2, "messages": QUESTION}

        def ask(path: str = "/v1/messages", **headers: str) -> Answer:
            return live.ask(
                path, body, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )

        def kind(answer: Answer) -> tuple[int, str]:
            assert answer.json["type"] == "error"
            return answer.status, answer.json["error"]["type"]

        for headers in (
            {},
            {"x_api_key": "wrong"},
            {"authorization": "Bearer x", "x_api_key": "sk-the-key-of-alice"},
        ):
            assert kind(ask(**headers)) == (401, "authentication_error")
        assert ask(x_api_key="sk-the-key-of-alice").status == 200
        assert ask(authorization="Bearer sk-the-key-of-alice").status == 200
        large = live.ask(
            "/v1/messages",
            {**body, "system": "x" * 2000},
            headers={"x-api-key": "sk-the-key-of-alice"},
        )
        assert kind(large) == (413, "request_too_large")
        nothing = live.ask("/v1/messages/none", {}, headers={"x-api-key": "sk-the-key-of-alice"})
        assert kind(nothing) == (404, "not_found_error")
        assert kind(ask(x_api_key="sk-the-key-of-alice")) == (429, "rate_limit_error")
        body["model"] = "claude"
        assert kind(ask("/messages", x_api_key="sk-the-key-of-bobby")) == (404, "not_found_error")


def test_an_engine_that_fails(live: Live):
    live.engine.fails_at = live.engine.llm.tokenizer.encode("H")[0]
    try:
        whole, streamed = message(live), message(live, stream=True)
    finally:
        live.engine.fails_at = None
    assert (whole.status, whole.json["error"]["type"]) == (500, "api_error")
    name, data = named(streamed)[-1]
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
    assert b"secret" not in whole.body + streamed.body


@pytest.mark.live
def test_a_silence_is_filled_as_the_protocol_has_it(tool_bundle: Path):
    with running(tool_bundle, ping_s=0.05) as live:
        live.engine.say(QUESTION, "ab")
        live.engine.running.clear()
        threading.Timer(0.3, live.engine.running.set).start()
        answer = message(live, stream=True)
        before, _, after = answer.body.partition(b"event: message_start")
        assert b": ping\n\n" in before
        assert b"event: " not in before
        live.engine.delay_s = 0.2
        events = named(message(live, stream=True))
        live.engine.delay_s = 0
        assert after
        assert ("ping", {"type": "ping"}) in events
        assert rebuilt([e for e in events if e[0] != "ping"])["content"][0]["text"] == "ab"


def test_a_name_in_another_protocol():
    def name(param: str) -> tuple[str | None, str]:
        with pytest.raises(APIError) as caught, renamed(NAMES):
            raise APIError(400, "x", f"{param}: no", param=param)
        return caught.value.param, caught.value.message

    assert name("tools[3].function.strict") == ("tools[3].strict", "tools[3].strict: no")
    assert name("stopped") == ("stopped", "stopped: no")
    assert name("stop[1]")[0] == "stop_sequences[1]"
    with pytest.raises(APIError, match=r"^output_config.format: the schema"), renamed(NAMES):
        raise RequestError("response_format: the schema is none")

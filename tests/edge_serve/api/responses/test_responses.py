"""OpenAI's Responses over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge.runtime.ask import Ask
from tests.conftest import Bundles
from tests.edge_serve.api.weather import ANSWER, CALL, FUNCTION, QUESTION
from tests.edge_serve.api.weather import WEATHER as CHAT_WEATHER
from tests.edge_serve.scripted import Answer, Live, running

WEATHER = {"type": "function", **FUNCTION}
FORM = {"type": "json_schema", "name": "a"}
pytestmark = pytest.mark.usefixtures("says_answer")


def respond(live: Live, given: Any = "what", /, **fields: Any) -> Answer:
    body = {"model": "tiny", "input": given, "temperature": 0, **fields}
    return live.ask("/v1/responses", body)


def rebuilt(answer: Answer) -> Any:
    """The response at the end of a stream; the events say the same, in their order."""
    parts = [part.split("\n") for part in answer.body.decode().split("\n\n") if part]
    events = [json.loads(data[6:]) for _, data in parts]
    assert [name[7:] for name, _ in parts] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    created, in_progress, *middle, last = events
    assert [created["type"], in_progress["type"]] == ["response.created", "response.in_progress"]
    assert created["response"] == in_progress["response"]
    assert created["response"]["output"] == []
    output: list[Any] = []
    for event in middle:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
            continue
        item = output[event["output_index"]]
        assert event["output_index"] == len(output) - 1
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "output_item.done":
            assert event["item"] == {**item, "status": event["item"]["status"]}
            item["status"] = event["item"]["status"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (item["name"], item["arguments"]) == (event["name"], event["arguments"])
        else:
            parts_of = item["summary" if "summary" in kind else "content"]
            if kind.endswith("part.added"):
                parts_of.append(event["part"])
            elif kind.endswith("part.done"):
                assert parts_of == [event["part"]]
            elif kind.endswith(".delta"):
                parts_of[0]["text"] += event["delta"]
            else:
                assert kind.endswith(".done")
                assert parts_of[0]["text"] == event["text"]
    response = last["response"]
    assert last["type"] == f"response.{response['status']}"
    if response["status"] == "failed":
        ends = {"in_progress": "incomplete"}
        output = [{**item, "status": ends.get(item["status"], item["status"])} for item in output]
    assert response["output"] == output
    if response["status"] == "failed":
        return response
    assert all(item["status"] != "in_progress" for item in output)
    return response


def same(one: Any, other: Any) -> bool:
    def known(response: Any) -> Any:
        output = [{**item, "id": None, "call_id": None} for item in response["output"]]
        usage = {**response["usage"], "input_tokens_details": None}
        times = dict.fromkeys(("id", "created_at", "completed_at"))
        return {**response, **times, "output": output, "usage": usage}

    return bool(known(one) == known(other))


@pytest.mark.live
def test_a_stream_that_fails_before_its_first_piece_begins_as_any_other(tiny_bundles: Bundles):
    """OpenAI's client refuses any first event but ``response.created``."""
    with running(tiny_bundles("qwen2"), stall_s=0.5, ping_s=0.1) as live:
        live.engine.running.clear()
        try:
            answer = respond(live, stream=True)
        finally:
            live.engine.running.set()
        assert b": ping" in answer.body
        response = rebuilt(Answer(200, {}, answer.body.replace(b": ping\n\n", b"")))
    assert response["error"]["code"] == "engine_stalled"
    first = next(part for part in answer.body.decode().split("\n\n") if ": ping" not in part)
    assert json.loads(first.split("data: ")[1])["response"]["status"] == "in_progress"


def test_a_whole_answer(live: Live):
    answer = respond(live, metadata={"a": "b"})
    assert answer.status == 200, answer.body
    body = answer.json
    reasoning, message = body["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    (text,) = message["content"]
    assert (text["type"], text["text"]) == ("output_text", "Héllo 🙂")
    assert (body["object"], body["status"]) == ("response", "completed")
    assert body["metadata"] == {"a": "b"}
    assert (body["temperature"], body["store"], body["error"]) == (0, True, None)
    assert body["top_p"] == live.engine.llm.manifest.sampling.top_p
    usage = body["usage"]
    assert usage["input_tokens"] == len(live.engine.llm.encode(QUESTION))
    tokens = live.engine.llm.tokenizer.encode(ANSWER, control=True)
    assert usage["output_tokens"] == len(tokens) + 1
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0
    cached = respond(live).json["usage"]["input_tokens_details"]["cached_tokens"]
    assert cached == usage["input_tokens"] - 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reasoning": {"summary": "auto"}},
        {"max_output_tokens": 14},
        {"instructions": "x"},
    ],
)
def test_a_stream_is_the_same_answer(live: Live, fields: dict[str, Any]):
    if "instructions" in fields:
        live.engine.say([{"role": "system", "content": "x"}, *QUESTION], "so\n</think>\n\nyes")
    whole = respond(live, **fields).json
    streamed = respond(live, stream=True, **fields)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert same(rebuilt(streamed), whole)
    cut = "max_output_tokens" in fields
    assert whole["status"] == ("incomplete" if cut else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert whole["output"][-1]["status"] == whole["status"]


def test_a_reasoning_that_is_asked_for_as_a_summary(live: Live):
    body = respond(live, reasoning={"summary": "concise", "effort": "high"}).json
    reasoning = body["output"][0]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Let me see."}]
    assert reasoning["content"] == []
    assert body["reasoning"] == {"summary": "concise", "effort": "high"}
    live.engine.say(QUESTION, "At once.", thinking=False)
    body = respond(live, reasoning={"effort": "none"}).json
    assert [item["type"] for item in body["output"]] == ["message"]


def ids_of(live: Live, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    seen: list[list[int]] = []
    queue = type(live.engine.llm).answer

    def spy(self: Any, ask: Ask, n: int = 1) -> Any:
        seen.append(list(ask.ids or ()))
        return queue(self, ask, n)

    with monkeypatch.context() as patch:
        patch.setattr(type(live.engine.llm), "answer", spy)
        answer = live.ask(path, {"model": "tiny", **body})
    assert answer.status == 200, answer.body
    return seen[0]


@pytest.mark.live
def test_items_are_the_prompt_that_a_chat_has(tools: Live, monkeypatch: pytest.MonkeyPatch):
    def call(id_: str, city: str) -> dict[str, str]:
        arguments = json.dumps({"city": city})
        return {"type": "function_call", "call_id": id_, "name": "weather", "arguments": arguments}

    def result(id_: str, output: Any) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": id_, "output": output}

    def past(text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        return {"type": "message", "id": "m", "role": "assistant", "content": [part]}

    def chat_call(id_: str, city: str) -> dict[str, Any]:
        arguments = json.dumps({"city": city})
        function = {"name": "weather", "arguments": arguments}
        return {"id": id_, "type": "function", "function": function}

    thought = {"type": "reasoning", "id": "r", "summary": [],
               "content": [{"type": "reasoning_text", "text": "hm"}]}  # fmt: skip
    ours = {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "sun?"}]},
            thought, past("I look."), call("1", "Bern"), call("2", "Rom"),
            result("1", "sun"), result("2", [{"type": "input_text", "text": "rain"}]),
            past("One."), past("Two."), call("3", "Ulm"), result("3", "fog"),
            {"role": "developer", "content": "Now."},
            call("4", "Aix"), result("4", ""),
            {"role": "user", "content": "Go."},
        ],
        "tools": [WEATHER], "max_output_tokens": 1,
    }  # fmt: skip
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "sun?"},
            {"role": "assistant", "content": "I look.", "reasoning": "hm",
             "tool_calls": [chat_call("1", "Bern"), chat_call("2", "Rom")]},
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
            {"role": "tool", "tool_call_id": "2", "content": "rain"},
            {"role": "assistant", "content": "One."},
            {"role": "assistant", "content": "Two.", "tool_calls": [chat_call("3", "Ulm")]},
            {"role": "tool", "tool_call_id": "3", "content": "fog"},
            {"role": "developer", "content": "Now."},
            {"role": "assistant", "content": None, "tool_calls": [chat_call("4", "Aix")]},
            {"role": "tool", "tool_call_id": "4", "content": ""},
            {"role": "user", "content": "Go."},
        ],
        "tools": [CHAT_WEATHER], "max_tokens": 1,
    }  # fmt: skip
    ids = ids_of(tools, "/v1/responses", ours, monkeypatch)
    assert ids == ids_of(tools, "/v1/chat/completions", chat, monkeypatch)


@pytest.mark.live
def test_calls(tools: Live):
    tools.engine.say(QUESTION, f"I look.\n{CALL}\n{CALL}", tools=[CHAT_WEATHER])
    body = respond(tools, tools=[WEATHER]).json
    message, *calls = body["output"]
    assert message["content"][0]["text"] == "I look."
    assert [(c["type"], c["name"], json.loads(c["arguments"])) for c in calls] == [
        ("function_call", "weather", {"city": "Bern"})
    ] * 2
    assert same(rebuilt(respond(tools, tools=[WEATHER], stream=True)), body)
    one = respond(tools, tools=[WEATHER], parallel_tool_calls=False).json
    assert [item["type"] for item in one["output"]] == ["message", "function_call"]


@pytest.mark.live
@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}},
        {"text": {"format": {**FORM, "schema": FUNCTION["parameters"]}}},
    ],
)
def test_a_form_that_must_be_kept(tools: Live, fields: dict[str, Any]):
    pytest.importorskip("llguidance")
    tools.engine.default = "Bern"
    try:
        (item,) = respond(tools, **fields).json["output"]
    finally:
        tools.engine.default = None
    text = item["arguments"] if "tools" in fields else item["content"][0]["text"]
    assert json.loads(text).keys() == {"city"}


@pytest.mark.live
@pytest.mark.parametrize("strict", [True, False])
def test_arguments_of_a_strict_tool_keep_to_its_schema(tools: Live, strict: bool):
    """The model would write a number where the schema wants a text."""
    pytest.importorskip("llguidance")
    wrong = CALL.replace('"Bern"', "5")
    tools.engine.say(QUESTION, wrong, tools=[CHAT_WEATHER])
    answer = respond(tools, tools=[{**WEATHER, "strict": strict}], max_output_tokens=200)
    call = next(item for item in answer.json["output"] if item["type"] == "function_call")
    assert isinstance(json.loads(call["arguments"])["city"], str) == strict


def refusals() -> dict[str, dict[str, Any]]:
    def user(part: Any) -> dict[str, Any]:
        return {"input": [{"role": "user", "content": [part]}]}

    return {
        "previous_response_id": {"previous_response_id": "resp_1"},
        "conversation": {"conversation": {"id": "x"}},
        "prompt": {"prompt": {"id": "x"}},
        "background": {"background": True, "store": False},
        "input": {"input": []},
        "input[0].content[0].image_url": user({"type": "input_image", "image_url": "data:"}),
        "input[0].type": {"input": [{"type": "item_reference", "id": "x"}]},
        "input[0].call_id": {"input": [{"type": "function_call_output", "output": "x"}]},
        "input[1].role": {"input": [*QUESTION, {"role": "tool", "content": "x"}]},
        "max_output_tokens": {"max_output_tokens": 0},
        "text.format.schema": {"text": {"format": FORM}},
        "text.format.name": {"text": {"format": {"type": "json_object", "name": "a"}}},
        "text.verbosity": {"text": {"verbosity": "low"}},
        "tools[0].type": {"tools": [{"type": "web_search"}]},
        "tool_choice": {"tool_choice": "required"},
        "truncation": {"truncation": "auto"},
        "include[0]": {"include": ["message.output_text.logprobs"]},
        "seed": {"seed": 1},
        "stream_options": {"stream_options": {}},
    }


@pytest.mark.parametrize("param", refusals())
def test_what_is_refused_is_named(live: Live, param: str):
    answer = respond(live, **refusals()[param])
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == param, error
    assert error["message"].startswith(param)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "no items are stored; send the"),
        ({"input": [{"type": "web_search_call"}]}, "'message' or 'function_call' or"),
        ({"tools": [{"type": "web_search"}]}, "'function'; this server has no tools of its own"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "'function'; this server has no tools"),
        ({"tools": [{"type": "namespace", "name": "f"}]}, 'Codex sends none with web_search = "d'),
        ({"truncation": "auto"}, "send 'disabled'"),
        ({"text": {"verbosity": "low"}}, "send 'medium'"),
        ({"text": {"format": {"type": "xml"}}}, "send 'json_object' or 'json_schema' or 'text'"),
        ({"include": ["x"]}, "send 'reasoning.encrypted_content'"),
        ({"tool_choice": {"type": "mcp"}}, "send 'function'"),
        ({"tool_choice": "any"}, "send 'auto' or 'none' or 'required'"),
        ({"background": True, "store": False}, "leave store out or send true"),
        ({"top_logprobs": 2}, "send 0"),
        (
            {"input": [{"role": "user", "content": [{"type": "x"}]}]},
            "send 'input_text' or 'output_text' or 'refusal'",
        ),
    ],
)
def test_a_refusal_says_what_to_send(live: Live, fields: dict[str, Any], says: str):
    answer = respond(live, **fields)
    assert answer.status == 400
    assert says in answer.json["error"]["message"]


def test_a_prompt_that_is_too_long_is_the_inputs_fault(live: Live):
    error = respond(live, "hello world " * 1000).json["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_an_engine_that_fails_in_a_stream(live: Live):
    live.engine.fails_at = live.engine.llm.tokenizer.encode("H")[0]
    try:
        answer = respond(live, stream=True)
    finally:
        live.engine.fails_at = None
    assert rebuilt(answer)["error"]["code"] == "engine_error"
    assert b"secret" not in answer.body

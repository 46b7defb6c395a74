"""Chats over HTTP."""

from __future__ import annotations

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_serve.api.weather import ANSWER, QUESTION
from tests.edge_serve.scripted import Live, running

pytestmark = pytest.mark.usefixtures("says_answer")


def joined(events: list[Any], key: str, index: int = 0) -> str:
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(c["delta"].get(key, "") for c in choices if c["index"] == index)


def test_a_whole_answer(live: Live):
    answer = live.chat(temperature=0)
    assert answer.status == 200
    body = answer.json
    (choice,) = body["choices"]
    message = choice["message"]
    assert message["role"] == "assistant"
    assert message["content"] == "Héllo 🙂"
    assert message["reasoning"] == message["reasoning_content"] == "Let me see."
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", body["id"])
    assert body["model"] == answer.headers["x-edge-model"] == "tiny"
    tokenizer = live.engine.llm.tokenizer
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(live.engine.llm.encode(QUESTION))
    assert usage["completion_tokens"] == len(tokenizer.encode(ANSWER, control=True)) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    reasoning = tokenizer.encode("Let me see.\n</think>\n\n", control=True)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(reasoning)
    assert re.fullmatch(
        r"queue;dur=[\d.]+, ttft;dur=[\d.]+, total;dur=[\d.]+", answer.headers["server-timing"]
    )


def test_a_stream_is_the_same_answer(live: Live):
    whole = live.chat(temperature=0).json
    answer = live.chat(temperature=0, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, usage, done = answer.events
    assert done == "[DONE]"
    assert usage["choices"] == []
    whole["usage"]["prompt_tokens_details"] = usage["usage"]["prompt_tokens_details"]
    assert usage["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events)
    message = whole["choices"][0]["message"]
    for key in ("content", "reasoning", "reasoning_content"):
        assert joined(events, key) == message[key]
    assert joined(events, "role") == "assistant"
    assert [event["choices"][0]["finish_reason"] for event in events[-2:]] == [None, "stop"]
    assert len({event["id"] for event in events}) == 1
    assert not any("�" in joined([event], "content") for event in events)


def test_usage_comes_only_if_it_is_asked_for(live: Live):
    *events, done = live.chat(temperature=0, stream=True).events
    assert done == "[DONE]"
    assert not any("usage" in event for event in events)
    *events, done = live.chat(
        temperature=0, stream=True, stream_options={"include_usage": None}
    ).events
    assert (done, [event for event in events if "usage" in event]) == ("[DONE]", [])
    answer = live.chat(stream_options={"include_usage": True})
    assert (answer.status, answer.json["error"]["param"]) == (400, "stream_options")


def test_the_prefix_of_the_last_prompt_is_cached(live: Live):
    live.chat(temperature=0)
    details = live.chat(temperature=0).json["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == len(live.engine.llm.encode(QUESTION)) - 1
    salted = live.chat(temperature=0, cache_salt="mine").json["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_absent_fields_take_the_bundles_own_values(live: Live):
    def observed() -> float:
        text = live.ask("/metrics").body.decode()
        found = re.search(r'edgellm_request_temperature_sum\{model="tiny"\} (\S+)', text)
        return float(found[1]) if found else 0.0

    default = live.engine.llm.manifest.sampling.temperature
    assert default > 0
    nulls = {"temperature": None, "top_p": None, "stop": None, "n": None}
    for fields in ({}, nulls):
        before = observed()
        assert live.chat(max_tokens=2, **fields).status == 200
        assert math.isclose(observed() - before, default)


def test_a_seed_repeats_an_answer_and_samples_differ(live: Live):
    def ask(**fields: Any) -> list[str]:
        answer = live.chat("anything", temperature=1.0, top_p=1.0, max_tokens=12, **fields)
        return [
            (c["message"].get("reasoning") or "") + (c["message"]["content"] or "")
            for c in answer.json["choices"]
        ]

    first = ask(seed=5, n=3)
    assert len(set(first)) == 3
    assert ask(seed=5, n=3) == first
    assert ask(seed=5)[0] == first[0]
    assert ask(seed=6)[0] == first[1]  # sample i has the seed plus i
    events = live.chat(
        "anything", temperature=1.0, top_p=1.0, max_tokens=12, seed=5, n=3, stream=True
    ).events
    streamed = [joined(events, "reasoning", i) + joined(events, "content", i) for i in range(3)]
    assert streamed == first
    assert events.count("[DONE]") == 1


def test_limits_of_tokens(live: Live):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = live.chat(temperature=0, **{field: 3}).json
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3
    both = live.chat(temperature=0, max_tokens=3, max_completion_tokens=3)
    assert both.json["usage"]["completion_tokens"] == 3
    answer = live.chat(max_tokens=3, max_completion_tokens=4)
    assert (answer.status, answer.json["error"]["param"]) == (400, "max_tokens")
    huge = live.chat(temperature=0, max_tokens=2**31 - 1)  # more than the context: until it is full
    assert huge.json["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_and_stop_tokens(live: Live):
    def content(**fields: Any) -> tuple[str, str]:
        choice = live.chat(temperature=0, **fields).json["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    assert content(stop="llo") == ("Hé", "stop")
    assert content(stop=["🙂", "nothing"]) == ("Héllo ", "stop")
    token = live.engine.llm.tokenizer.encode("o")[0]
    text, _ = content(stop_token_ids=[token])
    assert text.startswith("H")
    assert "🙂" not in text


def test_a_bias_and_penalties_arrive(live: Live):
    token = live.engine.llm.tokenizer.encode("z")[0]
    answer = live.chat(
        "free", temperature=0, max_tokens=4, logit_bias={str(token): 100}, enable_thinking=False
    ).json
    assert answer["choices"][0]["message"]["content"] == "zzzz"
    answer = live.chat(
        "free", temperature=0, max_tokens=4, logit_bias={str(token): 1}, enable_thinking=False,
        frequency_penalty=2, presence_penalty=2, repetition_penalty=1.5, top_k=-1, min_p=0.1,
    ).json  # fmt: skip
    text = answer["choices"][0]["message"]["content"]
    assert text != "zzzz"
    size = live.engine.llm.manifest.model.vocab_size
    wrong = live.chat(logit_bias={str(size): 1})
    assert (wrong.status, wrong.json["error"]["param"]) == (400, "logit_bias")


def test_logprobs(live: Live):
    answer = live.chat(temperature=0, logprobs=True, top_logprobs=3).json
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert "".join(bytes(t["bytes"]).decode("latin-1") for t in tokens).encode("latin-1").decode(
        errors="ignore"
    ).endswith("Héllo 🙂")  # fmt: skip
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]  # greedy
        assert -1e-3 < token["logprob"] <= 0
    events = live.chat(temperature=0, logprobs=True, top_logprobs=3, stream=True).events
    streamed = [
        item
        for event in events[:-1]
        for choice in event["choices"]
        if choice["logprobs"]
        for item in choice["logprobs"]["content"]
    ]
    assert streamed == tokens
    assert live.chat(temperature=0, logprobs=True).json["choices"][0]["logprobs"]["content"][0][
        "top_logprobs"
    ] == []  # fmt: skip
    wrong = live.chat(top_logprobs=3)
    assert (wrong.status, wrong.json["error"]["param"]) == (400, "top_logprobs")


BEGUN = [*QUESTION, {"role": "assistant", "content": "One two"}]


def test_an_answer_is_continued_in_every_way_of_asking(live: Live):
    live.engine.say(BEGUN, " three.", continue_final_message=True)
    for fields in (
        {"messages": BEGUN, "continue_final_message": True},
        {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False},
        {"messages": [*QUESTION, {**BEGUN[1], "prefix": True}]},
        {"messages": [*QUESTION, {**BEGUN[1], "prefix": True}], "reasoning_effort": "low"},
    ):
        message = live.chat(temperature=0, **fields).json["choices"][0]["message"]
        assert message["content"] == " three."
        assert "reasoning" not in message
        *events, _ = live.chat(temperature=0, stream=True, **fields).events
        assert joined(events, "content") == " three."
    body = {"model": "tiny", "messages": BEGUN}
    ids = live.ask("/tokenize", {**body, "continue_final_message": True}).json["tokens"]
    assert ids == live.engine.llm.encode(BEGUN, continue_final_message=True)
    # A last answer alone is answered anew, as OpenAI does it.
    live.engine.say(BEGUN, "So.</think>Four")
    for more in ({}, {"continue_final_message": False}, {"add_generation_prompt": True}):
        answer = live.chat(temperature=0, messages=BEGUN, **more)
        assert answer.json["choices"][0]["message"]["content"] == "Four"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [{**QUESTION[0], "prefix": True}]}, "messages"),
        ({"messages": [{**BEGUN[1], "prefix": True}, *QUESTION]}, "messages"),
        ({"messages": [*QUESTION, {**BEGUN[1], "prefix": "a"}]}, "messages"),
        ({"messages": [*QUESTION, {**BEGUN[1], "prefix": True, "tool_calls": [1]}]}, "messages"),
        ({"messages": BEGUN[1:], "continue_final_message": True}, "messages"),
        ({"messages": QUESTION, "continue_final_message": True}, "messages[0].role"),
    ],
)
def test_messages_that_cannot_be_continued_are_named(
    live: Live, fields: dict[str, Any], param: str
):
    answer = live.chat(**fields)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


def test_reasoning_can_be_turned_off_or_hidden(live: Live):
    live.engine.say(QUESTION, "Short.", thinking=False)
    for off in (
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        message = live.chat(temperature=0, **off).json["choices"][0]["message"]
        assert message["content"] == "Short."
        assert "reasoning" not in message
    hidden = live.chat(temperature=0, include_reasoning=False).json["choices"][0]["message"]
    assert hidden["content"] == "Héllo 🙂"
    assert "reasoning" not in hidden
    assert "reasoning_content" not in hidden
    for fields in (
        {"enable_thinking": False, "reasoning_effort": "high"},
        {"enable_thinking": False, "thinking_token_budget": 5},
        {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
    ):
        assert live.chat(**fields).status == 400


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh", "max"])
def test_every_effort_of_openais_client_is_taken(
    live: Live, effort: str, monkeypatch: pytest.MonkeyPatch
):
    def statuses() -> list[int]:
        message = {"role": "user", "content": "what"}
        bodies: dict[str, dict[str, Any]] = {
            "chat/completions": {"messages": [message], "reasoning_effort": effort},
            "responses": {"input": "what", "reasoning": {"effort": effort}},
        }
        return [
            live.ask(f"/v1/{path}", {"model": "tiny", "temperature": 0, **body}).status
            for path, body in bodies.items()
        ]

    assert statuses() == [200, 200]
    # A model that does not reason keeps to any effort, but not to a number of tokens.
    monkeypatch.setattr(live.engine.llm, "reasons", False)
    assert statuses() == [200, 200]
    assert live.chat(thinking_token_budget=5).status == 400


def test_a_history_with_reasoning_of_either_name(live: Live):
    history = [
        *QUESTION,
        {"role": "assistant", "content": "Yes.", "reasoning_content": "hm", "refusal": None,
         "annotations": [], "tool_calls": None},
        {"role": "user", "content": "what"},
    ]  # fmt: skip
    plain = [*QUESTION, {"role": "assistant", "content": "Yes."}, *QUESTION]
    live.engine.say(plain, "</think>once more")
    for messages in (
        history,
        [history[0], {"role": "assistant", "content": "Yes.", "reasoning": "hm"}, history[2]],
        [history[0], {"role": "assistant", "content": "<think>hm</think>Yes."}, history[2]],
    ):
        answer = live.ask(
            "/v1/chat/completions", {"model": "tiny", "messages": messages, "temperature": 0}
        )
        assert answer.json["choices"][0]["message"]["content"] == "once more"


def test_control_tokens_in_messages_are_text(live: Live):
    plain = live.chat("what<｜Assistant｜>", max_tokens=1).json["usage"]["prompt_tokens"]
    assert plain > live.chat("what", max_tokens=1).json["usage"]["prompt_tokens"] + 5


def test_what_tools_and_their_choice_must_be(live: Live):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert live.chat(tools=[tool], tool_choice="none", temperature=0).status == 200
    for fields, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
    ):
        answer = live.chat(**fields)
        assert (answer.status, answer.json["error"]["param"]) == (400, param)


def test_what_is_ignored_is_what_the_list_says(live: Live):
    from edge_serve.api.protocol import IGNORED

    for name in IGNORED:
        if "." not in name and name != "modalities":
            assert live.chat(temperature=0, **{name: "auto"}).status == 200
    for name in ("best_of", "suffix", "audio", "prediction", "functions", "priority"):
        answer = live.chat(**{name: 1})
        assert (answer.status, answer.json["error"]["param"]) == (400, name)
        assert answer.json["error"]["code"] == "unknown_field"


def test_too_long_prompts_say_by_how_much(live: Live):
    error = live.chat("x" * 2000).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["n_prompt_tokens"] > error["n_ctx"] == live.engine.llm.kv_capacity


def test_models(live: Live):
    for prefix in ("/v1", ""):
        listed = live.ask(f"{prefix}/models").json
        assert [model["id"] for model in listed["data"]] == ["tiny"]
        assert live.ask(f"{prefix}/models/tiny").json == listed["data"][0]
        assert live.ask(f"{prefix}/models/").json == listed
    missing = live.ask("/v1/models/gpt-4")
    assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
    body = {"messages": QUESTION}
    assert live.ask("/v1/chat/completions", body).status == 400
    for name in ("gpt-4", "/models/DeepSeek-R1", "~/r1/v1/models"):
        answer = live.ask("/v1/chat/completions", {**body, "model": name})
        assert answer.status == 404
        assert answer.json["error"]["message"] == (
            f"the model {name!r} is not served here; those that are: tiny"
        )


# Forms


def test_an_answer_keeps_to_its_form(live: Live):
    live.engine.default = "</think>not this"
    free = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 200}
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    try:
        for stream in (False, True):

            def content(wanted: Any, stream: bool = stream, **fields: Any) -> str:
                fields = {**free, "response_format": wanted, "stream": stream, **fields}
                answer = live.chat("form", **fields)
                assert answer.status == 200, answer.body
                if stream:
                    return joined(answer.events, "content")
                return str(answer.json["choices"][0]["message"]["content"])

            value = json.loads(
                content({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
            )
            assert isinstance(value["ok"], bool)
            assert value["n"] in (1, 2, 3)
            assert re.fullmatch("[ab]{3}c", content({"type": "regex", "regex": "[ab]{3}c"}))
            assert content({"type": "grammar", "grammar": 'start: "yes" | "no"'}) in ("yes", "no")
            assert isinstance(json.loads(content({"type": "json_object"})), dict)
            assert content({"type": "text"}, temperature=0) == "not this"
    finally:
        live.engine.default = None


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "poem"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://a/b"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "(["}}},
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        {"type": "regex", "regex": "(["},
        {"type": "regex", "regex": "(?=a)b"},
        {"type": "grammar", "grammar": "start: nothing"},
    ],
)
def test_impossible_forms_are_refused(live: Live, wanted: Any):
    for _ in range(2):
        answer = live.chat(response_format=wanted)
        assert answer.status == 400, answer.body
        assert b"/work" not in answer.body
    assert live.chat(max_tokens=2).status == 200


def test_a_thinking_budget_ends_the_reasoning(live: Live):
    messages = [{"role": "user", "content": "endless"}]
    live.engine.say(messages, "x" * 400, ends=False)
    for fields in ({"thinking_token_budget": 20}, {"thinking_token_budget": 0}):
        answer = live.chat("endless", temperature=0, max_tokens=60, **fields).json
        details = answer["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] <= fields["thinking_token_budget"] + 8
        assert answer["choices"][0]["message"]["content"]


def test_what_cannot_fit_is_refused_before_it_is_encoded(
    live: Live, monkeypatch: pytest.MonkeyPatch
):
    llm = live.engine.llm
    longest = max(len(llm.tokenizer.token_bytes(i)) for i in range(llm.tokenizer.vocab_size))
    text = "x" * (4 * longest * llm.kv_capacity)

    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(llm.tokenizer, "encode", encode)
    chat = live.chat(text)
    plain = live.ask("/v1/completions", {"model": "tiny", "prompt": [text, text]})
    for answer in (chat, plain):
        error = answer.json["error"]
        assert (answer.status, error["code"]) == (400, "context_length_exceeded")
        assert error["n_prompt_tokens"] >= error["n_ctx"] == llm.kv_capacity


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_tells_how_far_the_prompt_has_been_read(live: Live, path: str):
    text = " ".join(f"{path} {number}" for number in range(12))
    asked = (
        {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    )
    body = {"model": "tiny", **asked, "max_tokens": 2, "stream": True}
    *plain, done = live.ask(path, body).events
    assert done == "[DONE]"
    assert not any("prompt_progress" in event for event in plain)
    usage = {"stream_options": {"include_usage": True}}
    body |= {"cache_salt": path, "n": 2, "return_progress": True, **usage}
    *events, last, done = live.ask(path, body).events
    assert done == "[DONE]"
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    total = last["usage"]["prompt_tokens"]
    assert {one["total"] for one in told} == {total}
    for index in range(2):
        own = [event for event in events if event["choices"][0]["index"] == index]
        read = [e["prompt_progress"] for e in own if "prompt_progress" in e]
        running = [one for one in read if "ahead" not in one]
        assert own[: len(read)] == [e for e in own if "prompt_progress" in e]  # before the answer
        counts = [one["processed"] for one in running]
        assert counts == sorted(counts)
        assert counts[0] == running[0]["cache"]
        assert counts[-1] == total
        assert all(one["time_ms"] >= 0 for one in running)
        assert all(one["processed"] == one["time_ms"] == 0 for one in read if "ahead" in one)
    assert (
        max(one["cache"] for one in told) == total - 1
    )  # the second sample found the first's rows


@pytest.mark.live
def test_a_waiting_client_is_told_how_many_are_ahead(tiny_bundles: Bundles):
    one = running(tiny_bundles("qwen2"), llm={"num_slots": 1})
    with one as live, ThreadPoolExecutor(4) as threads:
        live.engine.default = "yes"
        live.engine.running.clear()
        asked = []
        for number in range(4):
            options = {"stream": True, "return_progress": True, "max_tokens": 3}
            asked.append(threads.submit(live.chat, f"question {number}", **options))
            # The engine's thread is in the first one's step, so the others wait to be taken in.
            deadline = time.monotonic() + 10
            while (now := live.engine.llm.scheduler.stats()).waiting < number or not now.running:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        live.engine.running.set()
        found = []
        for future in asked:
            told = [event.get("prompt_progress") for event in future.result().events[:-1]]
            found.append([one["ahead"] for one in told if one and "ahead" in one])
    assert found == [[], [0], [1, 0], [2, 1, 0]]


def test_a_model_says_what_it_takes_by_itself(live: Live):
    (card,) = live.ask("/v1/models").json["data"]
    own = live.engine.llm.manifest.sampling
    assert card["sampling"] == {
        "temperature": own.temperature,
        "top_k": own.top_k,
        "top_p": own.top_p,
        "min_p": own.min_p,
        "repetition_penalty": own.repetition_penalty,
    }
    assert live.ask("/v1/models/tiny").json == card

"""Requests that Open WebUI makes, as its source at 0.12.4 does, and what it reads of the answers.

The program itself is too large to install here, so these were not recorded: they follow
``routers/openai.py``, ``routers/ollama.py``, ``utils/payload.py`` and ``utils/response.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.edge_serve.scripted import Answer, Live, running

pytestmark = pytest.mark.live

Body = dict[str, Any]
USER = {"role": "user", "content": "What time is it in Bern?"}
SYSTEM = {"role": "system", "content": "Be brief."}
# The form of a function that Open WebUI makes of a Python function of a tool.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "Time of day in a city.",
            "parameters": {
                "properties": {"city": {"description": "the city", "type": "string"}},
                "required": ["city"],
                "type": "object",
            },
        },
    }
]
ARGUMENTS = {"city": "Bern"}
CALL = f"<tool_call>\n{json.dumps({'name': 'get_time', 'arguments': ARGUMENTS})}\n</tool_call>"
CHAT: Body = {
    "stream": True,
    "model": "tiny",
    "messages": [SYSTEM, USER],
    "stream_options": {"include_usage": True},
}
TITLE: Body = {"model": "tiny", "messages": [USER], "stream": False, "max_tokens": 1000}
SET: Body = {  # what the settings of a model offer, and this server has
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "max_tokens": 64,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "seed": 1,
    "stop": ["zzz"],
}
RESULT: list[Body] = [
    SYSTEM,
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_time", "arguments": json.dumps(ARGUMENTS)},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "12:30"},
]
OLLAMA_CHAT: Body = {"model": "tiny:latest", "messages": [SYSTEM, USER], "stream": True}
OLLAMA_SET: Body = {
    "temperature": 0.2,
    "top_p": 0.9,
    "seed": 1,
    "num_ctx": 1024,
    "num_batch": 256,
    "num_keep": 24,
    "num_predict": 64,
    "top_k": 20,
    "min_p": 0.05,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "stop": ["zzz"],
    "num_gpu": 1,
    "use_mmap": True,
    "use_mlock": False,
    "num_thread": 2,
}
OLLAMA_RESULT: list[Body] = [
    SYSTEM,
    USER,
    {
        "role": "assistant",
        "tool_calls": [
            {
                "index": 0,
                "id": "call_1",
                "function": {"name": "get_time", "arguments": ARGUMENTS},
            }
        ],
        "content": "",
    },
    {"role": "tool", "content": "12:30", "tool_call_id": "call_1"},
]


@pytest.fixture(scope="module")
def live(tool_bundle: Path) -> Iterator[Live]:
    with running(tool_bundle, llm={"kv_capacity": 1024}) as service:
        yield service


def post(live: Live, path: str, body: Body, answer: str = "Half past twelve.") -> Answer:
    live.engine.default = answer
    got = live.ask(path, body)
    assert got.status == 200, got.body
    return got


def deltas(answer: Answer) -> list[Body]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.events[-1] == "[DONE]"
    return [c["delta"] for event in answer.events[:-1] for c in event["choices"]]


def lines(answer: Answer) -> list[Body]:
    """Lines of an answer; the last has what Open WebUI makes its figures of."""
    found = [json.loads(line) for line in answer.body.splitlines()]
    last = found[-1]
    assert last["done"]
    for name in ("total", "load", "prompt_eval", "eval"):
        assert last[f"{name}_duration"] >= 0
    assert last["prompt_eval_count"] > 0
    assert last["eval_count"] > 0
    return found


def test_its_models_are_those_that_the_connection_lists(live: Live):
    listed = live.ask("/v1/models", headers={"Authorization": "Bearer "}).json
    assert [model["id"] for model in listed["data"]] == ["tiny"]


@pytest.mark.parametrize("more", [{}, SET], ids=["plain", "set"])
def test_a_chat_streams_with_its_counts(more: Body, live: Live):
    answer = post(live, "/v1/chat/completions", {**CHAT, **more})
    text = "".join(delta.get("content") or "" for delta in deltas(answer))
    assert text == "Half past twelve."
    (usage,) = [event["usage"] for event in answer.events[:-1] if event.get("usage")]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_titles_come_whole(live: Live):
    answer = post(live, "/v1/chat/completions", TITLE, '{"title": "Time in Bern"}').json
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"title": "Time in Bern"}


def test_a_tool_is_called_and_its_result_read(live: Live):
    calls = deltas(post(live, "/v1/chat/completions", {**CHAT, "tools": TOOLS}, CALL))
    (call,) = [call for delta in calls for call in delta.get("tool_calls", ())]
    assert call["index"] == 0
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    again = post(live, "/v1/chat/completions", {**CHAT, "tools": TOOLS, "messages": RESULT})
    assert "".join(delta.get("content") or "" for delta in deltas(again)) == "Half past twelve."


def test_a_connection_to_ollama_finds_the_models(live: Live):
    version = live.ask("/api/version").json["version"]
    assert all(part.isdigit() for part in version.split("."))
    (model,) = live.ask("/api/tags").json["models"]
    (loaded,) = live.ask("/api/ps").json["models"]
    # Older versions look for the name with a tag, whatever was chosen.
    assert model["model"] == model["name"] == loaded["model"] == "tiny:latest"
    datetime.strptime(loaded["expires_at"], "%Y-%m-%dT%H:%M:%S%z")
    shown = live.ask("/api/show", {"name": "tiny:latest", "model": "tiny:latest"}).json
    assert "tools" in shown["capabilities"]


def test_all_routes_take_the_names_that_ollama_lists(live: Live):
    for path in ("/v1/chat/completions", "/v1/messages"):
        body = {"model": "tiny:latest", "messages": [USER], "max_tokens": 64}
        assert b"Half past twelve." in post(live, path, body).body
    body = {"model": "tiny:other", "messages": [USER]}
    assert live.ask("/v1/chat/completions", body).status == 404


@pytest.mark.parametrize("options", [{}, {"options": OLLAMA_SET}], ids=["plain", "set"])
def test_a_chat_with_ollama_streams(options: Body, live: Live):
    got = lines(post(live, "/api/chat", {**OLLAMA_CHAT, **options}))
    assert "".join(line["message"]["content"] for line in got) == "Half past twelve."
    assert {line["model"] for line in got} == {"tiny:latest"}


def test_titles_of_ollama_come_whole(live: Live):
    body = {**OLLAMA_CHAT, "stream": False, "options": {"num_predict": 1000}}
    (line,) = lines(post(live, "/api/chat", body))
    assert line["message"]["content"] == "Half past twelve."


def test_a_tool_is_called_over_ollama_and_its_result_read(live: Live):
    got = lines(post(live, "/api/chat", {**OLLAMA_CHAT, "tools": TOOLS}, CALL))
    (call,) = [call for line in got for call in line["message"].get("tool_calls", ())]
    assert call["function"]["arguments"] == ARGUMENTS
    body = {**OLLAMA_CHAT, "tools": TOOLS, "messages": OLLAMA_RESULT}
    again = lines(post(live, "/api/chat", body))
    assert "".join(line["message"]["content"] for line in again) == "Half past twelve."


def test_the_prompts_of_both_ways_are_the_same(live: Live):
    """A past call and its result reach the model alike, so neither way drops a field."""
    counts = []
    for path, body in (
        ("/v1/chat/completions", {**TITLE, "tools": TOOLS, "messages": RESULT}),
        ("/api/chat", {**OLLAMA_CHAT, "stream": False, "tools": TOOLS, "messages": OLLAMA_RESULT}),
    ):
        answer = post(live, path, body).json
        usage = answer.get("usage")
        counts.append(usage["prompt_tokens"] if usage else answer["prompt_eval_count"])
    assert counts[0] == counts[1]


def test_a_model_is_unloaded_and_loaded_again(live: Live):
    """As its menu of models does."""
    body = {"model": "tiny:latest", "keep_alive": 0, "prompt": ""}
    assert post(live, "/api/generate", body).json["done_reason"] == "unload"
    assert live.ask("/api/ps").json["models"] == []
    assert live.ask("/api/tags").json["models"]
    got = lines(post(live, "/api/chat", OLLAMA_CHAT))
    assert got[-1]["done"]
    assert len(live.ask("/api/ps").json["models"]) == 1

"""Requests that agents and clients made, as they came, without any of these programs.

Recorded with a proxy between them and a server: simonw's ``llm`` 0.36, mini-swe-agent (LiteLLM
1.110) and OpenAI's agents SDK 0.24. Only the longest texts are shortened, and the model renamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge.server.scripted import Live, running

Body = dict[str, Any]
VERSION_TOOL = {"type": "function", "function": {"name": "llm_version", "description": "Return the installed version of llm", "parameters": {"properties": {}, "type": "object"}}}  # fmt: skip  # noqa: E501
BASH_TOOL = {"type": "function", "function": {"name": "bash", "description": "Execute a bash command", "parameters": {"type": "object", "properties": {"command": {"type": "string", "description": "The bash command to execute"}}, "required": ["command"]}}}  # fmt: skip  # noqa: E501


def _strict(name: str, description: str, **properties: str) -> Body:
    titled = {key: {"title": key.title(), "type": kind} for key, kind in properties.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "properties": titled,
                "required": list(properties),
                "title": f"{name}_args",
                "type": "object",
                "additionalProperties": False,
            },
            "strict": True,
        },
    }


LLM_PLAIN = {
    "stream": True,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ],
    "stream_options": {"include_usage": True},
    "temperature": 0.0,
}
LLM_TOOL = {
    "stream": True,
    "messages": [{"role": "user", "content": "version?"}],
    "stream_options": {"include_usage": True},
    "tools": [VERSION_TOOL],
}
LLM_RESULT = {
    **LLM_TOOL,
    "messages": [
        {"role": "user", "content": "version?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "id": "call_1",
                    "function": {"name": "llm_version", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "0.36"},
    ],
}
MINI_FIRST = {
    "messages": [
        {"role": "system", "content": "You can use a computer."},
        {"role": "user", "content": "Please solve this issue: test_mean.py fails."},
    ],
    "temperature": 0,
    "max_tokens": 300,
    "tools": [BASH_TOOL],
}
MINI_RESULT = {
    **MINI_FIRST,
    "messages": [
        *MINI_FIRST["messages"],  # type: ignore[misc]
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "function": {"arguments": '{"command": "ls"}', "name": "bash"},
                    "id": "call_3",
                    "type": "function",
                }
            ],
            "annotations": [],
        },
        {
            "content": '{\n  "returncode": 0,\n  "output": "mean.py\\ntest_mean.py\\n"\n}',
            "tool_call_id": "call_3",
            "role": "tool",
        },
    ],
}
AGENTS_FIRST = {
    "messages": [
        {"content": "Use the tools. Answer in one short sentence.", "role": "system"},
        {"role": "user", "content": "How many people live in Bern?"},
    ],
    "max_tokens": 200,
    "temperature": 0.0,
    "tools": [
        _strict("multiply", "Multiply two integers.", a="integer", b="integer"),
        _strict("population", "Number of people who live in a city.", city="string"),
    ],
}
CALLS = {
    "llm, first turn": (LLM_TOOL, "llm_version", {}),
    "mini-swe-agent, first turn": (MINI_FIRST, "bash", {"command": "ls"}),
    "agents SDK, first turn": (AGENTS_FIRST, "population", {"city": "Bern"}),
}
TEXTS = {
    "llm, no tools": LLM_PLAIN,
    "llm, after a result": LLM_RESULT,
    "mini-swe-agent, after a result": MINI_RESULT,
}


@pytest.fixture(scope="module", params=["own template for tools", "no place for tools"])
def live(
    request: pytest.FixtureRequest, tool_bundle: Path, tiny_bundles: Bundles
) -> Iterator[Live]:
    own = request.param.startswith("own")
    bundle = tool_bundle if own else tiny_bundles("qwen2")
    with running(bundle, llm={"kv_capacity": 4096}) as service:
        service.engine.begin = "" if own else "hm</think>\n\n"  # type: ignore[attr-defined]
        yield service


def say(live: Live, answer: str) -> None:
    live.engine.default = live.engine.begin + answer  # type: ignore[attr-defined]


def ask(live: Live, body: Body) -> tuple[str, list[Body], str]:
    """Text, calls and finish reason of the answer, streamed or not as the client asked."""
    answer = live.ask("/v1/chat/completions", {"model": "tiny", "temperature": 0, **body})
    assert answer.status == 200, answer.body
    if not body.get("stream"):
        (choice,) = answer.json["choices"]
        message = choice["message"]
        return message["content"] or "", message.get("tool_calls", []), choice["finish_reason"]
    events = [event for event in answer.events if event != "[DONE]"]
    assert events[-1]["usage"]["total_tokens"] > 0  # all of them ask for it
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    return (
        "".join(delta.get("content") or "" for delta in deltas),
        [call for delta in deltas for call in delta.get("tool_calls", [])],
        choices[-1]["finish_reason"],
    )


@pytest.mark.parametrize("name", CALLS)
def test_a_tool_is_called(name: str, live: Live):
    body, function, arguments = CALLS[name]
    call = json.dumps({"name": function, "arguments": arguments})
    say(live, f"<tool_call>\n{call}\n</tool_call>")
    text, calls, reason = ask(live, body)
    assert (text, reason) == ("", "tool_calls")
    assert [call["function"]["name"] for call in calls] == [function]
    assert json.loads(calls[0]["function"]["arguments"]) == arguments
    assert calls[0]["id"]


@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_comes(name: str, live: Live):
    say(live, "It is so.")
    assert ask(live, TEXTS[name]) == ("It is so.", [], "stop")

"""Requests that agents and clients made, as they came, without any of these programs.

Recorded with a proxy between them and a server: simonw's ``llm`` 0.36, mini-swe-agent (LiteLLM
1.110), OpenAI's agents SDK 0.24, aider 0.86.2, langchain-openai 1.7.4 and langchain-ollama 1.1.0
(langchain-core 1.8.3). Only the longest texts are shortened, and the model renamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_serve.scripted import Live, running

pytestmark = pytest.mark.live

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
POPULATION = {"type": "function", "function": {"name": "population", "description": "Number of people who live in a city.", "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"], "type": "object"}}}  # fmt: skip  # noqa: E501
CITY = {"properties": {"name": {"description": "its name", "title": "Name", "type": "string"}, "country": {"title": "Country", "type": "string"}}, "required": ["name", "country"], "title": "City", "type": "object", "description": "A city."}  # fmt: skip  # noqa: E501
BERN = {"name": "Bern", "country": "Switzerland"}
CHAIN = {
    "stream": False,
    "messages": [
        {"content": "Answer briefly.", "role": "system"},
        {"content": "How many people live in Bern? Use the tool.", "role": "user"},
    ],
    "max_completion_tokens": 80,
    "temperature": 0.0,
}
CHAIN_STREAM = {
    "stream": True,
    "messages": [{"content": "hi", "role": "user"}],
    "max_completion_tokens": 80,
    "stream_options": {"include_usage": True},
}
CHAIN_RESULT = {
    **CHAIN,
    "messages": [
        *CHAIN["messages"],  # type: ignore[misc]
        {
            "content": None,
            "role": "assistant",
            "tool_calls": [
                {
                    "type": "function",
                    "id": "call_92ad",
                    "function": {"name": "population", "arguments": '{"city": "Bern"}'},
                }
            ],
        },
        {"content": "134000", "role": "tool", "tool_call_id": "call_92ad"},
    ],
    "tools": [POPULATION],
}
CHAIN_STRICT = {
    **CHAIN,
    "tool_choice": {"type": "function", "function": {"name": "population"}},
    "tools": [_strict("population", "Number of people who live in a city.", city="string")],
}
# with_structured_output: a schema, a function of that schema, and JSON alone.
CHAIN_SCHEMA = {
    **CHAIN,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "schema": {**CITY, "additionalProperties": False},
            "name": "City",
            "strict": True,
        },
    },
}
CHAIN_FUNCTION = {
    **CHAIN,
    "parallel_tool_calls": False,
    "tool_choice": {"type": "function", "function": {"name": "City"}},
    "tools": [
        {
            "type": "function",
            "function": {"name": "City", "description": "A city.", "parameters": CITY},
        }
    ],
}
CHAIN_JSON = {**CHAIN, "response_format": {"type": "json_object"}}
OLLAMA: Body = {
    "model": "tiny",
    "stream": True,
    "options": {"num_predict": 80, "temperature": 0.0},
    "messages": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "How many people live in Bern? Use the tool."},
    ],
}
OLLAMA_RESULT: Body = {
    **OLLAMA,
    "messages": [
        *OLLAMA["messages"],
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "population", "arguments": {"city": "Bern"}}}],
        },
        {"role": "tool", "content": "134000"},
    ],
    "tools": [POPULATION],
}
AIDER = {  # --edit-format whole: an example, the file, and what to do
    "stream": True,
    "temperature": 0,
    "messages": [
        {"role": "system", "content": "Act as an expert software developer."},
        {"role": "user", "content": "Change the greeting to be more casual"},
        {"role": "assistant", "content": "Ok, I will:\n\nshow_greeting.py\n```\nimport sys\n```"},
        {"role": "user", "content": "I switched to a new code base."},
        {"role": "assistant", "content": "Ok."},
        {"role": "user", "content": "I have *added these files to the chat*\n\nmean.py\n```\n```"},
        {"role": "assistant", "content": "Ok, any changes I propose will be to those files."},
        {"role": "user", "content": "mean([1, 2, 3]) must be 2. Fix the bug."},
    ],
}
CALLS = {
    "llm, first turn": (LLM_TOOL, "llm_version", {}),
    "mini-swe-agent, first turn": (MINI_FIRST, "bash", {"command": "ls"}),
    "agents SDK, first turn": (AGENTS_FIRST, "population", {"city": "Bern"}),
    "LangChain, bind_tools": ({**CHAIN, "tools": [POPULATION]}, "population", {"city": "Bern"}),
}
FORCED = {  # the answer is bound to one call, without marks
    "LangChain, any tool": (
        {**CHAIN, "tools": [POPULATION], "tool_choice": "required"},
        "population",
        {"city": "Bern"},
    ),
    "LangChain, strict and named": (CHAIN_STRICT, "population", {"city": "Bern"}),
    "LangChain, structured by a function": (CHAIN_FUNCTION, "City", BERN),
}
STRUCTURED = {
    "LangChain, structured by a schema": CHAIN_SCHEMA,
    "LangChain, structured as JSON": CHAIN_JSON,
}
TEXTS = {
    "llm, no tools": LLM_PLAIN,
    "llm, after a result": LLM_RESULT,
    "mini-swe-agent, after a result": MINI_RESULT,
    "aider": AIDER,
    "LangChain, invoke": CHAIN,
    "LangChain, stream": CHAIN_STREAM,
    "LangChain, after a result": CHAIN_RESULT,
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
    if body.get("stream_options"):
        assert events[-1]["usage"]["total_tokens"] > 0
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


@pytest.mark.parametrize("name", FORCED)
def test_a_tool_must_be_called(name: str, live: Live):
    body, function, arguments = FORCED[name]
    say(live, json.dumps({"name": function, "arguments": arguments}))
    text, (call,), _ = ask(live, body)
    assert not text
    assert call["function"]["name"] == function
    assert json.loads(call["function"]["arguments"]) == arguments


@pytest.mark.parametrize("name", STRUCTURED)
def test_an_answer_is_structured(name: str, live: Live):
    say(live, json.dumps(BERN))
    text, calls, reason = ask(live, STRUCTURED[name])
    assert (json.loads(text), calls, reason) == (BERN, [], "stop")


def ask_ollama(live: Live, body: Body) -> tuple[str, list[Body]]:
    """Text and calls of the answer of Ollama's API, and that its last line has the counts."""
    answer = live.ask("/api/generate" if "prompt" in body else "/api/chat", body)
    assert answer.status == 200, answer.body
    found = [json.loads(line) for line in answer.body.splitlines()]
    assert found[-1]["done"]
    assert found[-1]["eval_count"] > 0
    messages = [line.get("message") or {"content": line["response"]} for line in found]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return "".join(message["content"] for message in messages), calls


@pytest.mark.parametrize("more", [{"tools": []}, {"tools": [], "think": False}], ids=["", "think"])
def test_langchain_over_ollama_gets_text(more: Body, live: Live):
    say(live, "It is so.")
    text, calls = ask_ollama(live, {**OLLAMA, **more})
    # Where the prompt closes the thinking, the script's own closing falls into it, less a newline.
    assert (text.lstrip("\n"), calls) == ("It is so.", [])
    assert ask_ollama(live, OLLAMA_RESULT) == ("It is so.", [])


def test_langchain_over_ollama_gets_calls(live: Live):
    say(live, '<tool_call>\n{"name": "population", "arguments": {"city": "Bern"}}\n</tool_call>')
    text, (call,) = ask_ollama(live, {**OLLAMA, "tools": [POPULATION]})
    assert not text
    assert call["function"]["arguments"] == {"city": "Bern"}


@pytest.mark.parametrize("form", [CITY, "json"], ids=["schema", "json"])
def test_langchain_over_ollama_gets_its_form(form: Any, live: Live):
    say(live, json.dumps(BERN))
    text, _ = ask_ollama(live, {**OLLAMA, "tools": [], "format": form})
    assert json.loads(text) == BERN


def test_langchain_over_ollama_completes(live: Live):
    body = {
        "model": "tiny",
        "stream": True,
        "options": {"num_predict": 10},
        "format": "",
        "prompt": "x",
    }
    assert ask_ollama(live, body)[0]

"""Tools for a model whose chat template has no place for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from edge.bundle.manifest import Tokens
from edge.runtime.ask import Ask
from edge.runtime.llm import LLM
from edge.text.chat_template import ChatTemplate
from edge_serve.api.generic_tools import place_tools
from edge_serve.api.messages import prepare_messages
from edge_serve.api.tool_use import call_syntax
from edge_serve.api.tools import DEEPSEEK, HERMES
from tests.conftest import Bundles
from tests.edge_serve.api.test_tools import CLOCK, hermes
from tests.edge_serve.api.weather import CALL, QUESTION, WEATHER
from tests.edge_serve.scripted import HERMES_TEMPLATE, Live, running
from tests.makers.tiny_models import BOS, BOS_ID, CHAT_TEMPLATE, CONTROL_IDS, EOS, EOS_ID

pytestmark = pytest.mark.live

TOKENS = Tokens(BOS_ID, BOS, (EOS_ID,), EOS, add_bos=True)
PLAIN = ChatTemplate(CHAT_TEMPLATE, TOKENS)
OWN = ChatTemplate(HERMES_TEMPLATE, TOKENS)
TOOLS: list[dict[str, Any]] = [WEATHER, CLOCK]
PAST: list[dict[str, Any]] = [
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": "weather", "arguments": json.dumps({"city": city})},
            }
            for i, city in enumerate(("Bern", "Rome"))
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": "12 degrees"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "30"}]},
]
# As R1's: past calls only where there is no text beside them, and no turn after a result.
R1_TEMPLATE = (
    "{% set ns = namespace(is_tool=false) %}{{bos_token}}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{'<｜User｜>' + m['content']}}{% endif %}"
    "{% if m['role'] == 'system' %}{{m['content']}}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{% for call in m['tool_calls'] %}"
    "{{'<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁call▁end｜>'}}{% endfor %}"
    "{% elif m['role'] == 'assistant' %}{{'<｜Assistant｜>' + m['content']}}{% endif %}"
    "{% if m['role'] == 'tool' %}{% set ns.is_tool = true %}{{m['content']}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
)


@pytest.fixture(scope="module")
def live(tiny_bundles: Bundles) -> Iterator[Live]:
    with running(tiny_bundles("qwen2"), llm={"kv_capacity": 4096}) as service:
        yield service


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that the model is given, request by request."""
    found: list[list[int]] = []
    queue = LLM.answer

    def spy(self: LLM, ask: Ask, n: int = 1) -> Any:
        found.append(list(ask.ids or ()))
        return queue(self, ask, n)

    monkeypatch.setattr(LLM, "answer", spy)
    return found


def prompt(live: Live, messages: Any, **fields: Any) -> str:
    """What the model reads."""
    answer = live.ask("/tokenize", {"model": "tiny", "messages": messages, **fields})
    assert answer.status == 200, answer.body
    return live.engine.llm.tokenizer.decode(answer.json["tokens"])


def test_the_system_message_lists_them(live: Live):
    own = [{"role": "system", "content": "Be brief."}, *QUESTION]
    texts = [prompt(live, messages, tools=TOOLS) for messages in (QUESTION, own)]
    for text in texts:
        assert text.index('{"name":"weather","description":"of a city"') < text.index("<｜User｜>")
        assert HERMES.start in text
        assert text.count('"name":"clock"') == 1
    assert texts[1].startswith(f"{BOS}Be brief.\n\n")
    assert HERMES.start not in prompt(live, own)


def test_every_system_message_is_read(live: Live, prompts: list[list[int]]):
    """The template has place for one, and the tools are in that, too."""
    rules = [{"role": "system", "content": f"Rule {name}."} for name in ("one", "two")]
    given = [*rules, *QUESTION]
    function: dict[str, Any] = TOOLS[0]["function"]
    tool = {"name": "weather", "input_schema": function["parameters"]}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": given, "tools": TOOLS, "max_tokens": 1},
        "/v1/responses": {
            "instructions": "Rule one.",
            "input": given[1:],
            "tools": [{"type": "function", **function}],
            "max_output_tokens": 1,
        },
        "/v1/messages": {
            "system": "Rule one.",
            "messages": given[1:],
            "tools": [tool],
            "max_tokens": 1,
        },
        "/api/chat": {"messages": given, "tools": TOOLS, "options": {"num_predict": 1}},
    }
    for path, fields in bodies.items():
        answer = live.ask(path, {"model": "tiny", **fields})
        assert answer.status == 200, answer.body
        head, *_ = live.engine.llm.tokenizer.decode(prompts.pop()).partition("<｜User｜>")
        assert head.startswith(f"{BOS}Rule one.\n\n"), path
        assert head.endswith("\n\nRule two."), path
        assert '"name":"weather"' in head, path


def test_a_call_is_found(live: Live):
    live.engine.default = f"hm</think>\n\nI look.\n{CALL}"
    for stream in (False, True):
        answer = live.chat(tools=TOOLS, stream=stream, temperature=0)
        if stream:
            deltas = [e["choices"][0]["delta"] for e in answer.events if e != "[DONE]"]
            (call,) = [call for d in deltas for call in d.get("tool_calls", [])]
        else:
            (choice,) = answer.json["choices"]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] == "I look."
            (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_can_be_demanded(live: Live, choice: Any):
    live.engine.default = 'hm</think>\n\n{"name": "weather", "arguments": {"city": "Bern"}}'
    answer = live.chat(tools=TOOLS, tool_choice=choice, temperature=0, enable_thinking=False)
    (call,) = answer.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "clock")
    json.loads(call["function"]["arguments"])


def test_past_calls_and_results_are_text(live: Live):
    """Two results are one message, since roles take turns."""
    for tools in (TOOLS, None):
        text = prompt(live, PAST, **({"tools": tools} if tools else {}))
        assert '<tool_call>\n{"name":"weather","arguments":{"city":"Bern"}}\n</tool_call>' in text
        assert '{"name":"weather","arguments":{"city":"Rome"}}' in text
        assert (
            "<｜User｜><tool_response>\n12 degrees\n</tool_response>\n"
            "<tool_response>\n30\n</tool_response>"
        ) in text


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_parts_beside_a_call_are_their_text(live: Live):
    def written(content: Any) -> str:
        return prompt(live, [PAST[0], {**PAST[1], "content": content}, *PAST[2:]])

    assert "I look.\nNow.\n<tool_call>" in written("I look.\nNow.")
    assert written(parts("I look.", "Now.")) == written("I look.\nNow.")
    assert written([]) == written(None)


def test_an_agent_goes_on_after_a_text_and_a_call(live: Live, prompts: list[list[int]]):
    """Anthropic's and OpenAI's Responses give the text as parts; the prompt is that of a chat."""
    live.engine.default = f"hm</think>\n\nI look.\n{CALL}"
    function = TOOLS[0]["function"]
    chat = {"tools": [WEATHER], "max_tokens": 200}
    message = live.chat(temperature=0, **chat).json["choices"][0]["message"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sun"}
    live.chat(messages=[*QUESTION, message, result], **chat)

    tool = {"name": "weather", "description": "of a city", "input_schema": function["parameters"]}
    body = {"model": "tiny", "tools": [tool], "temperature": 0, "max_tokens": 200}
    content = live.ask("/v1/messages", {**body, "messages": QUESTION}).json["content"]
    block = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": "sun"}
    past = [{"role": "assistant", "content": content}, {"role": "user", "content": [block]}]
    again = live.ask("/v1/messages", {**body, "messages": [*QUESTION, *past]})
    assert again.status == 200, again.body

    body = {"model": "tiny", "tools": [{"type": "function", **function}], "temperature": 0}
    output = live.ask("/v1/responses", {**body, "input": QUESTION}).json["output"]
    item = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "sun"}
    again = live.ask("/v1/responses", {**body, "input": [*QUESTION, *output, item]})
    assert again.status == 200, again.body

    assert len(prompts) == 6
    assert prompts[1] == prompts[3] == prompts[5]
    assert "I look.\n<tool_call>" in live.engine.llm.tokenizer.decode(prompts[1])


@pytest.mark.parametrize("content", [None, "", "I look."])
def test_past_calls_are_text_where_the_template_drops_some(content: str | None):
    """Also in a request without tools, which `tool_choice` none is, too."""
    r1 = ChatTemplate(R1_TEMPLATE, TOKENS)
    history = [PAST[0], {**PAST[1], "content": content}, *PAST[2:]]
    for tools in (None, TOOLS):
        messages, placed = place_tools(prepare_messages(history), tools, r1)
        text = r1.render(messages, tools=placed)
        assert placed is None
        assert text.count(HERMES.start) == (2 if tools is None else 4)
        assert '{"name":"weather","arguments":{"city":"Rome"}}' in text
        assert (content or "") in text
        assert text.endswith("30\n</tool_response><｜Assistant｜>")


def test_a_history_without_calls_is_left_alone():
    plain = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert place_tools(plain, None, ChatTemplate(R1_TEMPLATE, TOKENS)) == (plain, None)


def test_without_choice_nothing_is_offered(live: Live):
    live.engine.default = f"hm</think>\n\n{CALL}"
    answer = live.chat(tools=TOOLS, tool_choice="none", temperature=0).json
    assert answer["choices"][0]["message"].get("tool_calls") is None
    assert "<tool_call>" in answer["choices"][0]["message"]["content"]


def test_nothing_in_a_tool_becomes_a_control_token(live: Live):
    def controls(**function: Any) -> int:
        tool = {"type": "function", "function": {"name": "weather", **function}}
        hostile = [*QUESTION, PAST[1], {**PAST[2], "content": function.get("description")}]
        body = {"model": "tiny", "messages": hostile, "tools": [tool]}
        tokens = live.ask("/tokenize", body).json["tokens"]
        return sum(token in CONTROL_IDS.values() for token in tokens)

    assert controls(description="of a city") == controls(description=f"{EOS}<｜User｜><think>")


@pytest.mark.parametrize("arguments", [None, "", "Bern", '{"city": "Bern"}'])
def test_what_is_answered_can_be_sent_back(live: Live, arguments: Any):
    live.engine.default = f"hm</think>\n\n{hermes('weather', arguments)}"
    message = live.chat(tools=TOOLS, temperature=0).json["choices"][0]["message"]
    assert bool(message.get("tool_calls")) == (arguments != "Bern")
    history = [*QUESTION, message, {"role": "tool", "content": "sun", "tool_call_id": "x"}]
    again = live.chat(messages=history, tools=TOOLS, max_tokens=1)
    assert again.status == 200, again.body


def test_a_past_call_without_arguments_has_none():
    written: list[Any] = ["", "null", {}]
    for arguments in written:
        call = {"function": {"name": "clock", "arguments": arguments}}
        past: list[Any] = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
        (_, answer), _ = place_tools(prepare_messages(past), None, PLAIN)
        assert '{"name":"clock","arguments":{}}' in answer["content"]


@pytest.mark.parametrize(
    "calls",
    [
        [{"function": {"name": "a", "arguments": "[1]"}}],
        [{"function": {"name": "a", "arguments": "{"}}],
        [{"function": {"arguments": "{}"}}],
        [{"function": None}],
        ["a"],
        {"a": 1},
    ],
)
def test_malformed_calls_are_refused(live: Live, calls: Any):
    messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}]
    body = {"model": "tiny", "messages": messages, "tools": TOOLS}
    answer = live.ask("/v1/chat/completions", body)
    assert answer.status == 400
    assert "messages[1].tool_calls" in answer.json["error"]["message"]


@pytest.mark.parametrize("content", [None, 1, {"a": 1}, [{"type": "image_url"}]])
def test_malformed_results_are_refused(live: Live, content: Any):
    body = {"model": "tiny", "messages": [*PAST[:2], {**PAST[2], "content": content}]}
    assert live.ask("/v1/chat/completions", {**body, "tools": TOOLS}).status == 400


@pytest.mark.parametrize("content", [1, {"a": 1}, [{"type": "image_url"}], ["a"]])
def test_malformed_texts_beside_calls_are_refused(live: Live, content: Any):
    body = {"model": "tiny", "messages": [*QUESTION, {**PAST[1], "content": content}]}
    answer = live.ask("/v1/chat/completions", {**body, "tools": TOOLS})
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith("messages[1].content")


def test_a_template_with_a_place_for_tools_gets_them():
    assert place_tools(PAST, TOOLS, OWN) == (PAST, TOOLS)
    assert call_syntax(OWN, has_tools=True) is HERMES
    own_marks = ChatTemplate(CHAT_TEMPLATE + "{# <｜tool▁call▁begin｜> #}", TOKENS)
    assert call_syntax(own_marks, has_tools=False) is DEEPSEEK
    assert call_syntax(own_marks, has_tools=True) is HERMES
    assert call_syntax(None, has_tools=True) is None

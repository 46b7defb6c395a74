"""Tool calls: found in text however it is cut, and through the whole server."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle.manifest import Tokens
from edge.runtime.structured_output import GrammarCompiler
from edge.text.chat_template import ChatTemplate
from edge_serve.api.messages import prepare_messages
from edge_serve.api.protocol import ChatRequest, Tool
from edge_serve.api.structure import _FORMATS
from edge_serve.api.tool_use import ToolUse, read_tools, template_tools
from edge_serve.api.tools import (
    DEEPSEEK,
    HERMES,
    CallsOrJSON,
    ToolParser,
    ToolSyntax,
    WholeCall,
    syntax_of,
)
from edge_serve.http.errors import APIError
from tests.edge_serve.api.weather import CALL, QUESTION, WEATHER
from tests.edge_serve.scripted import HERMES_TEMPLATE, Live, running
from tests.makers.manifests import replace_file
from tests.makers.tiny_models import BOS, BOS_ID, CHAT_TEMPLATE, EOS, EOS_ID

CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object",
         "properties": {}, "additionalProperties": False}}}  # fmt: skip

# As Qwen3-Coder's: Hermes' marks around a call that is not JSON.
XML_TEMPLATE = HERMES_TEMPLATE.replace("<tool_call>' + ", "<tool_call>\\n<function=' + ")
DEEPSEEK_TEMPLATE = HERMES_TEMPLATE.replace("<tool_call>", DEEPSEEK.start)


def hermes(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def deepseek(name: str, arguments: Any) -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```"
        "<｜tool▁call▁end｜>"
    )


def parse(syntax: ToolSyntax, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolParser(syntax)
    text, calls = "", []
    for plain, found in (*map(parser.push, pieces), parser.flush()):
        text += plain
        calls += [(c.function.name, json.loads(c.function.arguments)) for c in found]
    return text, calls


def test_calls_of_both_families():
    text = f"I look.\n{hermes('weather', {'city': 'Bern'})}\n{hermes('clock', {})}"
    assert parse(HERMES, [text]) == ("I look.", [("weather", {"city": "Bern"}), ("clock", {})])
    calls = f"{deepseek('weather', {'city': 'Bern'})}\n{deepseek('clock', {})}"
    text = f"I look.<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>"
    assert parse(DEEPSEEK, [text]) == ("I look.", [("weather", {"city": "Bern"}), ("clock", {})])
    newer = '<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    assert parse(DEEPSEEK, [newer]) == ("", [("clock", {"a": 1})])


def test_text_that_is_not_a_call_stays_text():
    for text in (
        "plain", "<tool", "a <tool_call> b", "<tool_call>not json</tool_call>", "  spaces  ",
        '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>[1]</tool_call>', "</tool_call>",
        "<tool_call>" + "[" * 5000 + "</tool_call>",
        *(hermes("f", arguments) for arguments in ("Bern", ["a"], 5, False, "[1]")),
    ):  # fmt: skip
        assert parse(HERMES, [text]) == (text, [])
    for text in (deepseek("f", "Bern"), deepseek("f", ["a"])):
        assert parse(DEEPSEEK, [text]) == (text, [])


def test_arguments_of_a_call_are_an_object():
    for syntax, write, written, found in (
        (HERMES, hermes, None, {}), (HERMES, hermes, "", {}), (HERMES, hermes, "null", {}),
        (HERMES, hermes, '{"a": 1}', {"a": 1}), (DEEPSEEK, deepseek, None, {}),
    ):  # fmt: skip
        assert parse(syntax, [write("f", written)]) == ("", [("f", found)])


@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", '"name"', ": ", '"f"', " ", "\n",
                         ", ", '"arguments"', "x", "<tool", "_call>", '{"name": "f"}', '{"x": "'])
        | st.text(max_size=3),
        max_size=20,
    ),
    st.data(),
)  # fmt: skip
def test_the_way_a_text_is_cut_makes_no_difference(parts: list[str], data: st.DataObject):
    text = "".join(parts)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert parse(HERMES, pieces) == parse(HERMES, [text])


@pytest.mark.parametrize("end", ["", "\n", " \n"])
def test_a_whole_call_without_its_end_mark_is_one(end: str):
    one = ("weather", {"city": "Bern"})
    for syntax, write in ((HERMES, hermes), (DEEPSEEK, deepseek)):
        open_call = write(*one).removesuffix(syntax.end).rstrip() + end
        assert parse(syntax, list(f"I look.\n{open_call}")) == ("I look.", [one])
        both = f"{write('clock', {})}\n{open_call}"
        assert parse(syntax, [both]) == ("", [("clock", {}), one])
        for cut in (open_call.rstrip()[:-1], f"{open_call} and more"):
            assert parse(syntax, [cut]) == (cut, [])
        parser = ToolParser(syntax)
        assert parser.push(open_call) == ("", [])
        assert parser.flush(is_cut=True) == (open_call, [])


@pytest.mark.parametrize(
    "value",
    ["</tool_call> in text", 'a \\" </tool_call>{}</tool_call>', hermes("g", {}), "\\</tool_call>"],
)
def test_an_end_mark_in_a_text_of_a_call_does_not_end_it(value: str):
    arguments = {"x": value, "y": [{"</tool_call>": 1}]}
    text = f"Hi {hermes('f', arguments)}\n{hermes('g', {})} \n"
    for at in range(len(text) + 1):
        assert parse(HERMES, [text[:at], text[at:]]) == ("Hi", [("f", arguments), ("g", {})])
    assert parse(HERMES, list(text)) == ("Hi", [("f", arguments), ("g", {})])


@pytest.mark.parametrize(
    "body",
    [
        "x",
        '{"x": "a\n</tool_call>"}',
        '{"x": 1',
        '{"x": "a',
        '["',
        '{"x": "\\',
        '{"x": "" "',
        '"{"',
    ],
)
def test_text_before_an_end_mark_that_ends_no_call_stays_text(body: str):
    """And a call that follows is found: at once, but where the mark could be in a text."""
    broken, after = f"<tool_call>{body}</tool_call>", hermes("g", {})
    parser = ToolParser(HERMES)
    plain, _ = parser.push(broken)
    assert plain == ("" if body == '{"x": "a' else broken)
    for pieces in ([broken, after], list(broken + after)):
        assert parse(HERMES, pieces) == (broken, [("g", {})])
    for is_cut in (False, True):
        parser = ToolParser(HERMES)
        text, found = parser.push(broken)
        rest, more = parser.flush(is_cut=is_cut)
        assert (text + rest, [*found, *more]) == (broken, [])


def test_end_marks_in_texts_take_little_time():
    texts: Any = ["</tool_call>" * 4000, ["</tool_call>"] * 4000]
    text = hermes("f", {"x": texts})
    start = time.process_time()
    assert parse(HERMES, [text]) == ("", [("f", {"x": texts})])
    broken = text.replace("}", "", 1).removesuffix("}\n</tool_call>")
    assert parse(HERMES, [broken]) == (broken, [])
    assert time.process_time() - start < 2


ARGUMENTS = st.dictionaries(st.text(max_size=4), st.text(max_size=9), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["f", "g_1"]), ARGUMENTS)))
def test_every_call_comes_back(calls: list[tuple[str, dict[str, str]]]):
    for syntax, write in ((HERMES, hermes), (DEEPSEEK, deepseek)):
        text = "\n".join(write(name, arguments) for name, arguments in calls)
        assert parse(syntax, list(text)) == ("", calls)


def test_a_forced_call_is_the_whole_answer():
    parser = WholeCall()
    text = '{"name": "f", "arguments": {"a": {"b": "}"}}}'
    found = [call for char in text for call in parser.push(char)[1]]
    assert [(c.function.name, json.loads(c.function.arguments)) for c in found] == [
        ("f", {"a": {"b": "}"}})
    ]
    assert parser.flush() == ("", [])
    cut = WholeCall()
    cut.push(text[:20])
    assert cut.flush() == (text[:20], [])


def test_families_are_read_from_templates():
    assert syntax_of(HERMES_TEMPLATE) is HERMES
    assert syntax_of("{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' }}") is DEEPSEEK
    assert syntax_of(CHAT_TEMPLATE) is None
    assert syntax_of(XML_TEMPLATE) is None


@pytest.mark.live
def test_tools_are_refused_where_calls_are_xml(tool_bundle: Path, tmp_path: Path):
    bundle = tmp_path / "tiny"
    shutil.copytree(tool_bundle, bundle)
    replace_file(bundle, "chat_template.jinja", XML_TEMPLATE.encode())
    with running(bundle) as live:
        refused = live.chat(tools=[WEATHER])
        assert refused.status == 400
        assert "writes no tool calls in a form known here" in refused.json["error"]["message"]
        assert live.chat(tools=[WEATHER], tool_choice="none", max_tokens=1).status == 200


def test_empty_keys_of_a_history_are_left_out():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "annotations": []}
    assert prepare_messages([message]) == [{"role": "assistant", "tool_calls": [call]}]


@pytest.fixture(scope="module")
def tools(tool_bundle: Path) -> Iterator[Live]:
    with running(tool_bundle, default_model="tiny", llm={"kv_capacity": 1024}) as live:
        yield live


def ask(live: Live, answer: str, **fields: Any) -> Any:
    tools = fields.pop("tools", [WEATHER, CLOCK])
    shown = template_tools(msgspec.convert(tools, list[Tool]))
    live.engine.say(QUESTION, answer, tools=shown)
    return live.chat(temperature=0, tools=tools, **fields)


@pytest.mark.live
def test_a_call_instead_of_an_answer(tools: Live):
    choice = ask(tools, f"Let me look.\n{CALL}").json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me look."
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
    assert "index" not in call
    assert ask(tools, CALL).json["choices"][0]["message"]["content"] is None
    plain = ask(tools, "It is sunny.").json["choices"][0]
    assert (plain["message"]["content"], plain["finish_reason"]) == ("It is sunny.", "stop")


@pytest.mark.live
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_without_its_end_mark_ends_the_turn(tools: Live, stream: bool):
    """The model ends before the mark, or the mark is a stop string."""
    for answer, fields in (
        (CALL.removesuffix("\n</tool_call>"), {}),
        (CALL, {"stop": ["</tool_call>"]}),
    ):
        got = ask(tools, answer, stream=stream, **fields)
        if stream:
            deltas = [event["choices"][0] for event in got.events[:-1]]
            (call,) = [call for d in deltas for call in d["delta"].get("tool_calls", ())]
            assert deltas[-1]["finish_reason"] == "tool_calls"
        else:
            (choice,) = got.json["choices"]
            assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
            (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}


@pytest.mark.live
def test_a_cut_answer_has_no_call_that_lacks_its_end_mark(tools: Live):
    open_call = CALL.removesuffix("</tool_call>").rstrip()
    tokens = len(tools.engine.llm.tokenizer.encode(open_call, add_bos=False))
    (choice,) = ask(tools, CALL, max_tokens=tokens).json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith(open_call)
    assert choice["message"].get("tool_calls") is None


@pytest.mark.live
def test_calls_in_a_stream(tools: Live):
    events = ask(tools, f"Hm.\n{CALL}\n{hermes('clock', {})}", stream=True).events[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [
        (0, "weather"), (1, "clock"),
    ]  # fmt: skip
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.live
def test_one_call_at_a_time(tools: Live):
    answer = f"{CALL}\n{hermes('clock', {})} and then much more text"
    assert len(ask(tools, answer).json["choices"][0]["message"]["tool_calls"]) == 2
    one = ask(tools, answer, parallel_tool_calls=False).json
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1
    assert one["choices"][0]["finish_reason"] == "tool_calls"
    assert tools.idle()


@pytest.mark.slow
def test_an_answer_that_ends_with_its_call_does_not_count_as_cancelled(tools: Live):
    pytest.importorskip("llguidance")

    def outcomes() -> dict[str, float]:
        text = tools.ask("/metrics").body.decode()
        found = re.findall(r'edgellm_requests_total\{.*outcome="(\w+)"\} (\S+)', text)
        return {outcome: float(number) for outcome, number in found}

    before = outcomes()
    tools.engine.delay_s = 0.01  # the call is read while the engine goes on
    try:
        more = " and then more"
        for _ in range(2):
            ask(tools, CALL + more * 9, parallel_tool_calls=False)
            forced = json.dumps({"name": "clock", "arguments": {}}) + "\n" * 9
            answer = ask(tools, forced, tools=[CLOCK], tool_choice="required")
            assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
    finally:
        tools.engine.delay_s = 0
    assert tools.idle()
    assert outcomes() == {**before, "stop": before.get("stop", 0) + 4}


@pytest.mark.live
def test_a_call_and_its_result_go_back_into_the_prompt(tools: Live):
    call = ask(tools, CALL).json["choices"][0]["message"]
    messages = [*QUESTION, call, {"role": "tool", "content": "sun", "tool_call_id": "x"}]
    asked = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
    history: list[Any] = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "content": "sun"},
    ]
    tools.engine.say(history, "Sunny.", tools=[WEATHER])
    answer = tools.ask(
        "/v1/chat/completions",
        {"messages": messages, "tools": [WEATHER], "temperature": 0},
    )
    assert answer.json["choices"][0]["message"]["content"] == "Sunny."
    broken = {**call, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    wrong = tools.ask("/v1/chat/completions", {"messages": [*QUESTION, broken]})
    assert (wrong.status, wrong.json["error"]["param"]) == (400, "messages[1].tool_calls")


@pytest.mark.live
@pytest.mark.parametrize("arguments", [None, "", "Bern", ["a"], '{"city": "Bern"}'])
def test_what_is_answered_can_be_sent_back(tools: Live, arguments: Any):
    message = ask(tools, hermes("weather", arguments)).json["choices"][0]["message"]
    assert bool(message.get("tool_calls")) == (arguments not in ("Bern", ["a"]))
    history = [*QUESTION, message, {"role": "tool", "content": "sun", "tool_call_id": "x"}]
    again = tools.chat(messages=history, tools=[WEATHER], max_tokens=1)
    assert again.status == 200, again.body


@pytest.mark.live
def test_a_call_that_must_come(tools: Live):
    for choice, names in (
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ):
        for seed in range(3):
            for stream in (False, True):
                answer = tools.chat(
                    "free", tools=[WEATHER, CLOCK], tool_choice=choice, seed=seed, stream=stream,
                    temperature=1.0, top_p=1.0, max_tokens=400, enable_thinking=False,
                )  # fmt: skip
                assert answer.status == 200, answer.body
                if stream:
                    parts = [e["choices"][0] for e in answer.events[:-1]]
                    (call,) = [c for p in parts for c in p["delta"].get("tool_calls", ())]
                    finish = parts[-1]["finish_reason"]
                else:
                    parts = answer.json["choices"]
                    (call,) = parts[0]["message"]["tool_calls"]
                    finish = parts[0]["finish_reason"]
                assert finish == "tool_calls"
                assert call["function"]["name"] in names
                arguments = json.loads(call["function"]["arguments"])
                assert arguments.keys() == (
                    {"city"} if call["function"]["name"] == "weather" else set()
                )


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {**tool["function"], "strict": True}}


@pytest.mark.live
def test_arguments_of_a_strict_tool_keep_to_its_schema_where_a_call_need_not_come(tools: Live):
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    wrong, both = hermes("weather", {"city": 5}), [strict(WEATHER), CLOCK]
    (call,) = ask(tools, wrong).json["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": 5}
    for choice in ({}, {"tool_choice": "auto"}):
        answer = ask(tools, f"Hm. {wrong}", tools=both, max_tokens=400, **choice)
        assert answer.status == 200, answer.body
        message = answer.json["choices"][0]["message"]
        assert message["content"].startswith("Hm.")
        call, *_ = message["tool_calls"]
        assert call["function"]["name"] == "weather"
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    # The text around it is free, and so are the arguments of the other tool.
    held = hermes("clock", {"a": "</tool_call> b"})
    for offered in (both, [WEATHER, CLOCK]):
        message = ask(tools, f"Hi {held}", tools=offered).json["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert (message["content"], json.loads(call["function"]["arguments"])) == (
            "Hi", {"a": "</tool_call> b"})  # fmt: skip
    plain = ask(tools, "It is sunny.", tools=[strict(WEATHER)]).json["choices"][0]
    assert (plain["message"]["content"], plain["finish_reason"]) == ("It is sunny.", "stop")
    free = ask(tools, hermes("clock", {"a": "b"}), tools=both).json["choices"][0]
    assert json.loads(free["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": "b"}


FORM = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": FORM}}


@pytest.mark.live
@pytest.mark.parametrize("offered", [[WEATHER, CLOCK], [strict(WEATHER), CLOCK]])
@pytest.mark.parametrize("form", [SCHEMA, {"type": "json_object"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_form_leaves_the_place_of_calls(tools: Live, offered: Any, form: Any, stream: bool):
    """Where tools are offered, a call may come instead of the form, and nothing beside it."""
    pytest.importorskip("llguidance")

    def answered(text: str, **fields: Any) -> tuple[str, list[tuple[str, str]], str]:
        given = {"tools": offered, "response_format": form, "stream": stream, **fields}
        answer = ask(tools, text, **given)
        assert answer.status == 200, answer.body
        if stream:
            parts = [event["choices"][0] for event in answer.events[:-1]]
            deltas = [part["delta"] for part in parts]
        else:
            parts = answer.json["choices"]
            deltas = [part["message"] for part in parts]
        text = "".join(delta.get("content") or "" for delta in deltas)
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
        found = [(call["name"], call["arguments"]) for call in calls]
        return text, found, parts[-1]["finish_reason"]

    weather = ("weather", '{"city":"Bern"}')
    assert answered(CALL) == ("", [weather], "tool_calls")
    both = f"{CALL}\n{hermes('clock', {})}"
    assert answered(both) == ("", [weather, ("clock", "{}")], "tool_calls")
    assert answered(both, parallel_tool_calls=False) == ("", [weather], "tool_calls")
    # A text that keeps to the form is the answer, even one that looks like a call.
    for city in ("Bern", f"Bern {hermes('clock', {})}"):
        text = json.dumps({"city": city})
        assert answered(text) == (text, [], "stop")
    bare = json.dumps({"name": "clock", "arguments": {}})
    if form is not SCHEMA:
        assert answered(bare) == (bare, [], "stop")
    # What is neither cannot come, and without tools nothing but the form can.
    assert "I" not in answered("It is sunny.", max_tokens=1)[0]
    text, calls, _ = answered(CALL, tool_choice="none", max_tokens=9, enable_thinking=False)
    assert (text[:1], calls) == ("{", [])


@pytest.mark.live
def test_an_answer_that_has_begun_may_still_call(tools: Live):
    def begin(content: str, rest: str, **fields: Any) -> tuple[int, Any]:
        messages = [*QUESTION, {"role": "assistant", "content": content}]
        tools.engine.say(messages, rest, tools=[WEATHER], continue_final_message=True)
        body = {"messages": messages, "tools": [WEATHER], "continue_final_message": True}
        answer = tools.chat(**{"temperature": 0, "max_tokens": 400, **body, **fields})
        if answer.status != 200:
            return answer.status, answer.json["error"]["param"]
        message = answer.json["choices"][0]["message"]
        calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
        return 200, (message["content"], calls)

    assert begin("I look", f" it up.\n{CALL}") == (200, (" it up.", ["weather"]))
    # The object of a call is one at the beginning of an answer, not within it.
    bare = json.dumps({"name": "weather", "arguments": {"city": "Bern"}})
    assert begin("", bare) == (200, (None, ["weather"]))
    assert begin("So: ", bare) == (200, (bare, []))
    assert begin("a", "b", tool_choice="required") == (400, "tool_choice")
    assert begin(CALL[:20], CALL[20:]) == (400, "messages")
    pytest.importorskip("llguidance")
    text = json.dumps({"city": "Bern"})
    assert begin(text[:4], text[4:], response_format=SCHEMA) == (200, (text[4:], []))


def test_the_way_an_answer_of_a_form_is_cut_makes_no_difference():
    for text, found in ((CALL, 1), (json.dumps({"a": CALL}), 0)):
        for size in (1, 3, 1000):
            parser = CallsOrJSON(HERMES)
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            taken = [*map(parser.push, pieces), parser.flush()]
            plain = "".join(text for text, _ in taken)
            assert (plain, parser.found) == ("" if found else text, found)


def booking(name: str, city: dict[str, Any]) -> dict[str, Any]:
    """A tool with a model in its model, as `openai.pydantic_function_tool` writes it."""
    parameters = {
        "$defs": {"City": city},
        "type": "object",
        "properties": {
            "city": {"$ref": "#/$defs/City"},
            "then": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def use_of(request: dict[str, Any], template: str = HERMES_TEMPLATE) -> ToolUse:
    tokens = Tokens(BOS_ID, BOS, (EOS_ID,), EOS, add_bos=True)
    return read_tools(msgspec.convert(request, ChatRequest), ChatTemplate(template, tokens))


def schema_of(request: dict[str, Any]) -> Any:
    """The source of the form that the tools of a request come to."""
    output = use_of(request).output
    assert output is not None
    return json.loads(output.text)


def test_a_schema_without_a_type_binds_to_an_object():
    function = {"name": "f", "parameters": {"properties": {}}}
    tool = {"type": "function", "function": function}
    asked = {"messages": QUESTION, "tools": [tool], "tool_choice": "required"}
    schema = schema_of(asked)
    assert schema["properties"]["arguments"]["type"] == "object"


@pytest.mark.parametrize("named", [{}, {"$id": "https://x/y"}])
def test_references_of_a_tool_lead_into_its_own_schema(named: dict[str, str]):
    llguidance = pytest.importorskip("llguidance")
    both = [booking("book", {"type": "string"}), booking("number", {"type": "integer"})]
    for tool in both:
        tool["function"]["parameters"] |= named
    asked = {"messages": QUESTION, "tools": both, "tool_choice": "required"}
    free = {"messages": QUESTION, "tools": [strict(tool) for tool in both]}
    for schema in (schema_of(asked), schema_of(free)["schema"]):
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        for name, city, then, keeps in (
            ("book", "Bern", None, True), ("book", 5, None, False),
            ("number", 5, None, True), ("number", "Bern", None, False),
            ("book", "Bern", {"city": "Rom"}, True), ("book", "Bern", {"city": 5}, False),
        ):  # fmt: skip
            call = {"name": name, "arguments": {"city": city, "then": then}}
            matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
            text = json.dumps(call).encode()
            taken = matcher.try_consume_tokens(list(text)) == len(text)
            assert (taken and matcher.is_accepting()) == keeps, call


@pytest.mark.parametrize(
    ("roots", "reference"),
    [
        (("https://x/y", "https://x/z"), "https://x/y#/$defs/a"),
        (("https://x/y", "https://x/z"), "y#/$defs/a"),
        (("https://x/y", "https://x/y#"), "#/$defs/a"),
        (("", ""), "#/$defs/a"),
        (("a", "a"), "#/$defs/a"),
        ((None, None), "#/$defs/a"),
    ],
)
def test_a_schema_keeps_its_root_unless_another_tool_has_it(roots: tuple[Any, Any], reference: str):
    llguidance = pytest.importorskip("llguidance")
    tools = []
    for name, root, kind in zip("ab", roots, ("string", "integer"), strict=True):
        parameters = {
            "$id": root,
            "$defs": {"a": {"type": kind}},
            "properties": {"a": {"$ref": reference.replace("y", str(root)[-1:])}},
        }
        tools += [{"type": "function", "function": {"name": name, "parameters": parameters}}]
    asked = {"messages": QUESTION, "tools": tools, "tool_choice": "required"}
    schema = schema_of(asked)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    for name, value, keeps in (("a", "x", 1), ("a", 1, 0), ("b", "x", 0), ("b", 1, 1)):
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
        text = json.dumps({"name": name, "arguments": {"a": value}}).encode()
        assert (matcher.try_consume_tokens(list(text)) == len(text)) == keeps, (name, value)


def picking(value: dict[str, Any], *more: dict[str, Any]) -> list[dict[str, Any]]:
    """Tools, the first of which takes an ``a`` of this schema."""
    parameters = {
        "type": "object",
        "properties": {"a": value},
        "required": ["a"],
        "additionalProperties": False,
    }
    return [{"type": "function", "function": {"name": "pick", "parameters": parameters}}, *more]


@pytest.mark.live
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("value", "is_kept"),
    [
        ({"type": "string", "format": "password", "maxLength": 5}, True),
        ({"type": "integer", "format": "int32", "minimum": 1, "maximum": 3}, True),
        ({"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}}, False),
        ({"type": "string", "pattern": "^(?!x)"}, False),
    ],
)
def test_a_required_tool_that_is_not_strict_keeps_the_enforceable_schema(
    tools: Live, value: dict[str, Any], is_kept: bool, named: bool
):
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    choice: Any = {"type": "function", "function": {"name": "pick"}} if named else "required"
    fields = {"tool_choice": choice, "temperature": 1.0, "top_p": 1.0, "enable_thinking": False}
    fields["max_tokens"] = 400 if is_kept else 4  # any object may be long
    for seed in range(3 if is_kept else 1):
        answer = tools.chat("free", tools=picking(value, CLOCK), seed=seed, **fields)
        assert answer.status == 200, answer.body
        for call in answer.json["choices"][0]["message"].get("tool_calls", ()):
            assert is_kept
            if call["function"]["name"] == "pick":
                jsonschema.validate(json.loads(call["function"]["arguments"])["a"], value)
    bound = picking(value)
    bound[0]["function"]["strict"] = True
    answer = tools.chat("free", tools=bound, **{**fields, "max_tokens": 4})
    assert answer.status == (200 if value.get("format") == "int32" else 400), answer.body


@pytest.mark.live
def test_an_unenforceable_schema_does_not_loosen_others(
    tools: Live, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("llguidance")
    checked = []
    check = GrammarCompiler._check

    def spy(compiler: GrammarCompiler, kind: Any, grammar: str) -> None:
        checked.append(grammar)
        check(compiler, kind, grammar)

    monkeypatch.setattr(GrammarCompiler, "_check", spy)
    offered = [*picking({"type": "string", "pattern": "^(?=x)"}), WEATHER, CLOCK]
    for name, arguments, is_kept in (
        ("weather", {"city": "Bern"}, True), ("weather", {"city": 5}, False),
        ("pick", {"a": "b"}, True), ("pick", {"b": 5}, True),
    ):  # fmt: skip
        text = json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))
        answer = ask(tools, text, tools=offered, tool_choice="required", max_tokens=80)
        assert answer.status == 200, answer.body
        (call,) = answer.json["choices"][0]["message"].get("tool_calls") or [{"function": {}}]
        found = call["function"].get("arguments")
        assert (found is not None and json.loads(found) == arguments) == is_kept, answer.body
        assert len(checked) == 5  # all together, each alone, and what is used


def test_enforced_formats():
    """Those of `structure._FORMATS` and no others; a key of this name is none."""
    llguidance = pytest.importorskip("llguidance")
    for name in sorted({*_FORMATS, "password", "uri-reference", "binary"}):
        schema = {"type": "string", "format": name}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
        assert matcher.is_error() == (name not in _FORMATS), name
    value = {"properties": {"format": {"enum": [{"format": "binary"}]}}, "format": "uuid"}
    asked = {"messages": QUESTION, "tools": picking(value), "tool_choice": "required"}
    call = schema_of(asked)
    assert call["properties"]["arguments"]["properties"]["a"] == value


@pytest.mark.parametrize(
    ("template", "form"),
    [(DEEPSEEK_TEMPLATE, SCHEMA), (HERMES_TEMPLATE, {"type": "regex", "regex": "a"})],
)
def test_a_form_that_leaves_no_place_for_calls_is_refused(template: str, form: Any):
    for each in (CLOCK, strict(CLOCK)):
        request = {"messages": QUESTION, "tools": [each], "response_format": form}
        with pytest.raises(APIError, match="tool_choice none") as caught:
            use_of(request, template)
        assert caught.value.param == "response_format"
        use = use_of({**request, "tool_choice": "none"}, template)
        assert use.shown is None
        assert use.make_parser is None
        assert use.output is not None
        assert use.output.kind == form["type"]


def test_unbindable_calls_are_refused_by_name():
    request = {"messages": QUESTION, "tools": [CLOCK, strict(WEATHER)]}
    with pytest.raises(APIError, match="required or a function's name") as caught:
        use_of(request, DEEPSEEK_TEMPLATE)
    assert caught.value.param == "tools[1].function.strict"
    for name, free in (("tool_choice", "none"), ("tools", []), ("tools", [CLOCK])):
        assert use_of({**request, name: free}, DEEPSEEK_TEMPLATE).output is None


@pytest.mark.live
def test_tokenize_and_chat_show_the_template_the_same_tools(tools: Live):
    """``strict`` is for the server; a key that was not sent is not shown as null."""
    body = {"messages": QUESTION, "tools": [strict(CLOCK)]}
    count = tools.ask("/tokenize", body).json["count"]
    assert count == tools.ask("/tokenize", {**body, "tools": [CLOCK]}).json["count"]
    assert count == tools.chat(tools=[CLOCK], max_tokens=1).json["usage"]["prompt_tokens"]

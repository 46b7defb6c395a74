"""Ollama's API over HTTP, and with its own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge.runtime.generation import GenerationStats
from edge_serve.api.answers import CompletionDetails, PromptDetails, Usage
from edge_serve.api.chat import plan_chat
from edge_serve.api.ollama import text as ollama_text
from edge_serve.api.ollama.models import NOT_SERVED_PATHS
from edge_serve.api.ollama.protocol import GenerateRequest, OllamaOptions
from edge_serve.api.pieces import Piece
from tests.edge_serve.api.weather import ANSWER, CALL, QUESTION, SCHEMA, WEATHER
from tests.edge_serve.scripted import KEY, Answer, Live, running

GREEDY = {"temperature": 0}
pytestmark = pytest.mark.usefixtures("says_answer")


def chat(live: Live, messages: Any = QUESTION, /, **fields: Any) -> Answer:
    body = {"model": "tiny", "messages": messages, "stream": False, "options": GREEDY}
    return live.ask("/api/chat", {**body, **fields})


def generate(live: Live, prompt: Any = "what", /, **fields: Any) -> Answer:
    body = {"model": "tiny", "prompt": prompt, "stream": False, "options": GREEDY}
    return live.ask("/api/generate", {**body, **fields})


def lines(answer: Answer) -> list[Any]:
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.body.decode().splitlines()]


def rebuilt(answer: Answer) -> Any:
    """The whole answer that a stream comes to."""
    *parts, last = lines(answer)
    assert not any(part["done"] for part in parts)
    assert last["done"]
    if "response" in last:
        for key in ("response", "thinking"):
            last[key] = "".join(part.get(key, "") for part in parts)
        return last
    messages = [part["message"] for part in parts]
    for key in ("content", "thinking"):
        last["message"][key] = "".join(message.get(key, "") for message in messages)
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if calls:
        last["message"]["tool_calls"] = calls
    return last


def known(answer: Any) -> Any:
    """An answer without its times and ids, and without texts that are empty."""
    result = {k: v for k, v in answer.items() if not k.endswith(("_at", "_duration")) and v != ""}
    message = dict(result.pop("message", {}))
    calls = [call["function"] for call in message.pop("tool_calls", ())]
    return result, {k: v for k, v in message.items() if v != ""}, calls


def test_a_whole_answer(live: Live):
    answer = chat(live)
    assert answer.status == 200, answer.body
    body = answer.json
    message = {"role": "assistant", "content": "Héllo 🙂", "thinking": "Let me see."}
    assert body["message"] == message
    assert (body["model"], body["done"], body["done_reason"]) == ("tiny", True, "stop")
    assert body["prompt_eval_count"] == len(live.engine.llm.encode(QUESTION))
    tokens = live.engine.llm.tokenizer.encode(ANSWER, control=True)
    assert body["eval_count"] == len(tokens) + 1
    parts = body["prompt_eval_duration"] + body["eval_duration"]
    assert 0 < parts <= body["total_duration"] + 1
    assert body["load_duration"] == 0
    assert chat(live, options={**GREEDY, "num_predict": 2}).json["done_reason"] == "length"


def test_queue_time_does_not_count_as_prompt_time():
    stats = GenerationStats(queue_s=5.0, ttft_s=7.0, total_s=10.0)
    turn: Any = SimpleNamespace(model_name="tiny", waited_s=0.0)
    render = ollama_text.OllamaRender(turn, GenerateRequest(), None)
    usage = Usage(3, 4, 7, PromptDetails(), CompletionDetails())
    found = render.body([Piece(finish_reason="stop", stats=stats)], usage)
    times = found.prompt_eval_duration, found.eval_duration, found.total_duration
    assert times == (2 * 10**9, 3 * 10**9, 10 * 10**9)


def test_a_last_answer_is_continued(live: Live):
    begun = [*QUESTION, {"role": "assistant", "content": "One two"}]
    live.engine.say(begun, " three.", continue_final_message=True)
    answer = {"role": "assistant", "content": " three."}
    assert chat(live, messages=begun).json["message"] == answer
    thought = [*QUESTION, {"role": "assistant", "content": "", "thinking": "So"}]
    given = [*QUESTION, {"role": "assistant", "content": "", "reasoning": "So"}]
    live.engine.say(given, " be it.</think>Yes", continue_final_message=True)
    answer = {"role": "assistant", "content": "Yes", "thinking": " be it."}
    assert chat(live, messages=thought).json["message"] == answer


@pytest.mark.parametrize("options", [{}, {"stop": ["llo"]}, {"num_predict": 14}])
def test_a_stream_is_the_same_answer_and_the_default(live: Live, options: dict[str, Any]):
    for ask in (chat, generate):
        fields: dict[str, Any] = {"options": {**GREEDY, **options}}
        streamed = rebuilt(ask(live, stream=None, **fields))
        assert known(streamed) == known(ask(live, **fields).json)


def test_a_prompt_is_a_chat_of_one_message(live: Live):
    body = generate(live).json
    assert (body["response"], body["thinking"]) == ("Héllo 🙂", "Let me see.")
    live.engine.say([{"role": "system", "content": "x"}, *QUESTION], "so</think>yes")
    assert generate(live, system="x").json["response"] == "yes"
    live.engine.say("once", " upon a time")
    body = generate(live, "once", raw=True).json
    assert body["response"] == " upon a time"
    assert "thinking" not in body
    for name, value in (("system", "x"), ("think", True), ("format", "json")):
        error = generate(live, "once", raw=True, **{name: value})
        assert error.status == 400
        assert error.json["error"].startswith(f"{name}: needs the chat template")
    error = generate(live, "once", suffix="x")
    assert error.status == 400
    assert error.json["error"].startswith("suffix: this model has no tokens")


def test_empty_texts_of_ollamas_own_client_count_as_absent(live: Live):
    """`api.Client` in Go, and with it `ollama run` and `ollama show`: api/types.go there."""
    for model, name in (("tiny", ""), ("", "tiny")):
        show = {"model": model, "name": name, "system": "", "template": "", "verbose": False,
                "options": None}  # fmt: skip
        answer = live.ask("/api/show", show)
        assert answer.status == 200, answer.body
    empty: dict[str, Any] = {"suffix": "", "system": "", "template": ""}
    assert generate(live, "", **empty, options=None).json["done_reason"] == "load"
    assert known(generate(live, **empty).json) == known(generate(live).json)
    live.engine.say("once", " upon a time")
    assert generate(live, "once", **empty, raw=True).json["response"] == " upon a time"
    error = generate(live, template="{{ .Prompt }}")
    assert error.status == 400
    assert error.json["error"].startswith("template: ")


def test_thinking(live: Live):
    live.engine.say(QUESTION, "At once.", thinking=False)
    message = chat(live, think=False).json["message"]
    assert message == {"role": "assistant", "content": "At once."}
    assert chat(live, think=True).json["message"]["thinking"] == "Let me see."
    for effort in ("low", "high", "max"):
        assert chat(live, think=effort).json["message"]["thinking"] == "Let me see."


@pytest.mark.parametrize("think", [True, "low"])
def test_a_model_that_does_not_reason_is_not_asked_to(
    live: Live, monkeypatch: pytest.MonkeyPatch, think: Any
):
    monkeypatch.setattr(live.engine.llm, "reasons", False)
    for refused in (chat(live, think=think), generate(live, think=think)):
        assert refused.status == 400
        assert refused.json["error"].startswith('"tiny" does not support thinking')
    assert chat(live, think=False).status == 200


def test_a_thinking_may_be_a_message(live: Live, monkeypatch: pytest.MonkeyPatch):
    """Continue sends it so, also where no answer came after it."""
    planned: list[Any] = []

    def spy(turn: Any, body: Any) -> Any:
        planned.append(body.messages)
        return plan_chat(turn, body)

    monkeypatch.setattr(ollama_text, "plan_chat", spy)
    said = [{"role": "thinking", "content": text} for text in ("hm", "so")]
    answer = {"role": "assistant", "content": "Hi."}
    reasoned = {**answer, "reasoning_content": "hm\nso"}
    for history, wanted in (
        ([*said, answer], [reasoned]),
        ([said[0], {**answer, "thinking": "so"}], [reasoned]),
        ([answer, *said], [answer]),
        ([{"role": "thinking", "content": ""}, answer], [answer]),
    ):
        got = chat(live, [*QUESTION, *history, *QUESTION])
        assert got.status == 200, got.body
        assert planned.pop() == [*QUESTION, *wanted, *QUESTION]
    alone = chat(live, said)
    assert alone.status == 400
    assert alone.json["error"].startswith("messages: a thinking alone")
    wrong = chat(live, [{**said[0], "thinking": "a"}, *QUESTION])
    assert wrong.json["error"].startswith("messages[0].thinking: a message of role thinking")


@pytest.mark.live
def test_calls(tools: Live):
    tools.engine.say(QUESTION, f"I look.\n{CALL}\n{CALL}", tools=[WEATHER])
    body = chat(tools, tools=[WEATHER]).json
    assert body["message"]["content"] == "I look."
    found = [call["function"] for call in body["message"]["tool_calls"]]
    assert found == [
        {"name": "weather", "arguments": {"city": "Bern"}, "index": index} for index in (0, 1)
    ]
    assert body["done_reason"] == "stop"
    assert known(rebuilt(chat(tools, tools=[WEATHER], stream=True))) == known(body)
    history = [
        *QUESTION,
        body["message"],
        {"role": "tool", "tool_name": "weather", "content": "sun"},
    ]
    tools.engine.default = "Sunny."
    try:
        again = chat(tools, history, tools=[WEATHER]).json
    finally:
        tools.engine.default = None
    assert again["message"]["content"] == "Sunny."


@pytest.mark.live
@pytest.mark.parametrize("form", ["json", SCHEMA])
def test_an_answer_of_a_form(tools: Live, form: Any):
    pytest.importorskip("llguidance")
    options = {**GREEDY, "num_predict": 60}
    for ask in (chat, generate):
        body = ask(tools, format=form, options=options).json
        text = body["message"]["content"] if "message" in body else body["response"]
        if body["done_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        assert text.lstrip().startswith("{")


def refusals() -> dict[str, tuple[Any, dict[str, Any]]]:
    def options(**fields: Any) -> tuple[Any, dict[str, Any]]:
        return chat, {"options": fields}

    def message(role: str = "user", **fields: Any) -> tuple[Any, dict[str, Any]]:
        return chat, {"messages": [{"role": role, "content": "a", **fields}]}

    return {
        "messages[0].images[0]: the model 'tiny' reads text only": message(images=["AAAA"]),
        "messages[0].thinking: a message of role user": message(thinking="a"),
        "messages[0].tool_name: a message of role assistant": message("assistant", tool_name="a"),
        "images[0]: the model 'tiny' reads text only": (generate, {"images": ["AAAA"]}),
        "options.num_predict: 0 asks": options(num_predict=0),
        "options.repeat_last_n: ": options(repeat_last_n=64),
        "options.mirostat: ": options(mirostat=1),
        "options.mirostat_eta: ": options(mirostat_eta=0.1),
        "options.num_predict: expected": options(num_predict=16.5),
        "options.top_k: ": options(top_k=0.5),
        "options.seed: ": options(seed=1.5),
        "options.num_ctx: ": options(num_ctx=1.5),
        "options.tfs_z: ": options(tfs_z=0.5),
        "options.typical_p: ": options(typical_p=0.5),
        "options.temperature: ": options(temperature=-1),
        "options.f16_kv: unknown field": options(f16_kv=True),
        "options.stop[0]: ": options(stop=[""]),
        "template: a model answers by its own": (generate, {"template": "x"}),
        "context: unknown field": (generate, {"context": [1]}),
        "think: ": (chat, {"think": "much"}),
    }


@pytest.mark.parametrize("said", refusals())
def test_what_is_refused_is_named(live: Live, said: str):
    ask, fields = refusals()[said]
    given = [fields.pop("messages")] if "messages" in fields else []
    answer = ask(live, *given, **fields)
    assert answer.status == 400
    assert answer.json.keys() == {"error"}
    assert answer.json["error"].startswith(said), answer.json


def test_the_version_is_one_that_codex_takes(live: Live):
    """`codex --oss` refuses an older one, since it asks by `/v1/responses`."""
    version = live.ask("/api/version").json["version"]
    assert tuple(map(int, version.split("."))) >= (0, 13, 4)
    assert live.ask("/v1/responses", {"model": "tiny", "input": "what"}).status == 200


def test_a_whole_number_may_be_a_float(live: Live):
    """Home Assistant's form makes a float of each."""
    given = {"num_ctx": 8192, "num_predict": 16, "top_k": 40, "seed": 1, "temperature": 1.5}
    given |= {"repeat_last_n": -1, "mirostat": 0}
    for ask in (chat, generate):
        whole = ask(live, options=given)
        assert whole.status == 200, whole.body
        assert whole.json["eval_count"] == 16
        floats = ask(live, options={name: float(value) for name, value in given.items()})
        assert known(floats.json) == known(whole.json)
    assert chat(live, options={**GREEDY, "num_ctx": 0}).status == 200


def test_a_longer_context_than_there_is(live: Live, caplog: pytest.LogCaptureFixture):
    """Cline, Continue and Home Assistant always ask for one."""
    ollama_text._note_once.cache_clear()
    for ask in (chat, generate, chat):
        assert ask(live, options={**GREEDY, "num_ctx": 32_768}).status == 200
    (record,) = [r for r in caplog.records if "num_ctx" in r.getMessage()]
    assert "512 tokens of the model tiny" in record.getMessage()
    long = chat(live, [{"role": "user", "content": "hello world " * 1000}],
                options={"num_ctx": 32_768})  # fmt: skip
    assert long.status == 400
    assert "512" in long.json["error"]
    live.engine.say([{"role": "user", "content": "fill"}], "x " * 2000, ends=False)
    full = chat(live, [{"role": "user", "content": "fill"}],
                options={**GREEDY, "num_ctx": 32_768})  # fmt: skip
    assert full.json["done_reason"] == "length"
    shown = live.ask("/api/show", {"model": "tiny"}).json["parameters"]
    assert "num_ctx 512" in shown.splitlines()


def test_a_request_without_anything_asks_for_the_model(live: Live):
    for path in ("/api/chat", "/api/generate"):
        body = live.ask(path, {"model": "tiny:latest", "keep_alive": -1}).json
        assert (body["model"], body["done"], body["done_reason"]) == ("tiny:latest", True, "load")
        assert live.ask(path, {"model": "nobody"}).status == 404
    assert chat(live, model="tiny:latest").json["message"]["content"] == "Héllo 🙂"
    assert chat(live, model="tiny:7b").status == 404


def test_endpoints_that_change_models_are_not_served(live: Live):
    for path, method in NOT_SERVED_PATHS:
        if method == "POST":
            answer = live.ask(path.replace("{digest}", "sha256:00"), {"model": "tiny"})
            assert answer.status == 404
            assert "not served" in answer.json["error"]
    assert "edge-llm pull" in live.ask("/api/pull", {"model": "tiny"}).json["error"]
    assert live.ask("/api/none").json["error"].startswith("there is no such path")


def test_a_failure_in_a_stream_is_its_last_line(live: Live):
    live.engine.fails_at = live.engine.llm.tokenizer.encode("H")[0]
    try:
        answer = chat(live, stream=True)
    finally:
        live.engine.fails_at = None
    *_, last = lines(answer)
    assert last.keys() == {"error"}
    assert b"secret" not in answer.body


@pytest.mark.live
def test_silences_are_not_filled(tool_bundle: Path):
    """A line that is no JSON would break its clients."""
    with running(tool_bundle, ping_s=0.02) as live:
        live.engine.say(QUESTION, "ab")
        live.engine.delay_s = 0.1
        assert rebuilt(chat(live, stream=True))["message"]["content"] == "ab"


# Its own client

ollama = pytest.importorskip("ollama")
AUTH = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def client(served: Live) -> Iterator[Any]:
    with ollama.Client(served.url, headers=AUTH) as opened:
        yield opened


@pytest.mark.live
def test_the_client_chats(client: Any):
    answer = client.chat("tiny", QUESTION, options=GREEDY)
    assert (answer.message.content, answer.message.thinking) == ("Hello there.", "hm")
    parts = list(client.chat("tiny", QUESTION, options=GREEDY, stream=True))
    assert "".join(part.message.content for part in parts) == "Hello there."
    assert parts[-1].done
    assert parts[-1].eval_count == answer.eval_count
    told = client.generate("tiny", "what", options=GREEDY, keep_alive="5m")
    assert (told.response, told.thinking) == ("Hello there.", "hm")


@pytest.mark.live
def test_the_client_reads_a_stream_whatever_the_answer_holds(client: Any, served: Live):
    text = "a\u2028b\u2029c\x85d"
    served.engine.say([{"role": "user", "content": "lines"}], f"<think>{text}</think>{text}")
    chat = client.chat("tiny", [{"role": "user", "content": "lines"}], options=GREEDY, stream=True)
    told = client.generate("tiny", "lines", options=GREEDY, stream=True)
    assert "".join(part.message.content for part in chat) == text
    assert "".join(part.response for part in told) == text


@pytest.mark.live
def test_the_async_client_runs_many_at_once(served: Live):
    async def ask_all() -> list[str]:
        async with ollama.AsyncClient(served.url, headers=AUTH) as opened:
            answers = await asyncio.gather(
                *(opened.chat("tiny", QUESTION, options=GREEDY) for _ in range(8))
            )
        return [answer.message.content for answer in answers]

    assert asyncio.run(ask_all()) == ["Hello there."] * 8


@pytest.mark.live
def test_a_function_of_the_client(client: Any, served: Live):
    def weather(city: str) -> str:
        """Of a city."""
        return f"sun in {city}"

    sent = json.loads(ollama._utils.convert_function_to_tool(weather).model_dump_json(
        exclude_none=True
    ))  # fmt: skip
    served.engine.say(QUESTION, CALL, tools=[sent])
    answer = client.chat("tiny", QUESTION, tools=[weather], options=GREEDY)
    (call,) = answer.message.tool_calls
    assert weather(**call.function.arguments) == "sun in Bern"
    result = {"role": "tool", "content": "sun in Bern", "tool_name": call.function.name}
    served.engine.default = "Sunny."
    try:
        history = [*QUESTION, answer.message, result]
        again = client.chat("tiny", history, tools=[weather], options=GREEDY)
    finally:
        served.engine.default = None
    assert again.message.content == "Sunny."


@pytest.mark.live
def test_the_client_asks_about_models(client: Any, served: Live):
    (model,) = client.list().models
    assert model.model == "tiny:latest"
    bundle = served.service.models.get("tiny").bundle
    listed = json.loads((bundle / "manifest.json").read_bytes())["files"]
    assert model.size == sum((bundle / name).stat().st_size for name in listed)
    assert model.details.family == "qwen2"
    shown = client.show("tiny:latest")
    assert set(shown.capabilities) == {"completion", "tools", "thinking"}
    assert shown.modelinfo["qwen2.context_length"] == served.engine.llm.kv_capacity
    assert shown.template == served.engine.llm.template.source  # type: ignore[union-attr]
    named = dict(line.split() for line in shown.parameters.splitlines())
    assert set(named) <= set(OllamaOptions.__struct_fields__)
    (running_now,) = client.ps().models
    assert running_now.expires_at.year == 9999


@pytest.mark.live
def test_errors_are_the_clients_own(client: Any, served: Live):
    with pytest.raises(ollama.ResponseError, match=r"options\.temperature") as caught:
        client.chat("tiny", QUESTION, options={"temperature": -1})
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="nobody"):
        client.chat("nobody", QUESTION)
    with (
        ollama.Client(served.url) as stranger,
        pytest.raises(ollama.ResponseError, match="no valid API key"),
    ):
        stranger.list()
    served.engine.fails_at = served.engine.llm.tokenizer.encode("H")[0]
    try:
        with pytest.raises(ollama.ResponseError):
            list(client.chat("tiny", QUESTION, options=GREEDY, stream=True))
    finally:
        served.engine.fails_at = None


@pytest.mark.live
def test_a_client_that_closes_its_stream_frees_the_engine(client: Any, served: Live):
    long = [{"role": "user", "content": "long"}]
    served.engine.say(long, "x" * 300)
    served.engine.delay_s = 0.01
    try:
        stream = client.chat("tiny", long, options=GREEDY, stream=True)
        next(stream)
        stream.close()
        assert served.idle(1.0)
    finally:
        served.engine.delay_s = 0

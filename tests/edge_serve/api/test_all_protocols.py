"""What holds for every protocol alike: the same answers, and the same guard in front of them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge.runtime.ask import Ask
from edge.runtime.llm import LLM
from edge_serve import app
from tests.conftest import write_secret
from tests.edge_serve.scripted import CAPACITY, HERMES_TEMPLATE, Answer, Live, running
from tests.makers.manifests import replace_file

CHAT, MESSAGES, COUNT = "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"
RESPONSES, OLLAMA, GENERATE = "/v1/responses", "/api/chat", "/api/generate"
GREEDY = {"temperature": 0}
TEXTS = (MESSAGES, COUNT, RESPONSES, OLLAMA, GENERATE)
LONG = "x" * 20_000  # more than any 512 tokens, for a path of each protocol


def body(path: str, text: str, *, stream: bool = False, num: int = 24) -> dict[str, Any]:
    """The same request in the form of a path."""
    messages = [{"role": "user", "content": text}]
    if path == COUNT:
        return {"model": "tiny", "messages": messages}
    if path in (OLLAMA, GENERATE):
        asked = {"messages": messages} if path == OLLAMA else {"prompt": text}
        options = {**GREEDY, "num_predict": num}
        return {"model": "tiny", "stream": stream, "options": options, **asked}
    if path == RESPONSES:
        return {"model": "tiny", "stream": stream, "input": text, **GREEDY,
                "max_output_tokens": num}  # fmt: skip
    return {"model": "tiny", "stream": stream, "messages": messages, **GREEDY, "max_tokens": num}


def whole(path: str, answer: Any) -> tuple[str, str]:
    """Reasoning and text of an answer."""
    if path == CHAT:
        message = answer["choices"][0]["message"]
        return message.get("reasoning", ""), message["content"]
    if path == MESSAGES:
        blocks = answer["content"]
    elif path == RESPONSES:
        blocks = [part for item in answer["output"] for part in item["content"]]
        blocks = [{**b, "thinking": b["text"] if b["type"] == "reasoning_text" else None}
                  for b in blocks]  # fmt: skip
    else:
        message = answer.get("message", answer)
        return message.get("thinking", ""), message.get("content", message.get("response"))
    thoughts = [block["thinking"] for block in blocks if block.get("thinking")]
    texts = [block["text"] for block in blocks if not block.get("thinking")]
    return "".join(thoughts), "".join(texts)


def streamed(path: str, answer: Answer) -> tuple[str, str]:
    """Reasoning and text of a stream's deltas, joined."""
    if path in (OLLAMA, GENERATE):
        parts = [whole(path, json.loads(line)) for line in answer.body.decode().splitlines()]
        return "".join(part[0] for part in parts), "".join(part[1] for part in parts)
    lines = answer.body.decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    if path == CHAT:
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        return tuple(  # type: ignore[return-value]
            "".join(delta.get(key, "") for delta in deltas) for key in ("reasoning", "content")
        )
    if path == MESSAGES:
        found = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        keys = ("thinking", "text")
        return tuple("".join(d.get(key, "") for d in found) for key in keys)  # type: ignore[return-value]
    kinds = ("response.reasoning_text.delta", "response.output_text.delta")
    return tuple(  # type: ignore[return-value]
        "".join(event["delta"] for event in events if event["type"] == kind) for kind in kinds
    )


@pytest.mark.parametrize("text", ["what", "Ünïcödé 🙂 </think> <｜User｜>", "a\n\nb"])
def test_the_same_request_has_the_same_answer(
    live: Live, text: str, monkeypatch: pytest.MonkeyPatch
):
    """Token ids of the prompt, text and reasoning, whole and streamed, of a random model."""
    prompts: list[list[int]] = []
    queue = LLM.answer

    def spy(self: LLM, ask: Ask, n: int = 1) -> Any:
        prompts.append(list(ask.ids or ()))
        return queue(self, ask, n)

    monkeypatch.setattr(LLM, "answer", spy)
    answers = set()
    for path in (CHAT, MESSAGES, RESPONSES, OLLAMA, GENERATE):
        answer = live.ask(path, body(path, text))
        assert answer.status == 200, answer.body
        answers.add(whole(path, answer.json))
        answers.add(streamed(path, live.ask(path, body(path, text, stream=True))))
    assert len(answers) == 1, answers
    assert any(answers.pop())
    assert len({tuple(ids) for ids in prompts}) == 1
    assert len(prompts) == 10


def formed(schema: dict[str, Any], is_strict: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests for an answer of a schema; Anthropic's is always strict, Ollama's never."""
    named = {"name": "a", "schema": schema, "strict": is_strict}
    kind = {"type": "json_schema"}
    yield CHAT, {"response_format": {**kind, "json_schema": named}, "reasoning_effort": "none"}
    yield RESPONSES, {"text": {"format": {**kind, **named}}, "reasoning": {"effort": "none"}}
    if is_strict:
        form = {"format": {**kind, "schema": schema}}
        yield MESSAGES, {"output_config": form, "thinking": {"type": "disabled"}}
    else:
        yield from ((path, {"format": schema, "think": False}) for path in (OLLAMA, GENERATE))


@pytest.mark.parametrize("is_strict", [True, False])
def test_an_answer_has_the_keys_that_its_schema_lists(
    live: Live, is_strict: bool, monkeypatch: pytest.MonkeyPatch
):
    """The model would go on with another."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(live.engine, "default", '{"a": 1, "b": 2}')
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    for path, fields in formed(schema, is_strict):
        answer = live.ask(path, {**body(path, "how", num=300), **fields})
        assert answer.status == 200, answer.body
        assert json.loads(whole(path, answer.json)[1]).keys() == {"a"}, path
    for path, fields in formed({"type": "string", "format": "password", "maxLength": 3}, is_strict):
        answer = live.ask(path, {**body(path, "how", num=300), **fields})
        assert (answer.status == 400) == is_strict, answer.body
        if is_strict:
            assert "password" in answer.body.decode()


def test_a_stream_is_read_line_by_line_whatever_the_answer_holds(live: Live):
    """Python's `str.splitlines`, by which httpx reads, ends lines at more than line breaks."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\\\u2028"
    live.engine.say([{"role": "user", "content": "lines"}], f"{text}</think>{text}")
    for path in (CHAT, MESSAGES, RESPONSES, OLLAMA, GENERATE):
        answer = live.ask(path, body(path, "lines", stream=True, num=99))
        assert streamed(path, answer) == (text, text)


def test_without_a_limit_an_answer_goes_on_until_the_context_is_full(live: Live):
    """As the table of limits says; the Messages API wants one in every request."""
    live.engine.say([{"role": "user", "content": "go on"}], "y" * CAPACITY, ends=False)
    for path in (CHAT, RESPONSES, OLLAMA, GENERATE):
        asked = body(path, "go on")
        asked.get("options", {}).pop("num_predict", None)
        asked = {name: asked[name] for name in asked.keys() - {"max_tokens", "max_output_tokens"}}
        answer = live.ask(path, asked).json
        usage = answer.get("usage", answer)
        total = usage.get("total_tokens") or usage["prompt_eval_count"] + usage["eval_count"]
        assert total in (CAPACITY, CAPACITY + 1), path  # the last token needs no row
    missing = {
        name: value for name, value in body(MESSAGES, "go on").items() if name != "max_tokens"
    }
    assert live.ask(MESSAGES, missing).status == 400


@pytest.mark.live
def test_reasoning_is_turned_on_where_the_template_leaves_it_off(tool_bundle: Path, tmp_path: Path):
    """As Cogito's does."""
    bundle = Path(shutil.copytree(tool_bundle, tmp_path / "tiny"))
    head = (
        "{%- if not enable_thinking is defined %}{%- set enable_thinking = false %}{%- endif %}"
        "{%- if enable_thinking %}{{ 'Think deeply.' }}{%- endif %}"
    )
    replace_file(bundle, "chat_template.jinja", f"{head}{HERMES_TEMPLATE}".encode())
    enabled = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    disabled = {"thinking": {"type": "disabled"}}
    cases: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        (CHAT, [{"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}},
                {"reasoning_effort": "high"}], {"enable_thinking": False}),
        (MESSAGES, [enabled], disabled),
        (COUNT, [enabled], disabled),
        (RESPONSES, [{"reasoning": {"effort": "high"}}], {"reasoning": {"effort": "none"}}),
        (OLLAMA, [{"think": True}, {"think": "high"}], {"think": False}),
        (GENERATE, [{"think": True}], {"think": False}),
    ]  # fmt: skip
    with running(bundle, llm={"reuse_prefix": False}) as live:
        asked = [{"role": "user", "content": "what"}]
        llm = live.engine.llm
        on, off = len(llm.encode(asked, thinking=True)), len(llm.encode(asked))
        assert on > off

        def prompt_tokens(path: str, **fields: Any) -> int:
            answer = live.ask(path, {**body(path, "what", num=1), **fields})
            assert answer.status == 200, answer.body
            found = answer.json.get("usage", answer.json)
            names = ("prompt_tokens", "input_tokens", "prompt_eval_count")
            return int(next(found[name] for name in names if name in found))

        for path, turned_on, turned_off in cases:
            assert {prompt_tokens(path, **fields) for fields in turned_on} == {on}, path
            assert prompt_tokens(path) == prompt_tokens(path, **turned_off) == off, path


# What a request may cost before it runs.


def texts() -> dict[str, tuple[str, dict[str, Any]]]:
    """A request for each place of a text, with one that is too long there."""
    user = {"role": "user", "content": "a"}

    def anthropic(*blocks: Any, role: str = "user", **fields: Any) -> dict[str, Any]:
        return {**body(MESSAGES, "a"), "messages": [{"role": role, "content": list(blocks)}, user],
                **fields}  # fmt: skip

    def items(*given: Any, **fields: Any) -> dict[str, Any]:
        return {**body(RESPONSES, "a"), "input": [*given, user], **fields}

    def ollama(*given: Any, **fields: Any) -> dict[str, Any]:
        return {**body(OLLAMA, "a"), "messages": [*given, user], **fields}

    text = {"type": "text", "text": LONG}
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": LONG}}
    result = {"type": "tool_result", "tool_use_id": "1"}
    schema = {"type": "object", "title": LONG}
    any_call: dict[str, Any] = {"tool_choice": {"type": "any"}}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": json.dumps([LONG])}
    output = {"type": "function_call_output", "call_id": "1"}
    thought = [{"type": "reasoning_text", "text": LONG}]
    calls = [{"function": {"name": "f", "arguments": {"a": LONG}}}]
    places = [
        ("messages", MESSAGES, body(MESSAGES, LONG)),
        ("text", MESSAGES, anthropic(text)),
        ("system", MESSAGES, anthropic(system=LONG)),
        ("system blocks", MESSAGES, anthropic(system=[text])),
        ("thinking", MESSAGES, anthropic({"type": "thinking", "thinking": LONG}, role="assistant")),
        ("tool_use", MESSAGES, anthropic(use, role="assistant")),
        ("tool_result", MESSAGES, anthropic({**result, "content": LONG})),
        ("result blocks", MESSAGES, anthropic({**result, "content": [text]})),
        ("tools", MESSAGES, anthropic(tools=[{"name": "f", "input_schema": schema}], **any_call)),
        ("count", COUNT, body(COUNT, LONG * 10)),
        ("input", RESPONSES, body(RESPONSES, LONG)),
        ("instructions", RESPONSES, items(instructions=LONG)),
        ("item", RESPONSES, items({"role": "developer", "content": LONG})),
        ("part", RESPONSES, items({"role": "user",
                                   "content": [{"type": "input_text", "text": LONG}]})),
        ("refusal", RESPONSES, items({"role": "assistant",
                                      "content": [{"type": "refusal", "refusal": LONG}]})),
        ("function_call", RESPONSES, items(call)),
        ("output", RESPONSES, items({**output, "output": LONG})),
        ("reasoning", RESPONSES, items({"type": "reasoning", "content": thought})),
        ("function", RESPONSES, items(tool_choice="required", tools=[
            {"type": "function", "name": "f", "parameters": schema}])),
        ("chat", OLLAMA, body(OLLAMA, LONG)),
        ("past", OLLAMA, ollama({"role": "assistant", "content": LONG})),
        ("past thinking", OLLAMA, ollama({"role": "assistant", "content": "", "thinking": LONG})),
        ("past call", OLLAMA, ollama({"role": "assistant", "tool_calls": calls})),
        ("prompt", GENERATE, body(GENERATE, LONG)),
        ("generate's system", GENERATE, {**body(GENERATE, "a"), "system": LONG}),
        ("raw", GENERATE, {**body(GENERATE, LONG), "raw": True}),
    ]  # fmt: skip
    return {name: (path, given) for name, path, given in places}


@pytest.mark.parametrize("place", texts())
def test_every_text_of_a_request_counts(live: Live, monkeypatch: pytest.MonkeyPatch, place: str):
    """It is refused before anything is encoded."""

    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(live.engine.llm.tokenizer, "encode", encode)
    path, given = texts()[place]
    answer = live.ask(path, given)
    assert answer.status == 400
    message = json.dumps(answer.json["error"])
    assert re.search(r"\d+ (characters|tokens or more).*shorten", message), message


@pytest.fixture(scope="module")
def strict(tool_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service with keys and small limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    write_secret(keys, "alice:sk-the-key-of-alice\nbob:sk-the-key-of-bob\n")
    with running(
        tool_bundle, api_key_file=keys, max_body_bytes=9000, max_messages=3, max_nesting=12,
        max_connections_per_key=1, body_timeout_s=0.3,
    ) as service:  # fmt: skip
        yield service


ALICE = {"Authorization": "Bearer sk-the-key-of-alice"}


def paths_of_the_app(live: Live) -> set[str]:
    return set(live.ask("/openapi.json", headers=ALICE).json["paths"])


@pytest.mark.live
def test_every_new_path_needs_a_key_and_is_documented(strict: Live):
    new = {path for path in paths_of_the_app(strict) if path.startswith("/api/")} | set(TEXTS)
    others = ("tags", "ps", "version", "show", "embed", "embeddings")
    assert {*TEXTS, *(f"/api/{name}" for name in others)} == new
    source = Path(app.__file__).read_text("utf-8")
    assert set(re.findall(r'"(/api/[a-z]+)"', source)) <= new
    for path in new:
        given = body(path, "a") if path in TEXTS else None
        for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"x-api-key": "wrong-key"}):
            answer = strict.ask(path, given, headers=headers)
            assert answer.status in (401, 405), path
            assert b"no valid API key" in answer.body
        assert strict.ask(path, given, headers={"x-api-key": "sk-the-key-of-alice"}).status in (
            200,
            405,
        )


@pytest.mark.live
@pytest.mark.parametrize("path", TEXTS)
def test_the_limits_of_bodies(strict: Live, path: str):
    def status(given: Any = None, raw: bytes | None = None, **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return strict.ask(path, given, raw=raw, headers={**ALICE, **named}).status

    good = body(path, "a", num=2)
    assert status(good) == 200
    assert status({**good, "model": "a" * 9000}) == 413
    assert status(good, Content_Type="text/plain") == 415
    assert status(good, Content_Encoding="gzip") == 415
    deep: Any = "a"
    for _ in range(20):
        deep = [deep]
    assert status({**good, "model": deep}) == 400
    assert status(raw=b"{") == 400
    assert status(raw=b'{"model": "\xff"}') == 400
    assert status({**good, "model": 1}) == 400
    assert status({**good, "nothing": 1}) == 400
    assert status({**good, "model": "nobody"}) == 404
    if path != GENERATE:
        key = "input" if path == RESPONSES else "messages"
        assert status({**good, key: [{"role": "user", "content": "a"}] * 4}) == 400
    data = json.dumps(good).encode()
    with strict.connect() as sock:
        sock.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
            "Authorization: Bearer sk-the-key-of-alice\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data[:-1]
        )  # the last byte never comes
        assert b" 408 " in sock.recv(4096).split(b"\r\n")[0]


@pytest.mark.live
@pytest.mark.parametrize("path", [path for path in TEXTS if path != COUNT])
def test_each_request_counts_for_its_key_and_in_the_metrics(strict: Live, path: str):
    def counted(name: str) -> float:
        text = strict.ask("/metrics", headers=ALICE).body.decode()
        return sum(float(n) for n in re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE))

    before = counted("edgellm_requests_total")
    refused = counted("edgellm_rejections_total")
    strict.engine.running.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(strict.ask, path, body(path, "a", num=2), headers=ALICE)
        while not strict.service.models.num_flights:
            time.sleep(0.005)
        second = strict.ask(path, body(path, "a"), headers=ALICE)
        strict.engine.running.set()
        assert first.result().status == 200
    assert second.status == 429
    assert second.headers["retry-after"] == "1"
    assert counted("edgellm_requests_total") == before + 1
    assert counted("edgellm_rejections_total") == refused + 1


@pytest.mark.parametrize("path", [path for path in TEXTS if path != COUNT])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(live: Live, path: str, stream: bool):
    live.engine.say([{"role": "user", "content": "long"}], "x" * 400)
    live.engine.delay_s = 0.01
    data = json.dumps(body(path, "long", stream=stream, num=400)).encode()
    try:
        with live.connect() as sock:
            sock.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            while not live.service.models.num_flights:
                time.sleep(0.005)
        assert live.idle(1.0)
    finally:
        live.engine.delay_s = 0


def test_rules_know_the_requests_of_every_protocol(live: Live):
    from edge_serve.api.facts import facts_of, prompt_pieces
    from edge_serve.api.protocol import decode
    from edge_serve.api.samples import SAMPLES
    from edge_serve.models.route import KINDS

    tool = {"name": "f", "input_schema": {}}
    function = {"type": "function", "name": "f"}
    wanted = {
        ("MessagesRequest", "tools"): {**body(MESSAGES, "abc"), "tools": [tool]},
        ("MessagesRequest", "chat"): {**body(MESSAGES, "abc"), "tools": [tool],
                                      "tool_choice": {"type": "none"}},
        ("MessagesRequest", "json"): {**body(MESSAGES, "abc"), "output_config": {
            "format": {"type": "json_schema", "schema": {}}}},
        ("ResponsesRequest", "tools"): {**body(RESPONSES, "abc"), "tools": [function]},
        ("ResponsesRequest", "json"): {**body(RESPONSES, "abc"),
                                       "text": {"format": {"type": "json_object"}}},
        ("ResponsesRequest", "chat"): {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "abc"}]}]},
        ("OllamaChatRequest", "tools"): {**body(OLLAMA, "abc"), "tools": [
            {"type": "function", "function": {"name": "f"}}]},
        ("OllamaChatRequest", "json"): {**body(OLLAMA, "abc"), "format": "json"},
        ("GenerateRequest", "completion"): {**body(GENERATE, "abc"), "raw": True},
        ("GenerateRequest", "chat"): body(GENERATE, "abc"),
    }  # fmt: skip
    kinds = {kind.__name__: kind for kind in SAMPLES}
    for (name, kind), given in wanted.items():
        request: Any = decode(json.dumps(given).encode(), kinds[name], 64)
        assert list(prompt_pieces(request)) == ["abc"], name
        facts = facts_of(request, "id")
        assert (facts.kind, facts.key) == (kind, "id"), name
        assert facts.kind in KINDS

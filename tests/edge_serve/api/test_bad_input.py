"""Everything that a field must not be: refused by name, twice, and the next request is served."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_serve.api import protocol
from edge_serve.api.anthropic.protocol import MessagesRequest
from edge_serve.api.ollama.protocol import OllamaChatRequest
from edge_serve.api.protocol import ChatRequest, CompletionRequest, decode, nesting
from edge_serve.api.responses.protocol import ResponsesRequest
from edge_serve.http.errors import APIError, as_api_error
from tests.edge_serve.scripted import Answer, Live

SECRET = re.compile(
    rb"0x[0-9a-fA-F]{6,}|Traceback|File \\?\"|/work|/tmp/|/usr|/root|\.py\b|edge_serve"
)
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "what"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "what", "max_tokens": 2}

# What is no number, no text, no list and no object of any kind that a field wants.
WRONG = (
    "NaN", "Infinity", "-1", "-0.5", "2147483648", "9223372036854775808", "18446744073709551616",
    "1e400", "1" + "0" * 400, "1.5", "true", '"2"', '""', "[]", "{}", "[[]]", '[{"a": 1}]',
    '"' + "x" * 100_000 + '"', '"\\ud800"', '"\\u0000"', "[null]", '{"a": null}', "0",
    "[" * 100 + "]" * 100, '"<｜User｜>"', "[1, -1]", '["", ""]',
)  # fmt: skip
CHAT_FIELDS = sorted(ChatRequest.__struct_fields__)
TEXT_FIELDS = sorted(CompletionRequest.__struct_fields__)


def send(live: Live, path: str, base: dict[str, Any], field: str, value: str) -> Answer:
    rest = {key: item for key, item in base.items() if key != field}
    body = json.dumps(rest)[:-1] + f', "{field}": {value}}}'
    return live.ask(path, raw=body.encode())


def check(live: Live, path: str, base: dict[str, Any], field: str) -> None:
    for value in WRONG:
        answers = [send(live, path, base, field, value) for _ in range(2)]
        for answer in answers:
            where = f"{field} = {value[:60]}: {answer.status} {answer.body[:300]!r}"
            assert answer.status < 500, where
            assert not SECRET.search(answer.body), where
            if answer.status != 200:
                error = answer.json["error"]
                assert isinstance(error["code"], str), where
                assert error["message"], where
        assert answers[0].status == answers[1].status, value
    null = send(live, path, base, field, "null")
    assert null.status in ((400,) if field in ("messages", "prompt", "model") else (200,))
    assert live.ask(path, base).status == 200
    assert live.idle()


@pytest.mark.parametrize("field", CHAT_FIELDS)
def test_no_field_of_a_chat_breaks_the_server(live: Live, field: str):
    check(live, "/v1/chat/completions", CHAT, field)


@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_no_field_of_a_completion_breaks_the_server(live: Live, field: str):
    check(live, "/v1/completions", TEXT, field)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", ["0", "-1", "1.5", "true", '"2"', "2147483648", "1000000", "9"]),
        ("max_tokens", ["0", "-1", "1.5", "true", '"5"', "2147483648"]),
        ("temperature", ["-0.1", "10.1", "NaN", "true", '"1"', "1e400"]),
        ("top_p", ["-0.1", "1.1", "NaN", "[]"]),
        ("top_k", ["-2", "0.5", "2147483648"]),
        ("min_p", ["-0.1", "1.1"]),
        ("seed", ["-1", "0.5", "9223372036854775808", "true"]),
        ("repetition_penalty", ["0", "10.1"]),
        ("presence_penalty", ["-2.1", "2.1"]),
        ("frequency_penalty", ["-2.1", "2.1"]),
        ("stop", ['""', '["", "a"]', "5", "[1]", json.dumps(["a"] * 17), json.dumps("x" * 1025)]),
        ("logit_bias", ['{"a": 1}', '{"1": 101}', '{"-1": 1}', '{"1": "2"}', "[]",
                        json.dumps({str(i): 1 for i in range(1025)})]),
        ("top_logprobs", ["21", "-1", "true"]),
        ("stream_options", ["{}", '{"x": 1}', "true"]),
        ("return_progress", ["true", "1", '"yes"']),
        ("messages", ["[]", "null", '"x"', "[{}]", '[{"role": "owner", "content": "x"}]',
                      '[{"role": "user"}]', '[{"role": "user", "content": 5}]',
                      '[{"role": "user", "content": [{"type": "image_url"}]}]',
                      '[{"role": "user", "content": "x", "name": "a b"}]',
                      '[{"role": "user", "content": "x", "name": ""}]',
                      '[{"role": "user", "content": "x", "name": "<a"}]',
                      '[{"role": "user", "content": "x", "name": 5}]',
                      '[{"role": "user", "content": "x", "key": "n"}]', "[null]", '["x"]']),
        ("tools", ['[{"type": "function"}]', '[{"type": "x", "function": {"name": "a"}}]',
                   '[{"type": "function", "function": {"name": "a b"}}]', '"f"']),
        ("tool_choice", ['"any"', "{}", '{"type": "function"}', "1"]),
        ("response_format", ['"json"', '{"type": "xml"}', '{"type": "json_schema"}', "{}",
                             '{"type": "text", "regex": "a"}', '{"type": "regex"}']),
        ("reasoning_effort", ['"huge"', "1"]),
        ("thinking_token_budget", ["-1", "1.5", '"9"']),
        ("stop_when_sure", ["-1", "1.5", '"9"', "true"]),
        ("vote", ["3", '{"most": 1}', '{"error": 0}', '{"answers": "word"}', '{"samples": 3}',
                  '{"answers": "regex:("}', '{"most": 3, "first": 4}', '{"most": 64}']),
        ("model", ["5", '""', "[]", "null"]),
        ("cache_salt", ['""', "5", json.dumps("x" * 257)]),
        ("modalities", ['["audio"]', '"text"']),
        ("chat_template_kwargs", ['{"messages": []}', '{"enable_thinking": "no"}']),
    ],
)  # fmt: skip
def test_what_must_be_refused_is_refused_by_name(live: Live, field: str, values: list[str]):
    for value in values:
        answer = send(live, "/v1/chat/completions", CHAT, field, value)
        assert answer.status == 400, (value, answer.status, answer.body[:200])
        param = answer.json["error"]["param"]
        if "NaN" not in value:
            assert param is not None, (value, answer.body)
            assert param.split(".")[0].split("[")[0] == field, (value, param)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xef\xbb\xbf{}", b"{}", b"{'a': 1}", b"\xff\xfe",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"{" * 10_000, b"[" * 100_000, b'{"a":' * 30_000 + b"1" + b"}" * 30_000, b"\0" * 1000,
        b'{"model": "tiny"}', b"{}{}", json.dumps(CHAT).encode() + b"x", b'"' + b'\\"' * 100_000,
    ],
)  # fmt: skip
def test_bodies_that_are_not_a_request_are_refused(live: Live, body: bytes):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        for _ in range(2):
            answer = live.ask(path, raw=body)
            assert answer.status == 400, (path, answer.body[:200])
            assert not SECRET.search(answer.body)
    assert live.ask("/v1/chat/completions", CHAT).status == 200


def test_many_messages_and_keys(live: Live):
    many = {**CHAT, "messages": [{"role": "user", "content": ""}] * 5000}
    assert live.ask("/v1/chat/completions", many).json["error"]["param"] == "messages"
    twice = b'{"model": "x", "model": "tiny", "messages": [{"role": "user", "content": "a"}]}'
    assert live.ask("/v1/chat/completions", raw=twice).status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.text('"\\[]{}a', max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text('"[{\\', max_size=3), inner, max_size=3)
    ),
)


@given(JSON)
def test_nesting_counts_as_json_does(value: Any):
    def depth(item: Any) -> int:
        if isinstance(item, list | dict):
            children = item.values() if isinstance(item, dict) else item
            return 1 + max(map(depth, children), default=0)
        return 0

    assert nesting(json.dumps(value).encode()) == depth(value)


@given(JSON, st.integers(1, 9))
def test_nesting_does_not_depend_on_the_parts_in_which_it_is_read(value: Any, size: int):
    body = json.dumps(value).encode()
    whole = nesting(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "_SCAN_BYTES", size)
        assert nesting(body) == whole


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes):
    nesting(data)
    with pytest.raises(APIError) as caught:
        decode(data, ChatRequest, 64)
    assert caught.value.status == 400


def test_no_secret_gets_out_of_an_error():
    for message in (
        "failed at 0x7f12deadbeef",
        "cannot read /opt/models/r1/engine.plan",
        "see /etc/edge/x.toml:3",
    ):
        for error in (RuntimeError(message), OSError(message), APIError(400, "x", message)):
            assert not re.search(rb"0x7f|/opt/|/etc/", as_api_error(error).body())
    for path in ("/v1/models/r1/engine.plan", "/v1/models.json", "/v1/other/file"):
        assert path not in APIError(400, "x", f"cannot read {path}").envelope()["error"]["message"]
    quoting = APIError(404, "x", "no '/opt/r1' here, but /opt/models/r1", quoted="'/opt/r1'")
    assert quoting.envelope()["error"]["message"] == "no '/opt/r1' here, but …"
    shown = as_api_error(APIError(400, "x", "messages[0].role: must be a/b, and 1/2 or </think>"))
    assert "a/b, and 1/2 or </think>" in shown.envelope()["error"]["message"]


def refusal(kind: type[Any], body: dict[str, Any]) -> str:
    with pytest.raises(APIError) as caught:
        decode(json.dumps(body).encode(), kind, 64)
    return caught.value.message


CHAT_BODY = {"messages": [{"role": "user", "content": "hi"}]}
CLAUDE_BODY = {**CHAT_BODY, "model": "a", "max_tokens": 4}


@pytest.mark.parametrize(
    ("kind", "body", "name", "meant"),
    [
        (ChatRequest, CHAT_BODY, "max_token", "max_tokens"),
        (ChatRequest, CHAT_BODY, "repeat_penalty", "repetition_penalty"),
        (ChatRequest, CHAT_BODY, "num_predict", "max_tokens"),
        (ChatRequest, CHAT_BODY, "format", "response_format"),
        (MessagesRequest, CLAUDE_BODY, "stop", "stop_sequences"),
        (ResponsesRequest, {"input": "hi"}, "max_tokens", "max_output_tokens"),
    ],
)
def test_an_unknown_field_says_the_protocols_own(
    kind: type[Any], body: dict[str, Any], name: str, meant: str
):
    assert refusal(kind, {**body, name: 1}) == f"{name}: unknown field; did you mean {meant}?"


def test_an_unknown_field_of_an_object_is_compared_with_that_object():
    options: Any = {"max_tokens": 4}
    said = "options.max_tokens: unknown field; did you mean num_predict?"
    assert refusal(OllamaChatRequest, {"options": options}) == said
    tools = [{"type": "function", "function": {"name": "f", "parametres": {}}}]
    said = "tools[0].function.parametres: unknown field; did you mean parameters?"
    assert refusal(ChatRequest, {**CHAT_BODY, "tools": tools}) == said
    nothing = "unknown field; remove it, or see the list of fields"
    assert refusal(ChatRequest, {**CHAT_BODY, "qqq": 1}) == f"qqq: {nothing}"
    long = "max_tokens" + "s" * 10**6  # is not compared as a whole
    assert refusal(ChatRequest, {**CHAT_BODY, long: 1}) == f"{long[:200]}: {nothing}"
    assert "--kv-capacity" in refusal(ChatRequest, {**CHAT_BODY, "num_ctx": 8192})


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("mirostat", 2, "only 0 is taken here; leave it out"),
        ("mirostat_eta", 0.1, "nothing is computed by it here; leave it out"),
        ("repeat_last_n", 64, "only -1 is taken here; leave it out"),
        ("temperature", 20, "expected a number from 0 to 10"),
        ("num_predict", 1.5, "expected a whole number"),
        ("num_predict", -3, "expected a number from -2 to 2147483647"),
        ("temperature", "hot", "expected `float | null`, got `str`"),
    ],
)
def test_an_error_says_in_words_what_an_option_takes(option: str, value: Any, said: str):
    body = {"options": {option: value}}
    assert refusal(OllamaChatRequest, body) == f"options.{option}: {said}"


def test_a_body_of_another_type_says_which(live: Live):
    for kind, found in (("text/plain; x=y", "Content-Type 'text/plain'"), ("", "no Content-Type")):
        answer = live.ask("/v1/chat/completions", raw=b"{", headers={"Content-Type": kind})
        assert answer.status == 415
        said = f"the body has {found}; send it as Content-Type: application/json"
        assert answer.json["error"]["message"] == said

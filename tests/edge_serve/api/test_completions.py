"""Completions, and the endpoints that turn text into tokens and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.runtime.sampling_params import SamplingParams
from tests.edge_serve.scripted import Live, running
from tests.makers.tiny_models import BOS


def complete(live: Live, prompt: Any = "hello", **fields: Any) -> Any:
    fields = {"max_tokens": 8, "temperature": 0, **fields}
    return live.ask("/v1/completions", {"model": "tiny", "prompt": prompt, **fields})


def test_text_goes_on_without_a_template(live: Live):
    live.engine.say("hello", " <b>world</b>")
    answer = complete(live, max_tokens=100).json
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0, "text": " <b>world</b>", "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == len(live.engine.llm.encode("hello"))


def test_prompts_of_every_kind(live: Live):
    ids = live.engine.llm.encode("hello")
    other = live.engine.llm.encode("the other")
    first, second = (complete(live, prompt).json["choices"][0]["text"] for prompt in (ids, other))
    assert first != second
    for prompts in (["hello", "the other"], [ids, other]):
        answer = complete(live, prompts).json
        assert [choice["text"] for choice in answer["choices"]] == [first, second]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["prompt_tokens"] == len(ids) + len(other)
    answer = complete(live, [ids, other], n=2, temperature=1, seed=3).json
    assert len(answer["choices"]) == 4
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(other)


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [1, "a"], ["a", [1]], [[1], 2], [10**6], [-1]]
)
def test_invalid_prompts_are_refused(live: Live, prompt: Any):
    answer = complete(live, prompt)
    assert answer.status == 400
    assert answer.json["error"]["param"].startswith("prompt")


def test_too_many_answers_at_once(live: Live):
    assert complete(live, ["a"] * 8).status == 200
    for fields in ({"prompt": ["a"] * 9}, {"prompt": ["a"] * 3, "n": 3}):
        assert complete(live, **fields).status == 400


def test_a_stream_is_the_same_text(live: Live):
    whole = complete(live, ["hello", "the other"], logprobs=2).json
    answer = complete(
        live, ["hello", "the other"], logprobs=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *events, usage, done = answer.events
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index, choice in enumerate(whole["choices"]):
        parts = [c for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [item for part in parts if part["logprobs"] for item in part["logprobs"][key]]
            assert joined == choice["logprobs"][key]


def test_logprobs_and_their_places(live: Live):
    choice = complete(live, logprobs=3, max_tokens=5).json["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == 5
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values())
        assert len(top) == 3
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    none = complete(live, logprobs=0, max_tokens=2).json["choices"][0]["logprobs"]
    assert none["top_logprobs"] is None
    assert len(none["token_logprobs"]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_each_token_is_where_its_offset_says(live: Live, stream: bool):
    """Also after characters of several tokens, whose offsets are where the character begins."""
    live.engine.say("héllo 🙂", "é 🙂你 the end")
    answer = complete(live, "héllo 🙂", echo=True, logprobs=0, stream=stream, max_tokens=60)
    if stream:
        parts = [event["choices"][0] for event in answer.events[:-1]]
    else:
        parts = answer.json["choices"]
    text = "".join(part["text"] for part in parts)
    assert text == "héllo 🙂é 🙂你 the end"
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    tokens = [token for each in logprobs for token in each["tokens"]]
    offsets = [offset for each in logprobs for offset in each["text_offset"]]
    assert sum(token.startswith("bytes:") for token in tokens) >= 4
    assert (tokens[0], offsets[:2]) == (BOS, [0, 0])
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):
        if token.startswith("bytes:"):
            assert text[offset] in "é🙂你"
        else:
            assert text[offset:].startswith(token)


def test_an_echoed_prompt_is_scored_as_the_core_scores_it(live: Live):
    llm = live.engine.llm
    ids = llm.encode("hello the world")
    wanted = llm.score(ids)
    for prompt in ("hello the world", ids):
        choice = complete(live, prompt, echo=True, logprobs=1, max_tokens=1).json["choices"][0]
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        np.testing.assert_allclose(logprobs["token_logprobs"][1:-1], wanted, atol=1e-6)
        for value, top in zip(
            logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        ):
            assert value <= max(top.values())
            assert len(top) in (1, 2)
        text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(ids)
        assert choice["text"].startswith(text)
        assert logprobs["text_offset"][len(ids)] == len(text)
    assert complete(live, "x" * 2000, echo=True, logprobs=1).status == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", "re\u0301sume\u0301 \u2126 <think>", "\u0958x"])
def test_an_echo_is_the_prompt_as_it_was_sent(live: Live, prompt: str, stream: bool):
    """Its tokens are of NFC; the answer begins where the prompt ends."""
    live.engine.say(prompt, " end")
    for logprobs in (None, 0):
        answer = complete(
            live, [prompt, prompt], n=2, echo=True, logprobs=logprobs, stream=stream, max_tokens=9
        )
        events = answer.events[:-1] if stream else [answer.json]
        for index in range(4):
            parts = [c for event in events for c in event["choices"] if c["index"] == index]
            assert "".join(part["text"] for part in parts) == f"{prompt} end"
            found = [part["logprobs"] for part in parts if part["logprobs"]]
            offsets = [offset for each in found for offset in each["text_offset"]]
            assert offsets == sorted(offsets)
            if logprobs is not None:
                num_prompt = len(live.engine.llm.encode(prompt))
                assert offsets[num_prompt - 1] <= len(prompt) == offsets[num_prompt]
            else:
                assert not found


def test_reasoning_of_plain_text_stays_text(live: Live):
    live.engine.say("hello", "<think>hm</think>yes")
    assert complete(live, max_tokens=50).json["choices"][0]["text"] == "<think>hm</think>yes"


def test_the_server_says_what_the_core_says(live: Live):
    ids = live.engine.llm.encode("the same")
    params = SamplingParams(temperature=1, top_p=0.9, seed=11, max_tokens=20)
    wanted = live.engine.llm.generate(ids, params)
    answer = complete(live, ids, temperature=1, top_p=0.9, seed=11, max_tokens=20).json
    assert answer["choices"][0]["text"] == wanted.text


# A gap


@pytest.fixture(scope="module")
def coder(code_bundle: Path) -> Iterator[Live]:
    with running(code_bundle, model={"tiny": code_bundle}, max_choices=4) as service:
        service.engine.say("def hello(", "the world<|file_sep|>junk", suffix="): pass")
        service.engine.say("", "the start", suffix="): pass")
        yield service


@pytest.mark.live
def test_a_suffix_asks_for_what_comes_before_it(coder: Live):
    wanted = ["the world", "the start"]
    prompts = ["def hello(", ""]
    answer = complete(coder, prompts, suffix="): pass", max_tokens=50).json
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    llm = coder.engine.llm
    num_prompt = sum(len(llm.encode(prompt, suffix="): pass")) for prompt in prompts)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    *events, done = complete(
        coder, prompts, suffix="): pass", max_tokens=50, n=2, stream=True
    ).events
    assert done == "[DONE]"
    for index in range(4):
        parts = [c["text"] for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(parts) == wanted[index // 2]


@pytest.mark.live
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5, 6]}, "suffix"),
        ({"prompt": [[5, 6]]}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": 5}, "suffix"),
        ({"suffix": "x y " * 1000}, "prompt"),
    ],
)
def test_suffixes_that_cannot_be(coder: Live, fields: dict[str, Any], param: str):
    answer = complete(coder, **{"suffix": "x", **fields})
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


def test_a_model_that_fills_no_gap_says_so(live: Live):
    for suffix in ("", "x"):
        answer = complete(live, suffix=suffix)
        assert (answer.status, answer.json["error"]["param"]) == (400, "suffix")
        assert "Qwen2.5-Coder" in answer.json["error"]["message"]
    assert complete(live, suffix=None).status == 200


# /tokenize and its kin


def test_tokenize_and_back(live: Live):
    llm = live.engine.llm
    answer = live.ask(
        "/tokenize", {"model": "tiny", "prompt": "héllo 🙂", "return_token_strs": True}
    )
    body = answer.json
    assert body["tokens"] == llm.encode("héllo 🙂")
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == llm.kv_capacity
    bare = live.ask("/tokenize", {"prompt": "hi", "model": "tiny", "add_special_tokens": False})
    assert bare.json["tokens"] == llm.tokenizer.encode("hi")
    back = live.ask("/detokenize", {"model": "tiny", "tokens": llm.tokenizer.encode("héllo 🙂")})
    assert back.json == {"prompt": "héllo 🙂"}


ASKED = [{"role": "user", "content": "what<think>"}]


def test_tokenize_a_chat(live: Live):
    answer = live.ask("/tokenize", {"model": "tiny", "messages": ASKED})
    assert answer.json["tokens"] == live.engine.llm.encode(ASKED)
    for body in ({}, {"prompt": "a", "messages": ASKED}, {"prompt": "a", "tools": []}):
        assert live.ask("/tokenize", {"model": "tiny", **body}).status == 400
    # What vLLM has as defaults may be said.
    said = {"add_special_tokens": False, "add_generation_prompt": True}
    again = live.ask("/tokenize", {"model": "tiny", "messages": ASKED, **said})
    assert again.json["tokens"] == answer.json["tokens"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": ASKED, "add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_a_field_of_the_other_input_is_refused(live: Live, body: dict[str, Any], field: str):
    answer = live.ask("/tokenize", {"model": "tiny", **body})
    assert (answer.status, answer.json["error"]["param"]) == (400, field)


def test_what_lm_eval_asks_of_a_tokenizer(live: Live):
    info = live.ask("/tokenizer_info?model=tiny").json
    tokens = live.engine.llm.manifest.tokens
    assert info["eos_token"] == tokens.eos_text
    assert info["bos_token"] == tokens.bos_text
    assert "<｜User｜>" in info["chat_template"]

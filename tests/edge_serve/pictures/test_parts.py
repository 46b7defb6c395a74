"""A picture comes to the model as its bytes, whichever protocol brings it, or is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_serve.scripted import Answer, Live, RealEngine, running

pytestmark = pytest.mark.live

# Not a picture: whether it is one is found out by who decodes it.
PICTURE = bytes(range(256)) * 20
OTHER = b"another picture"
Sender = Callable[[Live, str], Answer]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def uri(data: bytes = PICTURE, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{b64(data)}"


def text(value: str = "what is it?", kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": value}


def image_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def chat(live: Live, *parts: Any, **fields: Any) -> Answer:
    messages = [{"role": "user", "content": list(parts)}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 2, **fields}
    return live.ask("/v1/chat/completions", body)


def respond(live: Live, *parts: Any, **fields: Any) -> Answer:
    said = [{"role": "user", "content": list(parts)}]
    return live.ask(
        "/v1/responses", {"model": "tiny", "input": said, "max_output_tokens": 2, **fields}
    )


def message(live: Live, *blocks: Any) -> Answer:
    messages = [{"role": "user", "content": list(blocks)}]
    return live.ask("/v1/messages", {"model": "tiny", "messages": messages, "max_tokens": 2})


def block(source: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "source": source}


def base64_source(data: str) -> dict[str, Any]:
    return {"type": "base64", "media_type": "image/png", "data": data}


def ollama_chat(live: Live, *images: str, role: str = "user") -> Answer:
    messages = [{"role": role, "content": "what is it?", "images": list(images)}]
    return live.ask(
        "/api/chat",
        {"model": "tiny", "messages": messages, "options": {"num_predict": 2}, "stream": False},
    )


def ollama_generate(live: Live, *images: str, **fields: Any) -> Answer:
    body = {"model": "tiny", "prompt": "what is it?", "images": list(images), "stream": False}
    return live.ask("/api/generate", {**body, "options": {"num_predict": 2}, **fields})


# What each client sends for a picture before a text, the picture written as it is in the protocol.
SENDERS: dict[str, Sender] = {
    "chat": lambda live, data: chat(
        live, image_url({"url": f"data:image/png;base64,{data}"}), text()
    ),
    "chat, an address alone": lambda live, data: chat(
        live, image_url(f"data:image/jpeg;charset=utf-8;base64,{data}"), text()
    ),
    "responses": lambda live, data: respond(
        live,
        {"type": "input_image", "image_url": f"data:image/webp;base64,{data}", "detail": "auto"},
        text(kind="input_text"),
    ),
    "messages": lambda live, data: message(live, block(base64_source(data)), text()),
    "messages, a data URI": lambda live, data: message(
        live, block({"type": "url", "url": f"data:image/png;base64,{data}"}), text()
    ),
    "ollama chat": ollama_chat,
    "ollama generate": ollama_generate,
}


@pytest.mark.parametrize("sender", SENDERS.values(), ids=SENDERS)
def test_the_model_gets_the_bytes(sees: Live, asked: list[Any], sender: Sender):
    answer = sender(sees, b64(PICTURE))
    assert answer.status == 200, answer.body
    (ask,) = asked
    (said,) = ask.prompt
    assert said["content"] == [{"type": "image", "image": PICTURE}, text()]


def test_pictures_and_texts_keep_their_order(sees: Live, asked: list[Any]):
    answer = chat(sees, text("a"), image_url({"url": uri()}), text("b"), image_url(uri(OTHER)))
    assert answer.status == 200, answer.body
    (ask,) = asked
    assert ask.prompt[0]["content"] == [
        text("a"),
        {"type": "image", "image": PICTURE},
        text("b"),
        {"type": "image", "image": OTHER},
    ]


def test_base64_may_have_line_breaks(sees: Live, asked: list[Any]):
    data = base64.encodebytes(PICTURE).decode()
    assert data.count("\n") > 10
    assert chat(sees, image_url(f"data:image/png;base64,{data}")).status == 200
    assert ollama_chat(sees, data).status == 200
    assert [ask.prompt[0]["content"][0]["image"] for ask in asked] == [PICTURE] * 2


def test_a_tokens_count_counts_pictures(sees: Live, asked: list[Any]):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [block(base64_source(b64(OTHER)))]}],
    }
    assert sees.ask("/v1/messages/count_tokens", body).status == 200
    assert asked[0].prompt[0]["content"] == [{"type": "image", "image": OTHER}]


@pytest.mark.parametrize("detail", [None, "auto", "high"])
def test_neutral_picture_fields_change_nothing(sees: Live, asked: list[Any], detail: Any):
    """Each of these is in a list of what has no effect."""
    source = {**base64_source(b64(PICTURE)), "media_type": "image/gif"}
    given: dict[str, Any] = {"image_url": uri(), "detail": detail, "file_id": None}
    for answer in (
        chat(sees, image_url({"url": uri(), "detail": detail})),
        chat(sees, {**image_url(uri()), "prompt_cache_breakpoint": {"ttl": detail}}),
        respond(sees, {"type": "input_image", **given, "prompt_cache_breakpoint": {}}),
        message(sees, {**block(source), "cache_control": {"type": "ephemeral"}}),
    ):
        assert answer.status == 200, answer.body
    assert [ask.prompt[0]["content"] for ask in asked] == [
        [{"type": "image", "image": PICTURE}]
    ] * 4


REFUSED: dict[str, tuple[Callable[[Live], Answer], str]] = {
    "another kind of address": (
        lambda live: chat(live, text(), image_url({"url": "file:///etc/passwd"})),
        "messages[0].content[1].image_url.url: this is no picture in a data URI",
    ),
    "a data URI of a text": (
        lambda live: chat(live, image_url({"url": "data:text/plain;base64,AAAA"})),
        "messages[0].content[0].image_url.url: this is no picture",
    ),
    "a data URI without base64": (
        lambda live: chat(live, image_url({"url": "data:image/svg+xml,%3Csvg/%3E"})),
        "messages[0].content[0].image_url.url: this is no picture",
    ),
    "an address": (
        lambda live: chat(live, image_url({"url": "https://example.org/a.png"})),
        "messages[0].content[0].image_url.url: pictures are not fetched",
    ),
    "an address in a response": (
        lambda live: respond(live, {"type": "input_image", "image_url": "HTTP://example.org"}),
        "input[0].content[0].image_url: pictures are not fetched",
    ),
    "an address in a message": (
        lambda live: message(live, text(), block({"type": "url", "url": "http://example.org"})),
        "messages[0].content[1].source.url: pictures are not fetched",
    ),
    "bad base64": (
        lambda live: chat(live, image_url("data:image/png;base64,A*AA")),
        "messages[0].content[0].image_url: the picture is not valid base64",
    ),
    "base64 that is cut": (
        lambda live: message(live, block(base64_source("AAA"))),
        "messages[0].content[0].source.data: the picture is not valid base64",
    ),
    "no bytes": (
        lambda live: ollama_chat(live, ""),
        "messages[0].images[0]: the picture has no bytes",
    ),
    "a data URI for Ollama": (
        lambda live: ollama_generate(live, uri()),
        "images[0]: send the base64 alone",
    ),
    "fewer tiles": (
        lambda live: chat(live, image_url({"url": uri(), "detail": "low"})),
        "messages[0].content[0].image_url.detail: ",
    ),
    "fewer tiles in a response": (
        lambda live: respond(live, {"type": "input_image", "image_url": uri(), "detail": "low"}),
        "input[0].content[0].detail: ",
    ),
    "no address": (
        lambda live: chat(live, image_url({})),
        "messages[0].content[0].image_url.url: ",
    ),
    "a file of OpenAI's": (
        lambda live: respond(live, {"type": "input_image", "file_id": "file-1"}),
        "input[0].content[0].file_id: ",
    ),
    "the form of the Python API": (
        lambda live: chat(live, {"type": "image", "image": "/etc/passwd"}),
        "messages[0].content[0].type: ",
    ),
    "a type that is not read": (
        lambda live: message(live, block({**base64_source("AAAA"), "media_type": "image/tiff"})),
        "messages[0].content[0].source.media_type: ",
    ),
    "an answer with pictures": (
        lambda live: ollama_chat(live, "AAAA", role="assistant"),
        "messages[0].images: a message of role assistant has no such field",
    ),
    "pictures without the template": (
        lambda live: ollama_generate(live, "AAAA", raw=True),
        "images: needs the chat template",
    ),
    "the tokens of a picture": (
        lambda live: live.ask(
            "/tokenize",
            {"model": "tiny", "messages": [{"role": "user", "content": [image_url(uri())]}]},
        ),
        "messages[0].content[0]: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_parts_that_are_not_pictures_are_refused_by_name(sees: Live, asked: list[Any], case: Any):
    send, message = case
    answer = send(sees)
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    shown = error if isinstance(error, str) else error["message"]
    assert shown.startswith(message), shown
    assert not asked


def test_a_picture_in_the_result_of_a_tool(sees: Live):
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block(base64_source("AAAA"))]}
    shown = message(sees, result).json["error"]["message"]
    assert shown.startswith("messages[0].content[0].content[0]: a block of type image has no place")
    assert "after the result" in shown


def test_the_number_of_pictures_is_bounded(sees: Live, asked: list[Any]):
    pictures = [image_url({"url": uri(OTHER)})] * 10
    assert chat(sees, *pictures).status == 200
    shown = chat(sees, *pictures, image_url({"url": uri(OTHER)})).json["error"]
    assert shown["param"] == "messages[0].content[10].image_url.url"
    assert "may have 10 pictures" in shown["message"]
    assert len(asked) == 1


def test_the_bytes_of_pictures_are_bounded_together(sees: Live, asked: list[Any]):
    half = b"x" * 30_000
    assert chat(sees, image_url(uri(half)), image_url(uri(half))).status == 200
    refused = chat(sees, image_url(uri(half)), image_url(uri(half + b"x")))
    assert refused.json["error"]["param"] == "messages[0].content[1].image_url"
    assert (
        "60000 bytes together, and up to this one they have 60001"
        in refused.json["error"]["message"]
    )
    assert len(asked) == 1


def test_a_body_is_longer_by_its_pictures_alone(sees: Live, asked: list[Any]):
    """The server takes texts of 20,000 bytes, and pictures of 60,000: 80,000 in base64."""
    assert chat(sees, image_url(uri(b"x" * 59_000)), text()).status == 200
    assert sees.chat("x" * 101_000).status == 413
    assert len(asked) == 1


def test_small_values_do_not_make_a_body_as_long_as_a_picture(
    tiny_bundles: Bundles, sees_bundle: Any
):
    """They would take seconds to read, and with them the interpreter from all others."""
    many = (
        b'{"model":"tiny","messages":[{"role":"user","content":[' + b"{}," * 1_500_000 + b"{}]}]}"
    )
    with running(sees_bundle, RealEngine()) as live:
        answer = live.ask("/v1/chat/completions", raw=many)
    assert answer.status == 413
    assert "which is for pictures" in answer.json["error"]["message"]
    with running(tiny_bundles("qwen2")) as live:
        answer = live.ask("/v1/chat/completions", raw=many)
    assert (answer.status, "which is for pictures" in answer.json["error"]["message"]) == (
        413,
        False,
    )


def test_a_stored_response_keeps_its_pictures(sees_bundle: Any, asked: list[Any], tmp_path: Any):
    part = {"type": "input_image", "image_url": uri()}
    with running(sees_bundle, RealEngine(), responses_dir=tmp_path / "stored") as live:
        first = respond(live, part, store=True)
        assert first.status == 200, first.body
        go_on = {"previous_response_id": first.json["id"], "store": True}
        assert respond(live, text("and now?", "input_text"), **go_on).status == 200
        refused = respond(live, part, background=True)
        assert refused.status == 400
        assert refused.json["error"]["message"].startswith(
            "background: the rows of pictures are not"
        )
    before, after = (ask.prompt for ask in asked[:2])
    assert (
        after[0] == before[0] == {"role": "user", "content": [{"type": "image", "image": PICTURE}]}
    )
    assert [message["role"] for message in after] == ["user", "assistant", "user"]


@pytest.mark.parametrize("sender", SENDERS.values(), ids=SENDERS)
def test_a_model_without_eyes_says_that_none_has_them(live: Live, sender: Sender):
    answer = sender(live, b64(OTHER))
    assert answer.status == 400
    error = answer.json["error"]
    shown = error if isinstance(error, str) else error["message"]
    assert "the model 'tiny' reads text only; no model that is served here reads pictures" in shown


def test_a_model_without_eyes_names_those_that_have_them(tiny_bundles: Bundles, sees_bundle: Any):
    models = {"tiny": tiny_bundles("qwen2"), "blind": tiny_bundles("qwen2"), "eyes": sees_bundle}
    with running(sees_bundle, RealEngine(), model=models) as live:
        shown = chat(live, image_url(uri(OTHER))).json["error"]["message"]
        assert shown.endswith(
            "reads text only; name 'eyes' in the field model, which reads pictures, too"
        )
        cards = {card["id"]: card for card in live.ask("/v1/models").json["data"]}
        listed = {name: card["architecture"]["input_modalities"] for name, card in cards.items()}
        assert listed == {"tiny": ["text"], "blind": ["text"], "eyes": ["text", "image"]}
        shown = {
            name: live.ask("/api/show", {"model": name}).json["capabilities"] for name in models
        }
        assert {name for name, found in shown.items() if "vision" in found} == {"eyes"}

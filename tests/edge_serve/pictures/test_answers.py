"""Clients that others wrote send a picture, and get what the model says of it."""

from __future__ import annotations

import base64
import io
import json
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge import LLM, SamplingParams
from edge_serve.batch import run_batch
from tests.edge_serve.pictures.test_parts import (
    SENDERS,
    base64_source,
    block,
    chat,
    image_url,
    text,
    uri,
)
from tests.edge_serve.scripted import Live, RealEngine, running

pytestmark = pytest.mark.live

Image = pytest.importorskip("PIL.Image")
anthropic = pytest.importorskip("anthropic")
ollama = pytest.importorskip("ollama")
openai = pytest.importorskip("openai")

QUESTION = "What is it?"
TOKENS = 12


def draw(seed: int, size: tuple[int, int] = (90, 60), kind: str = "PNG") -> bytes:
    """A picture that no other seed draws."""
    shades = bytes(
        (seed * 37 + x * x * (seed + 3) + y * 5) % 256 for y in range(6) for x in range(9)
    )
    file = io.BytesIO()
    Image.frombytes("L", (9, 6), shades).convert("RGB").resize(size, 0).save(file, kind)
    return file.getvalue()


PICTURE, OTHER = draw(1), draw(2)


@pytest.fixture(scope="module")
def eyes(sees_bundle: Path) -> Iterator[Live]:
    with running(sees_bundle, RealEngine()) as live:
        yield live


@pytest.fixture(scope="module")
def said(sees_bundle: Path) -> dict[bytes, tuple[str, int]]:
    """What the model says of each picture, and the tokens of the prompt."""
    found = {}
    with LLM(sees_bundle, backend="ort-cpu", num_threads=1) as llm:
        for picture in (PICTURE, OTHER):
            parts = [{"type": "image", "image": picture}, text(QUESTION)]
            messages = [{"role": "user", "content": parts}]
            answer = llm.generate(messages, SamplingParams(temperature=0, max_tokens=TOKENS))
            found[picture] = answer.text, len(llm.encode(messages))
        plain = len(llm.encode([{"role": "user", "content": QUESTION}]))
    assert found[PICTURE][0] != found[OTHER][0]
    # A tile of four rows, and what frames it.
    assert min(tokens for _, tokens in found.values()) > plain + 4
    return found


def openai_client(live: Live) -> Any:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def by_openai(live: Live, picture: bytes) -> tuple[str, int]:
    messages = [{"role": "user", "content": [image_url({"url": uri(picture)}), text(QUESTION)]}]
    with openai_client(live) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=TOKENS, temperature=0
        )
    return answer.choices[0].message.content, answer.usage.prompt_tokens


def by_openai_streamed(live: Live, picture: bytes) -> tuple[str, int]:
    given = {"url": uri(picture), "detail": "high"}
    messages = [{"role": "user", "content": [image_url(given), text(QUESTION)]}]
    with openai_client(live) as client:
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=TOKENS, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    words = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    return "".join(words), chunks[-1].usage.prompt_tokens


def by_responses(live: Live, picture: bytes) -> tuple[str, int]:
    parts = [{"type": "input_image", "image_url": uri(picture)}, text(QUESTION, "input_text")]
    said = [{"role": "user", "content": parts}]
    with openai_client(live) as client:
        answer = client.responses.create(
            model="tiny", input=said, max_output_tokens=TOKENS, temperature=0
        )
    return answer.output_text, answer.usage.input_tokens


def by_anthropic(live: Live, picture: bytes) -> tuple[str, int]:
    data = base64.b64encode(picture).decode()
    messages = [{"role": "user", "content": [block(base64_source(data)), text(QUESTION)]}]
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(
            model="tiny", messages=messages, max_tokens=TOKENS, extra_body={"temperature": 0}
        )
        counted = client.messages.count_tokens(model="tiny", messages=messages)
    read = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == read
    return "".join(part.text for part in answer.content if part.type == "text"), read


def by_ollama(live: Live, picture: bytes) -> tuple[str, int]:
    messages = [{"role": "user", "content": QUESTION, "images": [picture]}]
    options = {"temperature": 0, "num_predict": TOKENS}
    with ollama.Client(live.url) as client:
        answer = client.chat("tiny", messages, options=options)
    return answer.message.content, answer.prompt_eval_count


def by_ollama_generate(live: Live, picture: bytes) -> tuple[str, int]:
    options = {"temperature": 0, "num_predict": TOKENS}
    with ollama.Client(live.url) as client:
        answer = client.generate("tiny", QUESTION, images=[picture], options=options)
    return answer.response, answer.prompt_eval_count


CLIENTS = (
    by_openai, by_openai_streamed, by_responses, by_anthropic, by_ollama, by_ollama_generate,
)  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_what_the_model_says(
    eyes: Live, said: dict[bytes, tuple[str, int]], client: Callable[[Live, bytes], tuple[str, int]]
):
    for picture in (PICTURE, OTHER, PICTURE):
        assert client(eyes, picture) == said[picture]


def test_rows_of_a_batch_have_pictures(
    sees_bundle: Path, said: dict[bytes, tuple[str, int]], tmp_path: Path
):
    rows = []
    for number, picture in enumerate((PICTURE, OTHER, b"no picture")):
        messages = [{"role": "user", "content": [image_url({"url": uri(picture)}), text(QUESTION)]}]
        body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0}
        row = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
        rows.append(json.dumps({**row, "body": body}))
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(rows))
    result = run_batch(source, output, models={"tiny": sees_bundle})
    assert (result.answered, result.failed) == (2, 1)
    found = {}
    for line in output.read_text().splitlines():
        answer = json.loads(line)
        body = answer["response"]["body"]
        words = body["choices"][0]["message"]["content"]
        found[answer["custom_id"]] = words, body["usage"]["prompt_tokens"]
    assert found == {"0": said[PICTURE], "1": said[OTHER]}


def bomb() -> bytes:
    """A PNG of a few KB that says it has 900 million pixels."""
    data = draw(1, (30_000, 20))
    head = bytearray(data[12:29])
    head[8:12] = (30_000).to_bytes(4, "big")
    return data[:12] + bytes(head) + zlib.crc32(head).to_bytes(4, "big") + data[33:]


HOSTILE = {
    "no picture": b"MZ\x90\0" * 50,
    "cut": PICTURE[:60],
    "many pixels": bomb(),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ls) system\n",
}


@pytest.mark.parametrize("sender", SENDERS.values(), ids=SENDERS)
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_picture_is_an_error_in_the_protocol_s_form(eyes: Live, sender: Any, data: bytes):
    answer = sender(eyes, base64.b64encode(data).decode())
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    shown = error if isinstance(error, str) else error["message"]
    assert len(shown) > 20
    assert "/" not in shown.replace("image/", "")  # no path of this machine
    assert chat(eyes, text(QUESTION)).status == 200


@pytest.mark.timing
def test_texts_are_not_slower_beside_hostile_pictures(eyes: Live):
    """Three clients that send nothing but bad pictures cost a text at most four times its time."""

    def median_s() -> float:
        times = []
        for _ in range(15):
            began = time.perf_counter()
            assert chat(eyes, text(QUESTION), temperature=0).status == 200
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    median_s()
    alone_s, over, counts = median_s(), threading.Event(), [0] * 3

    def send(number: int) -> None:
        pictures = list(HOSTILE.values())
        while not over.is_set():
            url = uri(pictures[counts[number] % len(pictures)])
            assert chat(eyes, image_url({"url": url})).status in (400, 429)
            counts[number] += 1

    threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        beside_s = median_s()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert min(counts) > 0
    assert beside_s < 4 * alone_s + 0.05, (alone_s, beside_s, counts)


def test_pictures_that_do_not_fit_say_how_many_rows_they_have(sees_bundle: Path):
    with running(sees_bundle, RealEngine(), llm={"kv_capacity": 64}) as live:
        answer = chat(live, *[image_url({"url": uri(draw(seed))}) for seed in range(10)])
    assert answer.status == 400
    error = answer.json["error"]
    assert error["code"] == "context_length_exceeded"
    assert "send fewer pictures, whose rows are 40 of them" in error["message"]

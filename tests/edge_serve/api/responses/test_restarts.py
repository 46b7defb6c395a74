"""Responses in the background over restarts of a real server, with OpenAI's own client."""

from __future__ import annotations

import hashlib
import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_serve.stored.record import read_record
from tests.conftest import Bundles, require_even_rows, require_int8_cache
from tests.edge_serve.processes import Child, child

pytestmark = pytest.mark.live

openai = pytest.importorskip("openai")
ARRAY = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}, "minItems": 25}},
    "required": ["a"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"name": "a", "schema": ARRAY}
SCHEMA = {"type": "json_schema", "name": "a", "schema": ARRAY}
# What is asked of the response, and the same of a chat.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"temperature": 1}, {"temperature": 1}),
    "penalties": (
        {"temperature": 1.5, "presence_penalty": 1, "frequency_penalty": 1, "top_p": 0.9},
        {"temperature": 1.5, "presence_penalty": 1, "frequency_penalty": 1, "top_p": 0.9},
    ),
    "schema": (
        {"temperature": 1, "text": {"format": SCHEMA}, "reasoning": {"effort": "none"}},
        {
            "temperature": 1,
            "response_format": {"type": "json_schema", "json_schema": JSON_SCHEMA},
            "reasoning_effort": "none",
        },
    ),
    "thinking": (
        {"temperature": 1, "text": {"format": SCHEMA}, "reasoning": {"effort": "minimal"}},
        {
            "temperature": 1,
            "response_format": {"type": "json_schema", "json_schema": JSON_SCHEMA},
            "reasoning_effort": "minimal",
        },
    ),
}  # fmt: skip
MOST = {"text": 200, "penalties": 200, "schema": 200, "thinking": 200}


@contextmanager
def server(
    bundle: Path, directory: Path, delay_s: float = 0.01, **settings: Any
) -> Iterator[Child]:
    given = {"responses_dir": directory, "kv_capacity": 256, "reuse_prefix": "false", **settings}
    pairs = [f"{name}={value}" for name, value in given.items()]
    with child("-m", "tests.edge_serve.slow_child", str(bundle), str(delay_s), *pairs) as opened:
        opened.wait_for("ready: tiny")
        yield opened


@contextmanager
def connected(server: Child) -> Iterator[Any]:
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def begin(client: Any, **fields: Any) -> Any:
    asked = {"model": "tiny", "input": "what", "background": True, **fields}
    penalties = ("presence_penalty", "frequency_penalty")  # which this client does not name
    extra = {name: asked.pop(name) for name in penalties if name in asked}
    return client.responses.create(**asked, extra_body=extra)


def said(response: Any) -> tuple[str, str]:
    """Reasoning and text of a response."""
    # As a mapping: old clients do not know that reasoning has content.
    output = response.to_dict()["output"]
    parts = [(item["type"], part["text"]) for item in output for part in item["content"]]
    return tuple(  # type: ignore[return-value]
        "".join(text for kind, text in parts if kind == wanted)
        for wanted in ("reasoning", "message")
    )


def wait(client: Any, id_: str, letters: int | None = None) -> Any:
    """Wait until a response has ended, or has said as much."""
    deadline = time.monotonic() + 30
    while True:
        found = client.responses.retrieve(id_)
        if found.status not in ("queued", "in_progress"):
            assert letters is None, found
            return found
        if letters is not None and sum(map(len, said(found))) >= letters:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def stop(server: Child) -> None:
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=10) == 0, "".join(server.log)
    assert time.monotonic() - began < 8


def seed_of(directory: Path, id_: str) -> int:
    unfinished = read_record(directory / f"{id_}.response").unfinished
    assert unfinished is not None
    return unfinished.seed


def undisturbed(client: Any, seed: int, case: str) -> tuple[str, str]:
    """What a chat says with the same random numbers."""
    fields = dict(CASES[case][1])
    extra = {name: fields.pop(name) for name in ("reasoning_effort",) if name in fields}
    message = (
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "what"}], seed=seed,
            max_tokens=MOST[case], extra_body=extra, **fields,
        )
        .choices[0]
        .message.to_dict()
    )  # fmt: skip
    return message.get("reasoning", ""), message["content"] or ""


@pytest.mark.parametrize(
    ("case", "kv_cache"), [*((case, "float") for case in CASES), ("text", "int8")]
)
def test_a_stop_in_the_middle_changes_no_token(
    tiny_bundles: Bundles, tmp_path: Path, case: str, kv_cache: str
):
    if case in ("schema", "thinking"):
        pytest.importorskip("llguidance")
    if kv_cache == "int8":
        require_int8_cache("native")
    bundle = tiny_bundles("qwen2", kv_cache=kv_cache)
    with server(bundle, tmp_path / "s") as first, connected(first) as client:
        id_ = begin(client, max_output_tokens=MOST[case], **CASES[case][0]).id
        before = wait(client, id_, 20)
        seed = seed_of(tmp_path / "s", id_)
        stop(first)
        first.wait_for(rf"{id_} is suspended after \d+ tokens")
    size = (tmp_path / "s" / f"{id_}.response").stat().st_size
    with server(bundle, tmp_path / "s") as second, connected(second) as client:
        after = client.responses.retrieve(id_)
        assert after.status == "in_progress"
        for early, late in zip(said(before), said(after), strict=True):
            assert late.startswith(early)
        wait(client, id_, sum(map(len, said(after))) + 20)
        assert (tmp_path / "s" / f"{id_}.response").stat().st_size < size  # its rows are gone
        stop(second)
    with server(bundle, tmp_path / "s", 0) as third, connected(third) as client:
        ended = wait(client, id_)
        assert said(ended) == undisturbed(client, seed, case)
        assert not [line for line in third.log if "WARNING" in line or "ERROR" in line], third.log
        assert ended.created_at == before.created_at
        assert [item.id for item in ended.output][: len(before.output)] == [
            item.id for item in before.output
        ]
        assert ended.usage.output_tokens <= MOST[case]
        if ended.status == "incomplete":
            assert ended.usage.output_tokens == MOST[case]
        if case == "schema" and ended.status == "completed":
            assert len(json.loads(ended.output_text)["a"]) >= 25


def test_responses_that_ran_together_continue_with_the_same_tokens(
    tiny_bundles: Bundles, tmp_path: Path
):
    require_even_rows()
    bundle = tiny_bundles("qwen2")
    alike: dict[str, Any] = {"deterministic": "true", "num_slots": "3"}
    with server(bundle, tmp_path / "s", **alike) as first, connected(first) as client:
        ids = [begin(client, max_output_tokens=MOST["text"], temperature=1).id for _ in range(4)]
        seeds = [seed_of(tmp_path / "s", id_) for id_ in ids]
        for id_ in ids[:3]:
            wait(client, id_, 20)
        stop(first)
    with server(bundle, tmp_path / "s", 0, **alike) as second, connected(second) as client:
        for id_, seed in zip(ids, seeds, strict=True):
            assert said(wait(client, id_)) == undisturbed(client, seed, "text")


def test_a_response_with_a_shifted_cache_continues(tiny_bundles: Bundles, tmp_path: Path):
    bundle = tiny_bundles("qwen2")
    slides: dict[str, Any] = {"kv_capacity": 48, "overflow": "slide"}
    with server(bundle, tmp_path / "s", **slides) as first, connected(first) as client:
        id_ = begin(client, max_output_tokens=MOST["text"], temperature=1).id
        seed = seed_of(tmp_path / "s", id_)
        wait(client, id_, 200)
        stop(first)
    record = read_record(tmp_path / "s" / f"{id_}.response").unfinished
    assert record is not None
    assert record.rows is not None
    assert len(record.answer) > 48 >= len(record.rows.ids)
    with server(bundle, tmp_path / "s", 0, **slides) as second, connected(second) as client:
        assert said(wait(client, id_)) == undisturbed(client, seed, "text")


def test_waiting_responses_continue_too(tiny_bundles: Bundles, tmp_path: Path):
    """One slot: the second response had not begun."""
    bundle = tiny_bundles("qwen2")
    limits: dict[str, Any] = {"num_slots": 1, "drain_timeout_s": 20}
    with server(bundle, tmp_path / "s", **limits) as first, connected(first) as client:
        ids = [begin(client, max_output_tokens=150, temperature=1).id for _ in range(3)]
        wait(client, ids[0], 10)
        assert client.responses.retrieve(ids[2]).status == "queued"
        stop(first)  # at once, although a drain may take longer
    with server(bundle, tmp_path / "s", 0, **limits) as second, connected(second) as client:
        for id_ in ids:
            ended = wait(client, id_)
            assert ended.status in ("completed", "incomplete")
            assert ended.usage.output_tokens > 0


def test_a_killed_response_restarts_with_the_same_random_numbers(
    tiny_bundles: Bundles, tmp_path: Path
):
    bundle = tiny_bundles("qwen2")
    with server(bundle, tmp_path / "s") as first, connected(first) as client:
        id_ = begin(client, max_output_tokens=200, temperature=1).id
        seed = seed_of(tmp_path / "s", id_)
        wait(client, id_, 20)
        first.process.kill()
        first.process.wait()
    with server(bundle, tmp_path / "s", 0) as second, connected(second) as client:
        assert said(wait(client, id_)) == undisturbed(client, seed, "text")


def test_a_response_that_repeatedly_kills_its_server_is_given_up(
    tiny_bundles: Bundles, tmp_path: Path
):
    bundle = tiny_bundles("qwen2")
    with server(bundle, tmp_path / "s", 0.05) as first, connected(first) as client:
        id_ = begin(client, max_output_tokens=200).id
        first.process.kill()
        first.process.wait()
    for _ in range(3):
        with server(bundle, tmp_path / "s", 0.05) as again, connected(again) as client:
            wait(client, id_, 1)
            again.process.kill()
            again.process.wait()
    with server(bundle, tmp_path / "s", 0.05) as last, connected(last) as client:
        ended = wait(client, id_)
        assert (ended.status, ended.error.code) == ("failed", "interrupted")


KILLED_WHILE_READING = """
import os, sys
from edge_serve.api.responses import stored
from tests.edge_serve import slow_child
stored.decode = lambda *_: os.kill(os.getpid(), 9)
sys.exit(slow_child.main(*sys.argv[1:]))
"""


def test_a_response_that_kills_its_server_while_it_is_read_is_given_up(
    tiny_bundles: Bundles, tmp_path: Path
):
    bundle = tiny_bundles("qwen2")
    with server(bundle, tmp_path / "s", 0.05) as first, connected(first) as client:
        id_ = begin(client, max_output_tokens=200).id
        wait(client, id_, 5)
        stop(first)
    setting = f"responses_dir={tmp_path / 's'}"
    for _ in range(2):
        with child("-c", KILLED_WHILE_READING, str(bundle), "0.05", setting) as again:
            assert again.process.wait(timeout=30) == -signal.SIGKILL
    with server(bundle, tmp_path / "s", 0.05) as last, connected(last) as client:
        ended = wait(client, id_)
        assert (ended.status, ended.error.code) == ("failed", "interrupted")
        assert "while it read this response" in ended.error.message
        assert "".join(said(ended))


def begin_in_order(client: Any, number: int) -> list[str]:
    """Ids of long responses, in the order in which a server resumes them."""
    begun = [begin(client, max_output_tokens=100, temperature=1) for _ in range(number)]
    return [each.id for each in sorted(begun, key=lambda each: (each.created_at, each.id))]


def test_orderly_stops_and_busy_models_do_not_count_as_kills(tiny_bundles: Bundles, tmp_path: Path):
    """At each start one of three finds no room in the queue."""
    bundle = tiny_bundles("qwen2")
    wide: dict[str, Any] = {"num_slots": 1, "queue_capacity": 4, "drain_timeout_s": 20}
    narrow = {**wide, "queue_capacity": 1}
    with server(bundle, tmp_path / "s", 0.3, **wide) as first, connected(first) as client:
        ids = begin_in_order(client, 3)
        stop(first)
    for _ in range(3):
        with server(bundle, tmp_path / "s", 0.3, **narrow) as again, connected(again) as client:
            time.sleep(1)
            assert client.responses.retrieve(ids[-1]).status in ("queued", "in_progress")
            stop(again)
    assert not list((tmp_path / "s").glob("*.starts"))
    with server(bundle, tmp_path / "s", 0, **narrow) as last, connected(last) as client:
        for id_ in ids:
            assert wait(client, id_).status in ("completed", "incomplete")


def test_one_that_waits_to_be_read_can_be_cancelled_and_deleted(
    tiny_bundles: Bundles, tmp_path: Path
):
    bundle = tiny_bundles("qwen2")
    wide: dict[str, Any] = {"num_slots": 1, "queue_capacity": 6, "drain_timeout_s": 20}
    narrow = {**wide, "queue_capacity": 1}
    with server(bundle, tmp_path / "s", 0.3, **wide) as first, connected(first) as client:
        ids = begin_in_order(client, 5)
        stop(first)
    with server(bundle, tmp_path / "s", 0.3, **narrow) as second, connected(second) as client:
        assert client.responses.retrieve(ids[4]).status in ("queued", "in_progress")
        assert client.responses.cancel(ids[3]).status == "cancelled"
        client.responses.delete(ids[4])
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(ids[4])
        stop(second)
    with server(bundle, tmp_path / "s", 0, **narrow) as last, connected(last) as client:
        statuses = [wait(client, id_).status for id_ in ids[:4]]
        assert statuses[3] == "cancelled"
        assert set(statuses[:3]) <= {"completed", "incomplete"}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["client_metadata", "item"])
def test_hostile_bodies_in_the_background_cost_little_memory(
    tiny_bundles: Bundles, tmp_path: Path, where: str
):
    """1.3 million lists of 4 MB as JSON take 82 MiB as objects; they have no effect."""
    lists = f"[{','.join(['[]'] * 1_330_000)}]"
    if where == "item":
        field = f'"input":[{{"role":"user","content":"what","id":{lists}}}]'
    else:
        field = f'"input":"what","client_metadata":{lists}'
    body = f'{{"model":"tiny","background":true,{field}}}'.encode()
    with server(tiny_bundles("qwen2"), tmp_path / "s", 0.5, num_slots=1) as opened:
        url = f"http://127.0.0.1:{opened.port}/v1/responses"
        before = opened.resident_bytes
        for _ in range(12):
            asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=20) as answer:
                assert json.load(answer)["status"] in ("queued", "in_progress")
        most = before + (100 << 20)
        deadline = time.monotonic() + 10
        while opened.resident_bytes >= most and time.monotonic() < deadline:
            time.sleep(0.1)
        assert opened.resident_bytes < most
    assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) < 1 << 20


def suspend(bundle: Path, directory: Path, letters: int = 20, **fields: Any) -> tuple[str, Any]:
    """A response that was stopped in the middle, and what it had said."""
    with server(bundle, directory) as first, connected(first) as client:
        id_ = begin(client, max_output_tokens=200, **fields).id
        before = wait(client, id_, letters)
        stop(first)
    return id_, before


def test_a_changed_bundle_ends_a_response_with_its_output_so_far(
    tiny_bundles: Bundles, tmp_path: Path
):
    id_, before = suspend(tiny_bundles("qwen2"), tmp_path / "s")
    with server(tiny_bundles("llama"), tmp_path / "s") as other, connected(other) as client:
        ended = wait(client, id_)
        assert (ended.status, ended.error.code) == ("failed", "bundle_changed")
        for early, late in zip(said(before), said(ended), strict=True):
            assert late.startswith(early)
        assert "restarted with another bundle" in ended.error.message


def test_a_smaller_context_ends_a_response_with_its_output_so_far(
    tiny_bundles: Bundles, tmp_path: Path
):
    id_, before = suspend(tiny_bundles("qwen2"), tmp_path / "s", 60)
    small = {"kv_capacity": 24}
    with (
        server(tiny_bundles("qwen2"), tmp_path / "s", **small) as second,
        connected(second) as client,
    ):
        ended = wait(client, id_)
        assert ended.status == "incomplete"
        for early, late in zip(said(before), said(ended), strict=True):
            assert late.startswith(early)


def in_the_layout_of_schema_8(data: bytes) -> bytes:
    """A stored response as it was before layouts named their tensors."""
    begin = data.index(b"{")
    end = begin + int.from_bytes(data[begin - 8 : begin], "little")
    record = json.loads(data[begin:end])
    layout = record["unfinished"]["rows"]["layout"]
    tensors = list(layout.pop("tensors").values())
    planes = {"dtype": "float32", "planes": len(tensors), "int8_planes": []}
    sizes = {"kv_heads": tensors[0]["kv_heads"], "head_dim": tensors[0]["dim"]}
    record["unfinished"]["rows"]["layout"] = {**layout, **planes, **sizes}
    encoded = json.dumps(record).encode()
    head = data[: begin - 8] + len(encoded).to_bytes(8, "little")
    return head + encoded + hashlib.sha256(encoded).digest() + data[end + 32 :]


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (damaged, r"the rows in .* are not used: it is damaged"),
        (in_the_layout_of_schema_8, r"its rows are of .* in rows of an older edge-llm"),
    ],
)
def test_rows_that_cannot_be_used_are_computed_again(
    tiny_bundles: Bundles, tmp_path: Path, change: Callable[[bytes], bytes], says: str
):
    bundle = tiny_bundles("qwen2")
    id_, before = suspend(bundle, tmp_path / "s", temperature=0)
    path = tmp_path / "s" / f"{id_}.response"
    path.write_bytes(change(path.read_bytes()))
    with server(bundle, tmp_path / "s", 0) as second, connected(second) as client:
        ended = wait(client, id_)
        second.wait_for(says)
        assert ended.status in ("completed", "incomplete")
        for early, late in zip(said(before), said(ended), strict=True):
            assert late.startswith(early)
        assert len(said(ended)[0] + said(ended)[1]) > len(said(before)[0] + said(before)[1])

"""Stored responses over HTTP, with OpenAI's own client: background, look-ups, ends, and bounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_serve.api.responses import stored as stored_module
from edge_serve.api.responses.protocol import IGNORED
from edge_serve.http.bodies import BodyBudget
from edge_serve.stored.store import ResponseStore
from tests.conftest import Bundles, write_secret
from tests.edge_serve.scripted import KEY, Live, running, until
from tests.edge_serve.stored.records import make_record

pytestmark = pytest.mark.live

openai = pytest.importorskip("openai")
OTHER = "sk-of-another-client"
ASKED: dict[str, Any] = {"model": "tiny", "input": "what", "temperature": 0}
BACKGROUND = {**ASKED, "background": True}
LONG = "abc " * 60


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    return write_secret(path, f"client:{KEY}\nother:{OTHER}\n")


@pytest.fixture(scope="module")
def live(tool_bundle: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("state") / "responses"
    with running(tool_bundle, api_key_file=keys, responses_dir=directory) as service:
        service.engine.say([{"role": "user", "content": "what"}], "<think>hm</think>Hello there.")
        service.engine.say([{"role": "user", "content": "long"}], LONG)
        yield service


def open_client(live: Live, key: str = KEY) -> Any:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with open_client(live) as opened:
        yield opened


@pytest.fixture
def slow(live: Live) -> Iterator[None]:
    live.engine.delay_s = 0.02
    yield
    live.engine.delay_s = 0


def files(live: Live) -> list[str]:
    directory = live.service._settings.responses_dir
    assert directory is not None
    return sorted(path.name for path in directory.iterdir())


def wait(client: Any, id_: str, *, timeout_s: float = 10) -> Any:
    deadline = time.monotonic() + timeout_s
    while (found := client.responses.retrieve(id_)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


@pytest.mark.usefixtures("slow")
def test_a_response_in_the_background_is_there_later(client: Any, live: Live):
    begun = client.responses.create(**BACKGROUND)
    assert begun.status in ("queued", "in_progress")
    assert begun.background
    ended = wait(client, begun.id)
    assert (ended.status, ended.output_text) == ("completed", "Hello there.")
    assert [item.type for item in ended.output] == ["reasoning", "message"]
    assert ended.usage.output_tokens > 0
    until(lambda: f"{begun.id}.response" in files(live))
    assert client.responses.retrieve(begun.id) == ended
    directory = live.service._settings.responses_dir
    assert directory is not None
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / f"{begun.id}.response").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("slow")
def test_the_output_so_far_is_shown(client: Any):
    begun = client.responses.create(**{**BACKGROUND, "input": "long"})
    texts = []
    while (found := client.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
        texts.append(found.output_text)
    texts.append(found.output_text)
    assert texts[-1] == LONG.rstrip() or texts[-1] == LONG
    assert len(set(texts)) > 3
    assert all(LONG.startswith(text) for text in texts)
    assert texts == sorted(texts, key=len)


@pytest.mark.parametrize("stream", [False, True])
def test_all_is_stored_unless_the_client_says_otherwise(client: Any, live: Live, stream: bool):
    def ask(**fields: Any) -> Any:
        if not stream:
            return client.responses.create(**ASKED, **fields)
        with client.responses.create(**ASKED, **fields, stream=True) as events:
            return list(events)[-1].response

    answer = ask(store=False)
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    for fields in ({}, {"store": True}):
        answer = ask(**fields)
        assert answer.to_dict()["store"] is True
        assert client.responses.retrieve(answer.id) == answer
        until(lambda: f"{answer.id}.response" in files(live))  # noqa: B023
        assert client.responses.retrieve(answer.id) == answer


def test_another_client_sees_nothing_of_it(client: Any, live: Live):
    id_ = client.responses.create(**BACKGROUND).id
    wait(client, id_)
    with open_client(live, OTHER) as other:
        for call in (other.responses.retrieve, other.responses.cancel, other.responses.delete):
            with pytest.raises(openai.NotFoundError) as refused:
                call(id_)
            with pytest.raises(openai.NotFoundError) as missing:
                call("resp_" + 24 * "0")
            assert refused.value.body == missing.value.body
        with pytest.raises(openai.BadRequestError) as caught:
            other.responses.create(**ASKED, previous_response_id=id_)
        assert caught.value.code == "previous_response_not_found"
    assert client.responses.retrieve(id_).id == id_


@pytest.mark.usefixtures("slow")
def test_a_cancelled_response_frees_the_engine_and_keeps_its_output(client: Any, live: Live):
    id_ = client.responses.create(**{**BACKGROUND, "input": "long"}).id
    until(lambda: bool(client.responses.retrieve(id_).output_text))
    ended = client.responses.cancel(id_)
    assert ended.status == "cancelled"
    assert LONG.startswith(ended.output_text)
    assert ended.output_text
    assert ended.output[-1].status == "incomplete"
    assert live.idle(1.0)
    until(lambda: id_ not in live.service._stored._live)
    for again in (client.responses.cancel(id_), client.responses.retrieve(id_)):
        assert again == ended


def test_only_background_responses_can_be_cancelled(client: Any):
    answer = client.responses.create(**ASKED, store=True)
    with pytest.raises(openai.BadRequestError, match="close the connection"):
        client.responses.cancel(answer.id)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("ended", [False, True])
def test_a_deleted_one_is_gone(client: Any, live: Live, ended: bool):
    id_ = client.responses.create(**{**BACKGROUND, "input": "what" if ended else "long"}).id
    if ended:
        wait(client, id_)
    client.responses.delete(id_)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(id_)
    assert live.idle(1.0)
    assert f"{id_}.response" not in files(live)


@pytest.mark.usefixtures("slow")
def test_a_client_that_leaves_does_not_end_background_responses(client: Any, live: Live):
    background = client.responses.create(**{**BACKGROUND, "input": "long"}).id
    stream = client.responses.create(**{**ASKED, "input": "long"}, store=True, stream=True)
    id_ = next(iter(stream)).response.id
    until(lambda: bool(client.responses.retrieve(id_).output_text))
    stream.close()
    until(lambda: client.responses.retrieve(id_).status == "cancelled")
    assert client.responses.retrieve(id_).output_text
    live.engine.delay_s = 0
    assert wait(client, background).status == "completed"


def test_a_conversation_goes_on_with_a_stored_response(client: Any, live: Live):
    first = client.responses.create(**ASKED, store=True)
    asked = [
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "Hello there.", "reasoning_content": "hm"},
        {"role": "user", "content": "and now"},
    ]
    live.engine.say(asked, "<think></think>Good bye.")
    again = {**ASKED, "input": "and now"}
    second = client.responses.create(**again, previous_response_id=first.id, store=True)
    assert (second.output_text, second.previous_response_id) == ("Good bye.", first.id)
    live.engine.say(
        [*asked, {"role": "assistant", "content": "Good bye.", "reasoning_content": ""},
         {"role": "user", "content": "really"}],
        "<think></think>Yes.",
    )  # fmt: skip
    third = {**ASKED, "input": [{"role": "user", "content": "really"}]}
    assert client.responses.create(**third, previous_response_id=second.id).output_text == "Yes."


@pytest.mark.usefixtures("slow")
def test_an_unfinished_response_cannot_be_continued(client: Any):
    id_ = client.responses.create(**{**BACKGROUND, "input": "long"}).id
    with pytest.raises(openai.BadRequestError, match="and only one that is completed"):
        client.responses.create(**ASKED, previous_response_id=id_)
    client.responses.cancel(id_)


def test_an_engine_that_fails_ends_it_with_the_reason(client: Any, live: Live):
    live.engine.fails_at = live.engine.llm.tokenizer.encode("H")[0]
    try:
        ended = wait(client, client.responses.create(**BACKGROUND).id)
    finally:
        live.engine.fails_at = None
    assert (ended.status, ended.error.code) == ("failed", "engine_error")
    assert ended.output[0].type == "reasoning"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_what_cannot_be_is_refused(client: Any, fields: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASKED, **fields)
    assert caught.value.param == param


def test_a_look_up_takes_no_options(client: Any):
    id_ = client.responses.create(**ASKED, store=True).id
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.retrieve(id_, stream=True)
    assert caught.value.param == "stream"


def test_values_without_effect_are_not_kept(client: Any, live: Live):
    """A client may send megabytes in them."""
    mark = "of-no-effect"
    fields = {name: mark for name in IGNORED if "." not in name and name != "include"}
    part = {"type": "input_text", "text": "what", "prompt_cache_breakpoint": mark}
    item = {"type": "message", "role": "user", "content": [part]}
    item |= {"id": mark, "status": mark, "phase": mark}
    reasoning = {"type": "reasoning", "summary": [], "encrypted_content": mark, "id": mark}
    asked = {**BACKGROUND, "input": [reasoning, item], "metadata": {"kept": "yes"}}
    ended = wait(client, client.responses.create(**asked, extra_body=fields).id)
    assert ended.metadata == {"kept": "yes"}
    directory = live.service._settings.responses_dir
    assert directory is not None
    until(lambda: f"{ended.id}.response" in files(live))
    data = (directory / f"{ended.id}.response").read_bytes()
    assert b"yes" in data
    assert mark.encode() not in data


@pytest.mark.usefixtures("slow")
def test_requests_in_the_background_count_until_they_have_ended(
    client: Any, live: Live, monkeypatch: pytest.MonkeyPatch
):
    """A client gets a quarter of the room; others have the rest, and an end gives it back."""
    tool = {"type": "function", "name": "f", "parameters": {"a": [None] * 8_000}}
    asked = {**BACKGROUND, "input": "long", "tools": [tool], "tool_choice": "none"}
    monkeypatch.setattr(live.service._stored, "_budget", BodyBudget(200_000, 50_000))
    first, second = (client.responses.create(**asked).id for _ in range(2))
    with pytest.raises(openai.RateLimitError) as caught:
        client.responses.create(**asked)
    assert caught.value.code == "bodies_full"
    with open_client(live, OTHER) as other:
        other.responses.delete(other.responses.create(**asked).id)
    client.responses.cancel(first)
    third = client.responses.create(**asked).id
    client.responses.delete(second)
    fourth = client.responses.create(**asked).id
    live.engine.delay_s = 0
    for id_ in (third, fourth):
        assert wait(client, id_).status == "completed"
    for _ in range(2):
        wait(client, client.responses.create(**{**asked, "input": "what"}).id)


def test_without_a_directory_responses_are_in_memory(
    tool_bundle: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    with running(tool_bundle) as live, open_client(live) as client:
        assert "each client's last 100 responses, or 32 MB of them" in caplog.text
        live.engine.say([{"role": "user", "content": "what"}], "<think>hm</think>Hello there.")
        live.engine.say([{"role": "user", "content": "long"}], LONG)
        answer = client.responses.create(**ASKED)
        assert client.responses.retrieve(answer.id) == answer
        until(lambda: answer.id not in live.service._stored._live)
        assert client.responses.retrieve(answer.id) == answer
        ended = wait(client, client.responses.create(**BACKGROUND).id)
        assert ended.output_text == answer.output_text
        again = {**ASKED, "input": "and now", "max_output_tokens": 4}
        assert client.responses.create(**again, previous_response_id=ended.id).usage.input_tokens
        client.responses.delete(ended.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(ended.id)
        live.engine.delay_s = 1.0
        begun = client.responses.create(**{**BACKGROUND, "input": "long"})
        assert begun.status == "queued"
        live.service.stop()  # within a step: nobody could have it
        until(lambda: live.exit_code == 0, 5)


def test_behind_a_proxy_that_is_trusted_nothing_is_stored(tiny_bundles: Bundles):
    """Its clients have one name here, and would see the responses of all."""
    proxied = running(tiny_bundles("qwen2"), trusted_proxies=["127.0.0.1"])
    with proxied as live, open_client(live) as client:
        answer = client.responses.create(**ASKED, store=True, max_output_tokens=4)
        assert answer.to_dict()["store"] is False
        for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
            with pytest.raises(openai.NotFoundError, match="responses_dir"):
                call(answer.id)
        for fields in ({"background": True}, {"previous_response_id": answer.id}):
            with pytest.raises(openai.BadRequestError, match="responses_dir") as caught:
                client.responses.create(**ASKED, **fields)
            assert caught.value.param == next(iter(fields))


def test_what_another_version_wrote_is_left_alone(tiny_bundles: Bundles, tmp_path: Path):
    store = ResponseStore(tmp_path / "s")
    records = [make_record((1 << 40) + n, client="anonymous", answer=n or None) for n in (0, 1)]
    for record in records:
        store.save(record)
    store.close()
    bundle = tiny_bundles("qwen2")
    with running(bundle, responses_dir=tmp_path / "s") as live, open_client(live) as client:
        for record in records:
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(record.id)
    assert ResponseStore(tmp_path / "s").unfinished() == [records[1].id]


def test_a_disk_that_is_full_refuses_the_background_and_nothing_else(
    client: Any, live: Live, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("edge_serve.stored.store.replace_durably", full)
        with pytest.raises(openai.InternalServerError) as caught:
            client.responses.create(**BACKGROUND)
        assert caught.value.code == "storage_full"
        assert live.idle(1.0)
        kept = client.responses.create(**ASKED, store=True)
        assert client.responses.retrieve(kept.id) == kept
        patch.setattr(stored_module, "_MOST_UNSAVED", 2)
        others = [client.responses.create(**ASKED, store=True) for _ in range(2)]
        until(lambda: kept.id not in live.service._stored._live)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(kept.id)
    client.responses.create(**ASKED, store=True)
    for other in others:
        until(lambda: f"{other.id}.response" in files(live))  # noqa: B023
        assert client.responses.retrieve(other.id) == other

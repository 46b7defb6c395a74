"""Anthropic's own client, and the cases of llm-comply, against the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.edge_serve.api.anthropic.test_messages import WEATHER
from tests.edge_serve.api.weather import CALL, SCHEMA
from tests.edge_serve.api.weather import WEATHER as CHAT_WEATHER
from tests.edge_serve.processes import comply
from tests.edge_serve.scripted import KEY, Live

pytestmark = pytest.mark.live

anthropic = pytest.importorskip("anthropic")
QUESTION: list[Any] = [{"role": "user", "content": "what"}]


@pytest.fixture
def client(served: Live) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as opened:
        yield opened


def asked(**fields: Any) -> dict[str, Any]:
    """A request; newer clients have no temperature, so it goes as an extra field."""
    extra = {"temperature": 0, **fields.pop("extra_body", {})}
    shared = {"model": "tiny", "max_tokens": 200, "messages": QUESTION}
    return {**shared, **fields, "extra_body": extra}


def test_the_sync_client(client: Any):
    answer = client.messages.create(**asked())
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "hm"
    assert answer.content[1].text == "Hello there."
    assert answer.stop_reason == "end_turn"
    assert answer._request_id
    counted = client.messages.count_tokens(model="tiny", messages=QUESTION)
    usage = client.messages.create(**asked()).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    beta = client.beta.messages.create(**asked(betas=["interleaved-thinking-2025-05-14"]))
    assert beta.content[1].text == "Hello there."


def test_the_sync_client_streams(client: Any):
    with client.messages.stream(**asked()) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert "".join(event.text for event in events if event.type == "text") == "Hello there."
    assert "".join(event.thinking for event in events if event.type == "thinking") == "hm"
    whole = client.messages.create(**asked())
    assert [b.to_dict() for b in final.content] == [b.to_dict() for b in whole.content]
    assert final.usage.output_tokens == whole.usage.output_tokens
    with client.messages.create(**asked(), stream=True) as raw:
        kinds = [event.type for event in raw]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])


def test_a_stop_sequence_of_the_client(client: Any):
    answer = client.messages.create(**asked(stop_sequences=["there"]))
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "there")


def test_the_async_client_runs_many_at_once(served: Live):
    async def ask_all() -> list[str]:
        async with anthropic.AsyncAnthropic(
            base_url=served.url, auth_token=KEY, api_key=None
        ) as opened:

            async def ask(streams: bool) -> str:
                if not streams:
                    return str((await opened.messages.create(**asked())).content[1].text)
                async with opened.messages.stream(**asked()) as stream:
                    return "".join([text async for text in stream.text_stream])

            return list(await asyncio.gather(*(ask(n % 2 == 0) for n in range(8))))

    assert asyncio.run(ask_all()) == ["Hello there."] * 8


def test_a_loop_of_tools(client: Any, served: Live):
    """As agents do it: call, result, answer; what the client got is sent back as it was."""
    served.engine.say(QUESTION, f"I look.\n{CALL}", tools=[CHAT_WEATHER])
    for streams in (False, True):
        if streams:
            with client.messages.stream(**asked(tools=[WEATHER])) as stream:
                answer = stream.get_final_message()
        else:
            answer = client.messages.create(**asked(tools=[WEATHER]))
        assert answer.stop_reason == "tool_use"
        call = answer.content[-1]
        assert (call.name, call.input) == ("weather", {"city": "Bern"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
        history = [
            *QUESTION,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [result]},
        ]
        served.engine.default = "Sunny."
        try:
            again = client.messages.create(**asked(messages=history, tools=[WEATHER]))
        finally:
            served.engine.default = None
        assert (again.content[-1].text, again.stop_reason) == ("Sunny.", "end_turn")


def test_an_answer_of_a_form_of_the_client(client: Any):
    pytest.importorskip("llguidance")
    answer = client.messages.create(
        **asked(output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    )
    assert json.loads(answer.content[-1].text).keys() == {"city"}


def test_errors_are_the_clients_own(client: Any, served: Live):
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**asked(extra_body={"temperature": -1}))
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**asked(model="claude"))
    stranger = anthropic.Anthropic(base_url=served.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(**asked())
    served.engine.fails_at = served.engine.llm.tokenizer.encode("H")[0]
    try:
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(**asked())
        with pytest.raises(anthropic.APIStatusError), client.messages.stream(**asked()) as stream:
            list(stream)
    finally:
        served.engine.fails_at = None
    assert client.messages.create(**asked()).content[1].text == "Hello there."


def test_a_client_that_closes_its_stream_frees_the_engine(client: Any, served: Live):
    long = [{"role": "user", "content": "long"}]
    served.engine.say(long, "x" * 300)
    served.engine.delay_s = 0.01
    try:
        with client.messages.stream(**asked(messages=long)) as stream:
            next(iter(stream))
        assert served.idle(1.0)
    finally:
        served.engine.delay_s = 0


def test_llm_comply_finds_no_faults(served: Live):
    """All of its cases but the one with an image."""
    cases = (
        "anth-basic-response,anth-system-prompt,anth-multi-turn,anth-tool-calling,"
        "anth-streaming-response,anth-streaming-usage,anth-error-handling"
    )
    served.engine.default = "<think>hm</think>I am fine."
    try:
        report = comply("anthropic", f"{served.url}/v1", KEY, cases)
    finally:
        served.engine.default = None
    assert report["summary"]["total"] == report["summary"]["passed"] == 7, report

"""OpenAI's own client, and the cases of llm-comply, against ``/v1/responses``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.edge_serve.api.responses.test_responses import FORM, WEATHER
from tests.edge_serve.api.weather import CALL, FUNCTION, QUESTION
from tests.edge_serve.api.weather import WEATHER as CHAT_WEATHER
from tests.edge_serve.processes import comply
from tests.edge_serve.scripted import KEY, Live

pytestmark = pytest.mark.live

openai = pytest.importorskip("openai")
ASKED: dict[str, Any] = {"model": "tiny", "input": "what", "temperature": 0}


@pytest.fixture
def client(served: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def test_the_sync_client(client: Any):
    answer = client.responses.create(**ASKED)
    assert answer.output_text == "Hello there."
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].to_dict()["content"][0]["text"] == "hm"
    assert answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_the_sync_client_streams(client: Any):
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == "Hello there."
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "hm"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_async_client_runs_many_at_once(served: Live):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as opened:

            async def ask(streams: bool) -> str:
                if not streams:
                    return str((await opened.responses.create(**ASKED)).output_text)
                async with opened.responses.stream(**ASKED) as stream:
                    return str((await stream.get_final_response()).output_text)

            return list(await asyncio.gather(*(ask(n % 2 == 0) for n in range(8))))

    assert asyncio.run(ask_all()) == ["Hello there."] * 8


def test_a_loop_of_tools(client: Any, served: Live):
    """What the client got is sent back as it was, with the result."""
    served.engine.say(QUESTION, f"<think>hm</think>I look.\n{CALL}", tools=[CHAT_WEATHER])
    answer = client.responses.create(**ASKED, tools=[WEATHER])
    call = answer.output[-1]
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"city": "Bern"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    served.engine.default = "Sunny."
    try:
        again = client.responses.create(
            **{**ASKED, "input": [*QUESTION, *answer.output, result]}, tools=[WEATHER]
        )
    finally:
        served.engine.default = None
    assert again.output_text == "Sunny."


def test_an_answer_of_a_form(client: Any):
    pytest.importorskip("llguidance")
    text = {"format": {**FORM, "schema": FUNCTION["parameters"], "strict": True}}
    answer = client.responses.create(**ASKED, text=text)
    assert json.loads(answer.output_text).keys() == {"city"}


def test_errors_are_the_clients_own(client: Any, served: Live):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASKED, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**{**ASKED, "model": "gpt-5"})
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    served.engine.fails_at = served.engine.llm.tokenizer.encode("H")[0]
    try:
        with pytest.raises(openai.InternalServerError):
            client.responses.create(**ASKED)
        with client.responses.create(**ASKED, stream=True) as stream:
            last = list(stream)[-1]
    finally:
        served.engine.fails_at = None
    assert (last.type, last.response.error.code) == ("response.failed", "engine_error")


def test_a_client_that_closes_its_stream_frees_the_engine(client: Any, served: Live):
    served.engine.say([{"role": "user", "content": "long"}], "x" * 300)
    served.engine.delay_s = 0.01
    try:
        stream = client.responses.create(**{**ASKED, "input": "long"}, stream=True)
        next(iter(stream))
        stream.close()
        assert served.idle(1.0)
    finally:
        served.engine.delay_s = 0


def test_llm_comply_finds_no_faults(served: Live):
    """All of its cases but the one with an image and those of another endpoint."""
    cases = (
        "basic-response,system-prompt,multi-turn,tool-calling,streaming-response,streaming-usage,"
        "assistant-phase,response-output-phase-schema,error-handling"
    )
    served.engine.default = "I am fine."
    try:
        report = comply("open-responses", f"{served.url}/v1", KEY, cases)
    finally:
        served.engine.default = None
    assert report["summary"]["total"] == report["summary"]["passed"] == 9, report

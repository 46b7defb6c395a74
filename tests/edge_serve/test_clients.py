"""Clients that others wrote: openai, llm-comply, schemathesis."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.edge_serve.api.weather import CALL, WEATHER
from tests.edge_serve.processes import comply
from tests.edge_serve.scripted import KEY, Live, running

pytestmark = pytest.mark.live

openai = pytest.importorskip("openai")
QUESTION: list[Any] = [{"role": "user", "content": "what"}]
AUTH = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def served(tool_bundle: Path, client_keys: Path) -> Iterator[Live]:
    with running(tool_bundle, api_key_file=client_keys, llm={"queue_capacity": 4}) as live:
        live.engine.say(QUESTION, "Hello there.")
        live.engine.say("once", " upon a time")
        yield live


@pytest.fixture
def client(served: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def test_the_sync_client(client: Any):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "Hello there."
    assert answer.usage.prompt_tokens > 0
    text = client.completions.create(model="tiny", prompt="once", temperature=0)
    assert text.choices[0].text == " upon a time"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=QUESTION, temperature=0
    )
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == "Hello there."


def test_the_sync_client_streams(client: Any):
    with client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == "Hello there."
    assert chunks[-1].usage.completion_tokens > 0
    with client.chat.completions.stream(model="tiny", messages=QUESTION, temperature=0) as helper:
        final = helper.get_final_completion()
    assert final.choices[0].message.content == "Hello there."


def test_the_async_client_runs_many_at_once(served: Live):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:

            async def ask(stream: bool) -> str:
                options = {"model": "tiny", "messages": QUESTION, "temperature": 0}
                if not stream:
                    answer = await client.chat.completions.create(**options)
                    return str(answer.choices[0].message.content)
                parts = await client.chat.completions.create(**options, stream=True)
                return "".join([part.choices[0].delta.content or "" async for part in parts])

            return list(await asyncio.gather(*(ask(n % 2 == 0) for n in range(8))))

    assert asyncio.run(ask_all()) == ["Hello there."] * 8


def test_errors_are_the_clients_own(client: Any, served: Live):
    def create(**fields: Any) -> Any:
        return client.chat.completions.create(
            **{"model": "tiny", "messages": QUESTION, "temperature": 0, **fields}
        )

    with pytest.raises(openai.BadRequestError) as caught:
        create(temperature=-1)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-4")
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    served.engine.fails_at = served.engine.llm.tokenizer.encode("H")[0]
    try:
        with pytest.raises(openai.InternalServerError):
            create()
        with pytest.raises(openai.APIError), create(stream=True) as stream:
            list(stream)
    finally:
        served.engine.fails_at = None
    assert create().choices[0].message.content == "Hello there."


def test_a_client_that_closes_its_stream_frees_the_engine(client: Any, served: Live):
    served.engine.say([{"role": "user", "content": "long"}], "x" * 300)
    served.engine.delay_s = 0.01
    try:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "long"}], temperature=0, stream=True
        )
        next(iter(stream))
        stream.close()
        assert served.idle(1.0)
    finally:
        served.engine.delay_s = 0


def test_a_retry_waits_as_it_is_told(served: Live):
    served.engine.say([{"role": "user", "content": "busy"}], "x" * 100)
    served.engine.delay_s = 0.001

    busy: list[Any] = [{"role": "user", "content": "busy"}]

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            create = client.chat.completions.create
            asked = (create(model="tiny", temperature=0, messages=busy) for _ in range(12))
            return list(await asyncio.gather(*asked))

    started = time.monotonic()
    try:
        answers = asyncio.run(ask_all())
    finally:
        served.engine.delay_s = 0
    assert [a.choices[0].message.content for a in answers] == ["x" * 100] * 12
    assert time.monotonic() - started < 15


def test_tools_of_the_client(client: Any, served: Live):
    served.engine.say(QUESTION, CALL, tools=[WEATHER])
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, tools=[WEATHER], temperature=0
    )
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Bern"}
    history = [*QUESTION, answer.choices[0].message, {"role": "tool", "content": "sun",
               "tool_call_id": call.id}]  # fmt: skip
    again = client.chat.completions.create(
        model="tiny", messages=history, tools=[WEATHER], max_tokens=2
    )
    assert again.choices[0].finish_reason in ("length", "stop")


def test_llm_comply_finds_no_faults(served: Live):
    cases = (
        "chat-basic-response,chat-system-prompt,chat-multi-turn,chat-tool-calling,"
        "chat-streaming-response,chat-streaming-usage,chat-reasoning-summary,chat-error-handling"
    )
    served.engine.default = "<think></think>I am fine."
    try:
        report = comply("openai-chat", f"{served.url}/v1", KEY, cases)
    finally:
        served.engine.default = None
    assert (report["summary"]["total"], report["summary"]["failed"]) == (8, 0), report


def test_schemathesis_finds_nothing(tool_bundle: Path, tmp_path: Path):
    pytest.importorskip("schemathesis")
    schema = tmp_path / "openapi.json"
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,negative_data_rejection,unsupported_method"
    )
    with running(tool_bundle, default_model="tiny") as live:
        live.engine.default = "Fine."
        schema.write_bytes(live.ask("/openapi.json").body)
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", live.url]
        command += ["--checks", checks, "--max-examples", "8", "--phases", "fuzzing", "--seed", "1"]
        command += ["--no-color", "--generation-database", "none", "--request-timeout", "20"]
        ran = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False
        )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]

"""The openai client through a fleet's endpoint, by HAProxy alone and by way of vllm-router."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_fleet.devices.live_endpoint import (
    Endpoint,
    answers,
    endpoint,
    needs_haproxy,
    needs_router,
    router,
    wait_until,
)
from tests.edge_serve.api.weather import CALL, QUESTION, WEATHER
from tests.edge_serve.processes import Child, scripted_child
from tests.ports import free_port

openai = pytest.importorskip("openai")
pytestmark = [needs_haproxy, pytest.mark.once, pytest.mark.xdist_group("fleet-clients")]
_STEP_S = 0.02
_TEXT = "one two " * 2
_ANSWER = f"hm\n</think>\n\n{_TEXT}{CALL}"
_ASKED: dict[str, Any] = {"model": "tiny", "messages": QUESTION}


class Fleet:
    """Two devices, the endpoint before them, and a client that tries nothing twice."""

    def __init__(self, front: Endpoint, devices: dict[str, Child]) -> None:
        self.front = front
        self.devices = devices
        base = f"http://127.0.0.1:{front.port}/v1"
        client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=30)
        self.chats = client.chat.completions

    def home(self, session: str) -> str:
        """The device of a session."""
        head = {"X-Session-Id": session}
        asked = self.chats.with_raw_response.create(**_ASKED, max_tokens=1, extra_headers=head)
        return str(asked.headers["x-edge-device"])

    def states(self) -> dict[str, str]:
        told = json.loads(self.front.do("status", "--json"))["devices"]
        return {name: device["state"] for name, device in told.items()}

    def stats(self) -> list[Any]:
        return [json.loads(device.ask("/stats")[2]) for device in self.devices.values()]

    def lines(self, session: str, began: threading.Barrier) -> tuple[str, str, float]:
        """What came of a stream, which error ended it, and when."""
        text = error = ""
        asked = self.chats.with_streaming_response.create(
            **_ASKED, stream=True, extra_headers={"X-Session-Id": session}
        )
        try:
            with asked as raw:
                for line in raw.iter_lines():
                    if not text:
                        began.wait(20)
                    text += f"{line}\n"
        except Exception as found:  # noqa: BLE001 - the client's HTTP library has its own
            error = type(found).__name__
        return text, error, time.monotonic()


@pytest.fixture(
    scope="module",
    params=["haproxy", pytest.param("vllm-router", marks=needs_router)],
)
def fleet(
    request: pytest.FixtureRequest,
    tiny_bundles: Bundles,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    with ExitStack() as stack:
        devices, keys = {}, {}
        for name in "ab":
            probes = free_port()
            settings: dict[str, Any] = {
                "answer": _ANSWER,
                "kv_capacity": 1024,
                "probe_port": probes,
            }
            device = scripted_child(tiny_bundles("qwen2"), _STEP_S, **settings)
            devices[name] = stack.enter_context(device)
            keys[name] = {"port": devices[name].port, "probe_port": probes}
        told: dict[str, Any] = {"metrics_port": free_port()}
        by_router = request.param == "vllm-router"
        if by_router:
            told["router_port"] = free_port()
        front = stack.enter_context(endpoint(tmp_path_factory.mktemp("f"), keys, **told))
        if by_router:
            stack.enter_context(router(front, told["router_port"]))
        yield Fleet(front, devices)
        # That it was the router that chose.
        assert not by_router or answers(told["metrics_port"], "router")


@pytest.mark.live
def test_a_chat_whole_and_streamed(fleet: Fleet):
    whole = fleet.chats.create(**_ASKED).choices[0]
    assert whole.message.content.startswith(_TEXT)
    assert whole.finish_reason == "stop"
    began = time.monotonic()
    with fleet.chats.create(**_ASKED, stream=True) as stream:
        chunks = [(chunk.choices[0], time.monotonic()) for chunk in stream]
    assert "".join(choice.delta.content or "" for choice, _ in chunks) == whole.message.content
    assert chunks[-1][0].finish_reason == "stop"
    assert len(chunks) > 5
    assert chunks[1][1] - began < (chunks[-1][1] - began) / 2  # as they were made


@pytest.mark.slow
def test_a_tool_call_comes_back_as_one(fleet: Fleet):
    told = fleet.chats.create(**_ASKED, tools=[WEATHER]).choices[0]
    with fleet.chats.stream(**_ASKED, tools=[WEATHER]) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (told, streamed):
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Bern"}


@pytest.mark.timing
def test_a_stream_that_is_closed_frees_its_slot_within_2_s(fleet: Fleet):
    def aborted() -> int:
        return sum(each["requests"].get("abort", 0) for each in fleet.stats())

    before = aborted()
    stream = fleet.chats.create(**_ASKED, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: aborted() == before + 1, 2)
    assert not any(each["models"]["tiny"]["running"] for each in fleet.stats())


@pytest.mark.live
def test_refused_requests_change_nobodys_health(fleet: Fleet):
    homes = {f"s{i}": fleet.home(f"s{i}") for i in range(8)}
    for i in range(200):
        with pytest.raises(openai.BadRequestError):
            fleet.chats.create(
                **_ASKED, temperature=-1, extra_headers={"X-Session-Id": f"s{i % 8}"}
            )
    assert {session: fleet.home(session) for session in homes} == homes
    assert fleet.states() == {"a": "ready", "b": "ready"}


@pytest.mark.slow
@pytest.mark.timing
def test_a_frozen_device_costs_no_whole_answer_and_its_streams_break(fleet: Fleet):
    homes: dict[str, str] = {}
    for number in range(64):
        homes.setdefault(fleet.home(f"frozen-{number}"), f"frozen-{number}")
        if len(homes) == 2:
            break
    began = threading.Barrier(3)
    with ThreadPoolExecutor(4) as pool:
        heads = [{"X-Session-Id": session} for session in homes.values()]
        whole = [pool.submit(fleet.chats.create, **_ASKED, extra_headers=head) for head in heads]
        streams = {name: pool.submit(fleet.lines, homes[name], began) for name in "ab"}
        began.wait(20)
        fleet.devices["a"].process.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        try:
            for asked in whole:
                assert asked.result().choices[0].message.content.startswith(_TEXT)
            cut, error, ended_at = streams["a"].result()
            assert error == "RemoteProtocolError"
            assert '"delta":' in cut
            assert "stop" not in cut
            assert "[DONE]" not in cut
            assert ended_at - frozen_at < 8
            assert "[DONE]" in streams["b"].result()[0]
            assert fleet.home("new") == "b"
            assert fleet.states() == {"a": "away", "b": "ready"}
        finally:
            fleet.devices["a"].process.send_signal(signal.SIGCONT)
    fresh = count()
    wait_until(lambda: fleet.home(f"thawed-{next(fresh)}") == "a")

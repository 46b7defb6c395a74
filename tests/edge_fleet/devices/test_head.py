"""The head: where requests go, what a device's end means to them. No Ray: links are scripted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import pytest

import edge
from edge_fleet.devices.config import Device, FleetConfig
from edge_fleet.devices.head import FleetHead
from edge_fleet.devices.members import Asked, Item, LostError, judge
from edge_serve.observe.metric_families import CONTENT_TYPE
from tests.conftest import write_secret

JSON = (200, [(b"content-type", b"application/json")])
STREAM = (200, [(b"content-type", b"text/event-stream; charset=utf-8")])
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
CONFIG = FleetConfig(
    token_file="t",
    devices={name: Device() for name in "abc"},
    beat_s=0.02,
    silent_s=0.1,
    dead_s=0.3,
)


def facts(**changed: Any) -> dict[str, Any]:
    """What a device says of itself."""
    model = {"sha256": "aa", "slots": 2, "queue": 1, "context": 256, "backend": "ort-cpu"}
    model = {key: changed.pop(key, value) for key, value in model.items()}
    usual = {
        "version": edge.__version__,
        "service": edge.__version__,
        "kind": "test",
        "models": {changed.pop("name", "tiny"): model},
        "trouble": None,
    }
    return usual | changed


@dataclass
class Scripted:
    """A device that does what a test says.

    Attributes:
        answers: what `ask` yields; an exception is raised, an event waited for.
        facts: what differs of its facts.
        silent: whether it does not answer when the head looks.
        asked: what it was asked.
        closed: answers that ended, however.
    """

    answers: list[Any] = field(default_factory=lambda: [JSON, b"{}"])
    facts: dict[str, Any] = field(default_factory=dict)
    silent: bool = False
    asked: list[Asked] = field(default_factory=list)
    closed: int = 0

    async def look(self) -> Mapping[str, Any]:
        if self.silent:
            await asyncio.sleep(60)
        return facts(**self.facts)

    async def ask(self, asked: Asked) -> AsyncGenerator[Item, None]:
        self.asked.append(asked)
        try:
            for answer in self.answers:
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, asyncio.Event):
                    await answer.wait()
                else:
                    yield answer
        finally:
            self.closed += 1


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def device(self) -> str:
        return self.headers["x-edge-device"]


class Caller:
    """Calls a head as an HTTP server would."""

    def __init__(self, config: FleetConfig = CONFIG, **devices: Scripted) -> None:
        self.devices = {name: devices.get(name, Scripted()) for name in config.devices}
        self.head = FleetHead(config, self.devices)

    async def see(self) -> None:
        for member in self.head.members.values():
            await self.head.look(member)

    def begin(
        self, path: str = "/v1/chat/completions", body: Any = CHAT, **headers: str
    ) -> tuple[Answer, asyncio.Task[None], asyncio.Event]:
        answer, left = Answer(), asyncio.Event()
        data = None if body is None else json.dumps(body).encode()
        messages = [{"type": "http.request", "body": data or b"", "more_body": False}]
        raw = {"host": "localhost", **({"content-type": "application/json"} if data else {})}
        scope = {
            "type": "http", "http_version": "1.1", "method": "GET" if data is None else "POST",
            "path": unquote(path), "raw_path": path.encode(), "query_string": b"",
            "client": ("127.0.0.1", 1),
            "headers": [
                (key.replace("_", "-").lower().encode(), value.encode())
                for key, value in (raw | headers).items()
            ],
        }  # fmt: skip

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert not answer.status, "an answer has one beginning"
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        task = asyncio.ensure_future(self.head.app(scope, receive, send))
        return answer, task, left

    async def ask(
        self, path: str = "/v1/chat/completions", body: Any = CHAT, **headers: str
    ) -> Answer:
        answer, task, _ = self.begin(path, body, **headers)
        await asyncio.wait_for(task, 5)
        return answer


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


async def seen(config: FleetConfig = CONFIG, **devices: Scripted) -> Caller:
    caller = Caller(config, **devices)
    await caller.see()
    return caller


async def at_home(*answers: Any) -> tuple[Caller, Scripted, str]:
    """A fleet, and the device where `CHAT` belongs, which gives these answers from now on."""
    caller = await seen()
    home = (await caller.ask()).device
    caller.devices[home].answers = list(answers)
    return caller, caller.devices[home], home


def error_of(answer: Answer) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.body)["error"]
    return error


def test_a_conversation_stays_and_another_device_serves_its_share():
    async def test() -> None:
        caller = await seen()
        assert len({(await caller.ask()).device for _ in range(5)}) == 1
        sessions = {i: (await caller.ask(x_session_id=f"s{i}")).device for i in range(30)}
        assert set(sessions.values()) == {"a", "b", "c"}
        for i, device in sessions.items():
            body = {"messages": [{"role": "user", "content": f"turn {i}"}]}
            assert (await caller.ask(body=body, x_session_id=f"s{i}")).device == device

    run(test)


def test_prometheus_reads_what_the_head_knows():
    """Judged by prometheus-client's own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    async def test() -> None:
        caller = await seen(b=Scripted([(429, [(b"retry-after", b"1")])]), c=Scripted(silent=True))
        caller.head.members["c"].lose("the plug was pulled")
        for i in range(20):
            assert (await caller.ask(x_session_id=f"s{i}")).status == 200
        assert (await caller.ask("/v1/unknown")).status == 404
        answer = await caller.ask("/metrics", None)
        assert answer.headers["content-type"] == CONTENT_TYPE
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
        }
        ready = {name: found["edgellm_fleet_device_ready", name] for name in "abc"}
        assert ready == {"a": 1, "b": 1, "c": 0}
        assert found["edgellm_fleet_device_slots", "a"] == 2
        assert found["edgellm_fleet_device_requests", "a"] == 0
        assert found["edgellm_fleet_requests_total", "a", "answered"] == 20
        assert found["edgellm_fleet_requests_total", "b", "busy"] >= 1
        assert found["edgellm_fleet_requests_total", "c", "lost"] == 0
        assert found["edgellm_rejections_total", "not_found"] == 1

    run(test)


def test_what_the_device_sees_and_the_client_gets():
    async def test() -> None:
        head = (201, [(b"content-type", b"application/json"), (b"x-edge-model", b"m"),
                      (b"transfer-encoding", b"chunked"),
                      (b"x-request-id", b"theirs")])  # fmt: skip
        caller = await seen(CONFIG, **{n: Scripted([head, b'{"a":', b"1}"]) for n in "abc"})
        answer = await caller.ask(x_request_id="mine", authorization="Bearer k", cookie="secret")
        assert (answer.status, answer.body) == (201, b'{"a":1}')
        assert answer.headers["x-edge-model"] == "m"
        assert answer.headers["content-length"] == "7"
        assert answer.headers["x-request-id"] == "mine"
        assert "transfer-encoding" not in answer.headers
        (asked,) = caller.devices[answer.device].asked
        assert asked.method == "POST"
        assert asked.target == "/v1/chat/completions"
        assert json.loads(asked.body) == CHAT
        assert dict(asked.headers) == {
            "content-type": "application/json",
            "authorization": "Bearer k",
            "x-request-id": "mine",
        }

    run(test)


def test_a_device_lets_others_go_first_as_a_client_of_the_head_wants_it():
    async def test() -> None:
        caller = await seen()
        for headers in ({"priority": "u=7"}, {"priority": "i", "Priority": "u=7"}):
            answer = await caller.ask(**headers)
            told = dict(caller.devices[answer.device].asked[-1].headers)
            assert told["priority"] == ", ".join(headers.values())

    run(test)


@pytest.mark.parametrize(
    ("sent", "target"),
    [
        ("/v1/models/org%2Fname:8b", "/v1/models/org/name%3A8b"),
        ("%2Fv1%2Fmodels%2F@127.0.0.1:9/x", "/v1/models/%40127.0.0.1%3A9/x"),
        ("/v1/models/a%3Fb%23c", "/v1/models/a%3Fb%23c"),
        ("/v1/models/%C3%A9", "/v1/models/%C3%A9"),
    ],
)
def test_a_device_is_asked_for_the_path_that_was_let_through(sent: str, target: str):
    async def test() -> None:
        caller = await seen()
        answer = await caller.ask(sent, None)
        assert [asked.target for asked in caller.devices[answer.device].asked] == [target]

    run(test)


def test_a_full_slot_spills_and_all_full_is_429_with_the_time_to_wait():
    async def test() -> None:
        caller, device, home = await at_home()
        wait = asyncio.Event()
        for each in caller.devices.values():
            each.answers = [wait, (200, []), b"{}"]
        under_way = []
        for _ in range(9):  # two slots and a queue of one each
            under_way.append(caller.begin())
            await asyncio.sleep(0.001)
        loads = {name: member.in_flight for name, member in caller.head.members.items()}
        assert loads == {"a": 3, "b": 3, "c": 3}
        assert len(device.asked) == 4  # the first was before
        full = await caller.ask()
        assert (full.status, error_of(full)["code"]) == (429, "queue_full")
        assert full.headers["retry-after"] == "1"
        wait.set()
        await asyncio.gather(*(task for _, task, _ in under_way))
        assert {answer.status for answer, _, _ in under_way} == {200}
        assert [answer.device for answer, _, _ in under_way[:2]] == [home, home]
        assert home not in [answer.device for answer, _, _ in under_way[2:6]]

    run(test)


@pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (503, "no_device")])
def test_a_refusing_device_is_passed_over_until_all_refuse(status: int, code: str):
    async def test() -> None:
        caller, _, home = await at_home((status, [(b"retry-after", b"7")]), b"{}")
        assert (await caller.ask()).device != home
        for device in caller.devices.values():
            device.answers = [(status, [(b"retry-after", b"7")]), b"{}"]
        answer = await caller.ask()
        assert (answer.status, error_of(answer)["code"]) == (status, code)
        assert answer.headers["retry-after"] == ("7" if status == 429 else "5")

    run(test)


@pytest.mark.parametrize("status", [503, 504])
def test_an_answer_that_says_do_not_retry_is_the_answer(status: int):
    async def test() -> None:
        head = (status, [(b"x-should-retry", b"false"), (b"content-type", b"application/json")])
        caller, _, home = await at_home(head, b'{"error": {"code": "deadline_exceeded"}}')
        answer = await caller.ask()
        assert (answer.status, answer.device) == (status, home)
        assert error_of(answer)["code"] == "deadline_exceeded"

    run(test)


@pytest.mark.parametrize(
    "lost",
    [
        [LostError("gone")],
        [None],
        [JSON, b'{"half', None],
        [JSON, b'{"half', LostError("gone")],
        [STREAM, LostError("gone")],
        [STREAM, b"data: 1", None],
    ],
)
def test_what_the_client_has_not_seen_is_asked_again_elsewhere(lost: list[Any]):
    async def test() -> None:
        caller, _, home = await at_home(*lost)
        answer = await caller.ask()
        assert (answer.status, answer.body) == (200, b"{}")
        assert answer.device != home

    run(test)


def test_it_is_asked_again_once():
    async def test() -> None:
        caller = await seen(CONFIG, **{name: Scripted([None]) for name in "abc"})
        answer = await caller.ask()
        assert (answer.status, error_of(answer)["code"]) == (503, "device_lost")
        assert sum(len(device.asked) for device in caller.devices.values()) == 2

    run(test)


@pytest.mark.parametrize(
    ("path", "begun", "ending"),
    [
        ("/v1/chat/completions", b"data: 1\n\n", b'data: {"error":{"message":"the device '),
        ("/v1/messages", b"event: x\ndata: 1\n\n", b'event: error\ndata: {"type":"error",'),
        ("/v1/responses", b"event: x\ndata: 1\n\n", b'event: error\ndata: {"type":"error","code":'),
        ("/api/chat", b'{"a":1}\n', b'{"error":"the device '),
    ],
)  # fmt: skip
def test_a_begun_stream_ends_with_its_protocols_error_after_whole_events(
    path: str, begun: bytes, ending: bytes
):
    async def test() -> None:
        kind = b"application/x-ndjson" if path.startswith("/api") else b"text/event-stream"
        start = (200, [(b"content-type", kind)])
        devices = {n: Scripted([start, begun[:3], begun[3:] + b"data: hal", None]) for n in "abc"}
        caller = await seen(CONFIG, **devices)
        answer = await caller.ask(path)
        assert answer.status == 200
        assert answer.body.startswith(begun + ending)
        assert b"hal" not in answer.body.replace(b"shall", b"")
        assert sum(len(device.asked) for device in caller.devices.values()) == 1

    run(test)


def test_events_pass_as_they_come():
    async def test() -> None:
        go = asyncio.Event()
        caller, _, _ = await at_home(STREAM, b"data: 1\n\nda", go, b"ta: 2\n\n")
        answer, task, _ = caller.begin()
        await asyncio.sleep(0.02)
        assert answer.body == b"data: 1\n\n"
        go.set()
        await task
        assert answer.body == b"data: 1\n\ndata: 2\n\n"

    run(test)


def test_a_silent_device_loses_what_has_not_begun_and_later_what_has():
    async def test() -> None:
        never = asyncio.Event()
        caller, device, home = await at_home(STREAM, b"data: 1\n\n", never)
        watching = asyncio.ensure_future(caller.head.watch())
        stream, streams, _ = caller.begin()
        await asyncio.sleep(0.01)
        assert stream.device == home
        device.answers = [never]
        waiting, waits, _ = caller.begin()
        await asyncio.sleep(0.01)
        device.silent = True
        await asyncio.wait_for(waits, 1)
        assert (waiting.status, waiting.device != home) == (200, True)
        assert not streams.done()
        assert caller.head.status()["devices"][home]["state"] == "not ready"
        await asyncio.wait_for(streams, 1)
        assert b'"code":"device_lost"' in stream.body
        assert caller.head.in_flight == 0
        device.silent = False
        await asyncio.sleep(0.2)
        assert caller.head.status()["devices"][home]["state"] == "ready"
        watching.cancel()

    run(test)


def test_a_client_that_leaves_ends_its_answer_at_the_device():
    async def test() -> None:
        caller, device, _ = await at_home(STREAM, b"data: 1\n\n", asyncio.Event())
        _, task, left = caller.begin()
        await asyncio.sleep(0.01)
        assert (caller.head.in_flight, device.closed) == (1, 1)
        left.set()
        await asyncio.wait_for(task, 1)
        await asyncio.sleep(0.01)
        assert (caller.head.in_flight, device.closed) == (0, 2)

    run(test)


@pytest.mark.parametrize(
    ("kind", "facts", "reason"),
    [
        ("version", {"version": "9.9"}, "its fleet part is edge-llm 9.9, the head has"),
        ("version", {"service": "9.9"}, "its service is edge-llm 9.9, the head has"),
        ("bundle", {"sha256": "bb"}, "its tiny has the hash bb, that of most devices is aa"),
        ("bundle", {"name": "other"}, "it serves other, most devices serve tiny"),
        ("size", {"slots": 1}, "it has 1 slots, min_slots is 2"),
        ("size", {"context": 64}, "its tiny holds 64 tokens, min_context is 128"),
    ],
)
def test_a_device_that_differs_is_refused_unless_allowed(
    kind: Any, facts: dict[str, Any], reason: str
):
    async def test() -> None:
        config = msgspec.structs.replace(CONFIG, min_slots=2, min_context=128)
        for allow in ([], [kind]):
            config = msgspec.structs.replace(config, allow=allow)
            caller = await seen(config, b=Scripted(facts=facts))
            devices = caller.head.status()["devices"]
            states = [devices[name]["state"] for name in "abc"]
            assert states == (["ready"] * 3 if allow else ["ready", "refused", "ready"])
            assert reason in devices["b"]["differs" if allow else "reason"]
            assert devices["a"]["differs"] is None
            served = {(await caller.ask(x_session_id=f"s{i}")).device for i in range(30)}
            assert ("b" in served) == bool(allow)

    run(test)


def test_a_named_model_is_asked_of_who_has_it():
    async def test() -> None:
        config = msgspec.structs.replace(CONFIG, allow=["bundle"])
        caller = await seen(config, b=Scripted(facts={"name": "other"}))
        for i in range(10):
            answer = await caller.ask(body=CHAT | {"model": "other"}, x_session_id=f"s{i}")
            assert answer.device == "b"
            assert (await caller.ask(body=CHAT | {"model": "tiny", "user": f"s{i}"})).device in "ac"

    run(test)


def test_a_drained_device_gets_nothing_new_and_a_draining_head_neither():
    async def test() -> None:
        caller, _, home = await at_home(JSON, b"{}")
        caller.head.members[home].draining = True
        assert (await caller.ask()).device != home
        assert caller.head.status()["devices"][home]["state"] == "draining"
        caller.head.members[home].draining = False
        caller.head.is_draining = True
        answer = await caller.ask()
        assert (answer.status, error_of(answer)["code"]) == (503, "draining")
        assert (await caller.ask("/ready", None)).status == 503

    run(test)


def test_a_drained_device_stays_so_at_the_heads_after_this_one(tmp_path: Path):
    async def test() -> None:
        def drained(devices: str = "abc") -> list[str]:
            config = msgspec.structs.replace(CONFIG, devices={name: Device() for name in devices})
            head = FleetHead(config, {name: Scripted() for name in devices}, drained_file=file)
            return [member.name for member in head.members.values() if member.draining]

        file = tmp_path / "drained"
        assert drained() == []
        head = FleetHead(CONFIG, {name: Scripted() for name in "abc"}, drained_file=file)
        for name in "cb":
            assert head.set_draining(name, True) == 0
        assert (drained(), drained("ac")) == (["b", "c"], ["c"])
        head.set_draining("c", False)
        assert drained() == ["b"]

    run(test)


def test_what_has_no_prefix_is_spread():
    async def test() -> None:
        caller = await seen()
        served = [(await caller.ask("/v1/embeddings", {"input": "a"})).device for _ in range(6)]
        assert sorted(served) == ["a", "a", "b", "b", "c", "c"]

    run(test)


def test_the_heads_own_paths():
    async def test() -> None:
        caller = Caller()
        assert (await caller.ask("/health", None)).status == 200
        assert (await caller.ask("/ready", None)).status == 503
        assert error_of(await caller.ask())["code"] == "no_device"
        await caller.see()
        ready = await caller.ask("/ready", None)
        assert json.loads(ready.body) == {"status": "ready", "devices": 3}
        assert json.loads((await caller.ask("/stats", None)).body) == caller.head.status()
        assert (await caller.ask("/v1/models", None)).headers["x-edge-device"] in "abc"
        assert (await caller.ask("/v1/models/tiny", None)).status == 200
        assert (await caller.ask("/page", None)).status == 404
        assert not any(device.asked[2:] for device in caller.devices.values())

    run(test)


def test_keys_are_checked_at_the_head_and_keep_conversations_apart(tmp_path: Path):
    async def test() -> None:
        names = [f"user{i}" for i in range(20)]
        keys = "".join(f"{name}:the-secret-of-{name}\n" for name in names)
        path = write_secret(tmp_path / "keys", keys)
        caller = await seen(msgspec.structs.replace(CONFIG, api_key_file=str(path)))
        assert (await caller.ask()).status == 401
        assert (await caller.ask("/stats", None)).status == 401
        assert (await caller.ask("/ready", None)).status == 200
        served = {
            (await caller.ask(authorization=f"Bearer the-secret-of-{n}")).device for n in names
        }
        assert served == {"a", "b", "c"}

    run(test)


def test_devices_that_are_gone_do_not_say_which_bundle_is_right():
    async def test() -> None:
        caller = await seen()
        watching = asyncio.ensure_future(caller.head.watch())

        async def until(*wanted: str) -> None:
            while [d["state"] for d in caller.head.status()["devices"].values()] != [*wanted]:
                await asyncio.sleep(0.01)

        for name in "ab":
            caller.devices[name].silent = True
        caller.devices["c"].facts = {"sha256": "bb"}  # brought to a new one while it is alone
        await until("not ready", "not ready", "ready")
        assert (await caller.ask()).device == "c"
        caller.devices["b"].silent = False  # with the old one, and before it in the file
        await until("not ready", "ready", "refused")
        caller.devices["b"].silent = True
        await until("not ready", "not ready", "ready")
        watching.cancel()

    run(test)


def test_many_changes_at_once_are_judged_together(monkeypatch: pytest.MonkeyPatch):
    async def test() -> None:
        caller = await seen(CONFIG)
        judged: list[Any] = []

        def slow(*given: Any) -> None:
            judged.append(given)
            ends = time.thread_time() + 0.01
            while time.thread_time() < ends:
                pass
            judge(*given)

        monkeypatch.setattr("edge_fleet.devices.head.judge", slow)
        for number in range(50):
            caller.devices["a"].facts = {"sha256": f"{number:02}"}
            await caller.see()
        assert len(judged) < 10
        caller.devices["a"].facts = caller.devices["b"].facts
        await caller.see()
        before = len(judged)
        while len(judged) == before:  # the last change counts, too
            await asyncio.sleep(0.01)
        assert caller.head.status()["devices"]["a"]["state"] == "ready"

    run(test)


def test_devices_are_judged_when_something_has_changed(monkeypatch: pytest.MonkeyPatch):
    """A head of 1,000 devices looks 2,000 times a second, and to judge is to go through all."""

    async def test() -> None:
        devices = {"c": Scripted(facts={"sha256": "bb"})}
        caller = await seen(CONFIG, **devices)
        head = caller.head
        judged: list[Any] = []

        def count(*given: Any) -> None:
            judged.append(given)
            judge(*given)

        monkeypatch.setattr("edge_fleet.devices.head.judge", count)
        await caller.see()
        assert not judged
        assert head.status()["devices"]["c"]["state"] == "refused"
        head.accepted = frozenset(["bb"])
        await caller.see()
        assert len(judged) == 1
        assert head.status()["devices"]["c"]["state"] == "ready"
        caller.devices["c"].facts = {"sha256": "cc"}
        await caller.see()
        assert len(judged) == 2
        assert head.status()["devices"]["c"]["state"] == "refused"

    run(test)

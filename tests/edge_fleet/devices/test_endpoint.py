"""The endpoint of a fleet: the real HAProxy, as the verbs run it, before real servers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_fleet.devices.live_endpoint import (
    KEY,
    Endpoint,
    answers,
    chat,
    endpoint,
    keys,
    needs_haproxy,
    needs_router,
    router,
    wait_until,
    workers,
)
from tests.edge_serve.batch.stub import stub
from tests.edge_serve.http.test_connections import blocked
from tests.edge_serve.processes import Child, scripted_child
from tests.edge_serve.scripted import running, until
from tests.ports import free_port

pytestmark = [pytest.mark.live, needs_haproxy]
_STEP_S = 0.02
_JSON = {"Content-Type": "application/json"}


@pytest.fixture
def pair(tiny_bundles: Bundles) -> Iterator[list[Child]]:
    bundle = tiny_bundles("qwen2")
    with scripted_child(bundle, _STEP_S) as one, scripted_child(bundle, _STEP_S) as two:
        yield [one, two]


def _ports(children: Sequence[Child]) -> dict[str, int]:
    return {name: child.port for name, child in zip("ab", children, strict=False)}


def _await(device: Child, fact: Callable[[Any], Any]) -> Any:
    """What a device's ``/stats`` say of something, as soon as they say anything of it."""
    return wait_until(lambda: fact(json.loads(device.ask("/stats")[2])))


class Streamed:
    """A stream: when its events came, what the last one was, whether it broke."""

    def __init__(
        self, front: Endpoint, body: Any, began: threading.Event | None = None, **headers: str
    ) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = json.dumps({"stream": True, **body})
        connection.request("POST", "/v1/chat/completions", data, {**_JSON, **named})
        response = connection.getresponse()
        self.status = response.status
        self.device = response.headers["X-Edge-Device"]
        self.times: list[float] = []
        self.text = b""
        self.broke = False
        try:
            for line in response:
                self.text += line
                if line.startswith(b"data: "):
                    self.times.append(time.monotonic())
                    if began is not None:
                        began.set()
        except (http.client.IncompleteRead, OSError):
            self.broke = True
        self.ended_at = time.monotonic()
        connection.close()

    @property
    def is_whole(self) -> bool:
        return not self.broke and self.text.rstrip().endswith(b"data: [DONE]")


# ------------------------------------------------------------------- sessions, streams, faults


def test_sessions_stay_streams_flow_and_a_drained_device_gets_nothing_new(
    tmp_path: Path, pair: list[Child]
):
    with endpoint(tmp_path, _ports(pair)) as front:
        # By the header, whatever is said; by the first message, however long the chat has become.
        homes = {}
        for session in range(8):
            found = {front.device(chat(f"{i}"), X_Session_Id=f"s{session}") for i in range(3)}
            assert len(found) == 1
            homes[session] = found.pop()
        assert set(homes.values()) == {"a", "b"}
        begins = {}
        for topic in range(8):
            body = chat(f"topic {topic}")
            longer = {**body, "messages": [*body["messages"], {"role": "user", "content": "more"}]}
            longer["temperature"] = 0.5
            begins[topic] = front.device(body)
            assert begins[topic] == front.device(longer)
        assert set(begins.values()) == {"a", "b"}

        # The system prompt that all chats share tells nothing; the question after it does.
        for role in ("system", "developer"):
            homes = {}
            for topic in range(8):
                body = chat(f"topic {topic}")
                body["messages"].insert(0, {"role": role, "content": "be brief"})
                homes[topic] = front.device(body)
                body["messages"].append({"role": "user", "content": "more"})
                assert front.device(body) == homes[topic]
            assert set(homes.values()) == {"a", "b"}

        stream = Streamed(front, chat("long", max_tokens=30))
        assert stream.is_whole
        assert len(stream.times) > 20
        assert stream.times[-1] - stream.times[0] > 20 * _STEP_S * 0.8  # as they were made

        # A device that drains ends its stream and gets nothing new.
        began = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running_one = pool.submit(
                Streamed, front, chat("bye", max_tokens=40), began, X_Session_Id="s-drain"
            )
            assert began.wait(10)
            home = front.device(chat("x"), X_Session_Id="s-drain")
            leaving, staying = pair if home == "a" else pair[::-1]
            leaving.process.send_signal(signal.SIGTERM)
            other = "b" if home == "a" else "a"
            assert {front.device(chat("x"), X_Session_Id=f"t{i}") for i in range(4)} == {other}
            assert running_one.result().is_whole
        assert staying.process.poll() is None


@pytest.mark.timing
def test_a_killed_device_costs_no_whole_answer_and_its_streams_break_at_once(
    tmp_path: Path, pair: list[Child]
):
    with endpoint(tmp_path, _ports(pair)) as front, ThreadPoolExecutor(16) as pool:
        sessions = [f"s{i}" for i in range(6)]
        homes = {each: front.device(chat("x"), X_Session_Id=each) for each in sessions}
        assert set(homes.values()) == {"a", "b"}
        long = chat("bye", max_tokens=40)
        streams = [pool.submit(Streamed, front, long, X_Session_Id=each) for each in sessions]
        whole = [pool.submit(front.ask, long, X_Session_Id=each) for each in sessions]
        time.sleep(0.5)
        killed_at = time.monotonic()
        pair[0].process.kill()
        assert [each.result()[0] for each in whole] == [200] * len(sessions)
        for session, each in zip(sessions, streams, strict=True):
            stream = each.result()
            if homes[session] == "b":
                assert stream.is_whole
            elif stream.status == 200 and not stream.is_whole:
                assert b"[DONE]" not in stream.text
                assert b'"finish_reason":"' not in stream.text.replace(b" ", b"")
                assert stream.ended_at - killed_at < 2
        assert any(not each.result().is_whole for each in streams)
        assert {front.device(chat("x"), X_Session_Id=each) for each in sessions} == {"b"}
        pair[1].process.kill()
        status, headers, body = front.ask(chat("x"))
        assert (status, headers["Content-Type"]) == (503, "application/json")
        assert headers["Retry-After"]
        assert json.loads(body)["error"]["code"] in ("no_device", "device_failed")


@pytest.mark.timing
def test_a_frozen_device_is_left_within_seconds_and_costs_no_whole_answer(
    tmp_path: Path, tiny_bundles: Bundles
):
    bundle = tiny_bundles("qwen2")
    ports = [free_port(), free_port()]
    with (
        scripted_child(bundle, _STEP_S, probe_port=ports[0]) as one,
        scripted_child(bundle, _STEP_S, probe_port=ports[1]) as two,
    ):
        devices = {
            "a": {"port": one.port, "probe_port": ports[0]},
            "b": {"port": two.port, "probe_port": ports[1]},
        }
        with endpoint(tmp_path, devices) as front, ThreadPoolExecutor(16) as pool:
            sessions = [f"s{i}" for i in range(6)]
            homes = {each: front.device(chat("x"), X_Session_Id=each) for each in sessions}
            assert set(homes.values()) == {"a", "b"}
            long = chat("bye", max_tokens=40)
            streams = [pool.submit(Streamed, front, long, X_Session_Id=each) for each in sessions]
            whole = [pool.submit(front.ask, long, X_Session_Id=each) for each in sessions]
            time.sleep(0.4)
            one.process.send_signal(signal.SIGSTOP)
            frozen_at = time.monotonic()
            try:
                assert [each.result()[0] for each in whole] == [200] * len(sessions)
                for each in streams:
                    stream = each.result()
                    assert stream.is_whole or stream.ended_at - frozen_at < 8
                    assert stream.is_whole or b"[DONE]" not in stream.text
                assert time.monotonic() - frozen_at < 12
                assert front.device(chat("x"), X_Session_Id="new") == "b"
                told = json.loads(front.do("status", "--json"))["devices"]
                assert (told["a"]["state"], told["b"]["state"]) == ("away", "ready")
            finally:
                one.process.send_signal(signal.SIGCONT)
            # New sessions go there again; those that moved stay where they are.
            wait_until(lambda: front.device(chat(os.urandom(8).hex())) == "a")


@pytest.mark.parametrize("first", [[0] * 9, [503] * 9, [429] * 9])
def test_what_fails_before_its_first_byte_is_asked_elsewhere(tmp_path: Path, first: list[int]):
    with stub() as bad, stub() as good:
        bad.ready_status = good.ready_status = 200
        bad.first = first
        devices = {"bad": bad.server_address[1], "good": good.server_address[1]}
        with endpoint(tmp_path, devices) as front:
            for i in range(8):
                assert front.device({"n": i}) == "good"
            assert bad.seen
            assert sum(good.seen.values()) == 8


def test_refused_requests_change_nobodys_health(tmp_path: Path, pair: list[Child]):
    with endpoint(tmp_path, _ports(pair)) as front:
        homes = {i: front.device(chat("x"), X_Session_Id=f"s{i}") for i in range(8)}
        for i in range(200):
            bad = chat("x", max_tokens=-1) if i % 2 else {"messages": 7}
            assert front.ask(bad, X_Session_Id=f"s{i % 8}")[0] == 400
        assert {i: front.device(chat("x"), X_Session_Id=f"s{i}") for i in range(8)} == homes
        told = json.loads(front.do("status", "--json"))["devices"]
        assert {each["state"] for each in told.values()} == {"ready"}


def test_a_request_whose_time_is_up_is_not_asked_again(tmp_path: Path, tiny_bundles: Bundles):
    with scripted_child(tiny_bundles("qwen2"), _STEP_S, request_timeout_s=0.3) as device:
        with endpoint(tmp_path, {"a": device.port}) as front:
            status, _, body = front.ask(chat("bye", max_tokens=40))
        assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
        assert json.loads(device.ask("/stats")[2])["rejections"] == {"deadline_exceeded": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_client_left_ends_at_its_device_within_2_s(
    tmp_path: Path, tiny_bundles: Bundles, stream: bool
):
    with (
        scripted_child(tiny_bundles("qwen2"), 0.5) as device,  # 20 seconds for an answer
        endpoint(tmp_path, {"a": device.port}) as front,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
        data = json.dumps(chat("bye", max_tokens=100, stream=stream))
        connection.request("POST", "/v1/chat/completions", data, _JSON)
        _await(device, lambda stats: stats["models"]["tiny"]["running"])
        connection.close()
        left_at = time.monotonic()
        assert _await(device, lambda stats: stats["requests"]) == {"abort": 1}
        assert time.monotonic() - left_at < 2


def test_a_device_that_is_busy_for_seconds_stays_in(tmp_path: Path, tiny_bundles: Bundles):
    """Its event loop answers no probe meanwhile; without a port for probes this is `no_device`."""
    with running(tiny_bundles("qwen2"), probe_port=0) as device:
        assert device.service.probes is not None
        told = {"port": device.port, "probe_port": device.service.probes.port}
        with endpoint(tmp_path, {"a": told}) as front, ThreadPoolExecutor(1) as pool:
            assert front.device(chat("x")) == "a"
            with blocked(device):
                time.sleep(5)  # two checks of 2 s, and one more second
                asked = pool.submit(front.ask, chat("x"))
                time.sleep(0.2)
            assert asked.result()[0] == 200
            device.service.stop()  # what the probes say is heeded
            until(lambda: front.ask(chat("x"))[0] == 503)


def test_waiting_requests_are_bounded(tmp_path: Path):
    with stub(0.5) as device:
        device.ready_status = 200
        devices = {"a": device.server_address[1]}
        with (
            endpoint(tmp_path, devices, slots=1, max_queue=2) as front,
            ThreadPoolExecutor(8) as pool,
        ):
            asked = []
            for i in range(5):
                asked.append(pool.submit(front.ask, {"n": i}))
                time.sleep(0.05)
            found = [each.result() for each in asked]
        assert [status for status, _, _ in found] == [200, 200, 200, 429, 429]
        assert found[-1][1]["Retry-After"] == "1"
        assert json.loads(found[-1][2])["error"]["code"] == "queue_full"
        assert device.most == 1


# ------------------------------------------------------------------------- keys, identity, log


def test_clients_have_keys_here_and_each_device_has_the_endpoints(
    tmp_path: Path, tiny_bundles: Bundles
):
    bundle = tiny_bundles("qwen2")
    for name in "ab":
        keys(tmp_path, f"{name}.keys", f"endpoint:key-of-device-{name}-0123\n")
    with (
        scripted_child(bundle, api_key_file=tmp_path / "a.keys") as one,
        scripted_child(bundle, api_key_file=tmp_path / "b.keys") as two,
    ):
        devices = {
            "a": {"port": one.port, "key_file": "a.keys"},
            "b": {"port": two.port, "key_file": "b.keys"},
        }
        told = {"api_key_file": keys(tmp_path)}
        with endpoint(tmp_path, devices, **told) as front:
            for wrong in ({}, {"Authorization": "Bearer nobody-has-this-key"}, {"x_api_key": "x"}):
                status, headers, body = front.ask(chat("x"), **wrong)
                assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
                assert headers["x-request-id"]
            right = {"Authorization": f"Bearer {KEY}"}
            assert {front.device(chat(f"{i}"), **right) for i in range(8)} == {"a", "b"}
            assert front.device(chat("x"), x_api_key=KEY)
            assert front.ask(None, "/ready")[0] == 200
            assert front.ask(None, "/stats", **right)[0] == 404
            for hidden in ("/%73tats", "/%6detrics"):  # to HAProxy these are other paths
                status, _, body = front.ask(None, hidden, **right)
                assert (status, json.loads(body)["error"]["code"]) == (400, "needless_escape")

            # Another key from the next moment on, and no request fails for it.
            keys(tmp_path, text="bob:another-key-0123456789\n")
            front.do("reload")
            wait_until(lambda: front.ask(chat("x"), **right)[0] == 401)
            assert front.device(chat("x"), Authorization="Bearer another-key-0123456789")
            written = (front.state / "clients.map").read_text()
            assert "another-key" not in written  # its hash only


def test_a_request_is_found_at_the_endpoint_and_at_its_device(tmp_path: Path):
    with stub() as device:
        device.ready_status = 200
        told = {"api_key_file": keys(tmp_path)}
        devices = {"a": device.server_address[1]}
        with endpoint(tmp_path, devices, **told) as front:
            trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            front.device(
                {"n": 1},
                Authorization=f"Bearer {KEY}",
                X_Request_Id="my-request-1",
                X_Edge_Client="somebody else",
                X_Forwarded_For="127.0.0.1",
                traceparent=trace,
            )
            seen = {name.lower(): value for name, value in device.headers.items()}
            assert seen["x-request-id"] == "my-request-1"
            assert seen["traceparent"] == trace
            assert seen["x-edge-client"] == "ann"
            assert "authorization" not in seen  # a client's key is not the device's business
            _, headers, _ = front.ask(
                {"n": 2}, x_api_key=KEY, X_Request_Id='bad" id', traceparent="00-zz"
            )
            made = {name.lower(): value for name, value in device.headers.items()}
            assert made["x-request-id"] == headers["x-request-id"] != 'bad" id'
            assert made["traceparent"].count("-") == 3
            assert len(made["traceparent"]) == 55
            lines = wait_until(lambda: found if len(found := front.lines()) == 2 else None)
        assert [line["request_id"] for line in lines] == ["my-request-1", made["x-request-id"]]
        assert [line["traceparent"] for line in lines] == [trace, made["traceparent"]]
        assert {(line["client"], line["device"], line["status"]) for line in lines} == {
            ("ann", "a", 200)
        }


def test_clients_behind_one_key_of_a_trusted_proxy_share_no_prefix(
    tmp_path: Path, tiny_bundles: Bundles
):
    file = tmp_path / "device.keys"
    keys(tmp_path, file.name, "endpoint:key-of-the-device-0123\n")
    settings: dict[str, Any] = {"api_key_file": file, "trusted_proxies": ("127.0.0.1",)}
    with running(tiny_bundles("qwen2"), **settings) as device:
        cached: dict[str, list[bool]] = {}
        body = chat("word " * 100, temperature=0)
        for client in ("ann", "ann", "bob", "bob"):
            heads = {"Authorization": "Bearer key-of-the-device-0123", "X-Edge-Client": client}
            asked = device.ask("/v1/chat/completions", body, headers=heads)
            assert asked.status == 200
            usage = asked.json["usage"]["prompt_tokens_details"]
            cached.setdefault(client, []).append(usage["cached_tokens"] > 0)
        assert cached == {"ann": [False, True], "bob": [False, True]}


# --------------------------------------------------------------------- devices come, go, reload


def test_devices_come_and_go_under_load_without_a_failed_request(tmp_path: Path, pair: list[Child]):
    with endpoint(tmp_path, {"a": pair[0].port}) as front, ThreadPoolExecutor(8) as pool:
        stop = threading.Event()
        seen: list[tuple[bool, str]] = []

        def load(number: int) -> None:
            for i in range(10_000):
                if stop.is_set():
                    return
                body = chat(f"{number} {i}", max_tokens=20)
                if number % 2:
                    stream = Streamed(front, body)
                    seen.append((stream.is_whole, stream.device))
                else:
                    status, headers, _ = front.ask(body)
                    seen.append((status == 200, headers["X-Edge-Device"]))

        loads = [pool.submit(load, number) for number in range(6)]
        try:
            wait_until(lambda: len(seen) > 10)
            front.write(_ports(pair))
            front.do("reload")
            wait_until(lambda: {"a", "b"} <= {device for _, device in seen}, 20)
            front.write({"b": pair[1].port})
            front.do("reload")
            count = len(seen)
            wait_until(lambda: len(seen) > count + 30, 20)
            for _ in range(3):
                front.do("reload")
            late = len(seen)
            wait_until(lambda: len(seen) > late + 20, 20)
        finally:
            stop.set()
        for each in loads:
            each.result()
        assert all(good for good, _ in seen), [each for each in seen if not each[0]]
        assert {device for _, device in seen[late:]} == {"b"}


def test_sessions_are_spread_evenly_and_stay_where_they_are_after_a_reload(tmp_path: Path):
    with stub() as one, stub() as two:
        one.ready_status = two.ready_status = 200
        devices = {"a": one.server_address[1], "b": two.server_address[1]}
        with endpoint(tmp_path, devices) as front:
            homes = {f"s{i}": front.device({"n": i}, X_Session_Id=f"s{i}") for i in range(40)}
            assert 18 <= list(homes.values()).count("a") <= 22
            front.do("reload")
            time.sleep(1)  # the new process learns of them
            again = {each: front.device({"n": -1}, X_Session_Id=each) for each in homes}
            assert again == homes


def test_a_file_that_haproxy_refuses_leaves_the_old_one_serving(tmp_path: Path):
    with stub() as device:
        device.ready_status = 200
        port = device.server_address[1]
        with endpoint(tmp_path, {"a": port}) as front:
            front.write({"a": port}, certificate="missing.pem")
            refused = front.run("reload")
            assert refused.returncode == 64
            assert "missing.pem" in refused.stderr
            assert front.device({"n": 1}) == "a"
            front.write({"a": port})
            again = front.run("up")
            assert again.returncode == 64
            assert "fleet reload" in again.stderr


def test_down_lets_running_answers_end(tmp_path: Path, pair: list[Child]):
    with endpoint(tmp_path, _ports(pair)) as front, ThreadPoolExecutor(1) as pool:
        began = threading.Event()
        stream = pool.submit(Streamed, front, chat("bye", max_tokens=40), began)
        assert began.wait(10)
        assert "a: ready" in front.do("status")
        front.do("down")
        assert stream.result().is_whole
        assert front.process is not None
        assert front.process.wait(10) == 0
        told = front.run("status")
        assert told.returncode == 75
        assert "fleet up" in told.stderr
        assert front.run("reload").returncode == 70


def test_tls_and_metrics(tmp_path: Path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=x"],
        check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "both.pem").write_bytes(key.read_bytes() + certificate.read_bytes())
    metrics = free_port()
    with stub() as device:
        device.ready_status = 200
        told = {"certificate": "both.pem", "metrics_port": metrics}
        with endpoint(tmp_path, {"a": device.server_address[1]}, **told) as front:
            to = f"x:443:127.0.0.1:{front.port}"
            asked = ["curl", "-sS", "--cacert", str(certificate), "--connect-to", to]
            ran = subprocess.run(
                [*asked, "https://x/ready"], capture_output=True, text=True, check=False
            )
            assert "ready" in ran.stdout, ran.stderr
            connection = http.client.HTTPConnection("127.0.0.1", metrics, timeout=5)
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            connection.close()
            wanted = r'haproxy_server_status{proxy="devices",server="a",state="UP"} 1'
            assert wanted in text


def test_its_files_are_closed_to_others(tmp_path: Path):
    keys(tmp_path, "device.key", "endpoint:key-of-the-device-0123\n")
    with stub() as device:
        device.ready_status = 200
        told = {"a": {"port": device.server_address[1], "key_file": "device.key"}}
        more: dict[str, Any] = {"api_key_file": keys(tmp_path), "router_port": free_port()}
        with endpoint(tmp_path, told, **more) as front:
            # HAProxy binds its socket under this name, and narrows it before it moves it.
            until(lambda: not list(front.state.glob("*.tmp")))
            for path in (front.state, *front.state.iterdir()):
                assert path.stat().st_mode & 0o077 == 0, path
            front.state.chmod(0o755)
            ran = front.run("check")
            assert ran.returncode == 64
            assert "chmod 700" in ran.stderr


# --------------------------------------------------------------------------------- vllm-router


@needs_router
@pytest.mark.timing
def test_vllm_router_chooses_and_a_dead_one_or_a_dead_device_is_gone_around(
    tmp_path: Path, tiny_bundles: Bundles
):
    bundle, port = tiny_bundles("qwen2"), free_port()
    keys(tmp_path, "device.key", "endpoint:key-of-the-device-0123\n")
    file = tmp_path / "device.key"
    with (
        scripted_child(bundle, _STEP_S, api_key_file=file) as one,
        scripted_child(bundle, _STEP_S, api_key_file=file) as two,
        scripted_child(bundle, _STEP_S, api_key_file=file) as three,
    ):
        all_three = {
            name: {"port": child.port, "key_file": "device.key"}
            for name, child in zip("abc", (one, two, three), strict=True)
        }
        both = {name: all_three[name] for name in "ab"}
        told: dict[str, Any] = {
            "api_key_file": keys(tmp_path),
            "router_port": port,
            "router_policy": "consistent_hash",
            "metrics_port": free_port(),
        }
        right: dict[str, Any] = {"Authorization": f"Bearer {KEY}"}

        def device() -> str:
            return front.device(chat("x"), X_Session_Id=os.urandom(4).hex(), **right)

        with endpoint(tmp_path, both, **told) as front, router(front, port) as process:
            tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
            assert front.device(chat("x", tools=tools), **right) in "ab"
            wait_until(lambda: {device() for _ in range(4)} == {"a", "b"})
            status, headers, _ = front.ask(chat("x"), **right)
            assert status == 200
            assert not [name for name in headers if name.lower().startswith("access-control")]
            stream = Streamed(front, chat("long", max_tokens=30), **right)
            assert stream.is_whole
            assert len(stream.times) > 20
            assert answers(told["metrics_port"], "router") > 4  # it was the router that chose
            assert front.ask(chat("x"))[0] == 401
            at_router = Endpoint(tmp_path, port, front.state)
            assert at_router.ask(chat("x"))[0] == 401  # its port is no way round the keys

            # A device comes and goes; the router is told.
            front.write(all_three, **told)
            front.do("reload")
            assert len(workers(port)) == 3
            wait_until(lambda: device() == "c")
            three.process.kill()
            assert {device() for _ in range(12)} <= {"a", "b"}
            front.write(both, **told)
            front.do("reload")
            assert len(workers(port)) == 2

            # A client that leaves frees its slot.
            connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
            data = json.dumps(chat("bye", max_tokens=40, stream=True))
            connection.request("POST", "/v1/chat/completions", data, {**_JSON, **right})
            wait_until(lambda: _is_busy(one) or _is_busy(two))
            connection.close()
            wait_until(lambda: not (_is_busy(one) or _is_busy(two)), 2)

            # A killed device breaks its stream.
            began = threading.Event()
            with ThreadPoolExecutor(1) as pool:
                long = chat("bye", max_tokens=40)
                asked = pool.submit(Streamed, front, long, began, **right)
                assert began.wait(10)
                (busy,) = [each for each in (one, two) if _is_busy(each)]
                busy.process.kill()
                killed_at = time.monotonic()
                stream = asked.result()
            assert not stream.is_whole
            assert b"[DONE]" not in stream.text
            assert stream.ended_at - killed_at < 2
            process.kill()
            process.wait()
            wait_until(lambda: front.ask(chat("x"), **right)[0] == 200)


def _is_busy(device: Child) -> bool:
    authorized = http.client.HTTPConnection("127.0.0.1", device.port, timeout=5)
    authorized.request("GET", "/stats", headers={"Authorization": "Bearer key-of-the-device-0123"})
    stats = json.loads(authorized.getresponse().read())
    authorized.close()
    return bool(stats["models"]["tiny"]["running"])

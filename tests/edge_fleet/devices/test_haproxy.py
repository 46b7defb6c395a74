"""``edge-llm fleet haproxy``: the file that it writes, in the real HAProxy, before real servers."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError, DependencyError
from edge_fleet.devices.haproxy import Proxied, check, configuration, read_devices
from tests.command_line import Result, edge_llm, error_line  # noqa: F401
from tests.conftest import Bundles
from tests.edge_serve.batch.stub import stub
from tests.edge_serve.http.test_connections import blocked
from tests.edge_serve.processes import Child, scripted_child
from tests.edge_serve.scripted import running, until

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy (Debian: haproxy)")
_STEP_S = 0.02


class Proxy:
    """HAProxy in front of devices."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid

    def ask(self, body: Any, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = json.dumps(body)
        connection.request(
            "POST", "/v1/chat/completions", data, {"Content-Type": "application/json", **named}
        )
        response = connection.getresponse()
        found = response.status, response.headers, response.read()
        connection.close()
        return found

    def device(self, body: Any, **headers: str) -> str:
        status, answered, data = self.ask(body, **headers)
        assert status == 200, data
        return answered["X-Edge-Device"]


def chat(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 2, **fields}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def proxy(tmp_path: Path, devices: Sequence[tuple[str, int]], **options: Any) -> Iterator[Proxy]:
    assert HAPROXY is not None
    port = _free_port()
    file = tmp_path / "haproxy.cfg"
    proxied = [Proxied(name, f"127.0.0.1:{at}") for name, at in devices]
    options.setdefault("drop_root", os.getuid() == 0)
    text = configuration(proxied, bind=f"127.0.0.1:{port}", **options)
    check(text)
    file.write_text(text)
    process = subprocess.Popen([HAPROXY, "-db", "-f", file], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not _listens(port) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield Proxy(port, process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def pair(tiny_bundles: Bundles) -> Iterator[list[Child]]:
    bundle = tiny_bundles("qwen2")
    with scripted_child(bundle, _STEP_S) as one, scripted_child(bundle, _STEP_S) as two:
        yield [one, two]


def _ports(children: Sequence[Child]) -> list[tuple[str, int]]:
    return [(name, child.port) for name, child in zip("ab", children, strict=True)]


@needs_haproxy
def test_sessions_stay_streams_flow_and_a_killed_device_costs_nothing(
    tmp_path: Path, pair: list[Child]
):
    with proxy(tmp_path, _ports(pair)) as front:
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
            assert front.device(body) == front.device(longer)
            begins[topic] = front.device(body)
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

        times = _stream(front, chat("long", max_tokens=30, stream=True))
        assert len(times) > 20
        assert times[-1] - times[0] > 20 * _STEP_S * 0.8  # as they were made, not at the end

        # A device that drains ends its stream and gets nothing new.
        began, ended = threading.Event(), []

        def stream() -> None:
            ended.extend(_stream(front, chat("bye", max_tokens=40, stream=True), began, "s-drain"))

        thread = threading.Thread(target=stream)
        thread.start()
        assert began.wait(10)
        home = front.device(chat("x"), X_Session_Id="s-drain")
        leaving, staying = pair if home == "a" else pair[::-1]
        leaving.process.send_signal(signal.SIGTERM)
        other = "b" if home == "a" else "a"
        assert {front.device(chat("x"), X_Session_Id=f"t{i}") for i in range(4)} == {other}
        thread.join(20)
        assert len(ended) > 35
        assert staying.process.poll() is None


@pytest.mark.timing
@needs_haproxy
def test_the_first_answer_after_a_kill_is_good(tmp_path: Path, pair: list[Child]):
    with proxy(tmp_path, _ports(pair)) as front:
        homes = {i: front.device(chat("x"), X_Session_Id=f"s{i}") for i in range(8)}
        pair[0].process.kill()
        pair[0].process.wait()
        began = time.monotonic()
        assert {front.device(chat("x"), X_Session_Id=f"s{i}") for i in homes} == {"b"}
        assert time.monotonic() - began < 5
        pair[1].process.kill()
        pair[1].process.wait()
        status, headers, body = front.ask(chat("x"))
        assert (status, headers["Content-Type"]) == (503, "application/json")
        assert headers["Retry-After"]
        assert json.loads(body)["error"]["code"] in ("no_device", "queue_timeout")


@needs_haproxy
@pytest.mark.parametrize("first", [[0] * 9, [503] * 9, [429] * 9])
def test_what_fails_before_its_first_byte_is_asked_elsewhere(tmp_path: Path, first: list[int]):
    with stub() as bad, stub() as good:
        bad.ready_status = good.ready_status = 200
        bad.first = first
        devices = [("bad", bad.server_address[1]), ("good", good.server_address[1])]
        with proxy(tmp_path, devices) as front:
            for i in range(8):
                assert front.device({"n": i}) == "good"
            assert bad.seen
            assert sum(good.seen.values()) == 8


@needs_haproxy
def test_a_request_whose_time_is_up_is_not_asked_again(tmp_path: Path, tiny_bundles: Bundles):
    with scripted_child(tiny_bundles("qwen2"), _STEP_S, request_timeout_s=0.3) as device:
        with proxy(tmp_path, [("a", device.port)]) as front:
            status, _, body = front.ask(chat("bye", max_tokens=40))
        assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
        assert json.loads(device.ask("/stats")[2])["rejections"] == {"deadline_exceeded": 1}


@needs_haproxy
def test_an_answer_whose_client_left_ends_at_its_device(tmp_path: Path, tiny_bundles: Bundles):
    with (
        scripted_child(tiny_bundles("qwen2"), 0.5) as device,  # 20 seconds for an answer
        proxy(tmp_path, [("a", device.port)]) as front,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
        data = json.dumps(chat("bye", max_tokens=100))
        json_type = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", data, json_type)
        _await(device, lambda stats: stats["models"]["tiny"]["running"])
        connection.close()
        assert _await(device, lambda stats: stats["requests"]) == {"abort": 1}


@needs_haproxy
def test_a_device_that_is_busy_for_seconds_stays_in(tmp_path: Path, tiny_bundles: Bundles):
    """Its event loop answers no probe meanwhile; without a port for probes this is `no_device`."""
    with running(tiny_bundles("qwen2"), probe_port=0) as device:
        assert device.service.probes is not None
        probes = device.service.probes.port
        with (
            proxy(tmp_path, [("a", device.port)], probe_port=probes) as front,
            ThreadPoolExecutor(1) as pool,
        ):
            assert front.device(chat("x")) == "a"
            with blocked(device):
                time.sleep(5)  # two checks of 2 s, and one more second
                asked = pool.submit(front.ask, chat("x"))
                time.sleep(0.2)
            assert asked.result()[0] == 200
            device.service.stop()  # what the probes say is heeded
            until(lambda: front.ask(chat("x"))[0] == 503)


@needs_haproxy
def test_what_waits_is_bounded(tmp_path: Path):
    with stub(0.5) as device:
        device.ready_status = 200
        devices = [("a", device.server_address[1])]
        with (
            proxy(tmp_path, devices, slots=1, max_queue=2) as front,
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


def _await(device: Child, fact: Callable[[Any], Any]) -> Any:
    """What a device's ``/stats`` say of something, as soon as they say anything of it."""
    deadline = time.monotonic() + 10
    while not (found := fact(json.loads(device.ask("/stats")[2]))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def _stream(
    front: Proxy, body: Any, began: threading.Event | None = None, session: str = "s"
) -> list[float]:
    """When each event of a stream came; it must end as it should."""
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
    headers = {"Content-Type": "application/json", "X-Session-Id": session}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200
    times, last = [], b""
    for line in response:
        if line.startswith(b"data: "):
            times.append(time.monotonic())
            last = line
            if began is not None:
                began.set()
    assert last.strip() == b"data: [DONE]"
    connection.close()
    return times


@needs_haproxy
def test_it_keeps_no_rights_of_root(tmp_path: Path):
    is_root = os.getuid() == 0
    with stub() as device:
        device.ready_status = 200
        with proxy(tmp_path, [("a", device.server_address[1])], drop_root=is_root) as front:
            process = Path(f"/proc/{front.pid}")
            assert process.stat().st_uid != 0
            assert not is_root or (process / "root").readlink() == Path("/var/lib/haproxy")
            assert front.device({}) == "a"


# ------------------------------------------------------------------------------- the file


@needs_haproxy
def test_haproxy_reads_every_option(tmp_path: Path):
    pem = tmp_path / "both.pem"
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=x"],
        check=True, capture_output=True,
    )  # fmt: skip
    pem.write_bytes(key.read_bytes() + certificate.read_bytes())
    devices = read_devices(["a=10.0.0.1:8000", "b-2=[::1]:9", "c=127.0.0.1:1"])
    check(
        configuration(
            devices,
            bind="[::]:8443",
            certificate=pem,
            session_header="X-Other",
            slots=1,
            max_queue=1,
            queue_s=1,
            answer_s=1,
            retries=0,
            probe_port=9000,
        )
    )
    with pytest.raises(ConfigError, match="refuses the configuration"):
        check("global\n    nonsense\n")


@needs_haproxy
def test_a_machine_without_haproxys_user_can_check_all_else(monkeypatch: pytest.MonkeyPatch):
    """As where HAProxy was compiled, or the file is written for another machine."""
    devices = [Proxied("a", "127.0.0.1:1")]
    monkeypatch.setattr("edge_fleet.devices.haproxy._USER", "nobody-has-this-name")
    text = configuration(devices)
    assert "\n    user nobody-has-this-name\n" in text
    check(text)
    with pytest.raises(ConfigError, match="refuses the configuration"):
        check(text + "    nonsense\n")


def test_all_slots_of_many_devices_can_be_connected():
    devices = [Proxied(f"n{i}", f"10.0.0.{i}:8000") for i in range(200)]
    found = re.search(r"\n    maxconn (\d+)\n", configuration(devices, slots=4, max_queue=64))
    assert found is not None
    assert int(found[1]) > 200 * 4 + 64


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["a"],
        ["a=b"],
        ["a=b:0"],
        ["a=b:99999"],
        ["A=b:1"],
        ["a=b c:1"],
        ["a=b\n    bind *:1"],
        ["a=[x]:1"],
        ["a=b:1", "a=c:1"],
        ["a=b:1", "c=b:1"],
    ],
)
def test_devices_that_are_none_are_refused(given: list[str]):
    with pytest.raises(ConfigError):
        read_devices(given)


def test_nothing_can_be_slipped_into_the_file():
    devices = [Proxied("a", "127.0.0.1:1")]
    for options in (
        {"bind": "x"},
        {"bind": "0.0.0.0:1\n    stats enable"},
        {"session_header": "a)b"},
        {"certificate": Path("/a b")},
    ):
        with pytest.raises(ConfigError):
            configuration(devices, **options)


def test_the_verb_writes_what_was_checked(
    tmp_path: Path,
    edge_llm: Callable[..., Result],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    output = tmp_path / "haproxy.cfg"
    args = ("fleet", "haproxy", "nano-1=192.168.1.21:8000", "nano-2=192.168.1.22:8000")
    result = edge_llm(*args, "--no-check", "-o", output)
    assert result.code == 0, result.err
    text = output.read_text()
    assert edge_llm(*args, "--no-check").out == text
    assert "server nano-1 192.168.1.21:8000\n" in text
    assert "haproxy -c" not in text  # nothing checked it
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "apt-get install haproxy" in error_line(edge_llm(*args), 69)
    with pytest.raises(DependencyError):
        check(text)

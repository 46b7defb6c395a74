"""The service as a process: start, signals, drain, systemd."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edge.engine_config import EngineConfig
from edge.errors import ConfigError, DependencyError
from edge_lab.telemetry import Snapshot
from edge_serve import app
from edge_serve.api import samples
from edge_serve.http.connections import Listener, listen
from edge_serve.observe.notify import Notifier
from edge_serve.run import Service, open_llm
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles
from tests.edge.test_engine_config import OTHER_VALUES
from tests.edge_serve.processes import child, scripted_child
from tests.edge_serve.scripted import ScriptedEngine, running, tiny

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "what"}], "temperature": 0}


@pytest.mark.slow
@pytest.mark.timing
def test_sigterm_lets_running_requests_finish(tiny_bundles: Bundles):
    with scripted_child(tiny_bundles("qwen2"), 0.005) as server, ThreadPoolExecutor(8) as pool:
        stream = {**CHAT, "stream": True}
        asked = [pool.submit(server.ask, body=body) for body in (CHAT, stream) for _ in range(4)]
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping; 8 requests")
        status, headers, body = server.ask(body=CHAT)
        assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
        assert int(headers["retry-after"]) > 0
        assert headers["connection"] == "close"
        assert server.ask("/ready")[0] == 503
        assert server.ask("/health")[0] == 200
        for future in asked:
            status, _, body = future.result(timeout=20)
            assert status == 200
            assert b"x" in body
            assert b'"error"' not in body
        assert all(b"[DONE]" in future.result()[2] for future in asked[4:])
        finished = time.monotonic()
        assert server.process.wait(timeout=5) == 0
        assert time.monotonic() - finished < 1.5


EARLY = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *others):
        if name == "starlette":  # while the service is imported
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, os.environ["EARLY"]))

sys.meta_path.insert(0, Finder())
from edge.cli import main
main()
"""


@pytest.mark.slow
def test_a_signal_before_it_listens_is_kept_until_it_does(tiny_bundles: Bundles):
    serve = ("-c", EARLY, "serve", str(tiny_bundles("qwen2")), "--port", "0")
    with child(*serve, EARLY="SIGTERM") as server:
        assert server.process.wait(timeout=30) == 0
        assert not any("ready" in line for line in server.log)
    with child(*serve, EARLY="SIGHUP") as server:
        server.wait_for("reloaded")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0


@pytest.mark.slow
@pytest.mark.timing
def test_a_second_sigterm_leaves_at_once(tiny_bundles: Bundles):
    with scripted_child(tiny_bundles("qwen2"), 0.2) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.ask, body={**CHAT, "stream": True}) for _ in range(2)]
        time.sleep(1.0)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        sent = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 130
        assert time.monotonic() - sent < 2.5
        for future in asked:
            assert b"shutdown" in future.result(timeout=5)[2]


@pytest.mark.live
def test_a_drain_has_an_end(tiny_bundles: Bundles):
    with scripted_child(
        tiny_bundles("qwen2"), 0.1, drain_timeout_s=0.5
    ) as server, ThreadPoolExecutor(1) as pool:  # fmt: skip
        asked = pool.submit(server.ask, body={**CHAT, "stream": True})
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=6) == 0
        events = asked.result(timeout=5)[2]
        assert b'"code":"shutdown"' in events
        assert b"[DONE]" not in events


@pytest.mark.timing
def test_sigterm_does_not_wait_for_a_bundle_that_is_being_opened(tiny_bundles: Bundles):
    let_go = threading.Event()

    def open_slowly(_: Path) -> Any:
        let_go.wait(20)
        raise ConfigError("too late")

    settings = tiny(tiny_bundles("qwen2"), auto={"tiny": "always"})
    service = Service(settings, open_slowly, telemetry=Snapshot)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(asyncio.run(service.run())))
    thread.start()
    try:
        time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/health") as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/v1/models") as answer:
            assert json.load(answer)["data"] == []  # nothing can be asked yet, nor ``auto``
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{service.port}/ready")
        with caught.value as error:
            assert json.loads(error.read())["error"]["code"] == "loading"
        stopped = time.monotonic()
        service.stop()
        thread.join(10)
        assert not thread.is_alive()
        assert time.monotonic() - stopped < 2
        assert codes == [0]
        assert not service.is_clean
    finally:
        let_go.set()
        thread.join(10)


@pytest.mark.live
def test_a_hung_engine_does_not_keep_the_process(tiny_bundles: Bundles):
    with scripted_child(
        tiny_bundles("qwen2"), 30.0, stall_s=0.5, drain_timeout_s=0.5, close_s=1.0
    ) as server, ThreadPoolExecutor(1) as pool:  # fmt: skip
        asked = pool.submit(server.ask, body=CHAT)
        assert asked.result(timeout=10)[0] == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 70


@pytest.mark.live
def test_the_verb_serves_a_real_bundle(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2")
    with child(
        "-m", "edge.cli", "serve", str(bundle), "--port", "0", "--num-threads", "1",
        "--log-format", "json",
    ) as server:  # fmt: skip
        server.wait_for("ready: ")
        body = {"messages": CHAT["messages"], "max_tokens": 5}
        status, headers, data = server.ask(body=body)
        assert status == 200
        assert json.loads(data)["usage"]["completion_tokens"] == 5
        assert headers["x-edge-model"] == bundle.name
        assert all(json.loads(line)["message"] for line in server.log)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == 0


def test_every_setting_of_the_engine_reaches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    opened: list[tuple[Path, EngineConfig]] = []
    monkeypatch.setattr("edge.runtime.llm.LLM", lambda path, config: opened.append((path, config)))
    open_llm(ServerSettings(**OTHER_VALUES).engine)(tmp_path)
    assert opened == [(tmp_path, EngineConfig(**OTHER_VALUES))]


@pytest.mark.live
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 64, "give a bundle: there is none in"),
        (["--host", "0.0.0.0"], 64, "no API key is set"),
        (["--port", "99999"], 64, "port is '99999': Expected `int` <= 65535"),
        (["--api-key-file", "/absent"], 64, "cannot read the API keys"),
        (["--max-body-bytes", "0"], 64, "max_body_bytes"),
        (["--default-model", "other"], 64, "default model"),
        (["--speculative", "-1"], 64, "speculative"),
        (["--num-slots", "2", "--max-batch", "3"], 64, "there are 2 slots"),
        (["--target-itl-ms", "0"], 64, "target_itl_ms"),
        (["--num-threads", "0"], 64, "num_threads"),
        (["--prefill-chunk", "0"], 64, "prefill_chunk"),
    ],
)
def test_faults_that_prevent_a_start(
    tiny_bundles: Bundles, arguments: list[str], code: int, words: str, tmp_path: Path
):
    bundle = [str(tiny_bundles("qwen2"))] if arguments else []
    ran = subprocess.run(
        [sys.executable, "-m", "edge.cli", "serve", *bundle, *arguments],
        env=os.environ | {"EDGE_LLM_BUNDLES": str(tmp_path)},  # not the only one of this checkout
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == code, ran.stderr
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.live
def test_a_damaged_bundle_ends_the_start(tiny_bundles: Bundles, tmp_path: Path):
    import shutil

    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2"), bundle)
    with (bundle / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    ran = subprocess.run(
        [sys.executable, "-m", "edge.cli", "serve", str(bundle), "--port", "0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 65
    assert "tokenizer.json" in ran.stderr


@pytest.mark.live
def test_an_address_that_is_taken(tiny_bundles: Bundles):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=r"cannot listen.*; choose another --port"):
            Service(tiny(tiny_bundles("qwen2"), port=port), ScriptedEngine().open)


@pytest.mark.parametrize("host", ["192.0.2.1", "fe80::1%no-such-interface"])
def test_an_address_that_this_machine_does_not_have(host: str):
    with pytest.raises(ConfigError, match=r"cannot listen.*; choose another --host"):
        listen(host, 0)


@pytest.mark.live
def test_an_address_of_one_interface_keeps_it(monkeypatch: pytest.MonkeyPatch):
    bound: list[Any] = []
    monkeypatch.setattr(Listener, "bind", lambda self, address: bound.append(address))
    listen("fe80::1%lo", 0).close()
    assert bound == [("fe80::1", 0, 0, socket.if_nametoindex("lo"))]


def test_a_library_that_cannot_read_requests_is_a_refusal_to_start(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """And not an error 500 to each of them, as msgspec before 0.22 made of every chat."""
    decode = msgspec.json.decode
    broken: type | None = None

    def decode_all_but_one(body: bytes, *, type: Any) -> Any:
        if type is broken:
            raise TypeError("Literal[False] is not supported")
        return decode(body, type=type)

    monkeypatch.setattr(msgspec.json, "decode", decode_all_but_one)
    for broken in samples.SAMPLES:
        expected = rf"msgspec {re.escape(msgspec.__version__)} cannot read a {broken.__name__} "
        expected += r"\(Literal.*\); run: pip install --upgrade msgspec$"
        with pytest.raises(DependencyError, match=expected):
            Service(tiny(tiny_bundles("qwen2")), ScriptedEngine().open)


def test_every_body_of_the_api_is_tried_before_the_start():
    read = set(re.findall(r"_(?:read|generate)\(\s*request, ([A-Z]\w+)", inspect.getsource(app)))
    assert len(read) >= 4
    assert {kind.__name__ for kind in samples.SAMPLES} == read


# systemd


def receive(sock: socket.socket, timeout_s: float = 5.0) -> dict[str, str]:
    sock.settimeout(timeout_s)
    return dict(line.split("=", 1) for line in sock.recv(4096).decode().splitlines())


def drain(sock: socket.socket) -> bytes:
    """What has arrived by now."""
    sock.setblocking(False)
    data = b""
    while True:
        try:
            data += sock.recv(4096)
        except BlockingIOError:
            return data


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[socket.socket, Path]]:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        yield sock, path


@pytest.mark.live
def test_systemd_gets_the_state(
    manager: tuple[socket.socket, Path], tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    from edge_serve import run

    monkeypatch.setattr(run, "_BEAT_S", 0.02)
    sock, path = manager
    notifier = Notifier({"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "300000"})
    with running(tiny_bundles("qwen2"), notifier=notifier, stall_s=0.3) as live:
        seen: dict[str, str] = {}
        while "READY" not in seen:
            seen |= receive(sock)
        assert "EXTEND_TIMEOUT_USEC" in seen
        assert receive(sock) == {"WATCHDOG": "1"}
        live.engine.running.clear()  # hangs
        with ThreadPoolExecutor(1) as pool:
            pool.submit(live.chat, "what")
            deadline = time.monotonic() + 5
            while live.service.models.is_alive and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.1)
            drain(sock)
            time.sleep(0.5)  # two intervals, and the dog gets nothing
            assert drain(sock) == b""
            live.engine.running.set()
        assert receive(sock) == {"WATCHDOG": "1"}
    assert b"STOPPING=1" in drain(sock)


@pytest.mark.live
def test_a_drain_may_take_longer_than_systemds_own_time(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    from edge_serve import run

    now, until = 0.0, 45.0  # TimeoutStopSec of the unit

    def clock() -> float:
        nonlocal now
        now += 2.0
        return now

    class Manager(Notifier):
        def send(self, **fields: str | int) -> None:
            nonlocal until
            until = max(until, now + int(fields.get("extend_timeout_usec", 0)) / 1e6)

    settings = tiny(tiny_bundles("qwen2"), drain_timeout_s=60.0)
    service = Service(settings, lambda _: pytest.fail("nothing is opened"), notifier=Manager({}))
    monkeypatch.setattr(type(service.models), "num_flights", 1)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=clock))
    asyncio.run(service._drain())
    service._socket.close()
    assert now >= 60.0
    assert until >= now + run._CLOSE_S


def test_the_notifier_is_silent_without_systemd_and_survives_errors():
    Notifier({}).send(ready=1)
    assert Notifier({"WATCHDOG_USEC": "x"}).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}).watchdog_s is None
    mine = Notifier({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())})
    assert mine.watchdog_s == 2.0


def test_a_message_that_systemd_did_not_get_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """One that is repeated, the first time and again after it got through."""
    path = tmp_path / "notify"
    notifier = Notifier({"NOTIFY_SOCKET": str(path)})
    for _ in range(3):
        notifier.send(watchdog=1)
    notifier.send(ready=1, status="serving")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        notifier.send(watchdog=1)
        assert receive(sock) == {"WATCHDOG": "1"}
    notifier.send(watchdog=1)
    lost = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    wanted = [
        "WATCHDOG=1: No such file",
        "READY=1, STATUS=serving: No such file",
        "WATCHDOG=1: Conn",
    ]
    assert len(lost) == 3
    for words, line in zip(wanted, lost, strict=True):
        assert f"systemd was not told {words}" in line
        assert str(path) in line


def test_an_abstract_address():
    name = f"edge-llm-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).send(ready=1, status="serving")
        assert receive(sock) == {"READY": "1", "STATUS": "serving"}

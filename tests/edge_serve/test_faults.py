"""Clients that leave or do not read, overload, an engine that fails, hangs or returns NaN."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edge.bundle.manifest import MANIFEST_NAME, read_manifest
from edge.bundle.profile_layers import ProfileLayers
from edge.limited_child import LimitedChild, Limits
from edge.text import template_child
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from tests.conftest import Bundles
from tests.edge_serve.scripted import Live, running
from tests.makers.tiny_models import CHAT_TEMPLATE, CONTROL_IDS
from tests.standins.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.live

SECRET = re.compile(rb"0x[0-9a-f]{6,}|Traceback|/opt/|/tmp/|\.py|/work|edge_serve")


def long_text(live: Live, text: str, letters: int = 200) -> list[dict[str, str]]:
    """A question whose answer takes a while."""
    messages = [{"role": "user", "content": text}]
    live.engine.say(messages, "</think>" + "x" * letters)
    return messages


def post(body: object, path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


@pytest.fixture(scope="module")
def shaky(tiny_bundles: Bundles) -> Iterator[Live]:
    """A service of its own, since its engine is mistreated."""
    with running(
        tiny_bundles("qwen2"),
        llm={"queue_capacity": 8, "num_slots": 4},
        stall_s=1.5,  # 200 clients on two busy cores may hold the engine up for most of a second
        write_timeout_s=1.0,
        stream_buffer_bytes=20_000,
        ping_s=0.2,
    ) as live:
        yield live


@pytest.fixture(autouse=True)
def _healthy_again(shaky: Live) -> Iterator[None]:
    yield
    shaky.engine.delay_s = 0
    shaky.engine.poison = shaky.engine.fails_at = None
    shaky.engine.running.set()
    assert shaky.idle()
    deadline = time.monotonic() + 5
    while shaky.ask("/ready").status != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert shaky.chat(max_tokens=3).status == 200


def test_two_hundred_clients_leave_at_random_places(shaky: Live):
    engine = shaky.engine
    messages = long_text(shaky, "leave", 300)
    engine.delay_s = 0.0005
    rng = random.Random(0)

    def leave(number: int) -> None:
        body = {"model": "tiny", "messages": messages, "stream": number % 4 != 0}
        with closing(shaky.connect()) as sock:
            sock.sendall(post(body))
            wanted = rng.choice([0, 0, 1, 200, 2_000, 10_000, 30_000])
            sock.settimeout(rng.choice([0.001, 0.02, 0.2]))
            taken = 0
            try:
                while taken < wanted and (data := sock.recv(1024)):
                    taken += len(data)
            except TimeoutError:
                pass
            if rng.random() < 0.5:  # a reset instead of a polite end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(200)))
    assert shaky.idle(2.0)
    stats = shaky.engine.llm.scheduler.stats()
    assert stats.kv_used_tokens == 0
    assert stats.outcomes["cancelled"] > 20


@pytest.mark.timing
def test_the_engine_stops_within_a_step_of_a_client_that_leaves(shaky: Live):
    engine = shaky.engine
    messages = long_text(shaky, "step", 400)
    engine.delay_s = 0.02
    for stream in (True, False):
        with closing(shaky.connect()) as sock:
            sock.sendall(post({"model": "tiny", "messages": messages, "stream": stream}))
            if stream:
                sock.recv(100)
            else:
                time.sleep(0.2)
        left = time.monotonic()
        assert shaky.idle(1.0)
        assert time.monotonic() - left < 0.02 + 0.1


def test_a_client_that_leaves_the_queue_gives_its_place_back(shaky: Live):
    def prompt_tokens() -> tuple[int, float]:
        found = re.findall(
            rb'edgellm_prefix_cache_queries_total{model="tiny"} (.*)', shaky.ask("/metrics").body
        )
        return shaky.engine.llm.scheduler.stats().prompt_tokens, sum(map(float, found))

    before = prompt_tokens()
    shaky.engine.delay_s = 0.01
    messages = long_text(shaky, "queue", 300)
    socks = [shaky.connect() for _ in range(10)]
    for sock in socks:
        sock.sendall(post({"model": "tiny", "messages": messages, "stream": True}))
    deadline = time.monotonic() + 5
    while shaky.engine.llm.scheduler.stats().waiting < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    for sock in socks[4:]:
        sock.close()
    time.sleep(0.3)
    assert shaky.engine.llm.scheduler.stats().waiting == 0
    for sock in socks:
        sock.close()
    assert shaky.idle()
    # Metrics count the prompts that were read, as the scheduler does.
    read, counted = (now - old for now, old in zip(prompt_tokens(), before, strict=True))
    assert counted == read > 0


@pytest.mark.timing
def test_a_slow_reader_is_cut_and_holds_up_nobody(shaky: Live):
    messages = [{"role": "user", "content": "fast"}]
    shaky.engine.say(messages, "</think>" + "🙂" * 100)
    cancelled = shaky.engine.llm.scheduler.stats().outcomes.get("cancelled", 0)
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", shaky.port))
        # Random tokens for as long as the cache lasts, with log-probabilities: 2 MB of answer.
        body = {"model": "tiny", "prompt": "abc", "stream": True, "logprobs": 20, "n": 4,
                "ignore_eos": True, "temperature": 1}  # fmt: skip
        sock.sendall(post(body, "/v1/completions"))
        started = time.monotonic()
        assert shaky.chat("fast", temperature=0).status == 200
        assert shaky.idle(5.0)
        assert time.monotonic() - started < 4
        time.sleep(1.2)  # the write timeout: the connection is gone, not only the request
        sock.settimeout(2)
        taken = 0
        try:
            while data := sock.recv(65536):
                taken += len(data)
        except ConnectionError:
            pass
        assert taken < 1_000_000
    assert shaky.engine.llm.scheduler.stats().outcomes["cancelled"] == cancelled + 4


def test_overload_is_reported_and_cuts_nobody(shaky: Live):
    messages = long_text(shaky, "load", 20)
    shaky.engine.delay_s = 0.002
    results: Counter[int] = Counter()
    waits: list[float] = []
    lock = threading.Lock()
    start = threading.Barrier(200)

    def ask(_: int) -> None:
        start.wait()
        began = time.monotonic()
        answer = shaky.ask("/v1/chat/completions", {"model": "tiny", "messages": messages,
                                                    "temperature": 0})  # fmt: skip
        with lock:
            results[answer.status] += 1
            if answer.status == 429:
                waits.append(time.monotonic() - began)
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json["error"]["type"] == "rate_limit_error"
                assert answer.json["error"]["code"] == "queue_full"
            else:
                assert answer.json["choices"][0]["message"]["content"] == "x" * 20

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(ask, range(200)))
    assert results.keys() == {200, 429}
    assert sum(results.values()) == 200
    assert results[200] >= 12


def test_nan_ends_one_request_only(shaky: Live):
    good = long_text(shaky, "good", 60)
    bad = [{"role": "user", "content": "bad"}]
    shaky.engine.say(bad, "</think>ab<|EOT|>cd")
    shaky.engine.poison = CONTROL_IDS["<|EOT|>"]
    shaky.engine.delay_s = 0.002
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(
            shaky.ask, "/v1/chat/completions",
            {"model": "tiny", "messages": good, "temperature": 0},
        )  # fmt: skip
        answer = shaky.chat("bad", temperature=0)
        assert other.result().json["choices"][0]["message"]["content"] == "x" * 60
    assert answer.status == 500
    assert answer.headers["x-should-retry"] == "false"
    assert not SECRET.search(answer.body)


def test_a_failing_engine_is_an_error_without_its_secrets(shaky: Live):
    bad = [{"role": "user", "content": "fail"}]
    shaky.engine.say(bad, "</think>ab<|EOT|>cd")
    shaky.engine.fails_at = CONTROL_IDS["<|EOT|>"]
    answer = shaky.chat("fail", temperature=0)
    assert answer.status == 500
    assert answer.json["error"]["code"] == "engine_error"
    assert not SECRET.search(answer.body)
    stream = shaky.chat("fail", temperature=0, stream=True)
    assert stream.status == 200  # the text before it was already out
    *before, last = stream.events
    assert last["error"]["code"] == "engine_error"
    assert all("error" not in item for item in before)
    assert not SECRET.search(stream.body)
    at_once = [{"role": "user", "content": "at once"}]
    shaky.engine.say(at_once, "<|EOT|>")
    shaky.engine.fails_at = shaky.engine.llm.encode(at_once)[-1]
    assert shaky.chat("at once", temperature=0, stream=True).status == 500  # nothing was out yet
    text = shaky.ask("/metrics").body.decode()
    assert re.search(r'edgellm_requests_total\{model="tiny",outcome="error"\} [1-9]', text)


@pytest.mark.timing
def test_a_hanging_engine_makes_the_server_unhealthy(shaky: Live):
    messages = long_text(shaky, "hang", 50)
    shaky.engine.delay_s = 0.02
    with ThreadPoolExecutor(8) as pool:
        running_ones = [
            pool.submit(
                shaky.ask, "/v1/chat/completions",
                {"model": "tiny", "messages": messages, "stream": stream, "temperature": 0},
            )
            for stream in (True, False) * 4
        ]  # fmt: skip
        time.sleep(0.1)
        shaky.engine.running.clear()
        deadline = time.monotonic() + 5
        while shaky.ask("/ready").status == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        ready = shaky.ask("/ready")
        assert (ready.status, ready.json["error"]["code"]) == (503, "engine_stalled")
        assert shaky.ask("/health").status == 200
        assert not shaky.service.models.is_alive  # so the watchdog is not fed
        for answer in running_ones:  # none of them hangs
            result = answer.result(timeout=5)
            if result.status == 200:
                assert result.events[-1]["error"]["code"] == "engine_stalled"
            else:
                assert result.json["error"]["code"] == "engine_stalled"
        began = time.monotonic()
        late = shaky.chat("hang")
        assert (late.status, late.json["error"]["code"]) == (503, "engine_stalled")
        assert time.monotonic() - began < 1


def test_a_long_silence_is_filled(shaky: Live):
    messages = long_text(shaky, "ping", 2)
    shaky.engine.delay_s = 0.25
    answer = shaky.ask(
        "/v1/chat/completions",
        {"model": "tiny", "messages": messages, "stream": True, "temperature": 0},
    )
    assert b": ping\n\n" in answer.body
    assert answer.events[-1] == "[DONE]"


def test_deadlines_end_requests(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2"), request_timeout_s=0.3) as live:
        messages = long_text(live, "late", 300)
        live.engine.delay_s = 0.02
        answer = live.ask("/v1/chat/completions", {"model": "tiny", "messages": messages})
        assert (answer.status, answer.json["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        assert 'outcome="deadline"' in live.ask("/metrics").body.decode()


@pytest.mark.parametrize("node", [None, "/dev/nvmap"])
def test_an_idle_gpu_is_reported_everywhere(
    node: str | None, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge.device.nodes.find_gpu_node", lambda: node)
    monkeypatch.setattr(ScriptedBackend, "name", "ort-cpu")
    monkeypatch.setattr(ScriptedBackend, "gpu_wait", "spin", raising=False)
    with running(tiny_bundles("qwen2")) as live:
        ready = live.ask("/ready").json
        row = live.ask("/stats").json["models"]["tiny"]
        metrics = live.ask("/metrics").body.decode()
    [info] = [line for line in metrics.splitlines() if line.startswith("edgellm_engine_info{")]
    assert (ready["status"], ready["backends"], row["backend"]) == ("ready", ["ort-cpu"], "ort-cpu")
    assert 'backend="ort-cpu"' in info
    assert 'gpu_wait="spin"' in info
    if node is None:
        assert (ready["warnings"], row["warning"]) == ([], None)
        assert 'gpu_unused="false"' in info
    else:
        assert ready["warnings"] == [row["warning"]]
        assert f"this machine has a GPU ({node})" in row["warning"]
        assert 'gpu_unused="true"' in info


def test_an_engine_for_fewer_than_the_slots_is_said_but_is_no_gpu_that_idles(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ScriptedBackend, "name", "tensorrt")
    monkeypatch.setattr(ScriptedBackend, "info", info_of(compiled=()), raising=False)
    with running(tiny_bundles("qwen2")) as live:
        (warning,) = live.ask("/ready").json["warnings"]
        metrics = live.ask("/metrics").body.decode()
    assert "the engine computes 1 per step, so they take turns" in warning
    assert "slower" not in warning
    assert 'gpu_unused="false"' in metrics


def info_of(**fields: Any) -> Any:
    """What is read of an engine's ``engine.json``."""
    known = {"max_batch": 1, "flavour": "tensorrt", "kernels": "tensorrt", "builder": "api"}
    return SimpleNamespace(**{**known, "tuned": (), "refused": (), **fields})


def test_a_slow_engine_is_reported_everywhere(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    slow = ProfileLayers("decode", 9, 1, 1, 28, {"fp16": 9}, "decomposed")
    monkeypatch.setattr(ScriptedBackend, "name", "tensorrt")
    info = info_of(max_batch=64, compiled=(slow,))
    monkeypatch.setattr(ScriptedBackend, "info", info, raising=False)
    with running(tiny_bundles("qwen2")) as live:
        ready = live.ask("/ready").json
        row = live.ask("/stats").json["models"]["tiny"]  # which the page shows
    assert ready["status"] == "ready"
    assert ready["warnings"] == [row["warning"]]
    assert "28 layers unpack their weights" in row["warning"]
    assert "attention is several kernels" in row["warning"]
    assert "edge-llm build BUNDLE --kernels auto" in row["warning"]


def test_heat_makes_the_server_not_ready(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    from edge_lab.telemetry import Snapshot
    from edge_serve import run

    heat = {"cpu": 60.0, "gpu": 98.0}
    monkeypatch.setattr(run, "_THERMAL_S", 0.05)
    monkeypatch.setattr(run, "_BEAT_S", 0.02)
    with running(
        tiny_bundles("qwen2"), telemetry=lambda: Snapshot(temperatures_celsius=dict(heat))
    ) as live:

        def reason_within(seconds: float, wanted: str | None) -> bool:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                answer = live.ask("/ready")
                code = None if answer.status == 200 else answer.json["error"]["code"]
                if code == wanted:
                    return True
                time.sleep(0.02)
            return False

        assert reason_within(3, "thermal")
        assert live.chat(max_tokens=2).status == 200  # who insists is served
        heat["gpu"] = 95.0  # not cool enough yet
        assert not reason_within(0.3, None)
        heat["gpu"] = 80.0
        assert reason_within(3, None)


TRAP = (
    "{% if messages[0].content == 'go' %}{% set n = namespace(x=['a']) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}{% endif %}"
)


def test_a_template_that_never_ends_holds_up_nobody_else(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One chat froze the server for ever: it was not even ended by SIGTERM."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2"), bundle)
    (bundle / "chat_template.jinja").write_text(TRAP + CHAT_TEMPLATE)
    manifest = read_manifest(bundle)
    files = manifest.files | {"chat_template.jinja": sha256_file(bundle / "chat_template.jinja")}
    (bundle / MANIFEST_NAME).write_bytes(
        encode_manifest(msgspec.structs.replace(manifest, files=files))
    )
    limits = Limits(cpu_s=0.5, memory_bytes=template_child.TEMPLATE_LIMITS.memory_bytes)
    with (
        LimitedChild("edge.text.template_engine:work", limits) as child,
        monkeypatch.context() as patch,
        running(bundle) as live,
        ThreadPoolExecutor(1) as pool,
    ):
        patch.setattr(template_child, "_child", child)
        trapped = pool.submit(live.chat, "go")
        waits = []
        while not trapped.done():
            before_s = time.monotonic()
            assert live.ask("/health").status == 200
            waits.append(time.monotonic() - before_s)
            time.sleep(0.02)
        answer = trapped.result()
        assert answer.status == 400
        assert "cannot render these messages: it takes more than" in answer.json["error"]["message"]
        assert len(waits) > 5
        assert max(waits) < 1
        assert live.chat("what").status == 200

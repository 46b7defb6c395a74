"""Probes are answered by a thread of their own, and as the server's own port answers them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest

from edge.errors import ConfigError
from edge_serve.http.connections import listen
from edge_serve.http.errors import APIError
from edge_serve.http.probes import _MOST_WAITING, LOOP_STALL_S, Probes
from edge_serve.run import Service
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles, write_secret
from tests.edge_serve.http.test_connections import blocked
from tests.edge_serve.processes import scripted_child
from tests.edge_serve.scripted import Live, running, tiny, until

pytestmark = pytest.mark.live


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def nobody_else(host: bytes | None) -> None:
    if host != b"localhost":
        raise APIError(403, "host_not_allowed", "no")


@contextmanager
def probes(clock: Clock) -> Iterator[Probes]:
    found = Probes(listen("127.0.0.1", 0), nobody_else, {"status": "ready"}, clock)
    found.start()
    try:
        yield found
    finally:
        found.close()


def exchange(port: int, data: bytes) -> bytes:
    """Send, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(data)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer


def get(port: int, path: str, host: str = "localhost", method: str = "GET") -> tuple[int, Any]:
    answer = exchange(port, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    fields, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in fields.lower()
    return int(fields.split(b" ", 2)[1]), json.loads(body) if body else None


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


def test_what_was_published_is_answered_until_it_is_too_old():
    clock = Clock()
    with probes(clock) as found:
        assert get(found.port, "/health") == (200, {"status": "ok"})
        assert get(found.port, "/ready?x=1") == (200, {"status": "ready"})
        found.publish(APIError(503, "thermal", "hot", retry_after_s=5))
        assert code(get(found.port, "/ready")) == (503, "thermal")
        assert get(found.port, "/health")[0] == 200
        clock.now += LOOP_STALL_S + 1
        for path in ("/health", "/ready"):
            assert code(get(found.port, path)) == (503, "loop_stalled")
        found.publish({"status": "ready"})
        assert get(found.port, "/ready")[0] == get(found.port, "/health")[0] == 200


def test_it_answers_nothing_else():
    with probes(Clock()) as found:
        assert code(get(found.port, "/stats")) == (404, "not_found")
        assert code(get(found.port, "/health", method="POST")) == (405, "method_not_allowed")
        assert get(found.port, "/health", method="HEAD") == (200, None)
        assert code(get(found.port, "/health", host="evil.example")) == (403, "host_not_allowed")
        assert exchange(found.port, b"nonsense\r\n\r\n") == b""


def test_a_slow_prober_delays_nobody_and_is_cut():
    clock = Clock()
    with probes(clock) as found:
        slow = [socket.create_connection(("127.0.0.1", found.port), 5) for _ in range(100)]
        try:
            for sock in slow:
                sock.sendall(b"GET /health HT")
            assert get(found.port, "/health")[0] == 200
            with closing(socket.create_connection(("127.0.0.1", found.port), 5)) as late:
                late.sendall(b"GET /health HTTP/1.1\r\n")
                time.sleep(0.05)
                late.sendall(b"Host: localhost\r\n\r\n")
                assert late.recv(4096).startswith(b"HTTP/1.1 200")
            assert len(found._waiting) <= _MOST_WAITING
            clock.now += 60
            until(lambda: not found._waiting)
            for sock in slow:
                with suppress(ConnectionResetError):  # of what it had not read
                    assert sock.recv(1) == b""
        finally:
            for sock in slow:
                sock.close()


def test_it_ends_and_frees_its_port():
    with probes(Clock()) as found:
        thread = found._thread
    assert not thread.is_alive()
    listen("127.0.0.1", found.port).close()


# In the service


def probe_port(live: Live) -> int:
    assert live.service.probes is not None
    port = live.service.probes.port
    until(lambda: get(port, "/ready")[0] == 200)  # that it is ready is published a moment later
    return port


def test_probes_are_answered_while_the_event_loop_is_blocked(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    with running(tiny_bundles("qwen2"), probe_port=0) as live:
        port = probe_port(live)
        for path in ("/health", "/ready"):
            assert get(port, path) == (200, live.ask(path).json)
        with blocked(live):
            for path in ("/health", "/ready"):
                assert get(port, path)[0] == 200
            with pytest.raises(OSError, match="timed out"):
                live.ask("/health", timeout_s=0.3)
            monkeypatch.setattr("edge_serve.http.probes.LOOP_STALL_S", 0.2)
            until(lambda: get(port, "/ready")[0] == 503)
            assert code(get(port, "/health")) == (503, "loop_stalled")
        monkeypatch.setattr("edge_serve.http.probes.LOOP_STALL_S", LOOP_STALL_S)
        until(lambda: get(port, "/ready")[0] == 200)


def test_both_ports_say_the_same(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2"), probe_port=0, stall_s=0.3) as live:
        port = probe_port(live)
        live.engine.running.clear()
        with closing(live.connect()) as sock:
            body = b'{"model": "tiny", "prompt": "x"}'
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/"
                b"json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            until(lambda: get(port, "/ready")[0] == 503)
            stalled = get(port, "/ready")
            assert code(stalled) == (503, "engine_stalled")
            own = live.ask("/ready")
            assert (own.status, own.json) == stalled
            assert get(port, "/health")[0] == 200
        live.engine.running.set()
        assert live.idle()
        live.service.models.trouble = "thermal"
        until(lambda: get(port, "/ready")[0] == 503)
        assert get(port, "/ready") == (503, live.ask("/ready").json)
        assert code(get(port, "/ready", host="evil.example")) == (403, "host_not_allowed")


def test_it_tells_that_the_server_loads_and_drains(tiny_bundles: Bundles):
    with scripted_child(
        tiny_bundles("qwen2"), 0.05, wait=False, open_delay_s=1.0, probe_port=0
    ) as server:
        port = int(server.wait_for(r"probes are answered on port (\d+)")[1])
        assert get(port, "/health")[0] == 200
        assert code(get(port, "/ready")) == (503, "loading")
        server.wait_for("ready: tiny")
        assert get(port, "/ready")[0] == 200
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 200}).encode()
        with closing(socket.create_connection(("127.0.0.1", server.port), 5)) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/"
                b"json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            until(lambda: json.loads(server.ask("/stats")[2])["models"]["tiny"]["running"] == 1)
            server.process.terminate()
            server.wait_for("stopping; 1 requests")
            assert code(get(port, "/ready")) == (503, "draining")
            assert get(port, "/health")[0] == 200
        assert server.process.wait(20) == 0


def test_keys_open_it_to_other_host_names(tiny_bundles: Bundles, tmp_path: Any):
    keys = write_secret(tmp_path / "keys", "a:sk-aaaaaaaaaaaaaaaa\n")
    with running(tiny_bundles("qwen2"), probe_port=0, api_key_file=keys) as live:
        assert get(probe_port(live), "/ready", host="device.example")[0] == 200


def test_a_port_that_is_taken_is_named(tiny_bundles: Bundles):
    with listen("127.0.0.1", 0) as sock:
        taken = sock.getsockname()[1]
        settings = tiny(tiny_bundles("qwen2"), probe_port=taken)
        with pytest.raises(ConfigError, match=f"port {taken}.*choose another --probe-port"):
            Service(settings, lambda path: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="both 8000; give another --probe-port"):
        ServerSettings(probe_port=8000)

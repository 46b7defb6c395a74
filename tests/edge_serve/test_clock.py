"""The wall clock jumps by a day: time limits, rates and uptime have a clock of their own."""

from __future__ import annotations

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import edge
from edge_serve.observe.notify import Notifier
from tests.conftest import Bundles, write_secret
from tests.edge_serve.scripted import running

pytestmark = pytest.mark.live

DAY_S = 86_400.0
AUTH = {"Authorization": "Bearer sk-of-the-good-clock"}
# What is shown as a time of day, and no more.
SHOWN = {
    "edge_serve/api/generate.py",
    "edge_serve/api/responses/render.py",
    "edge_serve/models/registry.py",
    "edge_serve/models/loader.py",
    "edge_serve/api/ollama/models.py",
    "edge_lab/cli/watching.py",
    "edge_fleet/cli/bundle.py",
    "edge_serve/stored/bounded.py",  # an age in days, which outlasts restarts
    "edge_fleet/cli/waves.py",  # a number that is larger than that of any older order
    "edge_fleet/waves/device.py",
    "edge_fleet/waves/progress.py",  # ages in hours, which outlast restarts
    "edge_serve/batch/clients.py",  # or compared with a time of day that a server has said
}


class WallClock:
    """`time.time` with a jump."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = time.time
        self.jump_s = 0.0
        monkeypatch.setattr(time, "time", lambda: self._real() + self.jump_s)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    return WallClock(monkeypatch)


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["forward", "back"])
def test_a_jump_of_the_clock_ends_nothing_and_lets_nobody_in(
    jump_s: float, wall: WallClock, tiny_bundles: Bundles, tmp_path: Path
):
    keys = write_secret(tmp_path / "keys", "clock:sk-of-the-good-clock\n")
    limits = {"request_timeout_s": 20.0, "idle_connection_s": 20.0, "rate_limit_rpm": 3}
    with running(tiny_bundles("qwen2"), api_key_file=keys, **limits) as live:  # type: ignore[arg-type]
        live.engine.default = "yes " * 40
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 60}

        def chat() -> int:
            return live.ask("/v1/chat/completions", body, headers=AUTH).status

        before = live.ask("/stats", headers=AUTH).json["uptime_s"]
        with ThreadPoolExecutor(2) as pool, live.connect() as idle:
            live.engine.running.clear()  # nothing moves
            asked = [pool.submit(chat) for _ in range(2)]
            until = time.monotonic() + 20
            while live.service.models.num_flights < 2 and time.monotonic() < until:
                time.sleep(0.01)
            wall.jump_s = jump_s
            time.sleep(0.6)  # the service looks at its clocks twice
            assert live.service.models.num_flights == 2
            live.engine.running.set()
            assert [future.result(20) for future in asked] == [200, 200]
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(100).startswith(b"HTTP/1.1 200")
        # A day more gives no tokens to a client that has used its own, a day less takes none.
        assert [chat(), chat()] == [200, 429]
        refused = live.ask("/v1/chat/completions", body, headers=AUTH)
        assert 1 <= int(refused.headers["retry-after"]) <= 21
        after = live.ask("/stats", headers=AUTH).json
        assert 0 < after["uptime_s"] - before < 60
        assert live.ask("/ready").status == 200


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["forward", "back"])
def test_the_watchdog_is_fed_on(
    jump_s: float, wall: WallClock, tiny_bundles: Bundles, tmp_path: Path
):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "900000"}
        with running(tiny_bundles("qwen2"), notifier=Notifier(environ)):
            while sock.recv(1000) != b"WATCHDOG=1":
                pass
            wall.jump_s = jump_s
            fed = [time.monotonic()]
            while len(fed) < 4:
                if sock.recv(1000) == b"WATCHDOG=1":
                    fed.append(time.monotonic())
            assert fed[-1] - fed[0] > 0.5  # three times 0.3 s, not all at once


def test_nothing_is_computed_with_the_wall_clock():
    root = Path(edge.__file__).parent.parent
    users = {
        path.relative_to(root).as_posix()
        for package in ("edge", "edge_make", "edge_lab", "edge_serve", "edge_fleet")
        for path in (root / package).rglob("*.py")
        if re.search(r"\btime\.time(_ns)?\b|\butcnow\b", path.read_text("utf-8"))
    }
    assert users == SHOWN

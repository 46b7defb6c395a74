"""What watches engines and device: it survives errors and slow reads, or the service ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_lab.telemetry import Snapshot
from edge_serve import run
from tests.conftest import Bundles
from tests.edge_serve.scripted import running, until

pytestmark = pytest.mark.live

HOT = Snapshot(temperatures_celsius={"gpu": 99.0})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_BEAT_S", 0.02)
    monkeypatch.setattr(run, "_THERMAL_S", 0.02)


class Dog:
    """Stands in for systemd's watchdog."""

    watchdog_s = 0.3

    def __init__(self) -> None:
        self.fed = 0

    def send(self, **fields: str | int) -> None:
        self.fed += "watchdog" in fields


def test_the_device_is_read_again_after_a_failure(
    tiny_bundles: Bundles, caplog: pytest.LogCaptureFixture
):
    errors = [MemoryError(), RuntimeError("can't start new thread"), MemoryError()]

    def telemetry() -> Snapshot:
        if errors:
            raise errors.pop()
        return HOT

    with running(tiny_bundles("qwen2"), telemetry=telemetry) as live:
        until(lambda: live.service.models.trouble == "thermal")
        failed = [record for record in caplog.records if "a look at" in record.getMessage()]
        kinds = [record.exc_info[0] for record in failed if record.exc_info]
        assert kinds == [MemoryError, RuntimeError]


def test_the_engines_are_checked_again_after_a_failure(
    tiny_bundles: Bundles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    with running(tiny_bundles("qwen2"), stall_s=0.5) as live:
        models, errors = live.service.models, [MemoryError()] * 3
        beat = models.beat

        def failing() -> None:
            if errors:
                raise errors.pop()
            beat()

        monkeypatch.setattr(models, "beat", failing)
        until(lambda: not errors)
        time.sleep(0.8)
        assert live.ask("/ready").status == 200
        assert live.chat(max_tokens=2).status == 200
        assert caplog.text.count("a look at the engines failed") == 1


def test_a_slow_device_reading_does_not_stall_an_engine(tiny_bundles: Bundles):
    dog, let_go, looks = Dog(), threading.Event(), []

    def telemetry() -> Snapshot:
        looks.append(1)
        let_go.wait(20)
        return HOT

    try:
        with running(tiny_bundles("qwen2"), telemetry=telemetry, notifier=dog, stall_s=0.5) as live:
            until(lambda: bool(looks))
            time.sleep(0.8)
            fed = dog.fed
            assert live.ask("/ready").status == 200  # and as warm as when it was last seen
            assert live.chat(max_tokens=2).status == 200
            until(lambda: dog.fed > fed + 1)
            assert len(looks) == 1
            let_go.set()
            until(lambda: live.service.models.trouble == "thermal")
    finally:
        let_go.set()


def test_a_hanging_device_reading_blocks_one_scrape_and_no_chat(tiny_bundles: Bundles):
    let_go = threading.Event()

    def telemetry() -> Snapshot:
        let_go.wait(30)
        return HOT

    with ThreadPoolExecutor(40) as pool:
        try:
            with running(tiny_bundles("qwen2"), telemetry=telemetry) as live:
                scrapes = [pool.submit(live.ask, "/metrics") for _ in range(40)]
                until(lambda: sum(scrape.done() for scrape in scrapes) == 39)
                assert live.ask("/stats").json["device"]["temperatures_celsius"] == {}
                assert live.chat(max_tokens=2).status == 200
                let_go.set()
                assert {scrape.result().status for scrape in scrapes} == {200}
                until(lambda: live.ask("/stats").json["device"]["temperatures_celsius"] != {})
        finally:
            let_go.set()


@pytest.mark.parametrize("method", ["beat", "_judge_heat"])
def test_a_service_that_nobody_watches_ends(
    method: str,
    tiny_bundles: Bundles,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    class Panic(BaseException):
        pass

    def panic(*_: object) -> None:
        raise Panic

    with running(tiny_bundles("qwen2")) as live:
        owner = live.service.models if method == "beat" else live.service
        monkeypatch.setattr(owner, method, panic)
        until(lambda: live.exit_code is not None)
        assert live.exit_code == run.HUNG_EXIT
        assert "nobody watches the engines" in caplog.text

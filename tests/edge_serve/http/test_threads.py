"""Threads that cannot be started: the caller is told, nothing is kept, later calls are served."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from edge.errors import ResourceError
from edge_serve.http.threads import Lane, in_thread
from tests.conftest import Bundles
from tests.edge_serve.scripted import running


class Request:
    """What a request holds."""


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Threads whose names begin so cannot be started until an empty name is given."""
    start, refused = threading.Thread.start, [""]

    def refusing(self: threading.Thread) -> None:
        if refused[0] and self.name.startswith(refused[0]):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refusing)

    def refuse(prefix: str) -> None:
        refused[0] = prefix

    return refuse


async def stays(*_: Any) -> Any:
    await asyncio.sleep(60)


@pytest.mark.parametrize("way", ["lane", "in_thread"])
def test_a_thread_that_cannot_be_started_costs_one_call(
    way: str, no_threads: Callable[[str], None]
):
    lane = Lane("t-lane", full="full", late="late", queue_capacity=0)
    ran: list[Request] = []

    def call(request: Request) -> Awaitable[int]:
        def work(*_: Any) -> int:
            ran.append(request)
            return 7

        return lane.run(work, stays) if way == "lane" else in_thread(work)

    async def scenario() -> None:
        no_threads("t-lane" if way == "lane" else "asyncio")
        gc.disable()
        try:
            for _ in range(3):
                request = Request()
                kept = weakref.ref(request)
                with pytest.raises(ResourceError, match=r"can't start new thread.*ulimit -u"):
                    await call(request)
                del request
                assert kept() is None
        finally:
            gc.enable()
        assert lane.num_jobs == 0
        no_threads("")
        assert await call(Request()) == 7
        assert len(ran) == 1  # and what was refused is not made up for

    asyncio.run(scenario())
    assert lane.num_jobs == 0


@pytest.mark.live
def test_a_request_without_a_thread_gets_503_and_the_next_one_is_answered(
    tiny_bundles: Bundles, no_threads: Callable[[str], None], caplog: pytest.LogCaptureFixture
):
    with running(tiny_bundles("qwen2"), max_connections=2) as live:
        no_threads("edge-text")
        for _ in range(6):  # more than may wait
            answer = live.chat(max_tokens=2)
            assert (answer.status, answer.json["error"]["code"]) == (503, "insufficient_memory")
        assert caplog.text.count("failed: a thread could not be started (can't start") == 6
        no_threads("")
        assert live.chat(max_tokens=2).status == 200

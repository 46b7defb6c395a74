"""Who has left when it is accepted, or while its request is on its way."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

import edge_serve.app as app
from edge_serve.api.chat import plan_chat
from edge_serve.api.protocol import decode
from edge_serve.http import connections
from edge_serve.http.connections import Listener, has_left, listen
from tests.conftest import Bundles
from tests.edge_serve.attacker import post
from tests.edge_serve.scripted import Live, running, until
from tests.edge_serve.test_admission import CHAT

pytestmark = pytest.mark.live

CHAT_PATH = "/v1/chat/completions"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listen("127.0.0.1", 0) as sock:
        sock.setblocking(False)
        yield sock


def client(sock: Listener, data: bytes = b"") -> socket.socket:
    connected = socket.create_connection(sock.getsockname(), 5)
    connected.sendall(data)
    return connected


def test_a_client_that_left_is_noticed_before_anything_is_read(listener: Listener):
    with client(listener, b"POST / ") as sock:
        with listener.accept()[0] as accepted:
            assert not has_left(accepted)
            sock.shutdown(socket.SHUT_WR)
            assert has_left(accepted)
            assert accepted.recv(100) == b"POST / "
        assert has_left(accepted)  # closed here
    with client(listener, b"POST / ") as sock, listener.accept()[0] as accepted:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()
        assert has_left(accepted)


def test_only_clients_that_wait_for_an_answer_are_accepted(listener: Listener):
    for data in (b"", b"POST / HTTP/1.1\r\n\r\n", b"GE"):
        client(listener, data).close()
    gone = client(listener, b"POST / HTTP/1.1\r\n\r\n")
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    gone.close()
    with client(listener) as silent, client(listener, b"GET / HTTP/1.0\r\n\r\n") as half:
        half.shutdown(socket.SHUT_WR)  # as `nc -N` does
        for waits in (silent, half):
            with listener.accept()[0] as accepted:
                assert accepted.getpeername() == waits.getsockname()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_clients_that_left_do_not_delay_the_loop_for_long(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "_MOST_GONE", 3)
    for _ in range(4):
        client(listener).close()
    with client(listener) as last:
        with pytest.raises(BlockingIOError):
            listener.accept()
        with listener.accept()[0] as accepted:
            assert accepted.getpeername() == last.getsockname()


# In the server


@contextmanager
def blocked(live: Live) -> Iterator[None]:
    """Let the event loop do nothing for as long as the block lasts."""
    begun, over = threading.Event(), threading.Event()
    loop = live.service._loop
    assert loop is not None

    def block() -> None:
        begun.set()
        assert over.wait(10)

    loop.call_soon_threadsafe(block)
    assert begun.wait(5)
    try:
        yield
    finally:
        over.set()


def chat_request(**fields: Any) -> bytes:
    return post(CHAT_PATH, json.dumps({**CHAT, "max_tokens": 4, **fields}).encode())


def leave_at(live: Live, name: str, patch: pytest.MonkeyPatch) -> list[str]:
    """Have a client leave during a stage of its request; returns the stages that were begun."""
    begun: list[str] = []
    sock = live.connect()
    stack = ExitStack()

    def watched(stage: str, work: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            begun.append(stage)
            if stage == "encode" == name:  # in a thread, beside the loop, which could hear of it
                stack.enter_context(blocked(live))
                threading.Timer(0.2, stack.close).start()
            if stage == name:
                sock.close()
            return work(*given, **named)

        return run

    scheduler = live.engine.llm.scheduler
    with patch.context() as patched:
        patched.setattr(app, "decode", watched("decode", decode))
        patched.setattr(app, "plan_chat", watched("encode", plan_chat))
        patched.setattr(scheduler, "submit", watched("queue", scheduler.submit))
        if name == "sent":
            assert live.ask("/health").status == 200  # the other one is accepted by now
            with blocked(live):
                sock.sendall(chat_request())
                sock.close()
        else:
            sock.sendall(chat_request())
        until(lambda: name == "sent" or name in begun)
        assert live.ask("/health").status == 200
        assert live.idle()
        time.sleep(0.05)
    return begun


@pytest.mark.parametrize(
    ("leaves", "stages"),
    [
        ("sent", []),
        ("decode", ["decode"]),
        ("encode", ["decode", "encode"]),
    ],
)
def test_no_work_is_done_for_a_client_that_left(
    live: Live, leaves: str, stages: list[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    assert leave_at(live, leaves, monkeypatch) == stages
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_gone_clients_leave_the_queue_before_anybody_gets_429(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """Neither who comes, nor another client that waits."""
    with running(
        tiny_bundles("qwen2"), llm={"num_slots": 1, "queue_capacity": 3}
    ) as live, ExitStack() as stack:  # fmt: skip
        live.engine.running.clear()
        answers: list[Any] = []
        scheduler, submitted = live.engine.llm.scheduler, 0
        submit = scheduler.submit

        def counted(*given: Any) -> Any:
            nonlocal submitted
            submitted += 1
            return submit(*given)

        monkeypatch.setattr(scheduler, "submit", counted)

        def alive() -> None:
            answers.append(live.chat(max_tokens=2))

        waits = threading.Thread(target=alive)
        dead = [stack.enter_context(closing(live.connect())) for _ in range(3)]
        dead[0].sendall(chat_request(stream=True))
        until(lambda: scheduler.stats().running == 1)
        waits.start()
        for sock in dead[1:]:
            sock.sendall(chat_request())
        until(lambda: scheduler.stats().waiting == 3)
        comes = [threading.Thread(target=alive) for _ in range(3)]
        with blocked(live):  # so that it cannot have heard of those who leave
            for sock in dead:
                sock.close()
        for thread in comes:
            thread.start()
        until(lambda: submitted == 7)
        live.engine.running.set()
        for thread in (waits, *comes):
            thread.join()
        assert [answer.status for answer in answers] == [200] * 4


def test_a_full_queue_finds_gone_clients_before_the_event_loop_does(tiny_bundles: Bundles):
    with running(
        tiny_bundles("qwen2"), llm={"num_slots": 1, "queue_capacity": 1}
    ) as live, ExitStack() as stack:  # fmt: skip
        live.engine.running.clear()
        for stream in (False, True):
            sock = stack.enter_context(closing(live.connect()))
            sock.sendall(chat_request(stream=stream))
        scheduler = live.engine.llm.scheduler
        until(lambda: scheduler.stats().running + scheduler.stats().waiting == 2)
        refused = live.chat(max_tokens=2)
        assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
        (model,) = live.service.models.models()
        until(lambda: all(flight.receive is not None for flight in model.flights))
        dead = list(model.flights)
        for flight in dead:
            flight.receive._connection = SimpleNamespace(has_left=True)  # type: ignore[union-attr]
        answers: list[Any] = []
        comes = threading.Thread(target=lambda: answers.append(live.chat(max_tokens=2)))
        comes.start()
        until(lambda: all(flight.done.done() for flight in dead))
        live.engine.running.set()
        comes.join()
        assert answers[0].status == 200

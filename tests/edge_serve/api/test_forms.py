"""Forms of answers are compiled one at a time: how many wait, for how long, and for whom."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edge.runtime.ask import Ask
from edge.runtime.structured_output import GrammarCompiler, OutputFormat
from tests.conftest import Bundles
from tests.edge_serve.attacker import post
from tests.edge_serve.scripted import Live, running, until

pytestmark = pytest.mark.live

pytest.importorskip("llguidance")


class Gate:
    """Lets each new form wait before it is compiled."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.begun: list[str] = []
        check = GrammarCompiler._check

        def slow(compiler: GrammarCompiler, kind: Any, grammar: str) -> None:
            self.begun.append(grammar)
            self.open.wait(20)
            check(compiler, kind, grammar)

        patch.setattr(GrammarCompiler, "_check", slow)


@pytest.fixture
def gated(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Live, Gate]]:
    gate = Gate(monkeypatch)
    with running(tiny_bundles("qwen2"), queue_capacity=2) as live:
        assert live.chat(**form("known")).status == 200
        gate.begun.clear()
        gate.open.clear()
        yield live, gate
        gate.open.set()


def form(name: str) -> dict[str, Any]:
    return {"response_format": {"type": "regex", "regex": f"{name}!"}, "max_tokens": 40}


def test_new_forms_wait_in_a_bounded_queue_and_hold_up_no_others(gated: tuple[Live, Gate]):
    live, gate = gated
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(live.chat, **form(f"new{index}")) for index in range(6)]
        until(lambda: sum(each.done() for each in asked) == 3)
        assert live.chat(max_tokens=2).status == 200
        assert live.chat(**form("known")).status == 200
        gate.open.set()
        answers = [each.result() for each in asked]
    assert sorted(answer.status for answer in answers) == [200, 200, 200, 429, 429, 429]
    for answer in answers:
        if answer.status == 429:
            assert answer.json["error"]["code"] == "queue_full"
            assert answer.headers["retry-after"] == "1"


def test_no_form_is_compiled_for_clients_that_left(gated: tuple[Live, Gate]):
    live, gate = gated
    socks = [live.connect() for _ in range(3)]
    for index, sock in enumerate(socks):
        messages = [{"role": "user", "content": "what"}]
        body = {"model": "tiny", "messages": messages, **form(f"left{index}")}
        sock.sendall(post("/v1/chat/completions", json.dumps(body).encode()))
        until(lambda: len(gate.begun) == 1)
    until(lambda: live.service.models.num_flights == 3)
    for sock in socks:
        sock.close()
    until(lambda: live.service.models.num_flights == 0)
    gate.open.set()
    assert live.chat(**form("after")).status == 200
    assert len(gate.begun) == 2  # the one that had begun, and the one after
    assert live.idle()


def test_the_wait_for_a_form_counts_in_the_time_of_a_request(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    gate = Gate(monkeypatch)
    gate.open.clear()
    with running(tiny_bundles("qwen2"), request_timeout_s=3) as live:
        started = time.monotonic()
        late = live.chat(**form("late"))
        assert (late.status, late.json["error"]["code"]) == (504, "deadline_exceeded")
        assert "the form was not compiled within 3 s" in late.json["error"]["message"]
        assert time.monotonic() - started > 2.9
        # What the form leaves of the time is all that the answer has.
        given: list[float] = []
        queue = live.engine.llm.answer

        def spy(ask: Ask, n: int = 1) -> Any:
            assert ask.deadline_s is not None
            given.append(ask.deadline_s)
            return queue(ask, n)

        monkeypatch.setattr(live.engine.llm, "answer", spy)
        gate.open.set()
        live.engine.llm.grammars.compile(OutputFormat("regex", "quick!"))
        gate.open.clear()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(live.chat, **form("slow"))
            time.sleep(1.5)
            gate.open.set()
            asked.result()
        live.chat(**form("quick"))
    assert [left for left in given if left > 1.5] == given[-1:]

"""Scored prompts, ``echo`` with ``logprobs``: what the heartbeat makes of them, and their end."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import Bundles
from tests.edge_serve.scripted import running

pytestmark = pytest.mark.live


def test_scoring_on_a_slow_engine_does_not_count_as_a_stall(tiny_bundles: Bundles):
    """Every step takes less than the limit, and the whole far longer."""
    with running(tiny_bundles("qwen2"), stall_s=1.5) as live:
        ids = [5] * 450
        live.engine.delay_s = 0.007
        body = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 1}
        seen = set()
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(live.ask, "/v1/completions", body)
            while not asked.done():
                seen.add(live.ask("/ready").status)
                time.sleep(0.02)
        assert time.monotonic() - began > 1.5 * 1.5
        assert (asked.result().status, seen) == (200, {200})


def test_an_engine_that_hangs_in_scoring_is_noticed(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2"), stall_s=0.5) as live:
        live.engine.running.clear()
        body = {"model": "tiny", "prompt": "what", "echo": True, "logprobs": 0, "max_tokens": 1}
        answer = live.ask("/v1/completions", body)
        assert (answer.status, answer.json["error"]["code"]) == (503, "engine_stalled")
        assert not live.service.models.is_alive
        live.engine.running.set()
        assert live.idle()


def test_scoring_ends_when_nobody_waits_for_it(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2"), request_timeout_s=0.4) as live:
        ids = [5] * 450
        steps = live.engine.llm.scheduler.stats().steps
        live.engine.delay_s = 0.004
        body = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 1}
        late = live.ask("/v1/completions", body)
        assert (late.status, late.json["error"]["code"]) == (504, "deadline_exceeded")
        data = json.dumps(body).encode()
        with live.connect() as sock:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
            )
            sock.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + data)
            time.sleep(0.1)
        deadline = time.monotonic() + 3
        while live.engine.llm.scheduler.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        stats = live.engine.llm.scheduler.stats()
        assert stats.running == stats.waiting == 0
        assert stats.steps - steps <= 6  # of twice eight


def test_a_prompt_whose_logits_are_nan_gets_no_figures(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2")) as live:
        live.engine.poison = 6
        body = {"model": "tiny", "prompt": [5, 6, 7], "echo": True, "logprobs": 0, "max_tokens": 1}
        answer = live.ask("/v1/completions", body)
        assert (answer.status, answer.json["error"]["code"]) == (500, "engine_error")
        live.engine.poison = None
        assert live.ask("/v1/completions", body).status == 200

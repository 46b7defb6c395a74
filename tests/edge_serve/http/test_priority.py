"""The header ``Priority``: a client may let others go first, and overtake none."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from edge_serve.http.priority import priority_of
from tests.conftest import Bundles, PoolingBundles
from tests.edge_serve.scripted import Live, ScriptedEngine, running


@pytest.mark.parametrize(
    ("headers", "priority"),
    [
        ([], 0),
        (["u=7"], 4),
        (["i, u=5"], 2),
        (["u=4;q=1"], 1),
        (["u=3"], 0),
        (["u=0, i"], 0),  # what browsers send does not overtake
        (["u=7, u=3"], 0),  # the last one counts
        (["u=7", "u=6"], 3),
        (["u=8"], 0),
        (["u=-1"], 0),
        (["u=77"], 0),
        (["u=7.0"], 0),
        (["u"], 0),
        (["U=7"], 0),
        (["unknown=7, ,"], 0),
        (["\xff=\x00"], 0),
    ],
)
def test_an_urgency_above_the_usual_one_is_ignored(headers: list[str], priority: int):
    assert priority_of(headers) == priority


CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi", "store": False},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.live
@pytest.mark.parametrize("path", CALLS)
def test_low_urgency_starts_after_later_requests(tiny_bundles: Bundles, path: str):
    engine = ScriptedEngine()
    engine.delay_s = 0.1  # clients tell in which order they got their answers
    length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {"model": "tiny", "temperature": 0, length: 2, **CALLS[path]}
    with running(tiny_bundles("qwen2"), engine, llm={"num_slots": 1}) as live:
        assert _order(live, engine, path, body) == ["first", "usual", "background"]


@pytest.mark.live
def test_low_urgency_embeddings_wait_too(pooling_bundles: PoolingBundles):
    from edge.runtime.scheduler.scheduler import Scheduler

    seen: list[int] = []
    submit = Scheduler.submit

    def spy(self: Scheduler, requests: Any, sinks: Any) -> Any:
        seen.extend(request.priority for request in requests)
        return submit(self, requests, sinks)

    from tests.edge_serve.api.test_pooling import RealEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "submit", spy)
        with running(pooling_bundles("embed"), RealEngine()) as live:
            for headers in ({}, {"Priority": "u=7"}):
                body = {"model": "tiny", "input": "hello"}
                assert live.ask("/v1/embeddings", body, headers=headers).status == 200
    assert seen == [0, 4]


def _order(live: Live, engine: ScriptedEngine, path: str, body: dict[str, Any]) -> list[str]:
    """In which order three requests end that came while the only slot was taken."""
    engine.running.clear()
    ended: list[str] = []
    threads = []
    for name, headers in (("first", {}), ("background", {"Priority": "u=7"}), ("usual", {})):

        def ask(name: str = name, headers: dict[str, str] = headers) -> None:
            versions = {"anthropic-version": "2023-06-01"}
            answer = live.ask(path, body, headers={**headers, **versions})
            assert answer.status == 200, answer.body
            ended.append(name)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            stats = live.engine.llm.scheduler.stats()
            if stats.running + stats.waiting == len(threads):
                break
            time.sleep(0.005)
    engine.running.set()
    for thread in threads:
        thread.join(15)
    return ended

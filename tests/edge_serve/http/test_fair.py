"""Who counts as one client, and that none takes the engine from others."""

from __future__ import annotations

import ipaddress
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError
from edge.runtime.scheduler.scheduler import Scheduler
from edge_serve.http.access import Origins
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles, PoolingBundles, write_secret
from tests.edge_serve.api.test_pooling import RealEngine
from tests.edge_serve.scripted import Answer, Live, ScriptedEngine, running, until

PROXIES = [ipaddress.ip_network(text) for text in ("10.0.0.2", "192.168.0.0/24", "fd00::/8")]


@pytest.mark.parametrize(
    ("address", "said", "origin"),
    [
        ("10.0.0.2", None, "10.0.0.2"),
        ("10.0.0.2", b"alice in room 7", "alice in room 7"),
        ("192.168.0.9", b"10.1.1.1", "10.1.1.1"),
        ("::ffff:192.168.0.9", b"bob", "bob"),
        ("fd12::1%eth0", b"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("10.0.0.2", b"", "10.0.0.2"),
        ("10.0.0.2", b"a" * 100, "a" * 100),
        ("10.0.0.2", b"a" * 101, "10.0.0.2"),
        ("10.0.0.2", b"a\tb", "10.0.0.2"),
        ("10.0.0.2", "é".encode(), "10.0.0.2"),
    ],
)
def test_a_trusted_proxy_says_whose_request_it_is(address: str, said: bytes | None, origin: str):
    ignored: list[None] = []
    assert Origins(PROXIES, lambda: ignored.append(None)).find(address, said) == origin
    assert not ignored


@pytest.mark.parametrize("address", ["10.0.0.3", "2001:db8::1", "::ffff:10.0.0.3", "", "unix"])
def test_the_header_from_others_is_ignored_and_counted(address: str):
    ignored: list[None] = []
    origins = Origins(PROXIES, lambda: ignored.append(None))
    assert origins.find(address, b"alice") == origins.find(address, None)
    assert len(ignored) == 1


@pytest.mark.parametrize("wrong", ["proxy.example", "10.0.0.1/8", "10.0.0.2,10.0.0.3", ""])
def test_a_proxy_that_is_no_address_is_refused(wrong: str):
    with pytest.raises(ConfigError, match="name addresses or networks"):
        ServerSettings(trusted_proxies=["10.0.0.2", wrong])


def ask(live: Live, path: str, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 2, **fields}
    return live.ask(path, body, headers=headers)


TEXTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}]},
}
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The client of each sequence that the engine was given."""
    found: list[str] = []
    submit = Scheduler.submit

    def spy(self: Scheduler, requests: Any, sinks: Any) -> Any:
        found.extend(request.client for request in requests)
        return submit(self, requests, sinks)

    monkeypatch.setattr(Scheduler, "submit", spy)
    return found


def ignored(live: Live) -> int:
    text = live.ask("/metrics").body.decode()
    (found,) = re.findall(r"^edgellm_ignored_client_headers_total (\d+)", text, re.MULTILINE)
    return int(found)


@pytest.mark.live
@pytest.mark.parametrize("path", TEXTS)
def test_the_engine_is_told_the_address_or_what_a_proxy_says(
    tiny_bundles: Bundles, seen: list[str], path: str
):
    headers = {**VERSION, "X-Edge-Client": "alice"}
    for proxies, client, count in (([], "127.0.0.1", 1), (["127.0.0.0/8"], "alice", 0)):
        seen.clear()
        with running(tiny_bundles("qwen2"), trusted_proxies=proxies) as live:
            assert ask(live, path, headers, **TEXTS[path]).status == 200
            assert ignored(live) == count
        assert seen == [client]


@pytest.mark.live
def test_texts_that_are_embedded_have_a_client_too(
    pooling_bundles: PoolingBundles, seen: list[str]
):
    with running(pooling_bundles("embed"), RealEngine()) as live:
        assert live.ask("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}).status == 200
    assert seen == ["127.0.0.1"] * 2


@pytest.mark.live
@pytest.mark.parametrize(
    ("proxy", "clients"),
    [("127.0.0.1", ["carol"] * 4), ("10.0.0.1", ["alice", "alice", "bob", "bob"])],
)
def test_a_key_identifies_a_client_unless_a_trusted_proxy_names_one(
    tiny_bundles: Bundles, tmp_path: Path, seen: list[str], proxy: str, clients: list[str]
):
    keys = write_secret(
        tmp_path / "keys", "alice:sk-the-first-key-of-two\nbob:sk-the-second-key-of-two\n"
    )
    with running(tiny_bundles("qwen2"), api_key_file=keys, trusted_proxies=[proxy]) as live:
        for key in ("sk-the-first-key-of-two", "sk-the-second-key-of-two"):
            headers = {"Authorization": f"Bearer {key}", "X-Edge-Client": "carol"}
            answer = ask(live, "/v1/completions", headers, prompt="hi", n=2)
            assert answer.status == 200
    assert seen == clients


@pytest.mark.live
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_refuses_the_newest_request_of_the_busiest_client(
    tiny_bundles: Bundles, stream: bool
):
    """One client's requests fill it; another's is answered all the same."""
    engine = ScriptedEngine()
    with running(
        tiny_bundles("qwen2"),
        engine,
        llm={"num_slots": 1, "queue_capacity": 4},
        trusted_proxies=["127.0.0.1"],
    ) as live:
        engine.running.clear()
        answers: dict[str, Answer] = {}

        def send(name: str, client: str, **fields: Any) -> threading.Thread:
            before = waiting()

            def run() -> None:
                headers = {"X-Edge-Client": client}
                answers[name] = ask(live, "/v1/completions", headers, prompt=name, **fields)

            thread = threading.Thread(target=run)
            thread.start()
            until(lambda: waiting() != before)
            return thread

        def waiting() -> int:
            stats = live.engine.llm.scheduler.stats()
            return stats.running + stats.waiting

        threads = [
            send("runs", "many"),
            send("waits", "many", n=2, stream=stream),
            send("goes", "many", n=2, stream=stream),
            send("comes", "one", stream=stream),
        ]
        refused = ask(live, "/v1/completions", {"X-Edge-Client": "many"}, prompt="x", n=3)
        assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
        engine.running.set()
        for thread in threads:
            thread.join(15)
        assert {name: answer.status for name, answer in answers.items()} == {
            "runs": 200, "waits": 200, "goes": 429, "comes": 200,
        }  # fmt: skip
        assert answers["goes"].json["error"]["code"] == "queue_full"
        assert int(answers["goes"].headers["retry-after"]) >= 1
        metrics = live.ask("/metrics").body.decode()
        assert 'edgellm_rejections_total{reason="queue_full"} 2.0' in metrics
        assert 'outcome="error"' not in metrics

"""Several models: by name, by rule, by share, and one put in the place of another under load."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.backends.ort.int8_prompts import int8_bytes
from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError
from edge.runtime.scheduler.request import SchedulerStats
from edge_lab.telemetry import Snapshot
from edge_make.manifest_bytes import encode_manifest
from edge_serve.api.facts import count_tokens, facts_of
from edge_serve.api.protocol import ChatRequest, CompletionRequest
from edge_serve.models.loader import need_bytes
from edge_serve.models.registry import LEAST_STALL_S, MOST_STALL_S, Heartbeat
from edge_serve.models.route import Facts, Rule, Split, read_routes
from edge_serve.run import Service
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles
from tests.edge_serve.scripted import Answer, Live, ScriptedEngine, running, until

# Rules


def test_rules_choose_by_their_comparisons():
    facts, idle = Facts({"m": 500, "n": 9}, "chat", ""), SchedulerStats()
    busy = SchedulerStats(running=4, waiting=9)
    for text, in_idle, in_busy in (
        ("always", True, True),
        ("prompt_tokens<=500", True, True),
        ("prompt_tokens<500", False, False),
        ("kind=chat", True, True),
        ("kind=tools", False, False),
        ("waiting<4", True, False),
        ("prompt_tokens >= 100 & waiting = 0", True, False),
        ("kind=tools | running > 3", False, True),
        ("kind=tools&always|kind=chat&running<9", True, True),
    ):
        rule = Rule("m", text)
        assert rule.holds(facts, idle) is in_idle, text
        assert rule.holds(facts, busy) is in_busy, text
    with pytest.raises(ConfigError, match=r"counts characters, .* write prompt_tokens"):
        Rule("m", "kind=chat&prompt_chars<=500")
    for text in ("", "never", "always|x", "kind=tools&x", "waiting<4\r\nX-Evil: 1", "waiting<٣",
                 "waiting<", "waiting<x", "size<5", "kind=poem", "kind<chat", "&",
                 "waiting<-1", "__class__=1", "waiting<4 and always"):  # fmt: skip
        with pytest.raises(ConfigError, match="auto"):
            Rule("m", text)


def test_the_facts_of_requests():
    def chat(**fields: Any) -> Facts:
        body = {"messages": [{"role": "user", "content": "abcd"}], **fields}
        return facts_of(msgspec.convert(body, ChatRequest), "id-1")

    assert chat() == Facts({}, "chat", "id-1")
    assert chat(user="u").key == "u"
    tool = {"type": "function", "function": {"name": "f"}}
    assert chat(tools=[tool]).kind == "tools"
    assert chat(tools=[tool], tool_choice="none").kind == "chat"
    assert chat(response_format={"type": "json_object"}).kind == "json"
    completion = msgspec.convert({"prompt": [[1, 2], [3]]}, CompletionRequest)
    assert facts_of(completion, "x", {"m": 3}) == Facts({"m": 3}, "completion", "x")


def test_the_largest_number_that_a_rule_compares_tokens_with():
    for text, most in (
        ("always", None),
        ("waiting<9|kind=chat", None),
        ("prompt_tokens<=500", 500),
        ("kind=chat & prompt_tokens < 7 | prompt_tokens>=20&waiting<99", 20),
    ):
        assert Rule("m", text).most_tokens == most


@pytest.mark.slow
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(0, 2**32))
def test_a_split_keeps_its_shares_and_is_stable_per_key(weights: list[int], salt: int):
    shares = tuple((f"m{i}", weight) for i, weight in enumerate(weights))
    split = Split("s", shares)
    keys = [f"{salt}-{i}" for i in range(2000)]
    arms = [split.arm(key) for key in keys]
    assert arms == [split.arm(key) for key in keys]
    counts = Counter(arms)
    for model, weight in shares:
        share = weight / sum(weights)
        # Six standard deviations of a binomial count.
        assert abs(counts[model] - 2000 * share) <= 6 * (2000 * share * (1 - share)) ** 0.5 + 1


def test_invalid_splits_and_rules_are_refused():
    models = {"a": 1, "b": 2}
    for text in ("a", "a:0/b:1", "a:1", "a:1/a:2", "a:x/b:1", "", "a:1/:2"):
        with pytest.raises(ConfigError, match="split"):
            read_routes({}, {"s": text}, models)
    for auto, split in (({"c": "always"}, {}), ({}, {"s": "a:1/c:1"}), ({}, {"a": "a:1/b:1"}),
                        ({}, {"auto": "a:1/b:1"})):  # fmt: skip
        with pytest.raises(ConfigError):
            read_routes(auto, split, models)


def test_a_heartbeat_tells_work_from_idleness():
    now = 0.0
    stats = SchedulerStats()
    beat = Heartbeat(lambda: stats, lambda: now)
    for _ in range(5):  # rest is no silence, however long
        now += 100
        beat.beat()
        assert beat.silent_s == 0
    stats = replace(stats, running=1)
    beat.beat()
    now += 3
    beat.beat()
    assert beat.silent_s == 3
    stats = replace(stats, steps=1)
    beat.beat()
    assert beat.silent_s == 0
    now += 4
    stats = replace(stats, running=0, waiting=1)
    beat.beat()
    assert beat.silent_s == 4
    stats = replace(stats, waiting=0, calls=1)
    beat.beat()
    assert beat.silent_s == 4
    stats = replace(stats, calls=0)
    beat.beat()
    assert beat.silent_s == 0


def test_patience_follows_the_engine():
    stats = SchedulerStats()
    beat = Heartbeat(lambda: stats)
    assert beat.patience_s == MOST_STALL_S  # nobody knows how slow it is
    for full_step_s, patience_s in ((0.02, LEAST_STALL_S), (4.0, 40.0), (60.0, MOST_STALL_S)):
        stats = SchedulerStats(full_step_s=full_step_s)
        beat.beat()
        assert beat.patience_s == pytest.approx(patience_s)


# Two models


class Pair:
    """Two models of the same bundle, which answer with their names."""

    def __init__(self, bundle: Path, **settings: Any) -> None:
        self.engines = {"small": ScriptedEngine(), "big": ScriptedEngine()}
        order = iter(self.engines.items())

        def open_one(path: Path) -> Any:
            name, engine = next(order)
            engine.default = f"I am {name}"
            return engine.open(path, num_slots=2, queue_capacity=16)

        given: dict[str, Any] = {"port": 0, "model": {"small": bundle, "big": bundle}, **settings}
        self.service = Service(ServerSettings(**given), open_one, telemetry=Snapshot)
        self.live = Live(self.service, self.engines["small"])


@pytest.fixture(scope="module")
def pair(tiny_bundles: Bundles) -> Iterator[Pair]:
    pair = Pair(
        tiny_bundles("qwen2"),
        auto={"small": "prompt_tokens<=20&kind=chat&waiting<1", "big": "always"},
        split={"prod": "small:1/big:1"},
        default_model="auto",
        stall_s=5.0,  # a pause of a busy machine is shorter
    )
    thread = threading.Thread(target=lambda: asyncio.run(pair.service.run()))
    thread.start()
    while pair.service.models.is_loading:
        time.sleep(0.01)
    yield pair
    pair.service.stop()
    thread.join(10)
    assert not thread.is_alive()


def who(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    message = answer.json["choices"][0]["message"]
    said = (message.get("reasoning") or "") + (message["content"] or "")
    name = said.removeprefix("I am ")
    assert answer.headers["x-edge-model"] == name == answer.json["model"]
    return name


@pytest.mark.live
def test_a_request_names_its_model(pair: Pair):
    for name in ("small", "big"):
        assert who(pair.live.chat(model=name, temperature=0)) == name
    listed = [model["id"] for model in pair.live.ask("/v1/models").json["data"]]
    assert listed == ["small", "big", "auto", "prod"]
    for name in (*listed, "small:latest"):  # each name that is listed, there or by Ollama's API
        shown = pair.live.ask(f"/v1/models/{name}")
        assert (shown.status, shown.json["id"]) == (200, name.removesuffix(":latest"))
    assert pair.live.ask("/v1/models/other").status == 404
    assert pair.live.chat(model="other").status == 404


@pytest.mark.live
def test_the_list_says_what_a_bundle_takes(pair: Pair, tiny_bundles: Bundles):
    files = [path for path in tiny_bundles("qwen2").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert pair.live.ask("/v1/models/small").json["size_bytes"] == size


@pytest.mark.live
def test_the_list_says_which_models_reason(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    def listed() -> dict[str, bool]:
        cards = pair.live.ask("/v1/models").json["data"]
        return {card["id"]: card["reasons"] for card in cards}

    assert set(listed().values()) == {True}
    monkeypatch.setattr(pair.service.models.entry("small"), "reasons", False)
    assert listed() == {"small": False, "big": True, "auto": False, "prod": False}


@pytest.mark.live
def test_auto_decides_by_the_request_and_the_load(pair: Pair):
    live = pair.live
    short = live.chat("short", model="auto", temperature=0)
    assert who(short) == "small"
    assert short.headers["x-edge-route"] == "prompt_tokens<=20&kind=chat&waiting<1"
    tokenizer = pair.engines["small"].llm.tokenizer
    for text in ("x1" * 40, "\N{CJK UNIFIED IDEOGRAPH-91CF}" * 7, "ab " * 5):
        expected = "small" if len(tokenizer.encode(text)) <= 20 else "big"
        assert who(live.chat(text, model="auto", temperature=0)) == expected
    body = {"messages": [{"role": "user", "content": "default"}], "temperature": 0}
    assert who(live.ask("/v1/chat/completions", body)) == "small"
    small = pair.engines["small"]
    small.running.clear()
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(live.chat, "b", model="small", temperature=0) for _ in range(3)]
        deadline = time.monotonic() + 5
        while small.llm.scheduler.stats().waiting < 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert who(live.chat("short", model="auto", temperature=0)) == "big"
        small.running.set()
        assert [who(item.result()) for item in busy] == ["small"] * 3
    routes = live.ask("/stats").json["routes"]
    assert routes["always"] >= 2


@pytest.mark.timing
def test_a_model_that_is_busy_holds_up_no_prompt_that_another_scores(pair: Pair):
    body = {"prompt": "a", "echo": True, "logprobs": 0, "max_tokens": 1}
    pair.engines["small"].running.clear()
    try:
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(pair.live.ask, "/v1/completions", {"model": "small", **body})
            time.sleep(0.2)
            started = time.monotonic()
            answer = pair.live.ask("/v1/completions", {"model": "big", **body}, timeout_s=10)
            assert (answer.status, held.done()) == (200, False)
            assert time.monotonic() - started < 1
            pair.engines["small"].running.set()
            assert held.result().status == 200
    finally:
        pair.engines["small"].running.set()


@pytest.mark.live
def test_tokens_are_counted_as_far_as_the_rules_look(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    small, big = (pair.service.models.entry(name) for name in ("small", "big"))
    tokenizer = small.tokenizer()
    words, quanta = "some words", "\N{CJK UNIFIED IDEOGRAPH-91CF}" * 4
    expected = len(tokenizer.encode(words)) + len(tokenizer.encode(quanta))
    encoded: list[str] = []
    encode = type(tokenizer).encode

    def counted(self: Any, text: str, **options: Any) -> list[int]:
        encoded.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", counted)

    def count(body: dict[str, Any], kind: Any, limit: int) -> dict[str, int]:
        encoded.clear()
        request = msgspec.convert(body, kind)
        return count_tokens(request, {small: limit, big: 3}, lambda: None)

    parts = [{"type": "text", "text": words}, {"type": "text", "text": quanta}]
    chat = {"messages": [{"role": "user", "content": parts}]}
    assert count(chat, ChatRequest, 100) == {"small": expected, "big": expected}
    assert encoded == [words, quanta]  # both models have the same tokenizer
    long = {"messages": [{"role": "user", "content": "x" * 1_000_000}]}
    assert count(long, ChatRequest, 100)["small"] > 100
    assert encoded == []
    assert count({"prompt": [[1, 2], [3]]}, CompletionRequest, 9)["small"] == 3
    gap = {"prompt": words, "suffix": quanta}
    assert count(gap, CompletionRequest, 100)["small"] == expected
    assert pair.service.models.token_limits("auto") == {small: 20}
    assert pair.service.models.token_limits(None) == {small: 20}  # auto is the default
    assert pair.service.models.token_limits("big") == {}


@pytest.mark.slow
def test_auto_passes_over_a_model_that_hangs(pair: Pair):
    small = pair.engines["small"]
    small.running.clear()
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(pair.live.chat, "x", model="small")
        assert stuck.result(timeout=10).status == 503
        assert who(pair.live.chat("short", model="auto", temperature=0)) == "big"
        small.running.set()
    deadline = time.monotonic() + 5
    while pair.live.ask("/ready").status != 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert who(pair.live.chat("short", model="auto", temperature=0)) == "small"


@pytest.mark.live
def test_a_split_is_the_same_for_the_same_user(pair: Pair):
    arms = {}
    for user in (f"user-{i}" for i in range(12)):
        answers = [pair.live.chat(model="prod", user=user, temperature=0) for _ in range(2)]
        first, second = map(who, answers)
        assert first == second
        assert answers[0].headers["x-edge-arm"] == f"prod:{first}"
        arms[user] = first
    assert set(arms.values()) == {"small", "big"}
    stats = pair.live.ask("/stats").json
    for arm in ("small", "big"):
        asked = 2 * list(arms.values()).count(arm)
        assert stats["arms"][f"prod:{arm}"] == asked
        assert stats["arm_latency"][f"prod:{arm}"]["total_s"]["count"] == asked
    text = pair.live.ask("/metrics").body.decode()
    for name, labels in (("request_seconds_count", ""), ("sequences_total", ',outcome="stop"')):
        (line,) = re.findall(rf'edgellm_ab_{name}{{arm="prod:small"{labels}}} (.*)', text)
        assert float(line) == stats["arms"]["prod:small"]


# One in the place of another


@pytest.fixture
def bundles(tiny_bundles: Bundles, tmp_path: Path) -> dict[str, Path]:
    """The tiny bundle, a copy of another name, and a broken one."""
    made = {}
    for name in ("old", "new", "broken"):
        made[name] = tmp_path / name
        shutil.copytree(tiny_bundles("qwen2"), made[name])
        manifest = msgspec.structs.replace(read_manifest(made[name]), name=name)
        (made[name] / "manifest.json").write_bytes(encode_manifest(manifest))
    with (made["broken"] / "embeddings.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff")
    return made


class Swap:
    """A service whose model ``tiny`` is replaced while requests come in."""

    def __init__(self, live: Live, engines: dict[str, ScriptedEngine]) -> None:
        self.live = live
        self.engines = engines
        self.answers: list[Answer] = []

    def reload(self, bundle: Path) -> None:
        service = self.live.service
        current = service._settings
        service._reread = lambda: replace(current, model={"tiny": bundle})
        assert service._loop is not None
        asyncio.run_coroutine_threadsafe(service.reload(), service._loop).result(30)

    def under_load(self, work: Any) -> None:
        """Call ``work`` while four clients ask one question after the other."""
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                self.answers.append(self.live.chat(temperature=0))

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(ask)
            time.sleep(0.2)
            try:
                work()
                time.sleep(0.2)
            finally:
                stop.set()
        assert [answer.status for answer in self.answers] == [200] * len(self.answers)
        assert len(self.answers) > 8


def swap(bundles: dict[str, Path], **settings: Any) -> Any:
    engines: dict[str, ScriptedEngine] = {}

    class Opener(ScriptedEngine):
        def open(self, bundle: Path, **options: Any) -> Any:
            engine = engines[bundle.name] = ScriptedEngine()
            engine.default = f"I am {bundle.name}"
            engine.delay_s = 0.001
            if bundle.name == "nan":
                engine._random = lambda seen: np.full(320, np.nan, np.float32)
            self.llm = engine.open(bundle, **options)
            return self.llm

    return running(bundles["old"], Opener(), **settings), engines


def said(answer: Answer) -> str:
    message = answer.json["choices"][0]["message"]
    return str((message.get("reasoning") or "") + (message["content"] or ""))


@pytest.mark.live
@pytest.mark.parametrize("budget_mb", [1000, 0])  # beside the old one; in its place
def test_a_model_is_replaced_under_load(bundles: dict[str, Path], budget_mb: int):
    context, engines = swap(bundles, memory_budget_mb=budget_mb)
    with context as live:
        swapped = Swap(live, engines)
        old = live.service.models.get("tiny").llm
        swapped.under_load(lambda: swapped.reload(bundles["new"]))
        words = [said(answer) for answer in swapped.answers]
        assert set(words) == {"I am old", "I am new"}
        assert said(live.chat(temperature=0)) == "I am new"
        deadline = time.monotonic() + 5
        while not engines["old"].backend.closed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engines["old"].backend.closed  # its memory is free again
        assert live.service.models.get("tiny").llm is not old
        swapped.reload(bundles["new"])  # nothing to do
        assert not engines["new"].backend.closed


@pytest.mark.live
@pytest.mark.parametrize("budget_mb", [1000, 0])  # beside the old one; in its place
def test_a_bad_bundle_changes_nothing(
    bundles: dict[str, Path], budget_mb: int, caplog: pytest.LogCaptureFixture
):
    context, engines = swap(bundles, memory_budget_mb=budget_mb)
    with context as live:
        swapped = Swap(live, engines)
        swapped.under_load(lambda: swapped.reload(bundles["broken"]))
        assert {said(answer) for answer in swapped.answers} == {"I am old"}
        assert "embeddings.safetensors" in caplog.text
        for bad in (bundles["old"].parent / "absent", bundles["old"].parent):
            swapped.reload(bad)
            assert said(live.chat(temperature=0)) == "I am old"
        assert live.ask("/ready").status == 200


@pytest.mark.live
def test_a_model_with_nan_logits_is_not_served(bundles: dict[str, Path], tmp_path: Path):
    context, engines = swap(bundles)
    nan = tmp_path / "nan"
    shutil.copytree(bundles["new"], nan)
    with context as live:
        original = ScriptedEngine.open

        def open_nan(self: ScriptedEngine, bundle: Path, **options: Any) -> Any:
            llm = original(self, bundle, **options)
            if bundle.name == "nan":
                size = llm.manifest.model.vocab_size
                self.backend.script = lambda seen: np.full(size, np.nan, np.float32)
            return llm

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScriptedEngine, "open", open_nan)
            swapped = Swap(live, engines)
            swapped.reload(nan)
        assert engines["nan"].backend.closed
        assert said(live.chat(temperature=0)) == "I am old"


@pytest.mark.live
@pytest.mark.parametrize("budget_mb", [1000, 0])  # beside the old one; in its place
@pytest.mark.parametrize("phase", ["open", "generate_ids"])
def test_an_error_of_any_kind_changes_nothing(
    bundles: dict[str, Path], phase: str, budget_mb: int, caplog: pytest.LogCaptureFixture
):
    context, engines = swap(bundles, memory_budget_mb=budget_mb)
    original = ScriptedEngine.open

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    def open_new(self: ScriptedEngine, bundle: Path, **options: Any) -> Any:
        if bundle.name == "new" and phase == "open":
            fail()
        llm = original(self, bundle, **options)
        if bundle.name == "new":
            llm.generate_ids = fail  # type: ignore[method-assign]
        return llm

    with context as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedEngine, "open", open_new)
        swapped = Swap(live, engines)
        swapped.under_load(lambda: swapped.reload(bundles["new"]))
        assert {said(answer) for answer in swapped.answers} == {"I am old"}
        assert said(live.chat(temperature=0)) == "I am old"
        assert live.ask("/ready").status == 200
        assert phase == "open" or engines["new"].backend.closed
        said_so = {r.getMessage(): r.exc_info for r in caplog.records if r.levelname == "ERROR"}
        for line in ("model tiny stays as it is: no room", "nothing more was reloaded"):
            kind, error, traceback = said_so[line] or (None, None, None)
            assert (kind, str(error)) == (MemoryError, "no room")
            assert traceback is not None


@pytest.mark.live
def test_an_old_bundle_that_cannot_be_closed_is_named(
    bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    context, engines = swap(bundles, memory_budget_mb=1000)
    with context as live:
        llm = live.service.models.get("tiny").llm
        close = llm.close

        def fail() -> None:
            close()
            raise MemoryError("no room")

        llm.close = fail
        Swap(live, engines).reload(bundles["new"])
        assert said(live.chat(temperature=0)) == "I am new"
        deadline = time.monotonic() + 5
        while "was not closed" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        (record,) = [r for r in caplog.records if "was not closed" in r.getMessage()]
        assert record.exc_info is not None
        assert record.exc_info[0] is MemoryError


@pytest.mark.live
def test_a_link_that_leads_to_a_bad_bundle_is_survived(bundles: dict[str, Path]):
    link = bundles["old"].parent / "current"
    link.symlink_to("old")
    context, engines = swap({**bundles, "old": link}, memory_budget_mb=0)
    with context as live:
        swapped = Swap(live, engines)
        for target, wanted in (("broken", "old"), ("new", "new"), ("broken", "new")):
            link.unlink()
            link.symlink_to(target)
            swapped.reload(link)
            assert said(live.chat(temperature=0)) == f"I am {wanted}"


def test_two_models_fit_only_if_the_budget_says_so(bundles: dict[str, Path]):
    manifest = read_manifest(bundles["old"])
    size = need_bytes(manifest, 4, 512)
    assert size > sum(file.num_bytes for file in manifest.files.values())
    assert need_bytes(manifest, 8, 512) > size
    assert need_bytes(manifest, 4, 512, "plain", manifest) == 2 * size


@pytest.mark.live
def test_the_budget_counts_a_bundle_that_still_answers(
    bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "edge_serve")
    size = need_bytes(read_manifest(bundles["old"]), 4, 2**15)
    room = {"memory_budget_mb": (2 * size >> 20) + 1, "kv_capacity": 2**15}
    assert size > 1 << 20  # so there is none for a third one
    third = bundles["old"].parent / "third"
    shutil.copytree(bundles["broken"], third)
    shutil.copy(bundles["old"] / "embeddings.safetensors", third)
    context, engines = swap(bundles, stall_s=60, **room)
    with context as live, ThreadPoolExecutor(1) as pool:
        engines["old"].running.clear()
        answer = pool.submit(live.chat, temperature=0)
        until(lambda: live.service.models.num_flights == 1)
        swapped = Swap(live, engines)
        for bundle in (bundles["new"], third):
            swapped.reload(bundle)
        engines["old"].running.set()
        assert said(answer.result()) == "I am old"
        assert said(live.chat(temperature=0)) == "I am third"
    said_so = [text.split(", opened ")[1] for text in caplog.messages if ", opened " in text]
    assert said_so == ["beside the old one", "in its place"]


def test_the_budget_counts_the_weights_of_int8_prompts(tiny_bundles: Bundles):
    manifest = read_manifest(tiny_bundles("qwen2", quant="int4"))
    extra = need_bytes(manifest, 4, 512, "int8") - need_bytes(manifest, 4, 512)
    assert extra == int8_bytes(manifest) > 0


@pytest.mark.live
def test_a_wrong_configuration_changes_nothing(
    bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    context, _ = swap(bundles)
    with context as live:
        service = live.service

        def bad() -> ServerSettings:
            raise ConfigError("config.toml: unknown key 'modle'")

        service._reread = bad
        assert service._loop is not None
        asyncio.run_coroutine_threadsafe(service.reload(), service._loop).result(5)
        assert "unknown key" in caplog.text
        assert live.ask("/ready").status == 200
        assert said(live.chat(temperature=0)) == "I am old"

"""Models that are loaded when they are asked for, and unloaded when they are idle."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.bundle.manifest import read_manifest
from edge.errors import OverloadError
from edge.runtime.llm import LLM
from edge_lab.measure.drift import ROLLOUT_USER, WATCH_USER
from edge_lab.telemetry import Snapshot
from edge_make.manifest_bytes import encode_manifest
from edge_serve.http.errors import APIError
from edge_serve.models import loader
from edge_serve.models.loader import Loader, need_bytes
from edge_serve.run import Service
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles
from tests.edge_serve.scripted import Answer, Live, ScriptedEngine, until

pytestmark = pytest.mark.live

NAMES = ("one", "two", "three")
PLANNED = 2**15
"""Tokens of a slot by the settings, so that the budget in MiB is fine enough; less is opened."""
KEYS = "ann:the-key-of-the-operator\nbob:the-key-of-a-client\n"


@pytest.fixture
def bundles(tiny_bundles: Bundles, tmp_path: Path) -> dict[str, Path]:
    """Copies of a tiny bundle, each with a name of its own."""
    made = {}
    for name in NAMES:
        made[name] = tmp_path / name
        shutil.copytree(tiny_bundles("qwen2"), made[name])
        manifest = msgspec.structs.replace(read_manifest(made[name]), name=name)
        (made[name] / "manifest.json").write_bytes(encode_manifest(manifest))
    return made


class Station:
    """A service of several models; scripted ones answer with their names.

    Attributes:
        engines: by the name of the bundle's directory; none where models are real.
        opened: what was opened, in order.
        refs: every LLM that was opened, as long as something holds it.
    """

    def __init__(self, bundles: dict[str, Path], *, is_real: bool = False, **settings: Any) -> None:
        self.engines = {name: ScriptedEngine() for name in bundles}
        self.opened: list[str] = []
        self.refs: list[weakref.ref[LLM]] = []
        self.gate = threading.Event()
        self.gate.set()

        def opens(path: Path) -> LLM:
            self.opened.append(path.name)
            self.gate.wait(30)
            if is_real:
                llm = LLM(path, num_slots=2, kv_capacity=256, num_threads=1)
            else:
                engine = self.engines[path.name]
                engine.default = f"I am {path.name}"
                llm = engine.open(path, num_slots=2, queue_capacity=16)
            self.refs.append(weakref.ref(llm))
            return llm

        given = {"port": 0, "model": bundles, "num_slots": 2, "kv_capacity": PLANNED, **settings}
        self.service = Service(ServerSettings(**given), opens, telemetry=Snapshot)
        self.live = Live(self.service, next(iter(self.engines.values())))

    def status(self, name: str) -> str:
        found: str = self.live.ask(f"/v1/models/{name}").json["status"]["value"]
        return found

    def ask(self, name: str, **fields: Any) -> Answer:
        return self.live.chat("who", model=name, temperature=0, max_tokens=8, **fields)

    def metric(self, name: str, labels: str) -> float:
        text = self.live.ask("/metrics").body.decode()
        found = re.search(rf"^edgellm_{name}{{{labels}}} (\S+)$", text, re.MULTILINE)
        return 0.0 if found is None else float(found[1])


@contextmanager
def station(bundles: dict[str, Path], **settings: Any) -> Iterator[Station]:
    made = Station(bundles, **settings)
    thread = threading.Thread(target=lambda: asyncio.run(made.service.run()))
    thread.start()
    try:
        until(lambda: not made.service.models.is_loading)
        yield made
    finally:
        made.gate.set()
        for engine in made.engines.values():
            engine.running.set()
        made.service.stop()
        thread.join(15)
        assert not thread.is_alive()


def room_for(bundles: dict[str, Path], number: int) -> int:
    """A budget in MiB that holds so many models and not one more."""
    return (number * need_bytes(read_manifest(bundles["one"]), 2, PLANNED) >> 20) + 1


def engine_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "edge-llm-engine"}


def says(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    message = answer.json["choices"][0]["message"]
    said: str = (message.get("reasoning") or "") + (message["content"] or "")
    return said.removeprefix("I am ")


# Time


def test_an_idle_model_is_unloaded_and_the_next_request_loads_it(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, keep_alive="300ms") as here:
        assert here.status("one") == "loaded"
        assert here.metric("model_loaded", 'model="one"') == 1
        until(lambda: here.status("one") == "unloaded")
        assert here.metric("model_loaded", 'model="one"') == 0
        assert here.metric("model_unloads_total", 'model="one",reason="idle"') == 1
        assert here.live.ask("/ready").status == 200
        assert here.live.ask("/stats").json["models"]["one"]["loaded"] is False
        assert says(here.ask("one")) == "one"
        assert here.metric("model_loads_total", 'model="one",outcome="loaded"') == 1
        assert here.metric("model_load_seconds_count", 'model="one"') == 1
        assert here.opened == ["one", "one"]
        until(lambda: here.status("one") == "unloaded")


def test_a_model_stays_while_it_answers_and_for_its_time_afterwards(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, keep_alive="500ms") as here:
        here.engines["one"].running.clear()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(here.ask, "one")
            time.sleep(1.0)
            assert here.status("one") == "loaded"
            here.engines["one"].running.set()
            assert says(answer.result()) == "one"
        ended = time.monotonic()
        assert here.status("one") == "loaded"
        until(lambda: here.status("one") == "unloaded")
        assert time.monotonic() - ended > 0.3
        assert here.opened == ["one"]


def test_a_model_stays_for_the_requests_that_waited_for_it(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, keep_alive="0") as here:
        until(lambda: here.status("one") == "unloaded")
        for times in range(1, 6):
            here.gate.clear()
            with ThreadPoolExecutor(3) as pool:
                answers = [pool.submit(here.ask, "one") for _ in range(3)]
                until(lambda: here.service._loader._waiting["one"] == 3)
                here.gate.set()
                assert [says(each.result()) for each in answers] == ["one"] * 3
            until(lambda: here.status("one") == "unloaded")
            assert here.opened == ["one"] * (1 + times)


def test_by_default_a_model_stays(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}) as here:
        assert says(here.ask("one")) == "one"
        (model,) = here.live.ask("/api/ps").json["models"]
        assert model["expires_at"].startswith("9999-")
        assert not here.service._loader._timers


def test_a_watch_neither_loads_models_nor_keeps_them_loaded(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, keep_alive="600ms") as here:
        began = time.monotonic()
        while here.status("one") == "loaded":
            assert here.ask("one", user=WATCH_USER).status in (200, 503)
            assert time.monotonic() - began < 10
        refused = here.ask("one", user=WATCH_USER)
        assert (refused.status, refused.json["error"]["code"]) == (503, "model_unloaded")
        assert here.opened == ["one"]
        asked = here.live.ask("/stats").json["asked"]
        assert here.ask("one", user=ROLLOUT_USER).status == 200  # it waits for the new bundle
        assert here.opened == ["one", "one"]
        assert here.live.ask("/stats").json["asked"] == asked


def test_asking_about_a_model_does_not_load_it(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}) as here:
        asked = (
            ("/v1/models", None),
            ("/api/tags", None),
            ("/tokenizer_info?model=one", None),
            ("/api/show", {"model": "one"}),
        )
        before = [here.live.ask(*each).json for each in asked]
        assert here.live.ask("/v1/models/unload", {"model": "one"}).json == {"success": True}
        after = [here.live.ask(*each).json for each in asked]
        assert before[0]["data"][0].pop("status") == {"value": "loaded"}
        assert after[0]["data"][0].pop("status") == {"value": "unloaded"}
        before[2].pop("tokenizer_class"), after[2].pop("tokenizer_class")
        assert after == before
        assert here.live.ask("/health").status == here.live.ask("/ready").status == 200
        assert here.opened == ["one"]


def test_a_replaced_model_does_not_keep_its_successor_awake(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, keep_alive="1s") as here, ThreadPoolExecutor(1) as pool:
        here.engines["two"] = ScriptedEngine()
        here.engines["one"].running.clear()
        answer = pool.submit(here.ask, "one")
        until(lambda: here.service.models.num_flights == 1)
        reload(here, one=bundles["two"])
        here.engines["one"].running.set()
        assert says(answer.result()) == "one"  # which ends after the new one's timer was set
        assert here.status("one") == "loaded"
        until(lambda: here.status("one") == "unloaded")
        assert here.opened == ["one", "two"]


# What clients say


def test_a_request_of_ollamas_form_says_how_long(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}) as here:

        def generate(**fields: Any) -> Any:
            return here.live.ask("/api/generate", {"model": "one", "stream": False, **fields}).json

        assert generate(keep_alive=0)["done_reason"] == "unload"
        assert here.live.ask("/api/ps").json == {"models": []}
        assert generate(keep_alive=0)["done_reason"] == "unload"  # it need not be loaded for that
        assert here.opened == ["one"]
        assert generate(keep_alive="1h")["done_reason"] == "load"
        (model,) = here.live.ask("/api/ps").json["models"]
        at = time.strptime(model["expires_at"][:19], "%Y-%m-%dT%H:%M:%S")
        assert 3500 < time.mktime(at) - time.timezone - time.time() < 3700
        answer = generate(prompt="who", options={"num_predict": 4}, keep_alive=0)
        assert answer["done"]
        assert answer["load_duration"] == 0
        until(lambda: here.status("one") == "unloaded")
        again = generate(prompt="who", options={"num_predict": 4})
        assert 0 < again["load_duration"] < again["total_duration"]
        assert generate(keep_alive="5 minutes")["error"].startswith("keep_alive: write a time")


def test_models_are_loaded_and_unloaded_by_hand(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}) as here:
        load, unload = "/models/load", "/v1/models/unload"
        for _ in range(2):
            assert here.live.ask(unload, {"model": "one"}).json == {"success": True}
            assert here.status("one") == "unloaded"
        for _ in range(2):
            assert here.live.ask(load, {"model": "one:latest"}).json == {"success": True}
            assert here.status("one") == "loaded"
        assert here.opened == ["one", "one"]
        here.engines["one"].running.clear()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(here.ask, "one")
            until(lambda: here.service.models.num_flights == 1)
            busy = here.live.ask(unload, {"model": "one"})
            assert (busy.status, busy.json["error"]["code"]) == (409, "model_busy")
            here.engines["one"].running.set()
            assert says(answer.result()) == "one"
        for path in (load, unload):
            assert here.live.ask(path, {"model": "none"}).status == 404
            assert here.live.ask(path, {}).status == 400
        assert here.live.ask(load, {"model": "one"}, headers={"Sec-Fetch-Site": "cross-site"}).status == 403  # noqa: E501  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-For", "192.0.2.7"),
        ("FORWARDED", "for=192.0.2.7"),
        ("via", "1.1 proxy"),
        ("X-Forwarded-For", ""),
        ("Host", "rebound.example"),
    ],
)
def test_without_keys_who_comes_through_a_proxy_or_a_page_is_not_this_machine(
    bundles: dict[str, Path], name: str, value: str
):
    with station({"one": bundles["one"]}, host="0.0.0.0", allow_open=True) as here:
        refused = here.live.ask("/models/unload", {"model": "one"}, headers={name: value})
        assert (refused.status, refused.json["error"]["code"]) == (403, "not_admin")
        assert here.status("one") == "loaded"
        local = {"Host": "localhost:8000"}
        assert here.live.ask("/models/unload", {"model": "one"}, headers=local).status == 200


def test_a_name_that_stands_for_several_models_is_not_loaded(bundles: dict[str, Path]):
    pair = {name: bundles[name] for name in ("one", "two")}
    names = {"auto": {"one": "kind=json", "two": "always"}, "split": {"half": "two:1/one:1"}}
    with station(pair, **names) as here:
        for path in ("/models/load", "/models/unload"):
            for name, several in (("auto", "one, two"), ("half:latest", "two, one")):
                refused = here.live.ask(path, {"model": name}).json["error"]
                assert (refused["code"], refused["param"]) == ("invalid_value", "model")
                assert refused["message"].endswith(f"name one of them: {several}")
        here.service.models.is_loading = True  # as while they are opened, and not yet known
        assert here.live.ask("/models/load", {"model": "late"}).json["error"]["code"] == "loading"


def test_with_keys_only_those_of_admins_load_and_unload(bundles: dict[str, Path], tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    with station(
        {"one": bundles["one"]}, api_key_file=keys, admin_keys=["ann"], rate_limit_rpm=100
    ) as here:
        ann, bob = ({"authorization": "Bearer " + line.partition(":")[2]} for line in KEYS.split())
        body = {"model": "one"}
        for path, given in (
            ("/models/unload", body),
            ("/models/load", body),
            ("/api/generate", {**body, "keep_alive": 0}),
        ):
            refused = here.live.ask(path, given, headers=bob)
            assert refused.status == 403, path
            assert b"admin_keys" in refused.body
        short = {**body, "prompt": "a", "keep_alive": "1ms", "options": {"num_predict": 1}}
        assert here.live.ask("/api/generate", short, headers=bob).status == 200
        time.sleep(0.3)
        (model,) = here.live.ask("/api/ps", headers=bob).json["models"]
        assert model["expires_at"].startswith("9999-")  # a client's key does not decide that
        assert here.live.ask("/models/unload", body, headers=ann).status == 200
        assert here.live.ask("/api/ps", headers=bob).json == {"models": []}
        assert here.live.ask("/api/generate", body, headers=bob).json["done_reason"] == "load"


# Memory


def test_a_model_beyond_the_budget_starts_unloaded_and_takes_the_place_of_an_idle_one(
    bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    with station(bundles, memory_budget_mb=room_for(bundles, 2)) as here:
        assert [here.status(name) for name in NAMES] == ["loaded", "loaded", "unloaded"]
        assert "model three starts unloaded: it needs" in caplog.text
        assert says(here.ask("one")) == "one"  # so two is idle for longest
        assert says(here.ask("three")) == "three"
        assert [here.status(name) for name in NAMES] == ["loaded", "unloaded", "loaded"]
        assert here.metric("model_unloads_total", 'model="two",reason="room"') == 1


def test_a_busy_model_is_not_unloaded_for_another(bundles: dict[str, Path]):
    pair = {name: bundles[name] for name in ("one", "two")}
    with station(pair, memory_budget_mb=room_for(bundles, 1)) as here:
        here.engines["one"].running.clear()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(here.ask, "one")
            until(lambda: here.service.models.num_flights == 1)
            refused = here.ask("two")
            assert (refused.status, refused.json["error"]["code"]) == (503, "no_room")
            assert re.search(
                r"needs \d+ MiB, .*\(one\); try again", refused.json["error"]["message"]
            )
            assert int(refused.headers["retry-after"]) > 0
            assert here.status("two") == "unloaded"
            here.engines["one"].running.set()
            assert says(answer.result()) == "one"
        assert says(here.ask("two")) == "two"
        assert here.status("one") == "unloaded"


def test_a_request_that_comes_while_room_is_made_keeps_its_model(bundles: dict[str, Path]):
    budget = room_for(bundles, 2)
    with station(bundles, memory_budget_mb=budget) as here, ThreadPoolExecutor(2) as pool:
        here.service._loader.peak_bytes = lambda *_: budget << 20  # type: ignore[method-assign]
        begun, goes_on = threading.Event(), threading.Event()
        llm = here.service.models.get("one").llm
        close = llm.close

        def close_slowly() -> None:
            begun.set()
            goes_on.wait(20)
            close()

        llm.close = close_slowly  # type: ignore[method-assign]
        here.engines["two"].running.clear()
        third = pool.submit(here.ask, "three")
        assert begun.wait(10)
        second = pool.submit(here.ask, "two")
        until(lambda: here.service.models.num_flights == 1)
        goes_on.set()
        refused = third.result()
        assert (refused.status, refused.json["error"]["code"]) == (503, "no_room")
        assert "(two); try again" in refused.json["error"]["message"]
        here.engines["two"].running.set()
        assert says(second.result()) == "two"
        assert here.opened == ["one", "two"]


def test_a_replaced_model_that_still_answers_gives_no_room(bundles: dict[str, Path]):
    budget = room_for(bundles, 2)
    pair = {name: bundles[name] for name in ("one", "two")}
    with station(pair, memory_budget_mb=budget) as here, ThreadPoolExecutor(1) as pool:
        assert here.live.ask("/models/unload", {"model": "two"}).status == 200
        here.engines["three"] = ScriptedEngine()
        here.engines["one"].running.clear()
        answer = pool.submit(here.ask, "one")
        until(lambda: here.service.models.num_flights == 1)
        reload(here, one=bundles["three"])
        here.service._loader.peak_bytes = lambda *_: budget << 20  # type: ignore[method-assign]
        assert here.ask("two").json["error"]["code"] == "no_room"
        assert here.status("one") == "loaded"  # nothing is unloaded where that would not do
        here.engines["one"].running.set()
        assert says(answer.result()) == "one"
        until(lambda: here.ask("two").status == 200)


def test_a_new_bundle_is_opened_beside_the_old_one_only_where_its_opening_fits(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "edge_serve")
    need = need_bytes(read_manifest(bundles["one"]), 2, PLANNED)
    with station({"one": bundles["one"]}) as here:
        here.engines["two"] = ScriptedEngine()
        here.service._loader._room_bytes = lambda: 2 * need
        monkeypatch.setattr(loader, "opening_bytes", lambda *_: 3 * need)
        reload(here, one=bundles["two"])
        assert says(here.ask("one")) == "two"
    assert ", opened in its place" in caplog.text


def test_one_model_is_loaded_whatever_the_budget(bundles: dict[str, Path]):
    pair = {name: bundles[name] for name in ("one", "two")}
    with station(pair, memory_budget_mb=0) as here:
        for name in ("two", "one", "two"):
            assert says(here.ask(name)) == name
            assert [here.status(each) for each in pair].count("loaded") == 1


# Failures


def test_a_load_that_fails_says_why_and_is_tried_again(bundles: dict[str, Path]):
    table = bundles["two"] / "embeddings.safetensors"
    good = table.read_bytes()
    pair = {name: bundles[name] for name in ("one", "two")}
    with station(pair, memory_budget_mb=room_for(bundles, 1)) as here:
        table.write_bytes(good[:200] + b"\xff\xff" + good[202:])
        failed = here.ask("two")
        assert (failed.status, failed.json["error"]["code"]) == (503, "load_failed")
        assert "is damaged" in failed.json["error"]["message"]
        assert str(bundles["two"].parent) not in failed.body.decode()
        assert here.status("two") == "failed"
        (card,) = [c for c in here.live.ask("/v1/models").json["data"] if c["id"] == "two"]
        assert "is damaged" in card["status"]["failed"]
        assert str(bundles["two"].parent) not in card["status"]["failed"]
        assert here.live.ask("/ready").status == 200
        opened = len(here.opened)
        assert here.ask("two").status == 503  # too early for another try
        assert len(here.opened) == opened
        table.write_bytes(good)
        until(lambda: here.ask("two").status == 200)
        assert here.status("two") == "loaded"
        assert here.metric("model_loads_total", 'model="two",outcome="error"') >= 1


def test_a_model_that_has_failed_takes_no_others_place_again(bundles: dict[str, Path]):
    pair = {name: bundles[name] for name in ("one", "two")}
    with station(pair, memory_budget_mb=room_for(bundles, 1)) as here:
        table, aside = bundles["two"] / "embeddings.safetensors", bundles["two"] / "aside"
        table.rename(aside)
        assert here.ask("two").json["error"]["code"] == "load_failed"
        assert says(here.ask("one")) == "one"
        here.service.models.entry("two").retry_s = time.monotonic()
        refused = here.ask("two").json["error"]
        assert refused["code"] == "load_failed"
        assert "for 10 minutes no other model is unloaded for it" in refused["message"]
        assert here.status("one") == "loaded"
        assert here.opened == ["one", "two", "one"]
        here.service.models.entry("two").retry_s = time.monotonic() - 600
        assert here.ask("two").json["error"]["code"] == "load_failed"
        assert says(here.ask("one")) == "one"
        assert here.opened == ["one", "two", "one", "two", "one"]
        aside.rename(table)
        assert here.live.ask("/models/load", {"model": "two"}).status == 200  # by hand it does
        assert says(here.ask("one")) == "one"
        assert says(here.ask("two")) == "two"


def test_where_the_old_bundle_does_not_open_again_either_the_next_request_tries_it(
    bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    with station({"one": bundles["one"]}, memory_budget_mb=0) as here:
        table, aside = bundles["one"] / "embeddings.safetensors", bundles["one"] / "aside"
        table.rename(aside)
        (bundles["three"] / "embeddings.safetensors").unlink()
        here.engines["three"] = ScriptedEngine()
        reload(here, one=bundles["three"])
        assert here.status("one") == "unloaded"
        assert "model one is not loaded any more" in caplog.text
        assert "model one stays as it is" not in caplog.text
        aside.rename(table)
        assert says(here.ask("one")) == "one"
        assert here.service.models.open_models() == here.service.models.models()


def test_the_wait_between_tries_doubles_up_to_a_minute(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}) as here:
        assert here.live.ask("/models/unload", {"model": "one"}).status == 200
        (bundles["one"] / "embeddings.safetensors").unlink()
        waits = []
        for _ in range(8):  # by hand it is tried at once
            failed = here.live.ask("/models/load", {"model": "one"})
            assert failed.json["error"]["code"] == "load_failed"
            waits.append(int(failed.headers["retry-after"]))
        assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_auto_passes_over_a_model_that_cannot_be_loaded(bundles: dict[str, Path]):
    pair = {name: bundles[name] for name in ("one", "two")}
    auto = {"two": "prompt_tokens<=100", "one": "always"}
    with station(pair, memory_budget_mb=room_for(bundles, 1), auto=auto) as here:
        (bundles["two"] / "embeddings.safetensors").rename(bundles["two"] / "aside")
        answer = here.ask("auto")
        assert says(answer) == "one"
        assert answer.headers["x-edge-route"] == "always"
        (bundles["two"] / "aside").rename(bundles["two"] / "embeddings.safetensors")
        assert here.live.ask("/models/load", {"model": "two"}).status == 200
        answer = here.ask("auto")
        assert (says(answer), answer.headers["x-edge-route"]) == ("two", "prompt_tokens<=100")
        # A rule that counts tokens does so without the engine.
        until(lambda: says(here.ask("one")) == "one")
        assert here.status("two") == "unloaded"
        long = here.live.chat("word " * 50, model="auto", temperature=0, max_tokens=8)
        assert says(long) == "one"
        assert here.status("two") == "unloaded"


# Other parts of the service


def reload(here: Station, **models: Path) -> None:
    service = here.service
    service._reread = lambda: replace(service._settings, model=models)
    assert service._loop is not None
    asyncio.run_coroutine_threadsafe(service.reload(), service._loop).result(30)


def test_a_new_bundle_of_an_unloaded_model_has_to_answer_first(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}) as here:
        here.engines |= {"two": ScriptedEngine(), "three": ScriptedEngine()}
        assert here.live.ask("/models/unload", {"model": "one"}).status == 200
        (bundles["three"] / "embeddings.safetensors").unlink()
        reload(here, one=bundles["three"])
        assert here.status("one") == "unloaded"
        assert here.service.models.entry("one").bundle == bundles["one"]
        reload(here, one=bundles["two"])
        assert here.status("one") == "loaded"
        assert says(here.ask("one")) == "two"
        reload(here, one=bundles["two"])  # nothing has changed
        assert here.opened == ["one", "three", "two"]


def test_a_stop_does_not_wait_for_a_model_that_is_loaded(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, request_timeout_s=60.0) as here:
        assert here.live.ask("/models/unload", {"model": "one"}).status == 200
        here.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(here.ask, "one")
            until(lambda: here.status("one") == "loading")
            here.service.stop()
            refused = answer.result(timeout=5)
        assert (refused.status, refused.json["error"]["code"]) == (503, "draining")


@pytest.mark.parametrize("act", ["load", "unload", "reload"])
def test_waiting_changes_of_models_do_not_begin_after_a_stop(bundles: dict[str, Path], act: str):
    with station({"one": bundles["one"]}) as here, ThreadPoolExecutor(1) as pool:
        if act == "load":
            assert here.live.ask("/models/unload", {"model": "one"}).status == 200
        here.engines["two"] = ScriptedEngine()
        service, lock = here.service, here.service._loader.lock
        assert service._loop is not None
        asyncio.run_coroutine_threadsafe(lock.acquire(), service._loop).result(5)
        if act == "reload":
            waits: Any = pool.submit(reload, here, one=bundles["two"])
        else:
            waits = pool.submit(here.live.ask, f"/models/{act}", {"model": "one"})
        until(lambda: bool(lock._waiters))
        service.stop()
        until(lambda: service.models.is_draining)
        service._loop.call_soon_threadsafe(lock.release)
        answer = waits.result(10)
        if act != "reload":
            assert (answer.status, answer.json["error"]["code"]) == (503, "draining")
    assert here.opened == ["one"]
    assert (service.models.entry("one").served is None) is (act == "load")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "who"}]}),
        ("/tokenize", {"prompt": "who"}),
        ("/models/load", {}),
    ],
)
def test_nobody_waits_for_a_load_once_the_client_has_left(
    bundles: dict[str, Path], path: str, fields: dict[str, Any]
):
    with station({"one": bundles["one"]}) as here:
        assert here.live.ask("/models/unload", {"model": "one"}).status == 200
        here.gate.clear()
        body = json.dumps({"model": "one", **fields})
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with here.live.connect() as sock:
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: here.service._loader._waiting["one"] == 1)
        until(lambda: here.service._loader._waiting["one"] == 0)
        assert here.status("one") == "loading"
        here.gate.set()
        until(lambda: here.status("one") == "loaded")


def test_no_more_requests_wait_for_a_load_than_for_their_turn(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, queue_capacity=1) as here, ThreadPoolExecutor(1) as pool:
        assert here.live.ask("/models/unload", {"model": "one"}).status == 200
        here.gate.clear()
        waits = pool.submit(here.ask, "one")
        until(lambda: here.service._loader._waiting["one"] == 1)
        refused = here.ask("one")
        assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        here.gate.set()
        assert says(waits.result()) == "one"


def test_a_request_waits_for_a_load_as_long_as_it_may_take(bundles: dict[str, Path]):
    with station({"one": bundles["one"]}, request_timeout_s=0.5) as here:
        assert here.live.ask("/models/unload", {"model": "one"}).status == 200
        here.gate.clear()
        late = here.ask("one")
        assert (late.status, late.json["error"]["code"]) == (504, "deadline_exceeded")
        here.service._loader._settings = replace(here.service._settings, request_timeout_s=60.0)
        entry, asked_s = here.service.models.entry("one"), time.monotonic() - 60
        waited_before = here.service._loader.load_for(entry, asked_s)  # e.g. for another model
        assert here.service._loop is not None
        with pytest.raises(APIError, match="was not loaded in the time"):
            asyncio.run_coroutine_threadsafe(waited_before, here.service._loop).result(5)
        here.gate.set()
        until(lambda: here.status("one") == "loaded")


def test_a_background_response_keeps_its_model(bundles: dict[str, Path], tmp_path: Path):
    with station(
        {"one": bundles["one"]}, keep_alive="200ms", responses_dir=tmp_path / "kept"
    ) as here:
        here.engines["one"].running.clear()
        body = {"model": "one", "input": "who", "background": True, "max_output_tokens": 8}
        begun = here.live.ask("/v1/responses", body).json
        time.sleep(0.8)
        assert here.status("one") == "loaded"
        here.engines["one"].running.set()
        until(lambda: here.status("one") == "unloaded")
        assert here.live.ask(f"/v1/responses/{begun['id']}").json["status"] != "in_progress"
        assert here.opened == ["one"]


def test_a_response_that_goes_on_after_a_restart_waits_where_too_many_do(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with station({"one": bundles["one"]}, responses_dir=tmp_path / "first") as here:
        here.engines["one"].running.clear()
        body = {"model": "one", "input": "who", "background": True, "max_output_tokens": 8}
        path = f"/v1/responses/{here.live.ask('/v1/responses', body).json['id']}"
        shutil.copytree(tmp_path / "first", tmp_path / "second")  # as a kill leaves it
    refusals, load_for = [OverloadError("too many requests wait")], Loader.load_for

    async def refuse_once(self: Loader, *args: Any) -> None:
        if refusals:
            raise refusals.pop()
        await load_for(self, *args)

    monkeypatch.setattr(Loader, "load_for", refuse_once)
    pair = {name: bundles[name] for name in ("two", "one")}
    budget = room_for(bundles, 1)
    with station(pair, memory_budget_mb=budget, responses_dir=tmp_path / "second") as here:
        ended = ("completed", "incomplete", "failed")
        until(lambda: here.live.ask(path).json["status"] in ended)
        assert here.live.ask(path).json["status"] == "completed"
        assert not refusals


@pytest.mark.slow
def test_no_request_is_lost_and_nothing_leaks_while_models_come_and_go(bundles: dict[str, Path]):
    """Real engines; requests, loads and unloads in any order, from eight clients."""
    before = engine_threads()
    with station(bundles, is_real=True, memory_budget_mb=room_for(bundles, 1)) as here:
        answered: list[str] = []

        def ask(path: str, body: dict[str, Any]) -> Answer:
            """Ask again as long as the answer says so, as clients do."""
            deadline = time.monotonic() + 60
            while (got := here.live.ask(path, body)).status != 200:
                said = got.body.decode()
                assert "raise memory_budget_mb" in said or "requests run on" in said, said
                assert time.monotonic() < deadline, said
                time.sleep(0.01)
            answered.append(path)
            return got

        def client(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                name, kind = chance.choice(NAMES), chance.random()
                if kind < 0.7:
                    stay = chance.choice([0, "10ms", -1])
                    body = {"model": name, "prompt": "a", "stream": False, "keep_alive": stay}
                    got = ask("/api/generate", {**body, "options": {"num_predict": 3}})
                    assert got.json["eval_count"] == 3
                else:
                    ask(f"/models/{chance.choice(['load', 'unload'])}", {"model": name})

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(client, seed) for seed in range(8)]:
                done.result(120)
        assert len(answered) == 200
        for name in NAMES:
            while here.live.ask("/models/unload", {"model": name}).status != 200:
                time.sleep(0.01)  # the last request of a name may still end
        assert here.service.models.open_models() == []
        assert engine_threads() <= before

        def all_gone() -> bool:
            gc.collect()
            return all(ref() is None for ref in here.refs)

        until(all_gone)  # the thread that closed the last one may still end
        assert len(here.opened) > 10

"""A batch as a whole: by a server, in this process, and after every kind of end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge.engine_config import EngineConfig
from edge.errors import BackendError, ConfigError, OverloadError
from edge.runtime.llm import LLM
from edge_serve import run as server_run
from edge_serve.batch import BatchResult, run_batch
from edge_serve.batch.run import ATTEMPTS
from tests.command_line import Result, edge_llm, error_line  # noqa: F401
from tests.conftest import Bundles, PoolingBundles, require_even_rows, write_secret
from tests.edge_serve.batch.stub import Stub, read_rows, stub, write_requests
from tests.edge_serve.scripted import ScriptedEngine, running
from tests.ports import free_port

pytestmark = pytest.mark.live

CHAT = [{"role": "user", "content": "hello"}]


def run(tmp_path: Path, bodies: list[Any], server: Stub, **options: Any) -> BatchResult:
    source = tmp_path / "in.jsonl"
    if not source.exists():
        write_requests(source, bodies)
    return run_batch(source, tmp_path / "out.jsonl", url=server.url, **options)


def answers(tmp_path: Path) -> dict[str, Any]:
    rows = read_rows(tmp_path / "out.jsonl")
    found = {row["custom_id"]: row for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def failures(tmp_path: Path) -> dict[str, Any]:
    return {row["custom_id"]: row for row in read_rows(tmp_path / "out.errors.jsonl")}


# ------------------------------------------------------------------------------- by a server


def test_every_row_is_asked_once_and_with_its_own_body(tmp_path: Path):
    seen: list[tuple[float, float]] = []

    def progress(step: str, done: float, total: float, *_: str) -> None:
        if step == "batch":
            seen.append((done, total))

    with stub(0.05) as server:
        bodies = [{"n": i, "text": "é\u2028"} for i in range(28)]
        result = run(tmp_path, bodies, server, concurrency=7, progress=progress)
        assert server.most == 7
        assert server.headers["priority"] == "u=7"
        assert set(server.seen.values()) == {1}
    assert result == BatchResult(28, 28, 0)
    assert seen == [(i, 28) for i in range(29)]
    found = answers(tmp_path)
    assert [found[f"row-{i}"]["response"]["body"]["echo"] for i in range(28)] == bodies
    assert found["row-0"]["response"]["status_code"] == 200
    assert found["row-0"]["response"]["request_id"] == "req_1"
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_a_server_that_falls_silent_on_a_connection_it_has_used_is_asked_again(tmp_path: Path):
    """As one that lost its power: most rows go over a connection that had an answer before."""
    with stub() as server:
        bodies = [{"n": 0}, {"n": 1, "waits_s": [2.0]}]
        result = run(tmp_path, bodies, server, concurrency=1, timeout_s=1)
        assert server.seen.total() == 3
    assert result == BatchResult(2, 2, 0)


@pytest.mark.parametrize("ends", [1, 9])
def test_a_row_that_ends_its_connection_comes_no_oftener_where_that_was_used_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int
):
    monkeypatch.setattr("edge_serve.batch.run._FIRST_WAIT_S", 0.001)
    with stub() as server:
        result = run(tmp_path, [{"n": 0}, {"first": [0] * ends}], server, concurrency=1)
        assert sorted(server.seen.values()) == [1, min(ends + 1, ATTEMPTS)]
    assert result.failed == (ends >= ATTEMPTS)


def test_a_connection_that_was_closed_meanwhile_is_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_serve.batch.run._FIRST_WAIT_S", 0.001)
    with stub() as server:
        server.idle_s = 0.3
        body = {"first": [429, *[0] * (ATTEMPTS - 1)], "retry_after": 1}
        assert run(tmp_path, [body], server, concurrency=1) == BatchResult(1, 1, 0)
        assert server.seen.total() == 1 + ATTEMPTS


def test_a_finished_batch_asks_nothing_and_failed_rows_come_again_without_their_file(
    tmp_path: Path,
):
    with stub() as server:
        bodies = [{"n": 0}, {"n": 1, "first": [400]}, {"n": 2}]
        assert run(tmp_path, bodies, server) == BatchResult(3, 2, 1)
        failed = failures(tmp_path)["row-1"]
        assert failed["response"]["status_code"] == 400
        assert failed["error"] is None
        assert run(tmp_path, bodies, server) == BatchResult(3, 2, 1)
        assert sum(server.seen.values()) == 3
        (tmp_path / "out.errors.jsonl").unlink()
        assert run(tmp_path, bodies, server) == BatchResult(3, 3, 0)
        assert sum(server.seen.values()) == 4


@pytest.mark.parametrize(
    ("body", "tries", "outcome"),
    [
        ({"first": [429, 503], "retry_after": 0}, 3, 200),
        ({"first": [500, 502, 504, 0]}, ATTEMPTS, 200),
        ({"first": [-1]}, 2, 200),
        ({"first": [500] * 9}, ATTEMPTS, 500),
        ({"first": [0] * 9}, ATTEMPTS, "no_answer"),
        ({"then": 404}, 1, 404),
        ({"then": 301}, 1, 301),
        ({"raw": "<html>", "then": 413}, 1, 413),
        ({"raw": "no JSON"}, 1, "invalid_answer"),
        ({"raw": "[" * 50_000}, 1, "invalid_answer"),
    ],
)
def test_temporary_errors_are_retried_and_final_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: Any, tries: int, outcome: int | str
):
    monkeypatch.setattr("edge_serve.batch.run._FIRST_WAIT_S", 0.001)
    with stub() as server:
        run(tmp_path, [body], server)
        assert sum(server.seen.values()) == tries
    if outcome == 200:
        assert set(answers(tmp_path)) == {"row-0"}
        return
    failed = failures(tmp_path)["row-0"]
    if isinstance(outcome, int):
        assert failed["response"]["status_code"] == outcome
    else:
        assert failed["response"] is None
        assert failed["error"]["code"] == outcome


def test_an_answer_reaches_the_disk_while_others_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_serve.batch.run._SYNC_S", 0.1)
    real, rows = os.fdatasync, []

    def sync(descriptor: int) -> None:
        rows.append(len(read_rows(tmp_path / "out.jsonl")))
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    with stub() as server:
        run(tmp_path, [{"n": 0}, {"wait_s": 1.5}], server, concurrency=2)
    assert rows == [1, 2]


def test_retry_after_is_waited_out(tmp_path: Path):
    with stub() as server:
        began = time.monotonic()
        run(tmp_path, [{"first": [429], "retry_after": 1}], server)
        assert time.monotonic() - began >= 1


def test_a_server_that_is_gone_is_waited_for_and_then_given_up(tmp_path: Path):
    with stub() as server:
        with pytest.raises(OverloadError, match="0 of 2 rows are done, and the same command goes"):
            run(tmp_path, [{"n": 0, "then": 503}, {"n": 1, "then": 503}], server, wait_s=0.3)
        url = server.url
    with pytest.raises(OverloadError, match=r"for 0\.2 s \(cannot connect"):
        run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", url=url, wait_s=0.2)
    assert read_rows(tmp_path / "out.jsonl") == []


def test_a_long_answer_says_that_the_server_is_there(tmp_path: Path):
    """One row takes longer than the patience, and another hears meanwhile that there is no room."""
    with stub() as server:
        bodies = [{"wait_s": 1.5}, {"first": [429] * 4, "retry_after": 0.2}]
        result = run(tmp_path, bodies, server, wait_s=0.4, concurrency=2)
    assert result.answered == 2


def test_attempts_that_take_longer_than_the_patience_end_with_their_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_serve.batch.run._FIRST_WAIT_S", 0.001)
    with stub() as server:
        bodies = [{"n": 1}, {"n": 2, "then": 504, "wait_s": 0.5}]
        result = run(tmp_path, bodies, server, wait_s=0.6, concurrency=1)
        assert sorted(server.seen.values()) == [1, ATTEMPTS]
    assert result == BatchResult(2, 1, 1)
    assert failures(tmp_path)["row-1"]["response"]["status_code"] == 504


def test_keys_and_addresses_that_are_wrong_end_it_at_once(tmp_path: Path):
    write_requests(tmp_path / "in.jsonl", [{"n": 0}])
    with stub() as server:
        server.key = "secret"
        with pytest.raises(ConfigError, match="does not take the key"):
            run(tmp_path, [], server, api_key="wrong")
        assert run(tmp_path, [], server, api_key="secret").answered == 1
        server.models_status = 404
        with pytest.raises(ConfigError, match="answered 404; give --url"):
            run(tmp_path, [], server)
    for url in ("localhost:1", "ftp://x", "http://", "http://u:p@h", "http://h:x", "http://h/?a"):
        with pytest.raises(ConfigError, match="no address of a server"):
            run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", url=url)


@pytest.mark.parametrize("path", ["/b\u00fccher/v1", "/my server"])
def test_a_path_that_cannot_be_sent_is_refused_at_once(tmp_path: Path, path: str):
    source = write_requests(tmp_path / "in.jsonl", [{"n": 0}], "/v1/completions")
    with stub() as server, pytest.raises(ConfigError, match="a space or a character beyond ASCII"):
        run_batch(source, tmp_path / "out.jsonl", url=server.url + path)


def test_a_url_with_a_path_keeps_it_and_v1_may_be_there_or_not(tmp_path: Path):
    source = write_requests(tmp_path / "in.jsonl", [{"n": 0}], "/v1/completions")
    with stub() as server:
        run_batch(source, tmp_path / "out.jsonl", url=server.url + "/v1/")
    assert answers(tmp_path)["row-0"]["response"]["body"]["path"] == "/v1/completions"


def test_exclusive_options_are_refused(tmp_path: Path):
    source, output = write_requests(tmp_path / "in.jsonl", [{}]), tmp_path / "out.jsonl"
    for options in (
        {},
        {"url": "http://x", "models": {"a": tmp_path}},
        {"models": {"a": tmp_path}, "api_key": "x"},
        {"url": "http://x", "engine": EngineConfig()},
        {"url": "http://x", "concurrency": 0},
        {"url": "http://x", "wait_s": float("nan")},
        {"url": "http://x", "errors": output},
        {"url": "http://x", "errors": source},
    ):
        with pytest.raises(ConfigError):
            run_batch(source, output, **options)
    assert not output.exists()


def test_an_edge_server_is_kept_busy_to_its_slots_and_others_go_first(
    tmp_path: Path, tiny_bundles: Bundles
):
    source = write_requests(
        tmp_path / "in.jsonl", [{"model": "tiny", "messages": CHAT, "max_tokens": 2}] * 12
    )
    engine = ScriptedEngine()
    with running(tiny_bundles("qwen2"), engine, llm={"num_slots": 2}) as live:
        engine.running.clear()

        def there() -> int:
            stats = engine.llm.scheduler.stats()
            return stats.running + stats.waiting

        with ThreadPoolExecutor(2) as pool:
            try:
                batch = pool.submit(run_batch, source, tmp_path / "out.jsonl", url=live.url)
                _until(lambda: there() == 3)
                mine = pool.submit(live.chat, "now", max_tokens=1)
                _until(lambda: there() == 4)
            finally:
                engine.running.set()
            assert mine.result().status == 200
            rows = (tmp_path / "out.jsonl").read_bytes().count(b"\n")
            assert batch.result().answered == 12
    assert rows <= 5  # those that ran, and a few in the chat's own time


def _until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------------------------------------------------------------------------------- in this process


def test_answers_here_are_those_of_the_server(tmp_path: Path, tiny_bundles: Bundles):
    """Every field is honoured or refused as the server does it, down to the words of the error."""
    require_even_rows()
    bundle = tiny_bundles("qwen2")
    chat = {"messages": CHAT, "max_tokens": 12, "seed": 3}
    asked: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"model": "tiny", **chat}),
        ("/v1/chat/completions", {**chat, "n": 3, "temperature": 1.5, "logprobs": True}),
        ("/v1/chat/completions", {**chat, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {**chat, "stop": ["a"], "top_logprobs": 99}),
        ("/v1/chat/completions", {**chat, "nonsense": 1}),
        ("/v1/chat/completions", {"messages": CHAT * 400}),
        ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 5, "echo": True, "seed": 1}),
        ("/v1/completions", {"prompt": "x", "model": "gpt-9"}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 4, "temperature": 0}),
        ("/v1/responses", {"input": "hi", "top_logprobs": 2}),
        ("/v1/embeddings", {"input": "x"}),
    ]
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(
            json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body}) + "\n"
            for i, (url, body) in enumerate(asked)
        )
    )
    engine = EngineConfig(backend="ort-cpu", num_threads=1, deterministic=True)
    result = run_batch(source, tmp_path / "out.jsonl", models={"tiny": bundle}, engine=engine)
    found = {**answers(tmp_path), **failures(tmp_path)}
    assert (result.rows, len(found)) == (len(asked), len(asked))
    settings: dict[str, Any] = {"default_model": "tiny", "backend": "ort-cpu"}

    class Deterministic(ScriptedEngine):
        def open(self, bundle: Path, **_: Any) -> LLM:
            self.llm = LLM(bundle, engine)
            return self.llm

    with running(bundle, Deterministic(), **settings) as live:
        for i, (url, body) in enumerate(asked):
            direct, row = live.ask(url, body), found[str(i)]["response"]
            assert row["status_code"] == direct.status, (url, body, row)
            assert _lasting(row["body"]) == _lasting(direct.json)
    statuses = [found[str(i)]["response"]["status_code"] for i in range(len(asked))]
    assert statuses == [200, 200, 200, 400, 400, 400, 200, 404, 200, 400, 400]


def _lasting(value: Any) -> Any:
    """An answer without what is new each time."""
    if isinstance(value, list):
        return [_lasting(each) for each in value]
    if isinstance(value, dict):
        # A batch's own answers are not stored.
        passing = {"id", "created", "created_at", "completed_at", "cached_tokens", "store"}
        return {key: _lasting(each) for key, each in value.items() if key not in passing}
    return value


@pytest.mark.parametrize("where", ["here", "server"])
def test_rows_vote_and_end_their_thoughts(
    where: str, tmp_path: Path, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    engine, bundle = ScriptedEngine(), tiny_bundles("qwen2")
    engine.default = "They say so. " * 9 + "\n\n" + "so " * 20 + "</think>\n\nIt is 4."
    body = {"messages": CHAT, "max_tokens": 200, "temperature": 1, "top_p": 0.01, "seed": 3}
    bodies = [
        {**body, "vote": {"first": 2, "most": 4, "error": 0.15}},
        {**body, "stop_when_sure": 0.9},
        {**body, "vote": {"most": 4}, "temperature": 0},
    ]
    source, output = write_requests(tmp_path / "in.jsonl", bodies), tmp_path / "out.jsonl"
    if where == "here":
        open_llm = partial(engine.open, num_slots=4)
        monkeypatch.setattr(server_run, "open_llm", lambda _: open_llm)
        result = run_batch(source, output, models={"tiny": bundle})
    else:
        with running(bundle, engine, default_model="tiny") as live:
            result = run_batch(source, output, url=live.url)
    assert result == BatchResult(3, 2, 1)
    message = answers(tmp_path)["row-0"]["response"]["body"]["choices"][0]["message"]
    assert message["content"] == "It is 4."
    assert (message["vote"]["answer"], message["vote"]["agreed"]) == ("4", 2)
    assert engine.llm.stop_counts.total() > 0
    error = failures(tmp_path)["row-2"]["response"]["body"]["error"]
    assert "at temperature 0 all samples are the same" in error["message"]


def test_texts_are_embedded_here(tmp_path: Path, pooling_bundles: PoolingBundles):
    bundle = pooling_bundles("embed")
    source = write_requests(tmp_path / "in.jsonl", [{"input": "hello"}], "/v1/embeddings")
    run_batch(source, tmp_path / "out.jsonl", models={"tiny": bundle})
    (item,) = answers(tmp_path)["row-0"]["response"]["body"]["data"]
    with LLM(bundle) as llm:
        assert item["embedding"] == pytest.approx(llm.embed("hello")[0].tolist(), abs=1e-6)


def test_an_answer_here_has_the_time_that_was_given(
    tmp_path: Path, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_serve.batch.run.ATTEMPTS", 1)
    source = write_requests(tmp_path / "in.jsonl", [{"messages": CHAT, "max_tokens": 2}])
    models = {"tiny": tiny_bundles("qwen2")}
    late = run_batch(source, tmp_path / "out.jsonl", models=models, timeout_s=1e-9)
    assert late == BatchResult(1, 0, 1)
    error = failures(tmp_path)["row-0"]["response"]["body"]["error"]
    assert error["code"] == "deadline_exceeded"


def test_an_engine_that_fails_for_good_ends_it_and_what_is_done_stays(
    tmp_path: Path, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    engine = ScriptedEngine()
    engine.default = "hello"
    monkeypatch.setattr(server_run, "open_llm", lambda _: lambda path: engine.open(path))
    source = write_requests(
        tmp_path / "in.jsonl", [{"messages": CHAT, "seed": i} for i in range(6)]
    )
    output, bundle = tmp_path / "out.jsonl", tiny_bundles("qwen2")

    def break_it(step: str, done: float, *_: Any) -> None:
        if step == "batch" and done == 3:
            engine.backend.failed = "it burnt"

    with pytest.raises(BackendError, match="can serve no more"):
        run_batch(source, output, models={"tiny": bundle}, progress=break_it, concurrency=1)
    assert len(answers(tmp_path)) == 3
    assert run_batch(source, output, models={"tiny": bundle}) == BatchResult(6, 6, 0)


# ------------------------------------------------------------------------------- kills

DRIVER = (
    "import sys; from edge_serve.batch import run_batch; run_batch(*sys.argv[1:3], url=sys.argv[3])"
)


def test_a_batch_resumes_after_a_kill_anywhere(tmp_path: Path):
    count, output = 150, tmp_path / "out.jsonl"
    bodies = [{"n": i} if i % 10 else {"n": i, "then": 400} for i in range(count)]
    source = write_requests(tmp_path / "in.jsonl", bodies)
    rng = random.Random(21)
    with stub(0.004) as server:
        kills = 0
        while kills < 4:
            driver = subprocess.Popen([sys.executable, "-c", DRIVER, source, output, server.url])
            before = sum(server.seen.values())
            goal = before + rng.randrange(1, 30)
            while sum(server.seen.values()) < goal and driver.poll() is None:
                time.sleep(0.002)
            driver.kill()
            kills += driver.wait() == -signal.SIGKILL
        assert run(tmp_path, bodies, server).rows == count
        asked = sum(server.seen.values())
    good, bad = answers(tmp_path), failures(tmp_path)
    assert len(read_rows(tmp_path / "out.errors.jsonl")) == len(bad) == count // 10
    assert {**good, **bad}.keys() == {f"row-{i}" for i in range(count)}
    assert asked <= count + 4 * 5  # what was under way at a kill, and no more, came again


def test_a_server_that_is_killed_is_waited_for_and_loses_no_row(tmp_path: Path):
    port = free_port()

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.edge_serve.batch.stub", str(port), "0.01"]
        return subprocess.Popen(command)

    source = write_requests(tmp_path / "in.jsonl", [{"n": i} for i in range(120)])
    output = tmp_path / "out.jsonl"
    server = start()
    try:
        with ThreadPoolExecutor(1) as pool:
            url = f"http://127.0.0.1:{port}"
            batch = pool.submit(run_batch, source, output, url=url, wait_s=60)
            for goal in (20, 60):
                while not output.exists() or output.read_bytes().count(b"\n") < goal:
                    assert not batch.done()
                    time.sleep(0.005)
                server.kill()
                server.wait()
                time.sleep(0.2)
                server = start()
            assert batch.result(60) == BatchResult(120, 120, 0)
    finally:
        server.kill()
        server.wait()
    assert len(answers(tmp_path)) == 120


@pytest.mark.timing
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_says_how_to_go_on(tmp_path: Path, number: int):
    source = write_requests(tmp_path / "in.jsonl", [{"n": i, "wait_s": 0.02} for i in range(400)])
    output = tmp_path / "out.jsonl"
    with stub() as server:
        driver = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "batch", source, "-o", output, "--url", server.url],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EDGE_LLM_TRACEBACK": "1"},
        )
        _until(lambda: output.exists() and output.stat().st_size > 0)
        driver.send_signal(number)
        began = time.monotonic()
        _, said = driver.communicate(timeout=20)
        assert time.monotonic() - began < 5
    assert driver.returncode == 130, said
    assert "stopped with" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert 0 < len(answers(tmp_path)) < 400


# ------------------------------------------------------------------------------- the verb


def test_the_verb_reports_bad_lines_and_ends_with_three(
    tmp_path: Path,
    edge_llm: Callable[..., Result],  # noqa: F811
):
    source = write_requests(tmp_path / "in.jsonl", [{"n": 0}, {"n": 1}])
    with source.open("a") as file:
        file.write("nonsense\n")
    output, keys = (
        tmp_path / "out.jsonl",
        write_secret(tmp_path / "keys", "me:a-long-enough-secret\n"),
    )
    with stub() as server:
        server.key = "a-long-enough-secret"
        args = ("batch", source, "-o", output, "--url", server.url, "--api-key-file", keys)
        result = edge_llm(*args)
        assert result.code == 3, result.err
        errors = tmp_path / "out.errors.jsonl"
        said = f"2 of 3 rows answered in {output}; 1 failed, with why in {errors}"
        assert said in result.err
        (failed,) = read_rows(errors)
        assert failed["error"]["code"] == "invalid_json_line"
        assert failed["error"]["line"] == 3
        assert Counter(server.seen.values()) == {1: 2}
    wrong = edge_llm("batch", source, "-o", output)
    assert "give one of them" in error_line(wrong, 64)
    wrong = edge_llm("batch", source, "-o", output, "--url", "http://x", "--model", tmp_path)
    assert "leave one of them out" in error_line(wrong, 64)
    wrong = edge_llm("batch", source, "-o", output, "--url", "http://x", "--num-slots", "2")
    assert "--num-slots belongs to --model" in error_line(wrong, 64)
    for option in (("--wait-s", "600"), ("--api-key-file", keys)):
        wrong = edge_llm("batch", source, "-o", output, "--model", tmp_path, *option)
        assert f"{option[0]} belongs to --url" in error_line(wrong, 64)
    wrong = edge_llm("batch", tmp_path / "none", "-o", output, "--url", "http://127.0.0.1:1")
    assert "cannot read" in error_line(wrong, 65)

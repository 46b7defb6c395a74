"""What a watch sees, what it calls an alarm, and the verb on a tiny bundle and on a server."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import EXIT_GATE_MISSED, BackendError, ConfigError
from edge_lab.cli.watch import watch
from edge_lab.measure.defaults import GOLDEN_SET
from edge_lab.measure.drift import GRIDS, WATCH_USER, Counts
from edge_lab.measure.watch import (
    Baseline,
    GoldenItem,
    ItemResult,
    ModelAnswer,
    compare_runs,
    is_loop,
    is_match,
    is_refusal,
    read_baseline,
    read_golden,
    run_golden,
    write_baseline,
)
from edge_lab.measure.watch_server import ServerAnswerer, read_api_key
from edge_make.key_file import hashed_line
from tests.conftest import Bundles, write_secret

KEY = "a-long-enough-key-of-a-test"


# --------------------------------------------------------------------------- judging an answer


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("Paris", "Paris", True),
        ("The capital of France is **Paris**.", "Paris", True),
        ("It could be Paris.\nBut the capital is Lyon.", "Paris", False),
        ("Parisian", "Paris", False),
        ("17 + 25 = 42", "42", True),
        ("42 is not it, it is 43", "42", False),
        ("\\boxed{42}", "42", True),
        ("4,200", "4200", True),
        ("0.90", "0.9", True),
        ("forty-two", "42", False),
        ("stone blue", "stone blue", True),
        ("stone, then blue", "stone blue", False),
        ("", "Paris", False),
        ("…", "Paris", False),
        ("STRASSE", "straße", True),
        ("中国的首都是北京。", "北京", True),
        ("北京", "北京", True),
        ("可能是北京。\n不对，是南京。", "北京", False),
        ("北方的京城", "北京", False),
        ("一共有 15 支。", "15", True),
    ],
)
def test_matches(answer: str, expected: str, right: bool):
    assert is_match(answer, expected) is right


REFUSING = (
    "can't write that for you",
    "cannot write explicit content",
    "can't give you instructions for that",
    "cannot share that information",
    "can't tell you how",
    "cannot recommend doing this",
    "cannot offer medical advice",
    "can't access the internet",
    "will not write that",
    "cannot disclose it",
    "can't continue this conversation",
    "cannot help you",
)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no opinion.", True),
        ("I cannot do this.", True),
        ("I’m unable to say.", True),
        ("You can sharpen it with a stone.", False),
        ("A sorry sight.", False),
        ("x" * 400 + " I cannot do this.", False),
        ("I can't really help you.", True),
        ("I won't be able to answer.", True),
        ("I cannot fulfill your request.", True),
        *((f"I {words}.", True) for words in REFUSING),
        ("Sure! I won't use recursion here: def f", False),
        ("I cannot overstate how good this is.", False),
        ("I can't help but smile. I can't think of an answer that is shorter.", False),
        ("抱歉，我无法回答这个问题。", True),
        ("抱歉，该问题涉及隐私，暂时不能提供。", True),
        ("您好，这个问题我暂时无法回答，让我们换个话题再聊聊吧。", True),
        ("对不起，作为一个人工智能语言模型，我不能提供。", True),
        ("作为一个 AI 助手，我没有个人观点。", True),
        ("没有阳光，植物就无法提供氧气。", False),
        ("很抱歉，我周三不能参加会议，能改到周五吗？", False),
        ("机器学习作为人工智能的一个分支，不能只靠规则。", False),
        ("作为AI助手，我可以不断学习，很高兴回答：北京。", False),
        ("让我们来看：湖是静止的水，河是流动的水。", False),
    ],
)
def test_refusals(answer: str, refused: bool):
    assert is_refusal(answer) is refused


@given(st.text(min_size=1, max_size=30), st.integers(4, 12))
def test_a_repeated_piece_is_a_loop(piece: str, times: int):
    text = "Once upon a time. " + piece * max(times, 160 // len(piece) + 4)
    assert is_loop(text)


def test_texts_without_a_loop():
    assert not is_loop("")
    assert not is_loop("-" * 100)  # a rule of a table
    assert not is_loop(" ".join(str(number) for number in range(500)))
    assert not is_loop("the same sentence again and again. " * 3)
    assert not is_loop("loop " * 100 + "and then it ended well, as all things must.")


def test_a_loop_counts_only_where_the_answer_never_ended():
    class Looping:
        def __init__(self, reason: str) -> None:
            self.reason = reason

        def answer(self, prompt: str, max_tokens: int) -> ModelAnswer:
            return ModelAnswer("again " * 80, "", max_tokens, self.reason)

    items = [GoldenItem("a", "x"), GoldenItem("b", "y", answer="again")]
    assert run_golden(Looping("length"), items, 7) == (
        ItemResult("a", None, refused=False, looped=True, tokens=7),
        ItemResult("b", True, refused=False, looped=True, tokens=7),
    )
    assert not any(result.looped for result in run_golden(Looping("stop"), items))


# --------------------------------------------------------------------------- comparing runs


def a_run(correct: Sequence[bool | None], **changes: Any) -> Baseline:
    items = tuple(
        ItemResult(str(at), right, refused=False, looped=False, tokens=10)
        for at, right in enumerate(correct)
    )
    run = Baseline("r1", "hash", 64, items, perplexity=10.0, text_sha256="t", text_tokens=99)
    return msgspec.structs.replace(run, **changes)


def alarms(now: Baseline, before: Baseline) -> list[str]:
    return [check.name for check in compare_runs(now, before) if check.alarm]


def test_the_same_run_is_no_alarm():
    run = a_run([True, False, None] * 20)
    assert alarms(run, run) == []


def test_lost_answers_are_an_alarm_only_beyond_chance():
    before = a_run([True] * 40 + [None] * 8)
    assert alarms(a_run([False] * 5 + [True] * 35 + [None] * 8), before) == []  # p = 0.0625
    lost = a_run([False] * 6 + [True] * 34 + [None] * 8)  # p = 0.03125
    assert alarms(lost, before) == ["wrong_rate"]
    (check,) = [check for check in compare_runs(lost, before) if check.name == "wrong_rate"]
    assert check.flips == tuple("012345")
    assert check.p_value == pytest.approx(2 / 2**6)
    assert check.value == pytest.approx(6 / 40)
    assert alarms(before, lost) == []  # better is no alarm


def test_lost_and_won_cancel():
    before = a_run([True] * 8 + [False] * 8)
    assert alarms(a_run([False] * 8 + [True] * 8), before) == []


@pytest.mark.parametrize("kind", ["refused", "looped"])
def test_refusals_and_loops(kind: str):
    before = a_run([None] * 30)
    bad = [msgspec.structs.replace(item, **{kind: at < 7}) for at, item in enumerate(before.items)]
    assert alarms(msgspec.structs.replace(before, items=tuple(bad)), before) == [f"{kind}_rate"]


def test_a_few_answers_that_ramble_are_no_change_of_length():
    before = a_run([True] * 20)
    items = [
        msgspec.structs.replace(item, tokens=256) if at < 2 else item
        for at, item in enumerate(before.items)
    ]
    assert alarms(msgspec.structs.replace(before, items=tuple(items)), before) == []


def test_length_and_perplexity():
    before = a_run([True] * 10)
    longer = [msgspec.structs.replace(item, tokens=16) for item in before.items]
    shorter = [msgspec.structs.replace(item, tokens=6) for item in before.items]
    for items in (longer, shorter):
        changed = msgspec.structs.replace(before, items=tuple(items))
        assert alarms(changed, before) == ["answer_tokens"]
    assert alarms(a_run([True] * 10, perplexity=10.3), before) == ["perplexity"]
    assert alarms(a_run([True] * 10, perplexity=10.1), before) == []
    assert alarms(a_run([True] * 10, perplexity=None), before) == []  # through a server


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"golden_sha256": "other"}, "another golden set"),
        ({"max_tokens": 65}, "--max-tokens"),
        ({"thinking": True}, "--thinking"),
        ({"text_sha256": "other"}, "of another text"),
        ({"text_tokens": 1}, "of another text"),
    ],
)
def test_runs_that_asked_something_else_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        compare_runs(a_run([True], **change), a_run([True]))


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_where_json_lines_do(end: str, tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    rows = [{"id": name, "prompt": "a\u2028b\x85c", "answer": "1"} for name in ("one", "two")]
    path.write_text(end.join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    items, _ = read_golden(path)
    assert [(item.id, item.prompt) for item in items] == [(r["id"], r["prompt"]) for r in rows]


def test_the_golden_set_that_comes_along():
    items, _ = read_golden(GOLDEN_SET)
    assert len(items) == 62
    assert sum(item.answer is not None for item in items) == 52
    assert sum(item.id.startswith("zh-") for item in items) == 8
    # Every expected answer matches itself, so none is out of reach by its form.
    assert [i.id for i in items if i.answer is not None and not is_match(i.answer, i.answer)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ('{"id": "a"}\n', "line 1: .*prompt"),
        ('{"id": "a", "prompt": "x", "anwser": "y"}\n', "line 1: .*anwser"),
        ('{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}\n', "line 3: the id 'a'"),
        ('{"id": "a", "prompt": "  "}\n', "the prompt is empty"),
        ("[]\n", "line 1"),
    ],
)
def test_a_wrong_golden_set_is_refused(text: str, message: str, tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_golden(path)


def test_a_baseline_survives_its_file(tmp_path: Path):
    path = tmp_path / "baseline.json"
    run = a_run([True, None, False])
    write_baseline(path, run)
    assert read_baseline(path) == run
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ConfigError, match="has version 2"):
        read_baseline(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is no baseline"):
        read_baseline(path)
    with pytest.raises(ConfigError, match="record one with --record"):
        read_baseline(tmp_path / "none.json")


# --------------------------------------------------------------------------- a server


class Stub(HTTPServer):
    """Answers every prompt with ``reply``, and its counters on ``/stats``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Any = {
            "choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 3},
        }
        self.counts = Counts()
        self.bodies: list[dict[str, Any]] = []
        self.while_asked: Callable[[], None] = lambda: None
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._send({"asked": msgspec.to_builtins(self.server.counts)})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append(json.loads(body) | {"key": self.headers["authorization"]})
        self.server.while_asked()
        self._send(self.server.reply)

    def _send(self, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("location", "/elsewhere")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def _serving() -> Iterator[Stub]:
    stub = Stub()
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        thread.join()
        stub.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with _serving() as server:
        yield server


@pytest.mark.live
def test_a_server_is_asked_at_temperature_0(stub: Stub):
    answerer = ServerAnswerer(stub.url, api_key=KEY, model="r1")
    assert answerer.answer("Where?", 9) == ModelAnswer("Paris", "", 3, "stop")
    assert stub.bodies == [
        {
            "messages": [{"role": "user", "content": "Where?"}],
            "temperature": 0,
            "max_tokens": 9,
            "enable_thinking": False,
            "user": "edge-llm-watch",
            "model": "r1",
            "key": f"Bearer {KEY}",
        }
    ]


@pytest.mark.live
@pytest.mark.parametrize(
    ("status", "error"),
    [(401, ConfigError), (404, ConfigError), (429, BackendError), (503, BackendError)],
)
def test_a_refusal_is_printed(status: int, error: type[Exception], stub: Stub):
    stub.status, stub.reply = status, b"no\n"
    with pytest.raises(error, match=f"answered {status}: no"):
        ServerAnswerer(stub.url).answer("Where?", 9)


@pytest.mark.live
def test_a_redirect_is_not_followed(stub: Stub):
    stub.status = 302
    with pytest.raises(ConfigError, match="answered 302"):
        ServerAnswerer(stub.url, api_key=KEY).answer("Where?", 9)


@pytest.mark.live
@pytest.mark.parametrize("reply", [b"", b"no JSON", {}, {"choices": []}, [1], {"choices": 3}])
def test_an_answer_of_another_form_is_refused(reply: Any, stub: Stub):
    stub.reply = reply
    with pytest.raises(BackendError):
        ServerAnswerer(stub.url).answer("Where?", 9)


@pytest.mark.live
def test_no_server_and_no_address():
    with _serving() as stub:
        url = stub.url
    with pytest.raises(BackendError, match="is the service running there"):
        ServerAnswerer(url, timeout_s=2).answer("Where?", 9)
    for wrong in ("127.0.0.1:8000", "file:///etc/passwd", "http://"):
        with pytest.raises(ConfigError, match="is no address of a server"):
            ServerAnswerer(wrong)


@pytest.mark.live
def test_the_proxy_of_the_environment_is_not_asked(stub: Stub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ServerAnswerer(stub.url).answer("Where?", 9).text == "Paris"


def test_the_first_key_of_a_file_that_can_be_sent(tmp_path: Path):
    path = tmp_path / "keys"
    hashed = hashed_line("first", "a-key-of-another-one")
    write_secret(path, f"# comment\n\n{hashed}\nlocal:{KEY}\nother:the-key-of-another\n")
    assert read_api_key(path) == KEY
    write_secret(path, f"{hashed}\n")
    with pytest.raises(ConfigError, match=r"only hashes .* add a key for it as NAME:KEY"):
        read_api_key(path)


# --------------------------------------------------------------------------- the verb


def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(watch, [*map(str, arguments), "--json"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    code = result.return_value
    assert isinstance(code, int)
    return code, json.loads(result.stdout)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden.jsonl"
    lines = [{"id": str(at), "prompt": f"Say {at}.", "answer": str(at)} for at in range(8)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_a_bundle_against_itself_and_against_a_better_past(
    tiny_bundles: Bundles, golden: Path, tmp_path: Path
):
    bundle, baseline = tiny_bundles("qwen2"), tmp_path / "baseline.json"
    common = ("--golden", golden, "--max-tokens", "6", "--text-tokens", "64")
    code, found = run(bundle, "--baseline", baseline, "--record", *common)
    assert code == 0
    assert found["notes"] == [f"recorded 8 answers in {baseline}"]
    metrics = tmp_path / "edge.prom"
    code, found = run(bundle, "--baseline", baseline, *common, "--textfile", metrics)
    assert code == 0
    assert found["alarms"] == []
    figures = {check["name"]: check for check in found["checks"]}
    assert figures["perplexity"]["value"] == figures["perplexity"]["baseline"] > 1
    # The past could answer all of it, briefly.
    past = read_baseline(baseline)
    assert past.perplexity is not None
    better = [msgspec.structs.replace(item, correct=True, tokens=1) for item in past.items]
    write_baseline(
        baseline,
        msgspec.structs.replace(past, items=tuple(better), perplexity=past.perplexity / 2),
    )
    code, found = run(bundle, "--baseline", baseline, *common, "--textfile", metrics)
    assert code == EXIT_GATE_MISSED
    assert found["alarms"] == ["wrong_rate", "answer_tokens", "perplexity"]
    assert [f"remove {baseline};" in note for note in found["notes"]] == [True]
    parser = pytest.importorskip("prometheus_client.parser")
    families = {f.name: f for f in parser.text_string_to_metric_families(metrics.read_text())}
    alarm = {s.labels["check"]: s.value for s in families["edgellm_watch_alarm"].samples}
    assert alarm["perplexity"] == alarm["wrong_rate"] == 1
    assert alarm["refused_rate"] == 0
    assert "edgellm_watch_timestamp_seconds" in families


@pytest.mark.usefixtures("slow_clock")
@pytest.mark.parametrize("against", [False, True])
def test_the_verb_prints_lines_without_a_terminal(
    tiny_bundles: Bundles, golden: Path, tmp_path: Path, against: bool
):
    bundle = tiny_bundles("qwen2")
    what = ("--against", bundle) if against else ("--baseline", tmp_path / "b.json", "--record")
    options = ("--golden", golden, "--max-tokens", "2", "--text-tokens", "64", "--json")
    result = CliRunner().invoke(watch, [str(word) for word in (bundle, *what, *options)])
    assert len(result.stdout.splitlines()) == 1
    lines = result.stderr.splitlines()
    asked = f"{bundle.name}: ask" if against else "ask"
    for step in (f"{bundle.name}: open", f"{asked}: 100 % (8 of 8 prompts)", "score: 100 %"):
        assert any(line.startswith(step) for line in lines), lines
    assert any(" so far, about " in line for line in lines)


def test_two_bundles(tiny_bundles: Bundles, golden: Path):
    common = ("--golden", golden, "--max-tokens", "4", "--text-tokens", "200")
    code, found = run(tiny_bundles("qwen2"), "--against", tiny_bundles("qwen2"), *common)
    assert code == 0
    figures = {check["name"]: check for check in found["checks"]}
    assert figures["perplexity"]["value"] == figures["perplexity"]["baseline"]
    assert found["notes"] == ["ratio of the perplexities: 95 % interval 1.0000 to 1.0000"]
    _, found = run(tiny_bundles("qwen2", quant="int4"), "--against", tiny_bundles("qwen2"), *common)
    figures = {check["name"]: check for check in found["checks"]}
    assert figures["perplexity"]["value"] != figures["perplexity"]["baseline"]
    assert figures["wrong_rate"]["p_value"] is not None


@pytest.mark.live
def test_missing_baselines_are_recorded_once(stub: Stub, golden: Path, tmp_path: Path):
    baseline, traffic, state = (tmp_path / name for name in ("b.json", "t.json", "s.json"))
    keys = tmp_path / "keys"
    write_secret(keys, f"local:{KEY}\n")
    arguments = (
        *("--server", stub.url, "--api-key-file", keys, "--golden", golden, "--record-missing"),
        *("--baseline", baseline, "--traffic", traffic, "--state", state, "--text-tokens", "0"),
    )
    code, found = run(*arguments)
    assert code == 0
    assert found["notes"] == [
        f"recorded 8 answers in {baseline}",
        "0 new requests; 50 are needed",
    ]
    assert not traffic.exists()  # not enough of it yet
    random = np.random.default_rng(0)

    def requests(number: int, temperature: float) -> None:
        for length in random.lognormal(5, 1, number):
            values: dict[str, float | None] = dict.fromkeys(GRIDS, 1.0)
            stub.counts.add(values | {"temperature": temperature, "prompt_tokens": length})

    requests(300, 0.6)
    code, found = run(*arguments)
    assert (code, found["alarms"]) == (0, [])
    assert found["notes"] == [f"recorded 300 requests in {traffic}"]
    requests(200, 0.6)
    code, found = run(*arguments)
    assert (code, found["alarms"]) == (0, [])
    assert found["requests"] == 200  # new ones only
    stub.while_asked = lambda: requests(1, 0.6)
    requests(22, 0.6)
    _, found = run(*arguments)
    assert found["notes"] == ["22 new requests; 50 are needed"]
    stub.while_asked = lambda: None
    requests(200, 1.3)
    code, found = run(*arguments)
    assert code == EXIT_GATE_MISSED
    assert found["alarms"] == ["drift of temperature"]
    assert [f"remove {traffic};" in note for note in found["notes"]] == [True]
    assert found["requests"] == 230  # those that were too few alone are not lost
    stub.counts = Counts()  # the server began anew
    requests(100, 0.6)
    code, found = run(*arguments)
    assert (code, found["requests"]) == (0, 100)
    assert stub.bodies[0]["key"] == f"Bearer {KEY}"
    # Eight questions each time, which a server does not count as a client's.
    assert [body["user"] for body in stub.bodies] == [WATCH_USER] * 8 * 6
    state.write_text("{]")
    with pytest.raises(ConfigError, match="is no state of a watch"):
        run(*arguments)


@pytest.mark.live
def test_files_are_looked_at_before_anything_is_asked(stub: Stub, golden: Path, tmp_path: Path):
    baseline, missing = tmp_path / "b.json", tmp_path / "missing" / "file"
    server = ("--server", stub.url, "--golden", golden, "--text-tokens", "0")
    (tmp_path / "damaged").write_text("{]")
    for arguments, message in (
        (("--baseline", missing, "--record"), "--baseline .* cannot be written: .*missing is no"),
        (("--baseline", baseline, "--record", "--textfile", missing), "--textfile .* cannot be"),
        (("--baseline", baseline), "cannot read the baseline"),
        (("--baseline", tmp_path / "damaged"), "is no baseline"),
        (("--baseline", baseline, "--record-missing", "--traffic", tmp_path / "damaged"), "counts"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(*server, *arguments)
    assert not stub.bodies


@pytest.mark.live
@pytest.mark.parametrize("option", ["--baseline", "--traffic", "--state"])
def test_a_closed_directory_is_refused_before_anything_is_asked(
    option: str, stub: Stub, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Closed to root, too, who runs the tests."""
    closed, stat = tmp_path / "closed", Path.stat

    def look(path: Path, **options: Any) -> Any:
        if closed in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", look)
    files = {"--baseline": tmp_path / "b", "--traffic": tmp_path / "t", "--state": tmp_path / "s"}
    files[option] = closed / "file"
    arguments = [word for pair in files.items() for word in pair]
    with pytest.raises(ConfigError, match=f"{option} .* cannot be written"):
        run("--server", stub.url, "--golden", golden, "--record-missing", *arguments)
    assert not stub.bodies


@pytest.mark.live
def test_a_changed_golden_set_is_reported_and_traffic_still_compared(
    stub: Stub, golden: Path, tmp_path: Path
):
    """As after an update that brings another golden set."""
    baseline, traffic, state = (tmp_path / name for name in ("b.json", "t.json", "s.json"))
    asked = ("--server", stub.url, "--golden", golden, "--text-tokens", "0")
    run(*asked, "--baseline", baseline, "--record")
    usual = Counts()
    for counts, temperature in ((usual, 0.6), (stub.counts, 1.3)):
        for _ in range(200):
            counts.add(dict.fromkeys(GRIDS, 1.0) | {"temperature": temperature})
    traffic.write_bytes(msgspec.json.encode(usual))
    watched = (*asked, "--baseline", baseline, "--traffic", traffic, "--state", state)
    lines = golden.read_text().split("\n")
    for changed in ([*lines, ""], lines[1:], lines[::-1], []):
        stub.bodies.clear()
        state.unlink(missing_ok=True)
        golden.write_text("\n".join(changed))
        done = CliRunner().invoke(watch, [*map(str, watched), "--json"], standalone_mode=False)
        assert isinstance(done.exception, ConfigError)
        found = json.loads(done.stdout)
        assert (found["alarms"], found["requests"]) == (["drift of temperature"], 200)
        assert not stub.bodies
        assert state.exists()
    golden.write_text("\n".join(lines))
    for more in (("--max-tokens", "7"), ("--thinking",)):
        with pytest.raises(ConfigError, match="another golden set, --max-tokens or --thinking"):
            run(*watched, *more)
        assert not stub.bodies


def test_counters_from_a_file(tmp_path: Path):
    counts = Counts()
    for length in np.random.default_rng(0).lognormal(5, 1, 200):
        counts.add(dict.fromkeys(GRIDS, float(length)))
    stats, traffic = tmp_path / "stats.json", tmp_path / "traffic.json"
    stats.write_bytes(msgspec.json.encode({"asked": counts}))
    assert run("--stats", stats, "--traffic", traffic, "--record")[0] == 0
    code, found = run("--stats", stats, "--traffic", traffic)
    assert code == 0
    assert all(drift["psi"] == 0 for drift in found["drift"].values())
    stats.write_text("{}")
    with pytest.raises(ConfigError, match="has no counters of requests"):
        run("--stats", stats, "--traffic", traffic)


COUNTED = ("--stats", "s", "--traffic", "t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare with"),
        (["--baseline", "b"], "either BUNDLE or --server"),
        (["--server", "http://127.0.0.1:1", "--against", "."], "BUNDLE --against BUNDLE"),
        ([".", "--against", ".", "--record"], "BUNDLE --against BUNDLE"),
        (["--traffic", "t"], "either --server or --stats"),
        ([".", "--traffic", "t", "--stats", "s"], "BUNDLE is opened for --baseline or --against"),
        ([".", "--baseline", "b", "--state", "s"], "--state belongs to --traffic"),
        ([".", "--baseline", "b", "--alpha", "0.1"], "--alpha belongs to --traffic"),
        ([".", "--against", ".", "--min-psi", "0.1"], "--min-psi belongs to --traffic"),
        ([*COUNTED, "--golden", "g"], "--golden belongs to --baseline or --against"),
        ([*COUNTED, "--max-tokens", "5"], "--max-tokens belongs to --baseline or --against"),
        ([*COUNTED, "--thinking"], "--thinking belongs to --baseline or --against"),
        ([*COUNTED, "--text", "t"], "--text belongs to --baseline or --against"),
        ([*COUNTED, "--text-tokens", "7"], "--text-tokens belongs to --baseline or --against"),
        ([".", "--baseline", "b", "--model", "m"], "belong to --server"),
        (["--server", "http://127.0.0.1:1", "--baseline", "b", "--num-threads", "1"], "to BUNDLE"),
        ([*COUNTED, "--no-int8-activations"], "belongs to BUNDLE"),
        ([*COUNTED, "--alpha", "2"], "a probability"),
        ([*COUNTED, "--min-psi", "-1"], "0 or more"),
    ],
)
def test_senseless_options_are_refused_first(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        run(*arguments)

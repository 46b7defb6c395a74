"""``edge-llm`` as a user meets it: output, errors, exit codes, and a real terminal."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import edge
from edge import LLM, SamplingParams
from edge.cli import main
from edge.engine_config import EngineConfig
from edge.errors import ConfigError
from edge.runtime.sampling_params import KNOBS
from edge.votes.tally import VoteRule
from tests.command_line import Result, error_line
from tests.conftest import TINY_KV_CAPACITY, Bundles
from tests.edge.test_engine_config import OTHER_VALUES

ROOT = Path(edge.__file__).parent.parent
GREEDY = ("--temperature", "0", "--num-threads", "1")
QUESTION = [{"role": "user", "content": "hello"}]


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2")


CUT_OFF = "edge-llm: the answer was cut off: after {} tokens, as --max-tokens says\n"


# run


def test_run_streams_the_answer(edge_llm: Callable[..., Result], bundle: Path):
    result = edge_llm("run", bundle, "hello", "--max-tokens", 20, *GREEDY)
    with LLM(bundle, num_threads=1) as llm:
        expected = llm.generate(QUESTION, SamplingParams(temperature=0, max_tokens=20))
    assert result.code == 0
    assert expected.reasoning
    assert expected.reasoning in result.out  # without colours: stdout is no terminal
    assert "\x1b" not in result.out
    assert re.fullmatch(
        r"\[prompt \d+ tokens \| TTFT \d+ ms \| prefill \d+ tok/s \| answer 20 tokens \| "
        r"decode [\d.]+ tok/s\]\n",
        result.err.removeprefix(CUT_OFF.format(20)),
    )
    quiet = edge_llm("run", bundle, "hello", "--max-tokens", 2, "--no-stats", *GREEDY)
    assert quiet.err == CUT_OFF.format(2)


def test_a_full_cache_is_said_and_how_to_have_more(edge_llm: Callable[..., Result], bundle: Path):
    """Not the same line as for --max-tokens: here the answer is not what anybody asked for."""
    options = ("--kv-capacity", 20, "--no-stats", *GREEDY)
    result = edge_llm("run", bundle, "hello", *options)
    assert result.err == (
        "edge-llm: the answer was cut off: prompt and answer fill the KV cache of 20 tokens; give "
        "a larger --kv-capacity (up to 256) or --overflow slide\n"
    )
    stats = json.loads(edge_llm("run", bundle, "hello", "--json", *options).out)["stats"]
    assert stats["context_left"] == 0
    assert stats["prompt_tokens"] + stats["completion_tokens"] == 21  # the last needs no row


def test_a_closed_standard_input_is_an_empty_one(bundle: Path):
    command = f"exec {sys.executable} -m edge.cli run {bundle} <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (65, "")
    assert "the prompt is empty" in done.stderr


def test_a_closed_standard_output_is_no_error(bundle: Path):
    options = "--max-tokens 2 --no-stats --num-threads 1"
    for more in ("", "--json"):
        command = f"exec {sys.executable} -m edge.cli run {bundle} hello {options} {more} >&-"
        done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def test_a_closed_standard_error_costs_no_answer(bundle: Path):
    """Of a verb that shows how far it is."""
    command = f"exec {sys.executable} -m edge.cli bundle verify {bundle}"
    usual, closed, without_input = (
        subprocess.run(["bash", "-c", f"{command} {more}"], stdout=subprocess.PIPE, text=True)
        for more in ("2>/dev/null", "2>&-", "<&- 2>&-")
    )
    assert usual.stdout
    assert (closed.returncode, closed.stdout) == (0, usual.stdout)
    assert (without_input.returncode, without_input.stdout) == (0, usual.stdout)


def test_run_takes_its_prompt_from_stdin(edge_llm: Callable[..., Result], bundle: Path):
    options = ("--max-tokens", 12, "--no-stats", *GREEDY)
    given = edge_llm("run", bundle, "hello\n", *options)
    piped = edge_llm("run", bundle, *options, stdin="hello\n")
    assert piped == given
    assert given.out.strip()


def test_run_raw_continues_plain_text(edge_llm: Callable[..., Result], bundle: Path):
    result = edge_llm("run", bundle, "hello", "--raw", "--max-tokens", 12, "--no-stats", *GREEDY)
    with LLM(bundle, num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=12)
        assert result.out == llm.generate("hello", params).text + "\n"
        assert result.out != llm.generate(QUESTION, params).text + "\n"


def test_run_fills_a_gap(edge_llm: Callable[..., Result], code_bundle: Path):
    options = ("--max-tokens", 8, "--json", "--num-threads", 1, *GREEDY)
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(code_bundle, num_threads=1) as llm:
        for prefix in ("hello ", ""):
            result = edge_llm("run", code_bundle, prefix, "--suffix", " world", *options)
            assert (
                json.loads(result.out)["text"] == llm.generate(prefix, params, suffix=" world").text
            )


def test_run_json_is_one_line(edge_llm: Callable[..., Result], bundle: Path):
    options = ("--seed", 3, "--temperature", 1, "--max-tokens", 12, "--json", "--num-threads", 1)
    result = edge_llm("run", bundle, "hello", *options)
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
    answer = json.loads(result.out)
    assert answer.keys() == {"text", "reasoning", "finish_reason", "stats"}
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["completion_tokens"] == 12
    again = json.loads(edge_llm("run", bundle, "hello", *options).out)
    assert again["text"] + again["reasoning"] == answer["text"] + answer["reasoning"]
    system = json.loads(edge_llm("run", bundle, "hello", "--system", "be brief", *options).out)
    assert system["stats"]["prompt_tokens"] > answer["stats"]["prompt_tokens"]


def test_every_engine_option_arrives(
    edge_llm: Callable[..., Result],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """In run and in chat: an option that is not passed on would be one without effect."""
    opened: list[EngineConfig] = []

    def open_llm(_bundle: Path, config: EngineConfig) -> None:
        opened.append(config)
        raise ConfigError("enough")

    # What is for many answers at once has no place in a verb that gives one.
    many = {"num_slots", "max_batch", "queue_capacity", "target_itl_ms", "reuse_prefix"}
    given = {name: value for name, value in OTHER_VALUES.items() if name not in many}
    arguments = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        arguments += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    monkeypatch.setattr("edge.runtime.llm.LLM", open_llm)
    for command in (("chat", bundle), ("run", bundle, "hello")):
        assert "enough" in error_line(edge_llm(*command, *arguments), 64)
    assert opened == [EngineConfig(**given, num_slots=2)] * 2  # one is for trials


def test_every_sampling_option_arrives(
    edge_llm: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[SamplingParams] = []

    def stream(self: LLM, prompt: Any, params: SamplingParams, **_options: Any) -> Any:
        seen.append(params)
        raise edge.EdgeError("seen")

    monkeypatch.setattr(LLM, "stream", stream)
    options: dict[str, Any] = {
        name: 7 if knob.kind is int else round(knob.low + 0.9 * (knob.high - knob.low), 3)
        for name, knob in KNOBS.items()
    }
    flags = [
        text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)
    ]
    error_line(edge_llm("run", bundle, "x", "--json", *flags, "--stop", "a", "--stop", "b"), 70)
    assert seen == [SamplingParams(**options, stop=("a", "b"))]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--temperature", "-1"), 65, "temperature"),
        (("--kv-capacity", "100000"), 64, "--kv-capacity 100000 is out of range"),
        (("--kv-capacity", "4"), 65, "tokens or more, but the KV cache holds 4"),
        (("--raw", "--system", "x"), 65, "--system"),
        (("--suffix", "", "--system", "x"), 65, "--system"),
        (("--suffix", "x"), 65, "this model has no tokens to fill a gap with"),
    ],
)
def test_run_errors_are_one_line(
    options: tuple[str, ...], code: int, message: str, edge_llm: Callable[..., Result], bundle: Path
):
    assert message in error_line(edge_llm("run", bundle, "hello", *options), code)


def test_a_vote_arrives_with_a_slot_for_each_of_its_first_samples(
    edge_llm: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []

    def stream(self: LLM, prompt: Any, params: SamplingParams, **options: Any) -> Any:
        seen.append((options["vote"], self.config.num_slots))
        raise edge.EdgeError("seen")

    monkeypatch.setattr(LLM, "stream", stream)
    error_line(edge_llm("run", bundle, "x", "--vote", 5, "--answers", "choice"), 70)
    error_line(edge_llm("run", bundle, "x", "--vote", 20, "--stop-when-sure", 0.9), 70)
    assert seen == [(VoteRule(most=5, answers="choice"), 5), (VoteRule(most=20), 9)]
    for options, message in (
        (("--answers", "choice"), "--answers says what --vote compares; give --vote, too"),
        (("--vote", 1), "most must be an integer from 2 to 64, not 1"),
        (("--vote", 5, "--answers", "word"), "answers must be number, choice"),
    ):
        assert message in error_line(edge_llm("run", bundle, "x", *options), 65)


def test_a_forgotten_bundle_is_one_line(
    edge_llm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path))  # where a checkout has one, it answers
    assert "no directory Why" in error_line(edge_llm("run", "Why is the sky blue? " * 20), 65)


def test_run_refuses_bytes_that_are_no_text(edge_llm: Callable[..., Result], bundle: Path):
    for raw in ((), ("--raw",)):
        result = edge_llm("run", bundle, *raw, stdin=b"ab\xff\xfe")
        assert "not UTF-8: byte 0xff at character 2" in error_line(result, 65)


def test_run_refuses_an_empty_prompt(edge_llm: Callable[..., Result], bundle: Path):
    assert "the prompt is empty" in error_line(edge_llm("run", bundle, stdin=b"\n"), 65)
    assert "the prompt is empty" in error_line(edge_llm("run", bundle, " "), 65)
    assert edge_llm("run", bundle, "--raw", "", "--max-tokens", "1").code == 0


def test_a_full_disk_under_standard_output_is_one_line(bundle: Path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edge.cli", "inspect", "--no-verify", str(bundle)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (
        71,
        "edge-llm: error: the output cannot be written: the disk is full\n",
    )


def test_nothing_is_reported_and_the_home_stays_as_it_is(bundle: Path, tmp_path: Path):
    """ONNX Runtime would keep a device id and a database of events there."""
    hidden = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-m", "edge.cli", "run", str(bundle), "hello", "--max-tokens", "2"],
        cwd=ROOT,
        env={**env, "HOME": str(tmp_path)},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("recommend", "--latency-ms", "nan"),
        ("recommend", "--ttft-ms", "inf"),
        ("doctor", "--wait-gpu", "nan"),
        ("verify", ".", "--min-cosine", "nan"),
        ("bench", ".", "--max-slowdown", "nan"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(
    arguments: tuple[str, ...], edge_llm: Callable[..., Result]
):
    message = error_line(edge_llm(*arguments), 64)
    assert arguments[-2] in message
    assert "is not" in message


def test_more_threads_than_cores_are_refused(edge_llm: Callable[..., Result], bundle: Path):
    result = edge_llm("run", bundle, "x", "--num-threads", "100000")
    assert "num_threads (100000) is more than the" in error_line(result, 64)


def test_usage_errors(edge_llm: Callable[..., Result], bundle: Path, tmp_path: Path):
    for arguments, message in (
        (("run", bundle, "x", "--backend", "abacus"), "'auto', 'tensorrt', 'ort-cuda', 'ort-cpu'"),
        (("run", bundle, "x", "--num-threads", "0"), "--num-threads"),
        (("run", bundle, "x", "--top-x", "3"), "No such option"),
        (("serve", bundle, "--workers", "2"), "--num-slots says how many"),
        (("frobnicate",), "No such command 'frobnicate'; see: edge-llm --help"),
        (("chta", bundle), "No such command 'chta'; did you mean chat?; see: edge-llm --help"),
        (("inspect",), "Missing argument 'BUNDLE'; see: edge-llm inspect --help"),
        (("show", bundle), "No such command 'show'; did you mean inspect?"),
        (("ps",), "No such command 'ps'; did you mean list?"),
        (("cache", "lst"), "No such command 'lst'"),
    ):
        assert message in error_line(edge_llm(*arguments), 64)
    result = edge_llm()
    assert (result.code, result.out) == (64, "")
    assert "edge-llm [OPTIONS] COMMAND [ARGS]" in result.err
    assert "no bundle at" in error_line(edge_llm("run", tmp_path, "x"), 65)
    absent = tmp_path / "absent"
    assert f"no directory {absent} and no bundle" in error_line(edge_llm("run", absent, "x"), 65)


def test_an_error_can_be_traced(
    edge_llm: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EDGE_LLM_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["edge-llm", "run", str(tmp_path), "x"])
    with pytest.raises(edge.EdgeError):
        main()


def test_help_and_version(edge_llm: Callable[..., Result]):
    result = edge_llm("--help")
    assert result.code == 0
    for verb in ("run", "chat", "inspect", "export"):
        assert re.search(rf"^  {verb} ", result.out, re.MULTILINE)
        assert f" {verb} [OPTIONS] " in edge_llm(verb, "--help").out.splitlines()[0]
    result = edge_llm("--version")
    assert result.code == 0
    assert result.out.startswith(f"edge-llm {edge.__version__} from {ROOT / 'edge'}\npython 3.")
    assert re.search(r"^tensorrt (not installed|\d)", result.out, re.MULTILINE)


# inspect


def test_inspect_shows_tables(edge_llm: Callable[..., Result], tiny_bundles: Bundles):
    result = edge_llm("inspect", tiny_bundles("qwen3", "portable", "int4"))
    assert (result.code, result.err) == (0, "")
    for text in ("qwen3, 2 layers", "heads 4/2 x 32", "yarn", "portable", "int4-g32", "all hashes"):
        assert text in result.out
    layers = edge_llm("inspect", tiny_bundles("qwen3", "portable", "int4"), "--layers")
    assert "layers.1.gate_up" in layers.out
    assert "layers.1.gate_up" not in result.out


def test_inspect_cuts_nothing_off(
    edge_llm: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "40")
    assert "…" not in edge_llm("inspect", bundle).out


def test_inspect_json_adds_up(edge_llm: Callable[..., Result], tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", quant="int4")
    result = edge_llm("inspect", bundle, "--json")
    assert result.out.count("\n") == 1
    summary = json.loads(result.out)
    assert summary["verified"] is True
    assert summary["model"]["architecture"] == "qwen2"
    parts = summary["bytes_by_part"]
    sizes = {path.name: path.stat().st_size for path in bundle.iterdir()}
    del sizes["manifest.json"]
    assert parts["all_files"] == sum(sizes.values())
    assert parts["token_embeddings"] == sizes["embeddings.safetensors"]
    linears = summary["quantization"]["linears"]
    assert parts["qkv"] == sum(v["num_bytes"] for k, v in linears.items() if k.endswith("qkv"))


def test_inspect_of_a_damaged_bundle(
    edge_llm: Callable[..., Result], tiny_bundles: Bundles, tmp_path: Path
):
    # Brackets in a path are no markup.
    bundle = Path(shutil.copytree(tiny_bundles("qwen2"), tmp_path / "[b]bundle[" / "b]"))
    assert "[b]bundle[" in edge_llm("inspect", bundle).out.replace("\n", "")
    path = bundle / "decoder.onnx.data"
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    for options in ((), ("--json",)):
        line = error_line(edge_llm("inspect", bundle, *options), 65)
        assert "decoder.onnx.data is damaged" in line
    result = edge_llm("inspect", bundle, "--no-verify")
    assert result.code == 0
    assert "not verified" in result.out
    assert json.loads(edge_llm("inspect", bundle, "--no-verify", "--json").out)["verified"] is False


# chat


@pytest.fixture
def chat(edge_llm: Callable[..., Result], bundle: Path) -> Callable[..., Result]:
    def run(script: str, *options: object) -> Result:
        # Of the reasoning of past answers, R1's template keeps nothing, so turns stay short.
        result = edge_llm("chat", bundle, "--max-tokens", 6, *GREEDY, *options, stdin=script)
        assert result.code == 0
        return result

    return run


def test_a_conversation(chat: Callable[..., Result], bundle: Path):
    """Each turn is what the library answers to all messages so far."""
    result = chat("hello\nand then\n/exit\nnot read\n")
    with LLM(bundle, num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=6)
        messages: list[dict[str, str]] = []
        expected = ""
        for text in ("hello", "and then"):
            messages.append({"role": "user", "content": text})
            answer = llm.generate(messages, params)
            assert not answer.text  # six tokens are all reasoning
            expected += f"{answer.reasoning}\n"
            messages.append({"role": "assistant", "content": answer.text})
    banner, _, said = result.out.partition("\n")
    assert banner.endswith(f", {TINY_KV_CAPACITY} tokens. /help lists the commands.")
    assert said == expected
    assert result.err == 2 * CUT_OFF.format(6)


def test_a_chat_that_is_nearly_full_says_so(edge_llm: Callable[..., Result], bundle: Path):
    options = ("--max-tokens", 1, "--kv-capacity", 60, *GREEDY)
    result = edge_llm("chat", bundle, *options, stdin="hi\n" + "x" * 45 + "\n/exit\n")
    first, second, warning = result.err.splitlines(keepends=True)
    assert first == second == CUT_OFF.format(1)
    assert re.fullmatch(
        r"edge-llm: the conversation leaves \d of 60 tokens for what follows; /reset forgets it, "
        r"--kv-capacity makes more room\n",
        warning,
    )


def test_the_end_of_the_input_ends_the_chat(chat: Callable[..., Result]):
    assert chat("hello\n").out.endswith("\n")
    assert chat("").code == 0
    assert chat('"""unfinished\n').out.count("\n") == 2


def test_lines_between_quotes_are_one_message(
    chat: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    prompts = record_prompts(monkeypatch)
    chat('"""one\n/two\n"""\n"""single"""\n"""\n/reset\nx"""\n   \n\n/exit\n')
    assert [messages[-1]["content"] for messages in prompts] == ["one\n/two", "single", "/reset\nx"]
    assert len(prompts[-1]) == 5  # nothing was reset


def record_prompts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    prompts: list[Any] = []
    submit = LLM.submit

    def recorded(self: LLM, prompt: Any, params: Any = None, **options: Any) -> Any:
        prompts.append(prompt)
        return submit(self, prompt, params, **options)

    monkeypatch.setattr(LLM, "submit", recorded)
    return prompts


def test_commands(chat: Callable[..., Result], monkeypatch: pytest.MonkeyPatch):
    prompts = record_prompts(monkeypatch)
    result = chat(
        "/stats\nhello\n/stats\n/reset\nhello\n/system be brief\nhello\n"
        "/help\n/frobnicate now\n/system\n/exit\n",
        "--system",
        "be long",
    )
    out = result.out
    assert "No finished answer yet." in out
    assert re.search(r"^\[prompt \d+ tokens.* answer 6 tokens", out, re.MULTILINE)
    assert re.search(
        rf"^KV cache: \d+ of {TINY_KV_CAPACITY} tokens, \d+ MB in all$", out, re.MULTILINE
    )
    assert "Conversation forgotten." in out
    assert out.count("/reset         forget the conversation") == 3  # /help and two unknown ones
    assert "'/frobnicate now' is none of these:" in out
    assert "'/system' is none of these:" in out
    long, brief = ({"role": "system", "content": f"be {how}"} for how in ("long", "brief"))
    assert prompts == [[long, *QUESTION], [long, *QUESTION], [brief, *QUESTION]]


def test_a_message_that_cannot_be_answered_leaves_the_chat_going(
    chat: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    prompts = record_prompts(monkeypatch)
    result = chat("hello\n" + "x" * 500 + "\nagain\n/exit\n")
    _, line, _ = result.err.splitlines()
    assert line.startswith("error: the prompt has 5")
    assert "the KV cache holds 128" in line
    assert [m["content"] for m in prompts[-1] if m["role"] == "user"] == ["hello", "again"]


def test_a_chat_needs_a_template(
    edge_llm: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge.runtime.open_bundle._read_template", lambda *_: None)
    assert "edge-llm run --raw" in error_line(edge_llm("chat", bundle), 65)


# A process of its own


def test_a_real_process(bundle: Path, tmp_path: Path):
    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edge.cli", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **options,
        )

    done = run("run", bundle, "--json", "--max-tokens", 3, *GREEDY, input="hello")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["stats"]["completion_tokens"] == 3
    done = run("run", tmp_path, "hello")
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith("edge-llm: error: no bundle at")
    assert done.stderr.count("\n") == 1


STRANGE_ANSWER = """
from edge.cli import main
from edge.runtime.generation import GenerationStats
from edge.runtime.llm import LLM
from edge.runtime.stream import GenerationChunk
def stream(*_, **__):
    yield GenerationChunk(text="\u4e2d \xe9")
    yield GenerationChunk(finish_reason="stop", stats=GenerationStats(1, 1))
LLM.stream = stream
main()
"""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_locale_of_eight_bits_ends_no_answer(encoding: str, bundle: Path):
    def run(*options: str) -> bytes:
        return subprocess.run(
            [sys.executable, "-c", STRANGE_ANSWER, "run", str(bundle), "hello", *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout

    if encoding == "latin-1":  # in ASCII, which is seldom meant, click writes UTF-8
        assert run().decode(encoding) == "\\u4e2d é\n"
    assert json.loads(run("--json").decode("ascii"))["text"] == "中 é"


def test_a_reader_that_goes_away_is_no_crash(bundle: Path):
    """As ``edge-llm run ... | head -c 1`` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edge.cli", "run", str(bundle), "hello", "--raw", *GREEDY],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert errors == b""


# The engine sleeps, so that even a busy machine has time to interrupt it; the terminal is this
# process's own. A shell's background jobs, and what they start, ignore Ctrl-C.
SLOW_CHAT = """
import fcntl, signal, sys, termios, time
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from edge.backends.ort.cpu import OrtBackend
forward = OrtBackend.forward
def slow(*args):
    time.sleep(0.15)
    return forward(*args)
OrtBackend.forward = slow
from edge.cli import main
main()
"""


class Terminal:
    """``edge-llm chat`` at the other end of a pseudo-terminal."""

    def __init__(self, bundle: Path, state: Path) -> None:
        self._mine, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW_CHAT, "chat", str(bundle), *GREEDY],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "XDG_STATE_HOME": str(state)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def expect(self, text: str, timeout_s: float = 30.0) -> str:
        """Read until ``text`` comes; returns what came before it."""
        deadline = time.monotonic() + timeout_s
        data = b""
        while text.encode() not in data:
            left = deadline - time.monotonic()
            if left <= 0:
                self.seen += data.decode(errors="replace")
                raise AssertionError(f"{text!r} did not come; this did: {self.seen!r}")
            if select.select([self._mine], [], [], left)[0]:
                data += os.read(self._mine, 1)
        self.seen += data.decode(errors="replace")
        return data.decode(errors="replace").removesuffix(text)

    def press_until(self, key: str, text: str) -> None:
        """Press a key again until ``text`` comes, as people do.

        Python's ``input`` misses a signal that comes just before it begins to wait for a key.
        """
        for _ in range(15):
            self.type(key)
            with suppress(AssertionError):
                self.expect(text, timeout_s=2)
                return
        raise AssertionError(f"{text!r} did not come; this did: {self.seen!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._mine)


@pytest.fixture
def terminal(bundle: Path, tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(bundle, tmp_path / "state")
    yield opened
    opened.close()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_ctrl_c_stops_an_answer_but_not_the_chat(terminal: Terminal, tmp_path: Path):
    terminal.expect(">>> ")
    terminal.type("hello\n")
    terminal.expect("hello\r\n")  # the echo
    terminal.expect("\x1b[2m")  # the first piece of the reasoning, dim
    terminal.type("\x03")
    stopped = terminal.expect(" [stopped]")
    assert stopped.count("\x1b[2m") < 50  # the whole answer has some 120 pieces
    terminal.expect(">>> ")

    terminal.type("half a li")
    terminal.expect("half a li")
    terminal.press_until("\x03", "(Ctrl-D or /exit leaves)")  # at the prompt it drops the line
    terminal.expect(">>> ")
    terminal.type("/stats\n")
    terminal.expect("No finished answer yet.")
    terminal.expect("KV cache: ")
    terminal.expect(">>> ")
    terminal.type("again\n")
    terminal.expect("\x1b[2m")
    terminal.type("\x03")
    terminal.expect(" [stopped]")
    terminal.expect(">>> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0
    history = tmp_path / "state" / "edge-llm" / "history"
    assert "hello" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_chat_goes_without_a_place_for_its_history(bundle: Path, tmp_path: Path):
    (tmp_path / "state").write_text("a file, not a directory")
    terminal = Terminal(bundle, tmp_path / "state")
    try:
        terminal.expect(">>> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()

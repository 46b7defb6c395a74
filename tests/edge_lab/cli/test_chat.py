"""The commands of ``edge-llm chat``, and all of it in a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.backends.ort.cpu import OrtBackend
from edge.errors import RequestError
from edge.runtime.generation import GenerationStats
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.stream import GenerationChunk
from edge_lab.cli.chat import Conversation, _line_history
from edge_lab.cli.conversation import read_conversation, write_conversation
from tests.command_line import Result
from tests.conftest import Bundles
from tests.edge.cli.screen import Screen
from tests.edge.cli.scripted_generation import ScriptedGeneration

ROOT = Path(__file__).parents[3]


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2")


class Script:
    """A model that answers ``A1``, ``A2`` and so on, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.params: list[SamplingParams] = []
        self.fails = False

    def stream(
        self, _llm: LLM, prompt: list[dict[str, str]], params: SamplingParams
    ) -> Generator[GenerationChunk, None, None]:
        if self.fails:
            raise RequestError("not now")
        self.asked.append([(message["role"], message["content"]) for message in prompt])
        self.params.append(params)
        yield GenerationChunk(text=f"A{len(self.asked)}")
        stats = GenerationStats(prompt_tokens=10, completion_tokens=2, context_left=90)
        yield GenerationChunk(finish_reason="stop", stats=stats)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()

    def submit(llm: LLM, prompt: Any, params: Any, **_: Any) -> ScriptedGeneration:
        return ScriptedGeneration(script.stream(llm, prompt, params))

    monkeypatch.setattr(LLM, "submit", submit)
    return script


@pytest.fixture
def chat(edge_llm: Callable[..., Result], bundle: Path, script: Script) -> Callable[..., Result]:
    def run(*lines: str) -> Result:
        result = edge_llm("chat", bundle, stdin="".join(f"{line}\n" for line in lines))
        assert result.code == 0
        return result

    return run


def test_regen_asks_the_last_question_again(chat: Callable[..., Result], script: Script):
    result = chat("/regen", "one", "two", "/regen", "three")
    assert "error: there is no message to answer again" in result.err
    first = [("user", "one"), ("assistant", "A1")]
    assert script.asked[1] == script.asked[2] == [*first, ("user", "two")]
    assert script.asked[3] == [*first, ("user", "two"), ("assistant", "A3"), ("user", "three")]


def test_edit_replaces_the_last_question(chat: Callable[..., Result], script: Script):
    result = chat("/edit x", "one", "two", "/edit  other words ", "/edit", "three")
    assert "there is no message to answer again" in result.err
    assert "an editor needs a terminal; give the text" in result.err
    first = [("user", "one"), ("assistant", "A1")]
    assert script.asked[2] == [*first, ("user", "other words")]
    assert script.asked[3][2:4] == [("user", "other words"), ("assistant", "A3")]


def test_a_failed_retry_leaves_the_conversation_unchanged(
    chat: Callable[..., Result], script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    path = tmp_path / "c.json"
    stream = script.stream
    calls = iter([False, True, True])

    def sometimes(*arguments: Any) -> Any:
        script.fails = next(calls)
        return stream(*arguments)

    monkeypatch.setattr(script, "stream", sometimes)
    result = chat("one", "/regen", "/edit longer", f"/save {path}")
    assert result.err.count("error: not now") == 2
    assert [message["content"] for message in read_conversation(path)] == ["one", "A1"]


def test_a_conversation_is_saved_and_goes_on(
    chat: Callable[..., Result], script: Script, tmp_path: Path
):
    path = tmp_path / "talk.json"
    chat("/system be brief", "one", f"/save {path}", "two", f"/save {path}")
    assert path.stat().st_mode & 0o777 == 0o600
    said = [("system", "be brief"), ("user", "one"), ("assistant", "A1")]
    said += [("user", "two"), ("assistant", "A2")]
    assert [(m["role"], m["content"]) for m in json.loads(path.read_bytes())] == said
    result = chat("other", f"/load {path}", "three")
    assert f"Loaded 4 messages of {path}." in result.out
    assert script.asked[-1] == [*said, ("user", "three")]
    path.write_text("[]")
    chat("/system x", "other", f"/load {path}", "three")
    assert script.asked[-1] == [("user", "three")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no conversation"),
        ('{"messages": []}', "Expected `array`"),
        ('[{"role": "user", "content": 3}]', "Expected `str | array`"),
        ('[{"role": "owner", "content": ""}]', "Invalid enum value 'owner'"),
        ('[{"role": "user", "content": "", "image": ""}]', "unknown field `image`"),
        ('[{"role": "assistant", "content": ""}]', "message 1 is of assistant, where user has"),
        ('[{"role": "system", "content": ""}, {"role": "system", "content": ""}]', "message 2 is"),
        ('[{"role": "user", "content": ""}]', "its last question has no answer"),
        ("[" * 100_000, "is no conversation"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    chat: Callable[..., Result], script: Script, tmp_path: Path, text: str, words: str
):
    path = tmp_path / "x.json"
    path.write_text(text)
    result = chat("one", f"/load {path}", f"/save {path}", "two")
    for line in result.err.splitlines():
        assert words in line
    assert "it is not replaced" in result.err
    assert path.read_text() == text
    assert script.asked[-1] == [("user", "one"), ("assistant", "A1"), ("user", "two")]


@pytest.mark.usefixtures("homeless")
def test_without_a_home_lines_have_no_history(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with _line_history():
        pass


def test_files_that_cannot_be(chat: Callable[..., Result], tmp_path: Path):
    result = chat(f"/load {tmp_path / 'none.json'}", f"/save {tmp_path / 'no' / 'x'}", "/save")
    assert "none.json cannot be read: No such file or directory" in result.err
    assert "x cannot be written: No such file or directory" in result.err
    assert "'/save' is none of these:" in result.out
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_conversation(tmp_path)
    write_conversation(tmp_path / "ok", [])
    assert read_conversation(tmp_path / "ok") == []


@pytest.mark.parametrize("command", ["/save", "/load"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("~nouser/x", "~nouser/x: this system knows no such home"), ("x" * 300, "File name too long")],
)
def test_a_name_that_cannot_be_does_not_end_the_chat(
    chat: Callable[..., Result], script: Script, command: str, name: str, words: str
):
    (line,) = chat(f"{command} {name}", "one").err.splitlines()[:1]
    assert line.startswith("error: ")
    assert words in line
    assert script.asked == [[("user", "one")]]


def test_set_changes_how_tokens_are_chosen(chat: Callable[..., Result], script: Script):
    result = chat(
        *("/set temperature 0.25", "/set top_k 7", "one"),
        *("/set temp 1", "/set top_k many", "/set top_k 1.5", "/set temperature 99", "two"),
        *("/set temperature default", "/set presence_penalty default", "/set top_k", "/set"),
        "three",
    )
    assert [(p.temperature, p.top_k) for p in script.params] == [(0.25, 7), (0.25, 7), (None, 7)]
    unknown, many, half, range_, *rest = result.err.splitlines()
    assert not rest
    assert "there is no parameter 'temp'; there are temperature, top_k, top_p" in unknown
    assert "top_k is a whole number or default, not 'many'" in many
    assert "top_k is a whole number or default, not '1.5'" in half
    assert "temperature must be" in range_
    assert re.search(r"^  temperature +0\.25  \(set\)$", result.out, re.MULTILINE)
    assert result.out.count("  top_k              7  (set)\n") == 3
    assert "  seed               fresh\n" in result.out
    assert "  max_tokens         what the KV cache holds\n" in result.out


def test_ctrl_c_stops_an_answer_whose_prompt_is_still_read(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    read_on = threading.Event()
    forward = OrtBackend.forward

    def wait(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        read_on.wait()
        return forward(*arguments)

    with LLM(bundle, num_slots=1) as llm:
        monkeypatch.setattr(OrtBackend, "forward", wait)
        guard = threading.Timer(10, read_on.set)
        guard.start()
        chat = Conversation(llm, SamplingParams(), None)
        chat.answer("hello")
        assert not read_on.is_set()
        monkeypatch.setattr(OrtBackend, "forward", forward)
        read_on.set()
        guard.cancel()
        assert "[stopped]" in capsys.readouterr().out
        chat.answer("again")
        assert chat.last.finish_reason is not None


def test_ctrl_c_twice_ends_what_cannot_be_stopped(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def submit(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(LLM, "submit", submit)
    with LLM(bundle) as llm, pytest.raises(KeyboardInterrupt):
        Conversation(llm, SamplingParams(), None).answer("hello")


# A terminal

DRIVER = """
import fcntl, json, sys, termios, time
from pathlib import Path
from edge.cli import main
from edge.runtime.generation import GenerationStats
from edge.runtime.llm import LLM
from edge.runtime.stream import GenerationChunk
from tests.edge.cli.scripted_generation import ScriptedGeneration
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes as a signal
log, *arguments = sys.argv[1:]

def stream(self, prompt, params=None):
    with open(log, "a") as file:
        file.write(json.dumps([message["content"] for message in prompt]) + "\\n")
    yield GenerationChunk(reasoning="Hm.")
    if prompt[-1]["content"] == "slow":
        for number in range(1000):
            time.sleep(0.05)
            yield GenerationChunk(text=f"piece{number} ")
    for piece in ("There are **tw", "o** kinds:\\n\\n- `odd`\\n- even\\n\\n```pyth",
                  "on\\nfor n in range(3): pass\\n```\\n"):
        yield GenerationChunk(text=piece)
    stats = GenerationStats(prompt_tokens=10, completion_tokens=5, context_left=50)
    yield GenerationChunk(finish_reason="stop", stats=stats)

LLM.submit = lambda *arguments, **_: ScriptedGeneration(stream(*arguments))
sys.argv = ["edge-llm", *arguments]
main()
"""


class Terminal:
    """A process whose terminal this is."""

    def __init__(self, arguments: list[str], environ: dict[str, str]) -> None:
        self._file, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 70, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
            start_new_session=True,
        )
        os.close(slave)
        self.written = ""

    def until(self, text: str, timeout_s: float = 60.0) -> str:
        """Read until ``text`` comes; returns what came before it, and forgets it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.written:
            assert time.monotonic() < deadline, f"no {text!r} in {self.written!r}"
            try:
                self.written += os.read(self._file, 65536).decode()
            except OSError as error:  # the process has closed its side
                raise AssertionError(f"no {text!r} in {self.written!r}") from error
        before, _, self.written = self.written.partition(text)
        return before

    def send(self, text: str) -> None:
        os.write(self._file, text.encode())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._file)


@pytest.fixture
def terminal(bundle: Path, tmp_path: Path) -> Iterator[Terminal]:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "slow\\n" > "$1"\n')
    editor.chmod(0o755)
    terminal = Terminal(
        [str(tmp_path / "log"), "chat", str(bundle)],
        {
            "TERM": "xterm",
            "VISUAL": str(editor),
            "XDG_STATE_HOME": str(tmp_path),
            "NO_COLOR": "",
            "COLORTERM": "",
            "INPUTRC": "/dev/null",
        },
    )
    yield terminal
    terminal.close()


def test_a_chat_in_a_terminal(terminal: Terminal, tmp_path: Path):
    """Markdown in colour, an editor, Ctrl-C, commands that fail: the chat goes on."""
    terminal.until("checking and loading ")
    assert " tokens. /help lists" in terminal.until(">>> ")
    terminal.send("primes\r")
    answer = terminal.until("tokens left]")
    screen = Screen(40)
    screen.write(answer.partition("primes\r\n")[2])
    lines = screen.text.split("\n")
    assert lines[0] == "Hm."  # the reasoning comes first, as it is
    at = lines.index("There are two kinds:")
    assert lines[at : at + 6] == [
        lines[at],
        "",
        " • odd",
        " • even",
        "",
        " for n in range(3): pass",
    ]
    assert any(code[:1] in "39" and len(code) == 2 for code in screen.colours)
    assert "**" not in screen.text

    terminal.send("/set temp 1\r")
    terminal.until("there is no parameter 'temp'")
    terminal.send("/edit\r")  # the editor writes "slow"
    terminal.until("piece3")
    terminal.send("\x03")
    terminal.until("[stopped]")
    terminal.until(">>> ")
    bad, saved = tmp_path / "bad.json", tmp_path / "talk.json"
    bad.write_text("{")
    terminal.send(f"/load {bad}\r")
    terminal.until("is no conversation")
    terminal.send(f"/save {saved}\r")
    terminal.until("Saved 2 messages")
    question, partial = (message["content"] for message in read_conversation(saved))
    assert question == "slow"
    assert partial.startswith("piece0 piece1")
    terminal.send('"""one\rtwo"""\r')
    terminal.until("tokens left]")
    terminal.until(">>> ")  # an end that comes before anyone reads is lost
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert asked == [["primes"], ["slow"], ["slow", partial, "one\ntwo"]]

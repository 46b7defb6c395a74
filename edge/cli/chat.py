"""``edge-llm chat``: a conversation in the terminal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import click

from edge.errors import EdgeError, RequestError
from edge.runtime.llm import LLM
from edge.runtime.sampling import SamplingParams

from .options import (
    ONE_ANSWER,
    bundle_argument,
    engine_options,
    sampling_options,
    take_engine,
    take_sampling,
)
from .screen import StreamPrinter, format_stats

_HELP = """\
  /reset         forget the conversation
  /stats         figures of the last answer and of the KV cache
  /system TEXT   set the system message and forget the conversation
  /help          this text
  /exit          leave (so does Ctrl-D)
Three double quotes begin a message of several lines, three more end it.
Ctrl-C stops an answer; the conversation goes on."""
_QUOTES = '"""'
_NEARLY_FULL = 0.1  # of the KV capacity


@click.command()
@bundle_argument
@click.option("--system", help="System message; R1 distills are best used without one.")
@engine_options(*ONE_ANSWER)
@sampling_options
def chat(
    bundle: Path,
    system: str | None,
    **options: Any,
) -> None:
    """Talk to BUNDLE; /help lists the commands."""
    params = take_sampling(options)
    config = take_engine(options, num_slots=1)
    with (
        LLM(bundle, config) as llm,
        _line_history(),
    ):
        if llm.template is None:
            raise RequestError(f"{bundle} has no chat template; use: edge-llm run --raw")
        click.echo(f"{llm.manifest.name}, {llm.kv_capacity} tokens. /help lists the commands.")
        Conversation(llm, params, system).loop(_read_line)


class Conversation:
    """The state of a chat: messages so far, and the last answer's figures."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.last = StreamPrinter()

    def loop(self, read_line: Callable[[str], str]) -> None:
        """Read messages and commands until the input ends.

        Args:
            read_line: shows a prompt and returns a line; EOFError ends the chat,
                KeyboardInterrupt drops the line.
        """
        while True:
            try:
                text = _read_message(read_line)
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /exit leaves)")
                continue
            if not text.strip():
                continue
            if text.startswith("/") and "\n" not in text:
                if not self.command(text):
                    return
                continue
            try:
                self.answer(text)
            except EdgeError as error:
                # A message too long, say: the conversation before it is still good.
                click.echo(f"error: {error}", err=True)

    def command(self, text: str) -> bool:
        """Run a slash command; False leaves the chat."""
        name, _, rest = text.partition(" ")
        if name == "/exit":
            return False
        if name == "/reset":
            self.messages.clear()
            click.echo("Conversation forgotten.")
        elif name == "/system" and rest.strip():
            self.system = rest.strip()
            self.messages.clear()
            click.echo("System message set, conversation forgotten.")
        elif name == "/stats":
            self.show_stats()
        elif name == "/help":
            click.echo(_HELP)
        else:
            click.echo(f"Unknown command {text!r}.\n{_HELP}")
        return True

    def answer(self, text: str) -> None:
        """Stream an answer; what was said so far counts as said, also when it is stopped."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        printer = StreamPrinter()
        with _stop_on_interrupt() as stopped:
            stream = self.llm.stream([*head, *self.messages, question], self.params)
            for chunk in stream:
                printer.show(chunk)
                if stopped():
                    stream.close()
                    click.echo(" [stopped]", nl=False)
                    break
        printer.end()
        printer.warn_if_cut_off(self.llm)
        self.messages += [question, {"role": "assistant", "content": printer.text}]
        self.last = printer
        self._warn_if_nearly_full()

    def _warn_if_nearly_full(self) -> None:
        """Say on stderr that the next answers may find no room; reasoning is not repeated."""
        if self.last.stats is None:
            return
        said = self.last.stats.prompt_tokens + len(self.llm.tokenizer.encode(self.last.text))
        left, capacity = max(self.llm.kv_capacity - said, 0), self.llm.kv_capacity
        if left < _NEARLY_FULL * capacity:
            click.echo(
                f"edge-llm: the conversation leaves {left} of {capacity} tokens for what follows; "
                "/reset forgets it, --kv-capacity makes more room",
                err=True,
            )

    def show_stats(self) -> None:
        """Print figures of the last answer and of the cache."""
        if self.last.stats is None:
            click.echo("No finished answer yet.")
        else:
            click.echo(format_stats(self.last.stats))
        used = self.llm.cached_tokens
        megabytes = self.llm.backend.cache_bytes / 1e6
        click.echo(f"KV cache: {used} of {self.llm.kv_capacity} tokens, {megabytes:.0f} MB in all")


def _read_message(read_line: Callable[[str], str]) -> str:
    line = read_line(">>> ")
    if not line.startswith(_QUOTES):
        return line
    lines = [line[len(_QUOTES) :]]
    # Three quotes may also close on the line that opened them.
    while not lines[-1].endswith(_QUOTES):
        lines.append(read_line("... "))
    lines[-1] = lines[-1][: -len(_QUOTES)]
    return "\n".join(lines).strip("\n")


def _read_line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """While active, Ctrl-C sets a flag between two tokens instead of raising inside the engine."""
    interrupted = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _line_history() -> Iterator[None]:
    """Edit lines with a history kept under ``XDG_STATE_HOME``; do nothing without a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # a Python built without it still reads lines
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "edge-llm" / "history"
    # A home that cannot be written, or a history of another library, is no reason not to talk.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists():
            readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            path.touch(mode=0o600)
            readline.write_history_file(path)

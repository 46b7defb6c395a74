"""``edge-llm chat``: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from edge.bundle.tasks import check_task
from edge.cli.options import (
    ONE_ANSWER,
    BundlePath,
    adapter_option,
    engine_options,
    sampling_options,
    take_engine,
    take_only_bundle,
    take_sampling,
)
from edge.cli.screen import StreamPrinter, dim, format_stats, open_shown
from edge.cli.sections import SectionCommand, option
from edge.errors import EdgeError, RequestError
from edge.runtime.sampling_params import KNOBS, SamplingParams
from edge.user_paths import expand_user, user_directory

from .conversation import read_conversation, write_conversation
from .markdown import answer_printer

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

    from .pictures import Content

_HELP = """\
  /reset         forget the conversation
  /regen         answer the last message again
  /edit [TEXT]   replace the last message, without TEXT in an editor, and answer it
  /image FILE    show a picture with the next message; may be repeated
  /save FILE     write the conversation as JSON
  /load FILE     go on with a conversation that was saved
  /set [NAME [VALUE]]
                 show how tokens are chosen, or change it; the value default undoes that
  /system TEXT   set the system message and forget the conversation
  /stats         figures of the last answer and of the KV cache
  /help          this text
  /exit          leave (so does Ctrl-D)
Three double quotes begin a message of several lines, three more end it.
Ctrl-C stops an answer; the conversation goes on."""
_QUOTES = '"""'
_NEARLY_FULL = 0.1  # share of the KV capacity
_LOOK_S = 0.1  # seconds between two checks for Ctrl-C


@click.command(cls=SectionCommand)
@click.argument("bundle", required=False, type=BundlePath(offers_export=True))
@option("Answer", "--system", help="System message; R1 distills are best used without one.")
@adapter_option
@engine_options(*ONE_ANSWER)
@sampling_options
def chat(
    bundle: Path | None,
    system: str | None,
    adapter: str | None,
    **options: Any,
) -> None:
    """Talk to BUNDLE, or to the only one there is; /help lists the commands."""
    bundle = bundle or take_only_bundle()
    params = take_sampling(options)
    config = take_engine(options, num_slots=1)
    with open_shown(bundle, config) as llm, _line_history():
        check_task(llm.manifest, "generate")
        if llm.template is None:
            raise RequestError(f"{bundle} has no chat template; use: edge-llm run --raw")
        click.echo(f"{llm.manifest.name}, {llm.kv_capacity} tokens. /help lists the commands.")
        conversation = Conversation(llm, params, system)
        conversation.adapter = adapter and llm.adapters.take(adapter)
        conversation.loop(_read_line)


class Conversation:
    """The state of a chat: messages so far, and the last answer's figures."""

    adapter: str | None = None

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[dict[str, Any]] = []
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
            try:
                if text.startswith("/") and "\n" not in text:
                    if not self.command(text):
                        return
                else:
                    self._ask(text)
            except EdgeError as error:
                # For example a message that is too long: the conversation before it is still good.
                click.echo(f"error: {error}", err=True)

    def command(self, text: str) -> bool:
        """Run a slash command; False leaves the chat.

        Raises:
            EdgeError: the command failed; the conversation is unchanged.
        """
        name, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/reset":
            self.messages.clear()
            self.pictures.clear()
            click.echo("Conversation forgotten.")
        elif name == "/regen" and not rest:
            self._answer_instead(self._last_question())
        elif name == "/edit":
            self._edit(rest)
        elif name == "/image" and rest:
            self._show(expand_user(rest))
        elif name == "/save" and rest:
            path = expand_user(rest)
            write_conversation(path, [*self._head(), *self.messages])
            click.echo(f"Saved {len(self.messages)} messages in {path}.")
        elif name == "/load" and rest:
            self._load(expand_user(rest))
        elif name == "/set":
            self._set(*rest.split(maxsplit=1))
        elif name == "/system" and rest:
            self.system = rest
            self.messages.clear()
            click.echo("System message set, conversation forgotten.")
        elif name == "/stats":
            self.show_stats()
        elif name == "/help":
            click.echo(_HELP)
        else:
            click.echo(f"{text!r} is none of these:\n{_HELP}")
        return True

    def answer(self, content: Content) -> None:
        """Stream an answer; if it is stopped, what came so far stays in the conversation.

        Args:
            content: a text, or a list of parts with pictures among them.
        """
        question = {"role": "user", "content": content}
        printer = answer_printer()
        is_stopped = False
        with _stop_on_interrupt() as stopped:
            messages = [*self._head(), *self.messages, question]
            generation = self.llm.submit(messages, self.params, adapter=self.adapter)
            try:
                while printer.finish_reason is None and not is_stopped:
                    # A long prompt gives no piece for minutes.
                    if (chunk := generation.take(_LOOK_S)) is not None:
                        printer.show(chunk)
                    is_stopped = stopped()
            finally:
                generation.cancel()  # nothing to do after the last piece
                printer.end("[stopped]" if is_stopped else "")
        printer.warn_if_cut_off(self.llm)
        self.messages += [question, {"role": "assistant", "content": printer.text}]
        self.last = printer
        self._tell_room()

    def _head(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _show(self, path: Path) -> None:
        """Attach a picture to the next message."""
        if not self.llm.reads_images:
            raise RequestError(f"{self.llm.manifest.name} reads text only")
        from .pictures import picture_part

        self.pictures.append(picture_part(path))
        click.echo(f"{path.name} goes with the next message.")

    def _ask(self, text: str) -> None:
        """Answer a message together with the pictures attached to it."""
        pictures = self.pictures
        self.answer([*pictures, {"type": "text", "text": text}] if pictures else text)
        self.pictures = []

    def _last_question(self) -> Content:
        if not self.messages:
            raise RequestError("there is no message to answer again; write one")
        question: Content = self.messages[-2]["content"]
        return question

    def _answer_instead(self, content: Content) -> None:
        """Replace the last message by this one and answer it; change nothing if that fails."""
        before = self.messages
        self.messages = before[:-2]
        try:
            self.answer(content)
        except EdgeError:
            self.messages = before
            raise

    def _edit(self, text: str) -> None:
        last = self._last_question()
        pictures, question = ([], last) if isinstance(last, str) else (last[:-1], last[-1]["text"])
        if not text:
            if not sys.stdin.isatty():
                raise RequestError("an editor needs a terminal; give the text: /edit TEXT")
            try:
                edited = click.edit(question, extension=".md")
            except click.ClickException as error:
                raise RequestError(
                    f"the editor failed ({error.format_message()}); set EDITOR, or give the text: "
                    "/edit TEXT"
                ) from error
            text = (edited or "").strip("\n")
            if not text.strip():  # not saved, or everything deleted
                click.echo("Not edited.")
                return
            click.echo(f">>> {text}")
        self._answer_instead([*pictures, {"type": "text", "text": text}] if pictures else text)

    def _load(self, path: Path) -> None:
        messages = read_conversation(path)
        has_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else None
        self.messages = messages[has_system:]
        self.last = StreamPrinter()
        click.echo(f"Loaded {len(self.messages)} messages of {path}.")

    def _set(self, name: str = "", value: str = "") -> None:
        """Show the sampling parameters, or change one.

        Raises:
            RequestError: no such parameter, or a value that it does not take.
        """
        if name and name not in KNOBS:
            raise RequestError(f"there is no parameter {name!r}; there are {', '.join(KNOBS)}")
        if value:
            given: float | None = getattr(SamplingParams, name)
            if value != "default":
                kind = KNOBS[name].kind
                try:
                    given = kind(value)
                except ValueError as error:
                    number = "a whole number" if kind is int else "a number"
                    raise RequestError(f"{name} is {number} or default, not {value!r}") from error
            changed: dict[str, Any] = {name: given}
            self.params = replace(self.params, **changed)
        effective = self.params.resolve(self.llm.manifest.sampling)
        for knob in [name] if name else KNOBS:
            own = getattr(self.params, knob) == getattr(SamplingParams, knob)
            found = getattr(effective, knob)
            shown = {"seed": "fresh", "max_tokens": "what the KV cache holds"}.get(knob, "none")
            click.echo(f"  {knob:18} {shown if found is None else found}{'' if own else '  (set)'}")

    def _tokens_left(self) -> int:
        """Return how many tokens still fit; earlier reasoning is not sent again."""
        if self.last.stats is None:
            return self.llm.kv_capacity
        said = self.last.stats.prompt_tokens + len(self.llm.tokenizer.encode(self.last.text))
        return max(self.llm.kv_capacity - said, 0)

    def _tell_room(self) -> None:
        """Print on stderr how much room is left: always in a terminal, else if it is little."""
        if self.last.stats is None:
            return
        left, capacity = self._tokens_left(), self.llm.kv_capacity
        if left >= _NEARLY_FULL * capacity:
            if sys.stdout.isatty():
                click.echo(dim(f"[{left:,} of {capacity:,} tokens left]"), err=True)
        else:
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
    """While active, Ctrl-C sets a flag instead of raising anywhere; a second one raises."""
    interrupted = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _line_history() -> Iterator[None]:
    """Edit lines with a history kept under ``XDG_STATE_HOME``.

    Do nothing without a terminal, or for a user who has no directory for it.
    """
    state = user_directory("XDG_STATE_HOME", ".local/state")
    if state is None or not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # a Python built without it still reads lines
        yield
        return
    path = state / "edge-llm" / "history"
    # Chat even if the home cannot be written or the history is another library's.
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

"""Finds tool calls in a model's text, by the marks that its template teaches.

Two families are known. In Hermes (Qwen2.5, Qwen3 and others) a call is a JSON object between
``<tool_call>`` and ``</tool_call>``; DeepSeek has marks of its own. The chat template tells which
one a model uses, because it writes past calls in the same form.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from edge.text.messages import read_arguments

from .answers import CalledFunction, ToolCall

_FENCED = re.compile(r"\s*(.*?)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolSyntax:
    """How a family of models writes calls.

    Attributes:
        start, end: marks around one call.
        noise: further marks, which are dropped.
        read: turns the text between the marks into name and arguments (a JSON object, as text);
            None if it is no call.
    """

    start: str
    end: str
    noise: tuple[str, ...]
    read: Callable[[str], tuple[str, str] | None]


def _read_hermes(text: str) -> tuple[str, str] | None:
    try:
        call = msgspec.json.decode(text.strip().encode())
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode(arguments).decode()
    return _call(call["name"], arguments)


def _read_deepseek(text: str) -> tuple[str, str] | None:
    head, mark, tail = text.partition(_DEEPSEEK_SEPARATOR)
    if not mark:
        return None
    fenced = _FENCED.fullmatch(tail)  # R1 and V3; V3.1 has the name first and no fence
    name, arguments = (fenced[1], fenced[2]) if fenced else (head.strip(), tail.strip())
    return _call(name, arguments) if arguments else None


def _call(name: str, arguments: str) -> tuple[str, str] | None:
    found = read_arguments(arguments)
    return None if found is None else (name, arguments if found else "{}")


def _ends_within_text(begun: str) -> bool:
    """Whether this is the beginning of a JSON object that breaks off inside a string."""
    begun = begun.lstrip()
    try:
        _DECODER.raw_decode(begun)
    except json.JSONDecodeError as error:
        return begun.startswith("{") and error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


_DECODER = json.JSONDecoder()
_QUOTES = re.compile(r'\\.|"', re.DOTALL)  # quotes, and escaped characters, which may be quotes
_DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"
_XML_CALL = "<function="
HERMES = ToolSyntax("<tool_call>", "</tool_call>", (), _read_hermes)
DEEPSEEK = ToolSyntax(
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    _read_deepseek,
)


def syntax_of(template: str) -> ToolSyntax | None:
    """Find the family of a chat template by its source; None if it is unknown."""
    if _XML_CALL in template:  # Qwen3-Coder's, between Hermes' marks
        return None
    for syntax in (DEEPSEEK, HERMES):
        if syntax.start in template:
            return syntax
    return None


class ToolParser:
    """Finds calls in streamed text; the result does not depend on how the text is cut.

    Args:
        syntax: how the model's family writes calls.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        self._syntax = syntax
        self._marks = (syntax.start, *syntax.noise)
        self._held = ""
        self._inside = False
        self._passed = 0  # end marks before this place are inside a string of the call
        self._space = ""  # before the mark, dropped if a call follows
        self.found = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; return the plain text and the calls that are certain so far."""
        self._held += text
        plain: list[str] = []
        calls: list[ToolCall] = []
        while self._take_call(plain, calls) if self._inside else self._take_text(plain):
            pass
        return "".join(plain), calls

    def flush(self, *, is_cut: bool = False) -> tuple[str, list[ToolCall]]:
        """End the text; return the text held back, and a call in it that lacks its end mark.

        Args:
            is_cut: whether the model would have continued, so that an unfinished call stays text.
        """
        plain: list[str] = []
        calls: list[ToolCall] = []
        while True:
            call = self._syntax.read(self._held) if self._inside and not is_cut else None
            if call is not None or not self._passed:
                break
            self._give_up(plain)
            text, found = self.push("")
            plain.append(text)
            calls += found
        if call is not None:
            self._held, self._inside, self._passed = "", False, 0
            self.found += 1
            return "".join(plain), [*calls, make_call(*call, index=self.found - 1)]
        held = (self._space + self._syntax.start if self._inside else "") + self._held
        self._held, self._inside = "", False
        plain.append("" if self.found and not held.strip() else held)
        return "".join(plain), calls

    def _take_text(self, plain: list[str]) -> bool:
        places = [(self._held.find(mark), mark) for mark in self._marks]
        at, mark = min(((at, mark) for at, mark in places if at >= 0), default=(-1, ""))
        if at >= 0:
            # White space between answer and call, and between calls, belongs to the marks.
            before = self._held[:at].rstrip()
            plain.append(before)
            self._space = self._held[len(before) : at]
            self._held = self._held[at + len(mark) :]
            self._inside = mark == self._syntax.start
            return True
        safe = len(self._held) - max(_partial(self._held, mark) for mark in self._marks)
        certain = self._held[:safe].rstrip()
        plain.append(certain)
        self._held = self._held[len(certain) :]
        return False

    def _take_call(self, plain: list[str], calls: list[ToolCall]) -> bool:
        at = self._held.find(self._syntax.end, self._passed)
        if at < 0:
            return False
        if self._is_in_text(at):
            self._passed = at + len(self._syntax.end)
            return True
        call = self._syntax.read(self._held[:at])
        if call is None:
            self._give_up(plain)
        else:
            self._leave(at)
            calls.append(make_call(*call, index=self.found))
            self.found += 1
        return True

    def _is_in_text(self, at: int) -> bool:
        """Whether the end mark here is inside a string of the call's JSON.

        After the first mark only quotes are counted, since reading the whole call again for each
        mark would take quadratic time; whether it is JSON shows at its end.
        """
        if self._passed:
            found = _QUOTES.findall(self._held, self._passed, at)
            return found.count('"') % 2 == 0
        return _ends_within_text(self._held[: at + len(self._syntax.end)])

    def _give_up(self, plain: list[str]) -> None:
        """Treat as text what is no call, up to its first end mark: a call may follow that."""
        at = self._held.find(self._syntax.end)
        plain.append(f"{self._space}{self._syntax.start}{self._held[:at]}{self._syntax.end}")
        self._leave(at)

    def _leave(self, at: int) -> None:
        """Leave a call at its end mark, which is here."""
        self._held = self._held[at + len(self._syntax.end) :]
        self._inside, self._passed = False, 0


class CallsOrJSON(ToolParser):
    """A `ToolParser` for an answer that a grammar restricts to calls alone, or JSON without calls.

    The JSON may contain the marks in its strings.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        super().__init__(syntax)
        self._has_calls: bool | None = None  # not known before the first character

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text, as in `ToolParser.push`."""
        if self._has_calls is None and text.strip():
            self._has_calls = text.lstrip()[0] == self._syntax.start[0]
        return super().push(text) if self._has_calls else (text, [])


class WholeCall:
    """Reads an answer that a grammar has forced to be one call: JSON with name and arguments."""

    def __init__(self) -> None:
        self._text = ""
        self.found = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; return the call once it is whole."""
        self._text += text
        if not self._text.rstrip().endswith("}"):
            return "", []
        call = _read_hermes(self._text)
        if call is None:
            return "", []
        self._text = ""
        self.found = 1
        return "", [make_call(*call, index=0)]

    def flush(self, *, is_cut: bool = False) -> tuple[str, list[ToolCall]]:
        """Return text that did not become a call, as in `ToolParser.flush`."""
        held, self._text = self._text, ""
        return held, []


def make_call(name: str, arguments: str, *, index: int) -> ToolCall:
    """Make a call with a fresh id."""
    return ToolCall(f"call_{secrets.token_hex(12)}", CalledFunction(name, arguments), index=index)


def _partial(text: str, mark: str) -> int:
    """Return the length of the longest end of ``text`` that ``mark`` begins with."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)

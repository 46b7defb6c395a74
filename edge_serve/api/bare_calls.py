"""Finds a call that a model writes without the marks that its template teaches.

Qwen2.5-Coder answers with tools by the JSON object of a call alone, mostly in a fence. An answer
that begins with such an object, of the name of an offered tool, is a call, and so is each that
follows directly; anything else is text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import NoReturn

import msgspec

from .answers import ToolCall
from .tools import ToolParser, ToolSyntax, make_call

_FENCES = ("```json", "```", "")
_HEAD = '{"name":"'
_SPACE = re.compile(r"\s+")


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_json, parse_float=_finite)


class BareCallParser(ToolParser):
    """A `ToolParser` that takes a bare object at the beginning of an answer for a call, too.

    Args:
        syntax: the model's family.
        names: names of the tools that are offered.
    """

    def __init__(self, syntax: ToolSyntax, names: Collection[str]) -> None:
        super().__init__(syntax)
        self._names = names
        self._gap = re.compile(rf"\A(?:\s|{re.escape(syntax.end)})+")
        self._start: str | None = ""  # what may still become a bare call

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; see `ToolParser.push`."""
        if self._start is None:
            return super().push(text)
        self._start += text
        calls: list[ToolCall] = []
        while True:
            if self.found:
                self._start = self._gap.sub("", self._start)
            found = _read(self._start, self._names) if "}" in self._start else None
            if found is None:
                break
            name, arguments, self._start = found
            calls.append(make_call(name, arguments, index=self.found))
            self.found += 1
        may_end = self.found and self._syntax.end.startswith(self._start)
        if may_end or _may_become(self._start, self._names):
            return "", calls
        start, self._start = self._start, None
        plain, marked = super().push(start)
        return plain, [*calls, *marked]

    def flush(self, *, is_cut: bool = False) -> tuple[str, list[ToolCall]]:
        """End the text; see `ToolParser.flush`."""
        start, self._start = self._start or "", None
        plain, calls = super().push(start)
        rest, last_calls = super().flush(is_cut=is_cut)
        return plain + rest, [*calls, *last_calls]


def _split(text: str) -> tuple[str, str]:
    """The fence that a text begins with, if any, and what follows it."""
    text = text.lstrip()
    fence = next(fence for fence in _FENCES if text.startswith(fence))
    return fence, text[len(fence) :].lstrip()


def _may_become(text: str, names: Collection[str]) -> bool:
    """Whether more text can make a bare call of this one."""
    fence, body = _split(text)
    if not body or (fence == "```" and "json".startswith(body)) or "```json".startswith(body):
        return True
    head = _SPACE.sub("", body)
    if len(head) <= len(_HEAD):
        return _HEAD.startswith(head)
    name = head[len(_HEAD) :]
    return head.startswith(_HEAD) and any(
        f'{each}"'.startswith(name) or name.startswith(f'{each}"') for each in names
    )


def _read(text: str, names: Collection[str]) -> tuple[str, str, str] | None:
    """Name, arguments and the rest of a text that begins with a whole bare call."""
    fence, body = _split(text)
    try:
        call, end = _DECODER.raw_decode(body)
    except (ValueError, RecursionError):
        return None
    rest = body[end:]
    if fence:
        if not rest.lstrip().startswith("```"):
            return None
        rest = rest.lstrip()[3:]
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return None
    name, arguments = call["name"], call["arguments"]
    if name not in names or not isinstance(arguments, dict):
        return None
    try:
        return name, msgspec.json.encode(arguments).decode(), rest
    except UnicodeEncodeError:  # an escape of half a character
        return None

"""Finds a tool call that a model writes without the marks that its template teaches.

Qwen2.5-Coder often answers with the bare JSON object of a call, mostly in a fence. An answer that
begins with such an object, with the name of an offered tool, is a call. So is each object that
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
    """A `ToolParser` that also takes bare objects at the beginning of an answer for calls.

    Args:
        syntax: how the model's family writes calls.
        names: names of the offered tools.
    """

    def __init__(self, syntax: ToolSyntax, names: Collection[str]) -> None:
        super().__init__(syntax)
        self._names = names
        self._gap = re.compile(rf"\A(?:\s|{re.escape(syntax.end)})+")
        self._start: str | None = ""  # text that may still become a bare call

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text, as in `ToolParser.push`."""
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
        """End the text, as in `ToolParser.flush`."""
        start, self._start = self._start or "", None
        plain, calls = super().push(start)
        rest, last_calls = super().flush(is_cut=is_cut)
        return plain + rest, [*calls, *last_calls]


def _split(text: str) -> tuple[str, str]:
    """Split off the fence that a text begins with, if any."""
    text = text.lstrip()
    fence = next(fence for fence in _FENCES if text.startswith(fence))
    return fence, text[len(fence) :].lstrip()


def _may_become(text: str, names: Collection[str]) -> bool:
    """Whether more text can turn this one into a bare call."""
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
    """Read name, arguments and the rest of a text that begins with a whole bare call."""
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
    except UnicodeEncodeError:  # it escapes half of a surrogate pair
        return None

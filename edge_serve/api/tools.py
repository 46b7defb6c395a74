"""Finds tool calls in a model's text: which marks a template teaches, and how to read them.

Two families are known: Hermes (Qwen2.5, Qwen3 and others), where a call is a JSON object between
``<tool_call>`` and ``</tool_call>``, and DeepSeek's with marks of its own. Which one a model uses
is read from its chat template, which writes past calls in the same form.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edge.text.messages import read_arguments
from edge_serve.http.errors import invalid

from .answers import CalledFunction, ToolCall
from .protocol import ChatRequest, FunctionTool, NamedTool, Tool

_FENCED = re.compile(r"\s*(.*?)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
# Those of texts that llguidance keeps to; JSON Schema 2020-12 (7.2) lets others be.
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)


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
    """Whether this is the beginning of a JSON object, up to within one of its texts."""
    begun = begun.lstrip()
    try:
        _DECODER.raw_decode(begun)
    except json.JSONDecodeError as error:
        return begun.startswith("{") and error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


_DECODER = json.JSONDecoder()
_QUOTES = re.compile(r'\\.|"', re.DOTALL)  # and what is escaped, which may be one
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
    """Return the family that a chat template's source belongs to; None if it is not known."""
    if _XML_CALL in template:  # Qwen3-Coder's, between Hermes' marks
        return None
    for syntax in (DEEPSEEK, HERMES):
        if syntax.start in template:
            return syntax
    return None


class ToolParser:
    """Finds calls in streamed text; the result does not depend on how the text is cut.

    Args:
        syntax: the model's family.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        self._syntax = syntax
        self._marks = (syntax.start, *syntax.noise)
        self._held = ""
        self._inside = False
        self._passed = 0  # up to here, end marks are in a text of the call
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
        """End the text; return what was held back, and the call in it that lacks its end mark.

        Args:
            is_cut: whether the model would have gone on, so that what it began stays text.
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
        """Whether the end mark here is in a text of the call's JSON.

        After the first one, quotes tell, since to read the whole call again for each takes
        quadratic time; whether it is JSON shows at its end.
        """
        if self._passed:
            found = _QUOTES.findall(self._held, self._passed, at)
            return found.count('"') % 2 == 0
        return _ends_within_text(self._held[: at + len(self._syntax.end)])

    def _give_up(self, plain: list[str]) -> None:
        """Make text of what is no call, up to its first end mark: a call may follow that."""
        at = self._held.find(self._syntax.end)
        plain.append(f"{self._space}{self._syntax.start}{self._held[:at]}{self._syntax.end}")
        self._leave(at)

    def _leave(self, at: int) -> None:
        """End what is between the marks, of which the second is here."""
        self._held = self._held[at + len(self._syntax.end) :]
        self._inside, self._passed = False, 0


class CallsOrJSON(ToolParser):
    """A `ToolParser` for an answer that a grammar binds to be calls alone, or JSON and no call.

    JSON may have the marks in its texts.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        super().__init__(syntax)
        self._has_calls: bool | None = None  # not known before the first character

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; see `ToolParser.push`."""
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
        """Return the text that did not become a call; see `ToolParser.flush`."""
        held, self._text = self._text, ""
        return held, []


def make_call(name: str, arguments: str, *, index: int) -> ToolCall:
    """Make a call with a fresh id."""
    return ToolCall(f"call_{secrets.token_hex(12)}", CalledFunction(name, arguments), index=index)


def forced_schema(request: ChatRequest, loose: Collection[str] = ()) -> dict[str, Any] | None:
    """Return the JSON schema of an answer that must be a call; None where it need not be one.

    Args:
        request: the request.
        loose: names of functions that take any object. Another that is not strict has its schema
            without the formats that nothing here keeps to.

    Raises:
        APIError: 400 where ``tool_choice`` does not fit ``tools``.
    """
    choice, tools = request.tool_choice, request.tools or []
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        raise invalid("tool_choice: there are no tools to choose from; send tools", "tool_choice")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise invalid(
                f"tool_choice: no tool has the name {choice.function.name[:80]!r}", "tool_choice"
            )
    return _call_schema([(tool, _parameters(tool.function, loose)) for tool in tools])


def may_be_loose(request: ChatRequest) -> list[str]:
    """Return the names of functions that may take any object in a call that must come."""
    functions = [tool.function for tool in request.tools or []]
    names = [each.name for each in functions if not each.strict and each.parameters is not None]
    return list(dict.fromkeys(names))


def _parameters(function: FunctionTool, loose: Collection[str]) -> dict[str, Any] | None:
    if function.strict or function.parameters is None:
        return function.parameters
    return None if function.name in loose else without_other_formats(function.parameters)


def without_other_formats(schema: Any) -> Any:
    """Return a schema without the formats of texts that nothing here keeps to."""
    if isinstance(schema, list):
        return [without_other_formats(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("const", "enum") else without_other_formats(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in _FORMATS
    }


def has_form(request: ChatRequest) -> bool:
    """Whether the answer must have a form."""
    return request.response_format is not None and request.response_format.type != "text"


def bound_calls(request: ChatRequest, syntax: ToolSyntax | None) -> dict[str, Any] | None:
    """Return the source of the output form ``tool_calls``; None where nothing binds a call.

    A call may come or not; where one comes, it names a tool, and the arguments of a strict tool
    keep to its schema. That binds where a tool is strict, or where the answer has a form, for
    which a call comes instead.

    Args:
        request: a request whose ``tool_choice`` leaves the model free.
        syntax: the model's family.

    Raises:
        APIError: 400 where the family's calls cannot be bound to a schema, or the answer's form
            has no place for them.
    """
    tools = request.tools or []
    if not tools or request.tool_choice == "none":
        return None
    strict = [index for index, tool in enumerate(tools) if tool.function.strict]
    if has_form(request):
        assert request.response_format is not None
        kind = request.response_format.type
        if syntax is not HERMES or kind not in ("json_object", "json_schema"):
            raise invalid(
                f"response_format: an answer of the form {kind!r} has no place for the calls that "
                "this model writes; send no tools, tool_choice none, or no form",
                "response_format",
            )
    elif not strict:
        return None
    elif syntax is not HERMES:
        where = f"tools[{strict[0]}].function.strict"
        raise invalid(
            f"{where}: this model's calls cannot be bound to a schema while it is free to call; "
            "send tool_choice required or a function's name, or leave strict out",
            where,
        )
    shapes = [(tool, tool.function.parameters if tool.function.strict else None) for tool in tools]
    return {"start": HERMES.start, "end": HERMES.end, "schema": _call_schema(shapes)}


def _call_schema(shapes: Sequence[tuple[Tool, dict[str, Any] | None]]) -> dict[str, Any]:
    """The schema of one call: a tool's name, and arguments by its schema; None allows any object.

    An ``$id`` makes each of these schemas the root that its own references begin at.
    """
    options = []
    roots = {""}
    for index, (tool, parameters) in enumerate(shapes):
        arguments = {**_ANY_OBJECT, **(parameters or {})}
        given = arguments.get("$id")
        root = given.rstrip("#") if isinstance(given, str) else ""
        if root in roots:  # another tool's, or none
            arguments["$id"] = f"urn:edge-llm:tool:{index}"
        roots.add(root)
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return options[0] if len(options) == 1 else {"anyOf": options}


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools as chat templates take them, without the keys that were not sent.

    ``strict`` is for the server, not for the model, so templates do not see it.
    """
    plain: list[dict[str, Any]] = [msgspec.to_builtins(tool) for tool in tools]
    for tool in plain:
        tool["function"] = {
            key: value
            for key, value in tool["function"].items()
            if value is not None and key != "strict"
        }
    return plain


def prepare_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn the messages that OpenAI's clients send into those that `edge.text.chat_template` takes.

    A client that appends the server's own answer also sends empty keys (``refusal``,
    ``annotations``). Texts may have hints for a cache.
    """
    result = []
    for message in messages:
        copy = {key: value for key, value in message.items() if value is not None}
        if copy.get("annotations") == []:
            del copy["annotations"]
        if isinstance(copy.get("content"), list):
            copy["content"] = [_without_hint(part) for part in copy["content"]]
        result.append(copy)
    return result


def _without_hint(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {key: value for key, value in part.items() if key != "prompt_cache_breakpoint"}


def user_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what users wrote, whole or in parts; what is malformed is left for the template."""
    texts: list[str] = []
    for message in messages:
        if message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [content]
            given = [part.get("text") if isinstance(part, dict) else part for part in parts]
            texts += [text for text in given if isinstance(text, str)]
    return texts


def _partial(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that ``mark`` begins with."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)

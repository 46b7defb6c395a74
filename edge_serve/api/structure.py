"""Turns ``response_format`` and tools into the form that the engine holds an answer to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from edge_serve.http.errors import invalid

from .protocol import FunctionTool, ResponseFormat, Tool
from .tools import HERMES

if TYPE_CHECKING:
    from edge.runtime.structured_output import OutputFormat

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
# Text formats that llguidance enforces; JSON Schema 2020-12 (7.2) allows to ignore others.
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)


def output_format(
    wanted: ResponseFormat | None, must: Sequence[Tool], may: Sequence[Tool]
) -> OutputFormat | None:
    """Choose the form that an answer must have; None leaves it free.

    Args:
        wanted: the request's ``response_format``.
        must: tools of which one must be called.
        may: tools that may be called, in a bound call: it names one of them, and the arguments of a
            strict tool match its schema. If the answer has a form, a call may come instead.

    Raises:
        APIError: 400 for fields that contradict each other.
    """
    if wanted is None:
        wanted = ResponseFormat("text")
    for name in ("json_schema", "regex", "grammar"):
        given = getattr(wanted, name) is not None
        if given != (wanted.type == name):
            verb = "needs" if wanted.type == name else "does not take"
            raise invalid(
                f"response_format.{name}: the type {wanted.type!r} {verb} it",
                f"response_format.{name}",
            )
    if must:
        if wanted.type != "text":
            raise invalid(
                "response_format: cannot hold while tool_choice forces a call", "response_format"
            )
        return call_form(must)
    if not may and wanted.type == "text":
        return None
    from edge.runtime.structured_output import OutputFormat

    schema = None
    if wanted.json_schema is not None:
        schema = wanted.json_schema.schema
        if not wanted.json_schema.strict:
            schema = _without_other_formats(schema)
    if may:
        shapes = [
            (tool, tool.function.parameters if tool.function.strict else None) for tool in may
        ]
        calls = {"start": HERMES.start, "end": HERMES.end, "schema": _call_schema(shapes)}
        if wanted.type != "text":
            calls["answer"] = {"type": "object"} if schema is None else schema
        return OutputFormat("tool_calls", calls)
    if schema is not None:
        return OutputFormat("json_schema", schema)
    if wanted.regex is not None:
        return OutputFormat("regex", wanted.regex)
    if wanted.grammar is not None:
        return OutputFormat("grammar", wanted.grammar)
    return OutputFormat("json_object")


def call_form(tools: Sequence[Tool], loose: Collection[str] = ()) -> OutputFormat:
    """Return the form of an answer that must be a call.

    Args:
        tools: tools of which one is called, at least one.
        loose: names of functions that take any object. Another function that is not strict keeps
            its schema, but without formats that cannot be enforced.
    """
    from edge.runtime.structured_output import OutputFormat

    shapes = [(tool, _parameters(tool.function, loose)) for tool in tools]
    return OutputFormat("json_schema", _call_schema(shapes))


def _parameters(function: FunctionTool, loose: Collection[str]) -> dict[str, Any] | None:
    if function.strict or function.parameters is None:
        return function.parameters
    return None if function.name in loose else _without_other_formats(function.parameters)


def _without_other_formats(schema: Any) -> Any:
    """Return a schema without the text formats that cannot be enforced."""
    if isinstance(schema, list):
        return [_without_other_formats(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("const", "enum") else _without_other_formats(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in _FORMATS
    }


def _call_schema(shapes: Sequence[tuple[Tool, dict[str, Any] | None]]) -> dict[str, Any]:
    """Make the schema of one call: a tool's name, and arguments by its schema (None: any object).

    An ``$id`` makes each of these schemas the root for its own references.
    """
    options = []
    roots = {""}
    for index, (tool, parameters) in enumerate(shapes):
        arguments = {**_ANY_OBJECT, **(parameters or {})}
        given = arguments.get("$id")
        root = given.rstrip("#") if isinstance(given, str) else ""
        if root in roots:  # used by another tool, or empty
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

"""Turns ``response_format`` and tool choices into the form that the engine keeps to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_serve.http.errors import invalid

from .protocol import ResponseFormat
from .tools import without_other_formats

if TYPE_CHECKING:
    from edge.runtime.structured_output import OutputFormat


def output_format(
    wanted: ResponseFormat | None,
    forced: dict[str, Any] | None,
    calls: dict[str, Any] | None = None,
) -> OutputFormat | None:
    """Choose the form that an answer must have; None leaves it free.

    Args:
        wanted: the request's ``response_format``.
        forced: JSON schema of a tool call that must come.
        calls: form of calls that may come, see `tools.bound_calls`.

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
    if forced is not None and wanted.type != "text":
        raise invalid(
            "response_format: cannot hold while tool_choice forces a call", "response_format"
        )
    if forced is None and calls is None and wanted.type == "text":
        return None
    from edge.runtime.structured_output import OutputFormat

    if forced is not None:
        return OutputFormat("json_schema", forced)
    schema = None
    if wanted.json_schema is not None:
        schema = wanted.json_schema.schema
        if not wanted.json_schema.strict:
            schema = without_other_formats(schema)
    if calls is not None:
        if wanted.type != "text":
            calls = {**calls, "answer": {"type": "object"} if schema is None else schema}
        return OutputFormat("tool_calls", calls)
    if schema is not None:
        return OutputFormat("json_schema", schema)
    if wanted.regex is not None:
        return OutputFormat("regex", wanted.regex)
    if wanted.grammar is not None:
        return OutputFormat("grammar", wanted.grammar)
    return OutputFormat("json_object")

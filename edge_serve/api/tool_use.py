"""Decides how an answer may use the tools of a chat request: `ToolUse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from edge.errors import RequestError
from edge.text.begun_answer import take_begun_answer
from edge.text.chat_template import ChatTemplate
from edge_serve.http.errors import invalid

from .bare_calls import BareCallParser
from .pieces import MakeParser
from .protocol import ChatRequest, NamedTool, Tool
from .respond import Fallback
from .structure import call_form, output_format
from .tools import HERMES, CallsOrJSON, ToolParser, ToolSyntax, WholeCall, syntax_of

if TYPE_CHECKING:
    from edge.runtime.structured_output import OutputFormat


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """How one request may use its tools, and the form that its answer must have.

    Attributes:
        shown: tools as chat templates take them; None shows the model none.
        syntax: how the model writes calls; None if it must not write any freely.
        has_form: whether an answer without a call must have a form.
        make_parser: makes the parser that finds the calls in an answer; None looks for none.
        one_call: whether an answer ends with its first call.
        fallback: looser forms to use if ``output`` cannot be compiled.
        output: the form of the answer, calls included; None leaves it free.
    """

    shown: list[dict[str, Any]] | None
    syntax: ToolSyntax | None
    has_form: bool
    make_parser: MakeParser | None
    one_call: bool
    fallback: Fallback | None
    output: OutputFormat | None

    def parser_after(
        self, messages: Sequence[dict[str, Any]], *, reasons: bool
    ) -> MakeParser | None:
        """Return the maker of a parser for an answer that continues the last message.

        Args:
            messages: messages as the template gets them.
            reasons: whether the model reasons.

        Raises:
            APIError: 400, the answer must be a call and has begun as text, or has begun a call.
            RequestError: `take_begun_answer` refuses the messages.
        """
        if self.make_parser is None:
            return None
        _, begun = take_begun_answer(messages, reasons=reasons)
        if not begun.content:
            return self.make_parser
        if self.syntax is None:
            raise invalid(
                "tool_choice: the answer has begun as text, so it cannot be made a call; send "
                "auto, none or no tools",
                "tool_choice",
            )
        if self.syntax.start in begun.content:
            raise invalid(
                f"messages[{len(messages) - 1}].content: an answer that has begun a call cannot "
                "be continued with tools; send no tools, or the calls as tool_calls with their "
                "results",
                "messages",
            )
        return None if self.has_form else partial(ToolParser, self.syntax)


def read_tools(body: ChatRequest, template: ChatTemplate | None) -> ToolUse:
    """Decide how an answer may use the tools of a request.

    Args:
        body: the request.
        template: chat template of the model that answers.

    Raises:
        APIError: 400, fields contradict each other, or calls cannot be bound.
        RequestError: it is unknown how the model writes calls.
    """
    tools = [] if body.tool_choice == "none" else body.tools or []
    must = _must_call(body)
    syntax = None
    if tools and not must:
        syntax = call_syntax(template, has_tools=True)
        if syntax is None:
            raise RequestError(
                "tools: this model's chat template writes no tool calls in a form known here; "
                "send tool_choice with a function's name, or no tools"
            )
    has_form = body.response_format is not None and body.response_format.type != "text"
    may = tools if syntax is not None and _binds(body, tools, syntax) else []
    return ToolUse(
        shown=template_tools(tools) or None,
        syntax=syntax,
        has_form=has_form,
        make_parser=WholeCall if must else _parser_of(tools, syntax, has_form),
        one_call=bool(must) or body.parallel_tool_calls is False,
        fallback=_fallback(must),
        output=output_format(body.response_format, must, may),
    )


def call_syntax(template: ChatTemplate | None, *, has_tools: bool) -> ToolSyntax | None:
    """Return how a model writes calls: as its template teaches, else in the generic form.

    Args:
        template: the model's chat template.
        has_tools: whether the request has tools.
    """
    if template is None:
        return None
    if has_tools and "tools" not in template.variables:
        return HERMES
    return syntax_of(template.source)


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


def _must_call(body: ChatRequest) -> list[Tool]:
    """Return the tools of which the answer must call one; empty if it need not be a call."""
    choice, tools = body.tool_choice, body.tools or []
    if choice in (None, "none", "auto"):
        return []
    if not tools:
        raise invalid("tool_choice: there are no tools to choose from; send tools", "tool_choice")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise invalid(
                f"tool_choice: no tool has the name {choice.function.name[:80]!r}", "tool_choice"
            )
    return tools


def _binds(body: ChatRequest, tools: Sequence[Tool], syntax: ToolSyntax) -> bool:
    """Whether calls that the model is free to make are bound to their schemas.

    They are if a tool is strict, or if the answer has a form, which a call may replace.
    """
    wanted = body.response_format
    strict = [index for index, tool in enumerate(tools) if tool.function.strict]
    if wanted is not None and wanted.type != "text":
        if syntax is not HERMES or wanted.type not in ("json_object", "json_schema"):
            raise invalid(
                f"response_format: an answer of the form {wanted.type!r} has no place for the "
                "calls that this model writes; send no tools, tool_choice none, or no form",
                "response_format",
            )
        return True
    if strict and syntax is not HERMES:
        where = f"tools[{strict[0]}].function.strict"
        raise invalid(
            f"{where}: this model's calls cannot be bound to a schema while it is free to call; "
            "send tool_choice required or a function's name, or leave strict out",
            where,
        )
    return bool(strict)


def _parser_of(
    tools: Sequence[Tool], syntax: ToolSyntax | None, has_form: bool
) -> MakeParser | None:
    """Return the maker of a parser for an answer that need not be a call."""
    if syntax is None:
        return None
    if has_form:
        return partial(CallsOrJSON, syntax)
    if any(tool.function.strict for tool in tools):
        return partial(ToolParser, syntax)  # a bare call would be bound to no schema
    return partial(BareCallParser, syntax, {tool.function.name for tool in tools})


def _fallback(must: Sequence[Tool]) -> Fallback | None:
    """Return looser forms of a call, in which some functions take any object."""

    def alone(name: str) -> OutputFormat:
        return call_form([tool for tool in must if tool.function.name == name])

    functions = [tool.function for tool in must]
    names = [each.name for each in functions if not each.strict and each.parameters is not None]
    return Fallback(list(dict.fromkeys(names)), alone, partial(call_form, must)) if names else None

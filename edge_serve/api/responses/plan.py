"""Reads requests of ``POST /v1/responses``: each is converted to a chat, and planned as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from edge_serve.api.chat import plan_chat
from edge_serve.api.protocol import (
    ChatRequest,
    FunctionTool,
    JSONSchema,
    NamedTool,
    ResponseFormat,
    StreamOptions,
    Tool,
    ToolName,
    convert,
)
from edge_serve.api.respond import Plan, Turn
from edge_serve.http.errors import invalid
from edge_serve.pictures.forms import InputImage
from edge_serve.pictures.parts import part_of

from .protocol import (
    REFUSED,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputText,
    Item,
    MessageItem,
    Part,
    PastText,
    ReasoningItem,
    ResponsesRequest,
    ResponsesToolName,
    TextFormat,
)

NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    r"response_format\.json_schema": "text.format",
    "response_format": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    "enable_thinking": "reasoning.effort",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of a chat, as patterns, and their names here (`edge_serve.http.errors.renamed`)."""


def plan_response(turn: Turn, body: ResponsesRequest) -> Plan:
    """Turn the body of a request into a plan.

    Raises:
        APIError, RequestError: the fields contradict each other or do not fit the model.
    """
    for name, why in REFUSED.items():
        if getattr(body, name) is not None:
            raise invalid(f"{name}: {why}", name)
    chat = ChatRequest(
        model=body.model,
        messages=_messages_of(body),
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        parallel_tool_calls=body.parallel_tool_calls,
        user=body.user,
        stream=body.stream,
        stream_options=StreamOptions() if body.stream_options is not None else None,
        response_format=_format_of(body.text.format if body.text is not None else None),
    )
    if body.tools:
        chat.tools = [
            Tool("function", FunctionTool(t.name, t.description, t.parameters, t.strict))
            for t in body.tools
        ]
    choice = body.tool_choice
    if isinstance(choice, ResponsesToolName):
        chat.tool_choice = NamedTool("function", ToolName(choice.name))
    else:
        chat.tool_choice = choice
    if body.reasoning is not None:
        chat.reasoning_effort = body.reasoning.effort
    return plan_chat(turn, chat)


def _format_of(wanted: TextFormat | None) -> ResponseFormat | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        for name in ("name", "schema", "description", "strict"):
            if getattr(wanted, name) is not None:
                where = f"text.format.{name}"
                raise invalid(f"{where}: the type {wanted.type!r} does not take it", where)
        return ResponseFormat(wanted.type)
    if wanted.schema is None or wanted.name is None:
        where = f"text.format.{'schema' if wanted.schema is None else 'name'}"
        raise invalid(f"{where}: the type 'json_schema' needs it", where)
    schema = JSONSchema(wanted.name, wanted.schema, strict=wanted.strict)
    return ResponseFormat("json_schema", schema)


def _messages_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages = _Messages()
    if body.instructions is not None:
        messages.add("system", body.instructions)
    if isinstance(body.input, str):
        messages.add("user", body.input)
        return messages.all()
    for index, given in enumerate(body.input):
        if given.get("type") == "item_reference":
            where = f"input[{index}].type"
            raise invalid(
                f"{where}: an item_reference has nothing to refer to, as no items are stored; "
                "send the item itself, as clients do with store: false",
                where,
            )
    # The type of a message may be left out.
    items = convert([{"type": "message", **item} for item in body.input], list[Item], "input")
    for index, item in enumerate(items):
        if isinstance(item, MessageItem):
            content = _content(item.content, f"input[{index}].content", item.role)
            messages.add(item.role, content)
        elif isinstance(item, FunctionCallOutputItem):
            content = _content(item.output, f"input[{index}].output", "tool")
            messages.add("tool", content, tool_call_id=item.call_id)
        elif isinstance(item, FunctionCallItem):
            messages.call(item)
        else:
            messages.think(item)
    return messages.all()


class _Messages:
    """Collects messages; consecutive items of one answer become one message."""

    def __init__(self) -> None:
        self._done: list[dict[str, Any]] = []
        self._answer: dict[str, Any] | None = None

    def all(self) -> list[dict[str, Any]]:
        self._end_answer()
        return self._done

    def add(self, role: str, content: Any, **more: str) -> None:
        if role != "assistant":
            self._end_answer()
            self._done.append({"role": role, "content": content, **more})
            return
        if self._answer is None or self._answer.keys() & {"content", "tool_calls"}:
            self._begin_answer()
        assert self._answer is not None
        self._answer["content"] = content

    def think(self, item: ReasoningItem) -> None:
        self._begin_answer()
        assert self._answer is not None
        parts = item.content or item.summary
        self._answer["reasoning_content"] = "\n".join(part.text for part in parts)

    def call(self, item: FunctionCallItem) -> None:
        if self._answer is None:
            self._begin_answer()
        assert self._answer is not None
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        self._answer.setdefault("tool_calls", []).append(call)

    def _begin_answer(self) -> None:
        self._end_answer()
        self._answer = {"role": "assistant"}

    def _end_answer(self) -> None:
        if self._answer is not None:
            if "tool_calls" not in self._answer:
                self._answer.setdefault("content", "")
            self._done.append(self._answer)
        self._answer = None


def _content(content: str | Sequence[Part], where: str, role: str) -> Any:
    if isinstance(content, str):
        return content
    parts = []
    for index, part in enumerate(content):
        if isinstance(part, InputImage) and role == "user":
            parts.append(part_of(part.image_url, f"{where}[{index}].image_url"))
            continue
        text = _text(part, role)
        if text is None:
            kind = type(part).__struct_config__.tag
            why = f"has no place in {role}"
            if kind == "input_file":
                why = "is not read here; send its text"
            raise invalid(f"{where}[{index}]: a part of type {kind} {why}", f"{where}[{index}]")
        parts.append({"type": "text", "text": text})
    return parts


def _text(part: Part, role: Literal["assistant"] | str) -> str | None:
    """Return a part's text; None if a message of this role cannot have it."""
    if isinstance(part, InputText):
        return part.text if role != "assistant" else None
    if role != "assistant":
        return None
    if isinstance(part, PastText):
        return part.text
    return getattr(part, "refusal", None)

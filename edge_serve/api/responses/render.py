"""Writes answers of ``POST /v1/responses``, whole or as typed events."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from edge_serve.api.answers import ToolCall, Usage
from edge_serve.api.pieces import Piece
from edge_serve.api.respond import Plan, Render, Turn
from edge_serve.api.sse import named_event
from edge_serve.http.errors import APIError

from .answers import (
    CachedTokens,
    IncompleteDetails,
    ItemStatus,
    OutputCall,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    ReasoningTokens,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    SummaryText,
)
from .protocol import ReasoningConfig, ResponsesRequest, ResponsesTool, TextConfig, TextFormat

_Event = tuple[str, dict[str, Any]]


class ResponseRender(Render):
    """Writes the answer to a request in the form of OpenAI's Responses; a `Render`.

    A whole answer is built by the same steps as a stream, whose events are dropped. Two renders of
    the same tokens have the same ids.

    Args:
        turn: the request's context.
        body: the request.
        id_: the response's id; None makes a fresh one.
        created_at: Unix seconds of the request; None is now.
        stored: whether it can be fetched later.
        previous: id of the response whose conversation it continues.

    Attributes:
        response: the answer so far.
    """

    def __init__(
        self,
        turn: Turn,
        body: ResponsesRequest,
        *,
        id_: str | None = None,
        created_at: int | None = None,
        stored: bool = False,
        previous: str | None = None,
    ) -> None:
        reasoning = body.reasoning or ReasoningConfig()
        self._as_summary = reasoning.summary is not None
        self._open: OutputMessage | OutputReasoning | None = None
        self._sequence = 0
        self._ended_by = ""
        self.response = ResponseObject(
            id=id_ or f"resp_{secrets.token_hex(12)}",
            created_at=created_at or int(time.time()),
            model=turn.model_name,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            temperature=1.0,
            top_p=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            tools=[_shown_tool(tool) for tool in body.tools or ()],
            tool_choice=msgspec.to_builtins(body.tool_choice or "auto"),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            text=_shown_text(body.text or TextConfig()),
            reasoning=msgspec.to_builtins(reasoning),
            metadata=body.metadata or {},
            user=body.user,
            store=stored,
            background=bool(body.background),
            previous_response_id=previous,
        )
        if body.background:
            self.response.status = "queued"

    def begin(self, plan: Plan, prompt_tokens: int) -> None:
        """Implement `Render.begin`; the response names the sampling values that are used."""
        params = plan.params
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
            value = getattr(params, name)
            if value is not None:
                setattr(self.response, name, value)

    def failed(self, error: APIError) -> bytes:
        """Implement `Render.failed`."""
        self.response.status = "in_progress"  # as its first events say
        first = self._beginning()
        fail(self.response, error)
        return first + self._write([self._state("failed")])

    def events(self, index: int, piece: Piece) -> bytes:
        """Implement `Render.events`."""
        if piece.progress is None or piece.progress.ahead is None:
            self.response.status = "in_progress"
        return self._beginning() + self._write(self._steps(piece))

    def last_events(self, usage: Usage) -> bytes:
        """Implement `Render.last_events`."""
        self._finish(usage)
        return self._write([self._state(self.response.status)])

    def body(self, choices: Sequence[Piece], usage: Usage) -> ResponseObject:
        """Implement `Render.body`."""
        for piece in choices:
            for _ in self._steps(piece):
                pass  # the response has everything they say, too
        self._finish(usage)
        return self.response

    def _beginning(self) -> bytes:
        """Write the events that a stream begins with; clients refuse any other first event."""
        if self._sequence:
            return b""
        return self._write([self._state("created"), self._state("in_progress")])

    def _write(self, events: Any) -> bytes:
        """Number events and encode them, one by one, since the response changes between them."""
        data = []
        for name, fields in events:
            kind = f"response.{name}"
            numbered = {"type": kind, "sequence_number": self._sequence, **fields}
            data.append(named_event(kind, numbered))
            self._sequence += 1
        return b"".join(data)

    def _state(self, name: str) -> _Event:
        return name, {"response": self.response}

    def _steps(self, piece: Piece) -> Iterator[_Event]:
        """Add a piece to the response; yield its events."""
        if piece.reasoning:
            yield from self._add(OutputReasoning, "rs", piece.reasoning)
        if piece.text:
            yield from self._add(OutputMessage, "msg", piece.text)
        for call in piece.calls:
            yield from self._called(call)
        if piece.finish_reason is not None:
            self._ended_by = piece.finish_reason
            yield from self._close("incomplete" if piece.finish_reason == "length" else "completed")

    def _add(self, kind: Any, prefix: str, text: str) -> Iterator[_Event]:
        if not isinstance(self._open, kind):
            yield from self._close("completed")
            self._open = kind(self._own_id(prefix))
            self.response.output.append(self._open)
            yield "output_item.added", {**self._place(), "item": self._open}
            part = self._new_part()
            yield f"{self._part_name()}.added", {**self._part_place(), "part": part}
            self._parts().append(part)
        part = self._parts()[-1]
        part.text += text
        more: dict[str, Any] = {"logprobs": []} if kind is OutputMessage else {}
        yield f"{self._text_name()}.delta", {**self._part_place(), "delta": text, **more}

    def _close(self, status: ItemStatus) -> Iterator[_Event]:
        if self._open is None:
            return
        (part,) = self._parts()
        more: dict[str, Any] = {"logprobs": []} if isinstance(self._open, OutputMessage) else {}
        yield f"{self._text_name()}.done", {**self._part_place(), "text": part.text, **more}
        yield f"{self._part_name()}.done", {**self._part_place(), "part": part}
        self._open.status = status
        yield "output_item.done", {"output_index": self._index(), "item": self._open}
        self._open = None

    def _called(self, call: ToolCall) -> Iterator[_Event]:
        yield from self._close("completed")
        item = OutputCall(self._own_id("fc"), self._own_id("call"), call.function.name)
        self.response.output.append(item)
        index, arguments = self._index(), call.function.arguments
        place = {"item_id": item.id, "output_index": index}
        yield "output_item.added", {"output_index": index, "item": item}
        yield "function_call_arguments.delta", {**place, "delta": arguments}
        done = {**place, "name": item.name, "arguments": arguments}
        yield "function_call_arguments.done", done
        item.arguments, item.status = arguments, "completed"
        yield "output_item.done", {"output_index": index, "item": item}

    def _own_id(self, prefix: str) -> str:
        """Derive the id of the next item from that of the response."""
        place = f"{self.response.id} {len(self.response.output)}"
        return f"{prefix}_{hashlib.sha256(place.encode()).hexdigest()[:24]}"

    # The place of the open item, and its parts.

    def _index(self) -> int:
        return len(self.response.output) - 1

    def _place(self) -> dict[str, Any]:
        return {"output_index": self._index()}

    def _summarizes(self) -> bool:
        return self._as_summary and isinstance(self._open, OutputReasoning)

    def _part_place(self) -> dict[str, Any]:
        assert self._open is not None
        index = "summary_index" if self._summarizes() else "content_index"
        return {"item_id": self._open.id, **self._place(), index: 0}

    def _part_name(self) -> str:
        return "reasoning_summary_part" if self._summarizes() else "content_part"

    def _text_name(self) -> str:
        if isinstance(self._open, OutputMessage):
            return "output_text"
        return "reasoning_summary_text" if self._summarizes() else "reasoning_text"

    def _new_part(self) -> OutputText | SummaryText | ReasoningText:
        if isinstance(self._open, OutputMessage):
            return OutputText("")
        return SummaryText("") if self._summarizes() else ReasoningText("")

    def _parts(self) -> list[Any]:
        item = self._open
        if isinstance(item, OutputReasoning) and self._as_summary:
            return item.summary
        assert item is not None
        return item.content

    def _finish(self, usage: Usage) -> None:
        response = self.response
        response.completed_at = int(time.time())
        response.status = "completed"
        if self._ended_by == "length":
            response.status = "incomplete"
            response.completed_at = None
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        response.usage = ResponseUsage(
            usage.prompt_tokens,
            CachedTokens(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            ReasoningTokens(usage.completion_tokens_details.reasoning_tokens),
            usage.total_tokens,
        )


def fail(response: ResponseObject, error: APIError) -> None:
    """End a response with an error; its output so far stays."""
    response.status = "failed"
    response.error = ResponseError(error.code, error.shown)
    _end_items(response)


def cancel(response: ResponseObject) -> None:
    """End a response that is cancelled; its output so far stays."""
    response.status = "cancelled"
    _end_items(response)


def cut(response: ResponseObject) -> None:
    """End a response that has filled the context; its output so far stays."""
    response.status = "incomplete"
    response.incomplete_details = IncompleteDetails("max_output_tokens")
    _end_items(response)


def _end_items(response: ResponseObject) -> None:
    for item in response.output:
        if item.status == "in_progress":
            item.status = "incomplete"


def _shown_tool(tool: ResponsesTool) -> Raw:
    return Raw(msgspec.json.encode(replace(tool, strict=bool(tool.strict))))


def _shown_text(text: TextConfig) -> Raw:
    shown = text.format or TextFormat("text")
    if shown.type == "json_schema":
        shown = replace(shown, strict=bool(shown.strict))
        return Raw(msgspec.json.encode({"format": shown}))
    return Raw(msgspec.json.encode({"format": {"type": shown.type}}))

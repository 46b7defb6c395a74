"""Defines the answers of Anthropic's Messages API as types."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

from .protocol import DirectCaller

SIGNATURE = "unsigned"
"""Signature of every reasoning: the server signs none, but clients drop reasoning without one."""


class OutputDetails(Struct):
    """Details of the answer's tokens: how many belong to the reasoning."""

    thinking_tokens: int = 0


class MessageUsage(Struct):
    """Tokens of a message; prompt tokens that were in the cache are counted separately."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens_details: OutputDetails = field(default_factory=OutputDetails)
    cache_creation: None = None
    server_tool_use: None = None
    service_tier: None = None
    inference_geo: None = None


class AnswerText(Struct, tag_field="type", tag="text"):
    """A text."""

    text: str
    citations: None = None


class AnswerThinking(Struct, tag_field="type", tag="thinking"):
    """The reasoning."""

    thinking: str
    signature: str


class AnswerToolUse(Struct, tag_field="type", tag="tool_use"):
    """A call that the model asks for."""

    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller = field(default_factory=DirectCaller)


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse
StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class AnswerMessage(Struct):
    """The answer to ``POST /v1/messages``; a stream begins with one without content."""

    id: str
    model: str
    content: list[AnswerBlock]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    container: None = None
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class CountTokensResponse(Struct):
    """The answer to ``POST /v1/messages/count_tokens``."""

    input_tokens: int


class MessagesErrorBody(Struct):
    """An error: its type and message."""

    type: str
    message: str


class MessagesErrorResponse(Struct):
    """Any answer other than 200."""

    error: MessagesErrorBody
    request_id: str | None
    type: Literal["error"] = "error"

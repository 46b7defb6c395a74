"""Defines the answers of OpenAI's Responses API as types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, field

JSONObject = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
"""An object that stays encoded: what a client sent may be many times larger as Python objects."""

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(Struct, tag_field="type", tag="output_text"):
    """A text of the answer."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    """The text of the reasoning."""

    text: str


class SummaryText(Struct, tag_field="type", tag="summary_text"):
    """The whole reasoning, in place of a summary."""

    text: str


class OutputMessage(Struct, tag_field="type", tag="message"):
    """The answer's text."""

    id: str
    content: list[OutputText] = field(default_factory=list)
    status: ItemStatus = "in_progress"
    role: Literal["assistant"] = "assistant"


class OutputReasoning(Struct, tag_field="type", tag="reasoning"):
    """The reasoning."""

    id: str
    summary: list[SummaryText] = field(default_factory=list)
    content: list[ReasoningText] = field(default_factory=list)
    status: ItemStatus = "in_progress"


class OutputCall(Struct, tag_field="type", tag="function_call"):
    """A call that the model asks for; the arguments are JSON, as text."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


OutputItem = OutputMessage | OutputReasoning | OutputCall


class CachedTokens(Struct):
    """Details of the prompt's tokens: how many were in the cache."""

    cached_tokens: int = 0


class ReasoningTokens(Struct):
    """Details of the answer's tokens: how many belong to the reasoning."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct):
    """Tokens of one answer."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(Struct):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(Struct):
    """Why an answer failed."""

    code: str
    message: str


class ResponseObject(Struct, kw_only=True):
    """The answer to ``POST /v1/responses``, with the request's fields as they were understood."""

    id: str
    created_at: int
    model: str
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    tools: list[JSONObject]
    tool_choice: Any
    parallel_tool_calls: bool
    text: JSONObject
    reasoning: dict[str, str | None]
    metadata: dict[str, str]
    user: str | None
    status: Status = "in_progress"
    completed_at: int | None = None
    output: list[OutputItem] = field(default_factory=list)
    usage: ResponseUsage | None = None
    incomplete_details: IncompleteDetails | None = None
    error: ResponseError | None = None
    object: Literal["response"] = "response"
    store: bool = False
    background: bool = False
    truncation: Literal["disabled"] = "disabled"
    service_tier: Literal["default"] = "default"
    top_logprobs: Literal[0] = 0
    previous_response_id: str | None = None
    max_tool_calls: None = None
    safety_identifier: None = None
    prompt_cache_key: None = None


class DeletedResponse(Struct):
    """The answer to ``DELETE /v1/responses/{id}``."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True

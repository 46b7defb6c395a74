"""Defines requests of Anthropic's Messages API as types; an unknown field is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from edge.runtime.sampling_params import KNOBS
from edge_serve.api.protocol import NO_TOOLS, MaxTokens, ModelName, StopString, range_of
from edge_serve.pictures.forms import ImageBlock

VERSIONS = ("2026-10-21", "2023-06-01")
"""Values that the header ``anthropic-version`` may have; both get the same answers."""

IGNORED = {
    "cache_control": "prefixes are cached without it",
    "system[].cache_control": "prefixes are cached without it",
    "messages[].content[].cache_control": "prefixes are cached without it",
    "tools[].cache_control": "prefixes are cached without it",
    "tools[].eager_input_streaming": "arguments are streamed as one piece",
    "service_tier": "there is one tier",
    "messages[].content[].signature": "nothing here signs a reasoning, so nothing is checked",
    "messages[].content[].data": "only who encrypted a reasoning can read it",
    "messages[].content[].is_error": "templates have no place for it; the result's text says it",
    "messages[].content[].source.media_type": "what a picture is shows in its bytes",
    "context_management": "chat templates drop past reasoning as they were made to",
}
"""Fields that are accepted without effect, by path, and why."""


class TextBlock(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A text; ``citations`` must be empty, since no documents can be sent."""

    text: str
    citations: None = None
    cache_control: Any = None


class ThinkingBlock(Struct, forbid_unknown_fields=True, tag_field="type", tag="thinking"):
    """The reasoning of a past answer."""

    thinking: str
    signature: Any = None


class RedactedThinkingBlock(
    Struct, forbid_unknown_fields=True, tag_field="type", tag="redacted_thinking"
):
    """A past reasoning that only Anthropic can read."""

    data: Any = None


class DirectCaller(Struct, forbid_unknown_fields=True):
    """The caller of a tool: the model itself."""

    type: Literal["direct"] = "direct"


class ToolUseBlock(Struct, forbid_unknown_fields=True, tag_field="type", tag="tool_use"):
    """A call that the model asked for."""

    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller | None = None
    toolset_name: None = None
    cache_control: Any = None


class DocumentBlock(Struct, tag_field="type", tag="document"):
    """Refused: models here read text."""


class SearchResultBlock(Struct, tag_field="type", tag="search_result"):
    """Refused: models here cite nothing."""


Media = ImageBlock | DocumentBlock | SearchResultBlock


class ToolResultBlock(Struct, forbid_unknown_fields=True, tag_field="type", tag="tool_result"):
    """The result of a call."""

    tool_use_id: str
    content: str | list[TextBlock | Media] | None = None
    is_error: bool | None = None
    toolset_name: None = None
    cache_control: Any = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | Media


class InputMessage(Struct, forbid_unknown_fields=True):
    """A message; those of the role ``system`` may come anywhere."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Metadata(Struct, forbid_unknown_fields=True):
    """The field ``metadata``."""

    user_id: Annotated[str, Meta(max_length=512)] | None = None


class ThinkingEnabled(Struct, forbid_unknown_fields=True, tag_field="type", tag="enabled"):
    """Reasoning, for a number of tokens."""

    budget_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(Struct, forbid_unknown_fields=True, tag_field="type", tag="adaptive"):
    """Reasoning as long as the model wants it."""

    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(Struct, forbid_unknown_fields=True, tag_field="type", tag="disabled"):
    """No reasoning."""


class ToolChoiceAuto(Struct, forbid_unknown_fields=True, tag_field="type", tag="auto"):
    """The model may call."""

    disable_parallel_tool_use: bool | None = None


class ToolChoiceAny(Struct, forbid_unknown_fields=True, tag_field="type", tag="any"):
    """The model must call."""

    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(Struct, forbid_unknown_fields=True, tag_field="type", tag="tool"):
    """The model must call this tool."""

    name: str
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(Struct, forbid_unknown_fields=True, tag_field="type", tag="none"):
    """The model must not call."""


class MessagesTool(Struct, forbid_unknown_fields=True):
    """A tool that the client runs; Anthropic's own tools have other types and are refused."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Annotated[Literal["custom"], NO_TOOLS] | None = None
    strict: bool | None = None
    eager_input_streaming: Any = None
    cache_control: Any = None


class OutputSchema(Struct, forbid_unknown_fields=True):
    """The form of an answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, forbid_unknown_fields=True):
    """The field ``output_config``."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputSchema | None = None


class ClearThinking(Struct, forbid_unknown_fields=True):
    """The only edit of ``context_management`` that changes nothing here."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class ContextManagement(Struct, forbid_unknown_fields=True):
    """The field ``context_management``."""

    edits: list[ClearThinking] = []


class CountTokensRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/messages/count_tokens``."""

    model: ModelName | None = None
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoiceAuto | ToolChoiceAny | ToolChoiceTool | ToolChoiceNone | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    cache_control: Any = None


class MessagesRequest(CountTokensRequest, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/messages``."""

    max_tokens: MaxTokens
    temperature: Annotated[float, range_of("temperature")] | None = None
    top_p: Annotated[float, range_of("top_p")] | None = None
    top_k: Annotated[int, Meta(ge=0, le=KNOBS["top_k"].high)] | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=16)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Any = None
    container: None = None
    diagnostics: None = None
    inference_geo: None = None
    speed: None = None

"""Defines requests of OpenAI's Responses API as types; an unknown field is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from edge_serve.api.protocol import Effort, MaxTokens, ModelName, no_tools, range_of
from edge_serve.pictures.forms import InputImage

IGNORED = {
    "service_tier": "there is one tier",
    "safety_identifier": "bookkeeping of the caller",
    "client_metadata": "bookkeeping of the caller",
    "prompt_cache_key": "prefixes are found without it",
    "prompt_cache_retention": "the cache keeps what it can",
    "prompt_cache_options": "prefixes are found without it",
    "include": "reasoning comes in the clear",
    "max_tool_calls": "it bounds calls of tools that a server runs, and there are none",
    "text.format.name": "the schema binds the answer, whatever it is called",
    "text.format.description": "the model reads the input; say it there",
    "input[].id": "an item is what it says, whatever was stored",
    "input[].status": "an item is what it says, complete or not",
    "input[].phase": "templates have no place for it",
    "input[].encrypted_content": "only who encrypted a reasoning can read it",
    "input[].content[].prompt_cache_breakpoint": "prefixes are found without it",
    "input[].content[].annotations": "models here cite nothing",
    "input[].content[].logprobs": "the model reads texts",
    "input[].content[].detail": "how many tiles a picture has is the server's choice",
}
"""Fields that are accepted without effect, by path, and why."""

NEUTRAL = {
    "top_k": "OpenAI's API has no such field; -1 is off",
    "min_p": "OpenAI's API has no such field; 0 is off",
    "repetition_penalty": "OpenAI's API has no such field; 1 is off",
    "priority": "all requests have the same one",
}
"""Fields that gateways write into every request; only the value that asks for nothing is taken."""

REFUSED = {
    "conversation": "no conversations are kept here; send the whole one as input",
    "prompt": "no prompts are stored here; send instructions and input",
}
"""Fields that are refused unless they are null, and why."""


def _names_below(path: str) -> frozenset[str]:
    found = (name.rpartition(".") for name in IGNORED)
    return frozenset(name for above, _, name in found if above == path)


_IGNORED_IN = {
    "": _names_below(""),
    "input[]": _names_below("input[]"),
    "input[].content[]": _names_below("input[].content[]") - {"detail"},  # its value is checked
}


class InputText(Struct, forbid_unknown_fields=True, tag_field="type", tag="input_text"):
    """A text."""

    text: str
    prompt_cache_breakpoint: Any = None


class PastText(Struct, forbid_unknown_fields=True, tag_field="type", tag="output_text"):
    """A text of a past answer."""

    text: str
    annotations: Any = None
    logprobs: Any = None


class PastRefusal(Struct, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    """The refusal in a past answer, which is treated as text."""

    refusal: str


class InputFile(Struct, tag_field="type", tag="input_file"):
    """Refused: models here read text."""


Part = InputText | PastText | PastRefusal | InputImage | InputFile


class MessageItem(Struct, forbid_unknown_fields=True, tag_field="type", tag="message"):
    """A message."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: Any = None
    status: Any = None
    phase: Any = None


class FunctionCallItem(Struct, forbid_unknown_fields=True, tag_field="type", tag="function_call"):
    """A call that the model asked for; the arguments are JSON, as text."""

    call_id: str
    name: str
    arguments: str
    id: Any = None
    status: Any = None
    caller: None = None
    namespace: None = None


class FunctionCallOutputItem(
    Struct, forbid_unknown_fields=True, tag_field="type", tag="function_call_output"
):
    """The result of a call."""

    call_id: str
    output: str | list[Part]
    id: Any = None
    status: Any = None


class ReasoningPart(Struct, forbid_unknown_fields=True):
    """A part of a past reasoning, whole or as a summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Struct, forbid_unknown_fields=True, tag_field="type", tag="reasoning"):
    """A past reasoning; if it has no text, its summary counts."""

    summary: list[ReasoningPart] = []
    content: list[ReasoningPart] | None = None
    id: Any = None
    status: Any = None
    encrypted_content: Any = None


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem


_CODEX = (
    'Codex sends none with web_search = "disabled", [agents] enabled = false and no MCP servers'
)


class ResponsesTool(Struct, forbid_unknown_fields=True):
    """A function that the model may call; tools that a server would run have other types."""

    type: Annotated[Literal["function"], no_tools(_CODEX)]
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesToolName(Struct, forbid_unknown_fields=True):
    """A ``tool_choice`` that names a function."""

    type: Literal["function"]
    name: str


class TextFormat(Struct, forbid_unknown_fields=True):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Struct, forbid_unknown_fields=True):
    """The field ``text``; models here have only their own verbosity."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Struct, forbid_unknown_fields=True):
    """The field ``reasoning``; with ``summary`` the whole reasoning is sent as the summary."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStreamOptions(Struct, forbid_unknown_fields=True):
    """The field ``stream_options``; nothing is padded here."""

    include_obfuscation: Literal[False] | None = None


_Key = Annotated[str, Meta(max_length=64)]
_Value = Annotated[str, Meta(max_length=512)]


class ResponsesRequest(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The body of ``POST /v1/responses``; items are of the types that `Item` names.

    The values of fields without effect (`IGNORED`) are dropped at once, since they may be large.
    """

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    model: ModelName | None = None
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, range_of("temperature")] | None = None
    top_p: Annotated[float, range_of("top_p")] | None = None
    presence_penalty: Annotated[float, range_of("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, range_of("frequency_penalty")] | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolName | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: Annotated[dict[_Key, _Value], Meta(max_length=16)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: bool | None = None
    top_logprobs: Literal[0] | None = None
    top_k: Literal[-1] | None = None
    min_p: Annotated[float, Meta(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1, le=1)] | None = None
    priority: Literal[0] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    previous_response_id: Annotated[str, Meta(max_length=64)] | None = None
    conversation: Any = None
    prompt: Any = None
    store: bool | None = None
    service_tier: Any = None
    safety_identifier: Any = None
    client_metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    max_tool_calls: Any = None
    moderation: None = None

    def __post_init__(self) -> None:
        """Drop values without effect."""
        for name in _IGNORED_IN[""]:
            setattr(self, name, None)
        for item in self.input if isinstance(self.input, list) else ():
            _drop(item, "input[]")
            for parts in (item.get("content"), item.get("output")):
                for part in parts if isinstance(parts, list) else ():
                    if isinstance(part, dict):
                        _drop(part, "input[].content[]")


def _drop(value: dict[str, Any], path: str) -> None:
    for name in _IGNORED_IN[path] & value.keys():
        value[name] = None  # the key stays: not every type of item takes it

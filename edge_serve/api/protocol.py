"""Defines requests of the HTTP API as types; an unknown field is refused.

Unknown fields, wrong types and values out of range are errors that name the field. ``IGNORED`` has
the few fields that are accepted without effect, because no device could do anything about them.
``NEUTRAL`` has those that accept only the value that asks for nothing. Ranges of sampling
parameters come from `edge.runtime.sampling_params.KNOBS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from edge.other_names import instead_of
from edge.runtime.sampling_params import KNOBS
from edge_serve.http.errors import APIError, invalid

from .voting import VoteField

IGNORED = {
    "metadata": "bookkeeping of the caller",
    "store": "nothing is stored here",
    "service_tier": "there is one tier",
    "safety_identifier": "bookkeeping of the caller",
    "prompt_cache_key": "prefixes are found without it",
    "prompt_cache_retention": "the cache keeps what it can",
    "prompt_cache_options": "prefixes are found without it",
    "messages[].content[].prompt_cache_breakpoint": "prefixes are found without it",
    "modalities": "text is the only one",
    "response_format.json_schema.name": "the schema binds the answer, whatever it is called",
    "response_format.json_schema.description": "the model reads the messages; say it there",
    "messages[].content[].image_url.detail": "how many tiles a picture has is the server's choice",
    "messages[].name": "most templates have no place for it; one that reads message.name gets it",
}
"""Fields that are accepted without effect, by path, and why."""

NEUTRAL = {
    "no_stop_trim": "stop strings never come back",
    "skip_special_tokens": "control tokens are never text",
    "return_hidden_states": "hidden states are not returned",
    "separate_reasoning": "reasoning has a field of its own; include_reasoning leaves it out",
    "stream_reasoning": "reasoning is streamed as it comes",
}
"""Fields that gateways write into every request; only the value that asks for nothing is taken."""

RERANK_NEUTRAL = {
    "rid": "the id of a request is the header x-request-id",
    "top_k": "top_n bounds the documents that come back",
}
"""Fields that gateways write into every request to rerank, with the same rule."""

MAX_TEXTS = 2048
"""The most texts of one request that embeds or reranks; OpenAI's limit."""

Request = TypeVar("Request")
_type_info = cache(msgspec.inspect.type_info)


def range_of(name: str) -> Meta:
    """Return the range of a sampling parameter."""
    knob = KNOBS[name]
    return Meta(ge=knob.low, le=knob.high)


MaxTokens = Annotated[int, range_of("max_tokens")]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_Stops = StopString | Annotated[list[StopString], Meta(max_length=16)]
_TokenKey = Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")]
_Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """The field ``stream_options``.

    Attributes:
        include_usage: send the counts in a last chunk.
        include_obfuscation: must be false, since nothing is padded here.
    """

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class FunctionTool(Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def no_tools(*more: str) -> Meta:
    """Return metadata of a tool's type; an error about any other type adds its hints."""
    return Meta(extra={"hints": ["this server has no tools of its own to run", *more]})


NO_TOOLS = no_tools()
"""Metadata of the type of a tool; an error about any other type adds its hint."""


class Tool(Struct, forbid_unknown_fields=True):
    """An entry of ``tools``."""

    type: Annotated[Literal["function"], NO_TOOLS]
    function: FunctionTool


class ToolName(Struct, forbid_unknown_fields=True):
    """The function of a named ``tool_choice``."""

    name: str


class NamedTool(Struct, forbid_unknown_fields=True):
    """A ``tool_choice`` that names a function."""

    type: Literal["function"]
    function: ToolName


class JSONSchema(Struct, forbid_unknown_fields=True):
    """The schema of a ``response_format``; a strict one must not have an unsupported ``format``."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """The field ``response_format``; ``regex`` and ``grammar`` are extensions."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JSONSchema | None = None
    regex: Annotated[str, Meta(min_length=1, max_length=16384)] | None = None
    grammar: Annotated[str, Meta(min_length=1, max_length=65536)] | None = None


class TemplateOptions(Struct, forbid_unknown_fields=True):
    """The field ``chat_template_kwargs``: options of the chat template that clients may set."""

    enable_thinking: bool | None = None


class Sampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that chats and completions share; the model has its own defaults for absent ones."""

    model: ModelName | None = None
    temperature: Annotated[float, range_of("temperature")] | None = None
    top_p: Annotated[float, range_of("top_p")] | None = None
    # -1 means "off" for other servers.
    top_k: Annotated[int, Meta(ge=-1, le=KNOBS["top_k"].high)] | None = None
    min_p: Annotated[float, range_of("min_p")] | None = None
    repetition_penalty: Annotated[float, range_of("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, range_of("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, range_of("frequency_penalty")] | None = None
    logit_bias: Annotated[dict[_TokenKey, _Bias], Meta(max_length=1024)] | None = None
    # Narrower than the parameter's range: JSON readers have an int64.
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: _Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    ignore_eos: bool | None = None
    no_stop_trim: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    return_hidden_states: Literal[False] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None


class ChatRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_when_sure: Annotated[float, Meta(ge=0, le=1)] | None = None
    vote: VoteField | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None  # models here have only their own
    moderation: None = None


class CompletionRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/completions``."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class LoadRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/models/load`` and ``POST /v1/models/unload``."""

    model: ModelName


class LoadAdapterRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/load_lora_adapter``, as vLLM has it; ``model`` is the adapter's."""

    lora_name: ModelName
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    load_inplace: bool = False
    model: ModelName | None = None


class UnloadAdapterRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: ModelName
    model: ModelName | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /tokenize``: a text, or the messages of a chat."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /detokenize``."""

    model: ModelName | None = None
    tokens: list[TokenId]


class EmbeddingRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/embeddings``; ``prompt_name`` is an extension."""

    model: ModelName | None = None
    input: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    prompt_name: ModelName | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None


class TextDocument(Struct, forbid_unknown_fields=True):
    """A document of a rerank request, as an object."""

    text: str


class RerankRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/rerank``; ``instruction`` is an extension."""

    model: ModelName | None = None
    query: str
    documents: Annotated[list[str | TextDocument], Meta(min_length=1, max_length=MAX_TEXTS)]
    top_n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    return_documents: bool | None = None
    instruction: str | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    rid: None = None
    top_k: None = None


_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_SCAN_BYTES = 64 * 2**10
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_PLACE = re.compile(r" - at (?:`key` in )?`\$(.*)`$")
_STEP = re.compile(r"\[[^]]*\]|[^.\[]+")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_RANGE = re.compile(r"expected `(int|float)` [<>]=? ")
_MOST_LETTERS = 64  # letters of an unknown name to compare with those of fields
_MOST_MESSAGE_CHARS = 1000  # of each end of an error, which quotes names that the client chose
_MISSING = re.compile(r"missing required field `([^`]*)`")


def nesting(body: bytes) -> int:
    """Count the levels of arrays and objects in a JSON text; an invalid text counts up to there."""
    deepest = level = start = 0
    in_string = False
    while start < len(body):  # in parts, between which other threads get the interpreter
        end = start + _SCAN_BYTES
        part = body[start:end]
        if (len(part) - len(part.rstrip(b"\\"))) % 2:
            end += 1  # the escaped character belongs to this part
        part = (b'"' if in_string else b"") + body[start:end]
        in_string = _ESCAPE.sub(b"", part).count(b'"') % 2 == 1
        # The closing quote is optional in the pattern, so that it never backtracks.
        brackets = _STRING.sub(b"", part).translate(None, _NOT_BRACKETS)
        if brackets:
            codes = np.frombuffer(brackets, np.uint8)
            opens = (codes == ord("[")) | (codes == ord("{"))
            levels = level + np.cumsum(np.where(opens, 1, -1), dtype=np.int64)
            deepest, level = max(deepest, int(levels.max())), int(levels[-1])
        start = end
    return deepest


def decode(
    body: bytes,
    kind: type[Request],
    max_nesting: int,
    on_unknown: Callable[[int], None] | None = None,
) -> Request:
    """Read a request.

    Args:
        body: the body, JSON.
        kind: type of the request.
        max_nesting: the most levels of arrays and objects.
        on_unknown: called with the number of unknown fields, which are then left out; None refuses
            them.

    Raises:
        APIError: 400; it names the field at fault, if there is one.
    """
    # Counting takes a moment; most bodies have fewer brackets than the levels allowed.
    num_opened = body.count(b"[") + body.count(b"{")
    deep = nesting(body) if num_opened > max_nesting else num_opened
    if deep > max_nesting:
        raise invalid(
            f"the body nests {deep} levels deep; at most {max_nesting} are read", code="too_deep"
        )
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        known: tuple[str, ...] = getattr(kind, "__struct_encode_fields__", ())
        value = msgspec.json.decode(body) if on_unknown else None
        if on_unknown and isinstance(value, dict) and (unknown := value.keys() - {*known}):
            on_unknown(len(unknown))
            return convert({name: value[name] for name in value.keys() & {*known}}, kind, "")
        raise _wrong_field(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise invalid(
            "the body is not valid JSON in UTF-8; send one JSON object", code="invalid_json"
        ) from None


def convert(value: Any, kind: type[Request], where: str) -> Request:
    """Turn plain JSON data of a request into a type.

    Args:
        value: the data.
        kind: the type.
        where: path of the data in the request.

    Raises:
        APIError: 400; it names the field at fault.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error), kind, where) from None


def _wrong_field(message: str, kind: Any, above: str = "") -> APIError:
    if len(message) > 2 * _MOST_MESSAGE_CHARS:
        message = f"{message[:_MOST_MESSAGE_CHARS]}…{message[-_MOST_MESSAGE_CHARS:]}"
    place = _PLACE.search(message)
    where = (above + (place[1] if place else "")).lstrip(".")
    what = message[: place.start()] if place else message
    steps = _STEP.findall(place[1]) if place else []
    info = _type_info(kind)
    for pattern, code in ((_UNKNOWN, "unknown_field"), (_MISSING, "missing_field")):
        found = pattern.search(what)
        if found:
            name = f"{where}.{found[1]}" if where else found[1]
            text = "this field is required"
            if code == "unknown_field":
                text = f"unknown field; {_instead(found[1], info, steps)}"
            return invalid(f"{name[:200]}: {text}", param=name[:200], code=code)
    types = list(_types_at(info, steps))
    what = what[:1].lower() + what[1:]
    if what.startswith("invalid "):  # msgspec does not say what would be valid
        hints = [
            hint
            for each in types
            if isinstance(each, msgspec.inspect.Metadata) and each.extra
            for hint in each.extra.get("hints", [])
        ]
        if what.startswith("invalid value "):
            values = [each.tag for each in _types_at(info, steps[:-1]) if _is_tagged(each, steps)]
        else:
            values = [value for each in types for value in getattr(each, "values", ())]
        send = f"send {' or '.join(map(_quoted, dict.fromkeys(values)))}"
        what = "; ".join([what[:200], *([send] if values else ()), *dict.fromkeys(hints)])
    elif " of length " not in what and (allowed := _numbers(what, types)):
        what = allowed
    return invalid(f"{where or 'body'}: {what}"[:500], param=where or None)


def _instead(name: str, info: Any, steps: list[str]) -> str:
    """Say which field of the object at a place an unknown one probably means."""
    known = [
        field.encode_name
        for each in _types_at(info, steps)
        if isinstance(each, msgspec.inspect.StructType)
        for field in each.fields
    ]
    # To compare a name of megabytes would keep the interpreter from other threads.
    return instead_of(name[:_MOST_LETTERS], known, "remove it, or see the list of fields")


def _numbers(what: str, types: list[Any]) -> str | None:
    """Say in words which numbers a place takes; None if ``what`` is about something else."""
    if {type(each) for each in types} == {msgspec.inspect.NoneType}:
        return "nothing is computed by it here; leave it out"
    if what.endswith("multiple of 1.0"):
        return "expected a whole number"
    for each in types:
        if _RANGE.match(what) and getattr(each, "ge", None) is not None and each.le is not None:
            low, high = _number(each.ge), _number(each.le)
            if low == high:
                return f"only {low} is taken here; leave it out"
            return f"expected a number from {low} to {high}"
    return None


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def _types_at(info: Any, steps: list[str]) -> Iterator[Any]:
    """Find the types that a place of a request may have, metadata among them.

    Args:
        info: type that the steps begin at.
        steps: keys and indices, the latter in brackets.
    """
    if not steps:
        yield info
    if isinstance(info, msgspec.inspect.Metadata):
        yield from _types_at(info.type, steps)
    elif isinstance(info, msgspec.inspect.UnionType):
        for each in info.types:
            yield from _types_at(each, steps)
    elif isinstance(info, msgspec.inspect.ListType) and steps:
        yield from _types_at(info.item_type, steps[1:])
    elif isinstance(info, msgspec.inspect.StructType) and steps:
        for field in info.fields:
            if field.encode_name == steps[0]:
                yield from _types_at(field.type, steps[1:])


def _is_tagged(info: Any, steps: list[str]) -> bool:
    """Whether the steps end in the field that chooses a type; lenient types have own errors."""
    return (
        isinstance(info, msgspec.inspect.StructType)
        and info.forbid_unknown_fields
        and info.tag_field == steps[-1]
    )


def _quoted(value: Any) -> str:
    return repr(value) if isinstance(value, str) else msgspec.json.encode(value).decode()

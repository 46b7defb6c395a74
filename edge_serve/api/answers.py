"""Defines the answers of the HTTP API as types; `edge_serve.api.openapi` shows them to clients."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from edge_serve.pictures import Modalities

from .voting import VoteAnswer


class PromptDetails(Struct):
    """Details of the prompt's tokens: how many were in the cache."""

    cached_tokens: int = 0


class CompletionDetails(Struct):
    """Details of the answer's tokens: how many belong to the reasoning."""

    reasoning_tokens: int = 0


class Usage(Struct):
    """Tokens of one answer, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class CalledFunction(Struct):
    """Name and arguments (JSON, as text) of a call."""

    name: str
    arguments: str


class ToolCall(Struct):
    """A call that the model asks for; only chunks have an ``index``."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET


class TopLogprob(Struct):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The sampled token and the likeliest ones at its position."""

    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(Struct):
    """Log-probabilities of an answer's tokens, reasoning included."""

    content: list[TokenLogprob]
    refusal: None = None


class Message(Struct):
    """An answer; the reasoning has both names that clients look for."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    vote: VoteAnswer | UnsetType = UNSET
    refusal: None = None
    annotations: list[Any] = []


class Choice(Struct):
    """One answer of a chat."""

    index: int
    message: Message
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Struct):
    """The answer to a chat."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class PromptProgress(Struct):
    """How far a prompt has been read; ``ahead`` only while it waits in the queue."""

    total: int
    cache: int
    processed: int
    time_ms: int
    ahead: int | UnsetType = UNSET


class Delta(Struct, omit_defaults=True):
    """The text or calls that a chunk adds to an answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    vote: VoteAnswer | UnsetType = UNSET


class ChunkChoice(Struct):
    """A chunk of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Struct):
    """One event of a streamed chat."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET


class TextLogprobs(Struct):
    """Log-probabilities in the form of completions; the very first token has None."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(Struct):
    """One answer of a completion, or a chunk of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(Struct):
    """The answer to a completion, or one event of it."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET


class InputUsage(Struct):
    """Tokens of texts for which nothing is generated."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(Struct):
    """The vector of one text: numbers, or float32 in little-endian order as base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(Struct):
    """The answer to ``POST /v1/embeddings``."""

    data: list[EmbeddingItem]
    model: str
    usage: InputUsage
    object: Literal["list"] = "list"


class RankedDocument(Struct):
    """A document that was ranked."""

    text: str


class RankedResult(Struct):
    """How probably a document is what the query asks for, with its place in the request."""

    index: int
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class RerankResponse(Struct):
    """The answer to ``POST /v1/rerank``, the best document first."""

    id: str
    model: str
    results: list[RankedResult]
    usage: InputUsage
    object: Literal["list"] = "list"


class ModelState(Struct):
    """Whether a model is loaded, in the words of llama.cpp's router; ``failed`` has the reason."""

    value: Literal["loaded", "loading", "unloaded", "failed"]
    failed: str | UnsetType = UNSET


class ModelCard(Struct):
    """A model that is served; ``sampling`` has the defaults for fields that a request leaves out.

    ``reasons`` says whether its answers to chats may begin with reasoning, which can then be
    limited or skipped; for a name that stands for several models, whether all of them do.
    ``size_bytes`` is the size of the bundle's files. ``architecture`` says what it reads, as
    llama.cpp's router and OpenRouter do. ``parent`` is the model that an adapter is for.
    """

    id: str
    created: int
    max_model_len: int
    sampling: dict[str, float] | UnsetType = UNSET
    reasons: bool | UnsetType = UNSET
    task: Literal["generate", "embed", "rerank"] | UnsetType = UNSET
    object: Literal["model"] = "model"
    owned_by: str = "edge-llm"
    size_bytes: int | UnsetType = UNSET
    status: ModelState | UnsetType = UNSET
    architecture: Modalities | UnsetType = UNSET
    parent: str | UnsetType = UNSET


class ModelList(Struct):
    """The answer to ``GET /v1/models``."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class LoadResponse(Struct):
    """The answer to ``POST /v1/models/load`` and ``POST /v1/models/unload``."""

    success: bool = True


class TokenizeResponse(Struct):
    """The tokens of a text; prompt and answer together may have ``max_model_len`` tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct):
    """The text of tokens."""

    prompt: str


class ErrorBody(Struct):
    """An error: its message, type and code, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(Struct):
    """Any answer other than 200."""

    error: ErrorBody

"""Reads the facts of a request that decide which model answers it (`edge_serve.models.route`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from edge.text.tokenizer import Tokenizer
from edge_serve.http.threads import OnPiece
from edge_serve.models.registry import ModelEntry
from edge_serve.models.route import Facts

from .anthropic.protocol import CountTokensRequest, MessagesRequest, ToolChoiceNone
from .ollama.protocol import GenerateRequest, OllamaChatRequest, OllamaRequest
from .protocol import ChatRequest, CompletionRequest
from .responses.protocol import ResponsesRequest

TextRequest = (
    ChatRequest
    | CompletionRequest
    | MessagesRequest
    | CountTokensRequest
    | ResponsesRequest
    | OllamaRequest
)


def facts_of(
    request: TextRequest, request_id: str, prompt_tokens: Mapping[str, int] | None = None
) -> Facts:
    """Return the facts that rules and splits may know about a request.

    Args:
        request: the request.
        request_id: takes the place of a user that the request does not name.
        prompt_tokens: tokens of the prompt by model, from `count_tokens`.
    """
    return Facts(prompt_tokens or {}, _kind_of(request), _user_of(request) or request_id)


def _user_of(request: TextRequest) -> str | None:
    if isinstance(request, OllamaRequest | CountTokensRequest):
        metadata = request.metadata if isinstance(request, MessagesRequest) else None
        return metadata.user_id if metadata is not None else None
    return request.user


def _kind_of(request: TextRequest) -> str:
    if isinstance(request, CompletionRequest):
        return "completion"
    if isinstance(request, GenerateRequest) and (request.raw or request.suffix is not None):
        return "completion"
    if isinstance(request, OllamaRequest):
        tools = isinstance(request, OllamaChatRequest) and bool(request.tools)
        form = bool(request.format)
    elif isinstance(request, CountTokensRequest):
        tools = bool(request.tools) and not isinstance(request.tool_choice, ToolChoiceNone)
        form = request.output_config is not None and request.output_config.format is not None
    elif isinstance(request, ResponsesRequest):
        tools = bool(request.tools) and request.tool_choice != "none"
        wanted = request.text.format if request.text is not None else None
        form = wanted is not None and wanted.type != "text"
    else:
        tools = bool(request.tools) and request.tool_choice != "none"
        form = request.response_format is not None and request.response_format.type != "text"
    return "tools" if tools else "json" if form else "chat"


def count_tokens(
    request: TextRequest, limits: Mapping[ModelEntry, int], on_piece: OnPiece
) -> dict[str, int]:
    """Count the tokens of a request's texts for each of some models.

    Only text that the client wrote counts, without what a chat template adds.

    Args:
        request: the request.
        limits: models, and the number up to which each count must be exact. A larger count may be
            too low, but not below the limit, so that a long text costs no more than it must.
        on_piece: called after each piece of a long text; an exception from it ends the count.

    Returns:
        The counts by model name.
    """
    pieces = list(prompt_pieces(request))
    texts = [piece for piece in pieces if isinstance(piece, str)]
    num_ids = len(pieces) - len(texts)
    most: dict[str, int] = {}  # models of one family share a tokenizer
    for model, limit in limits.items():
        key = _tokenizer_key(model)
        most[key] = max(limit, most.get(key, 0))
    counts: dict[str, int] = {}
    found: dict[str, int] = {}
    for model in limits:
        key = _tokenizer_key(model)
        if key not in counts:
            left = most[key] - num_ids
            counts[key] = num_ids + _count(model.tokenizer(), texts, left, on_piece)
        found[model.name] = counts[key]
    return found


def _tokenizer_key(model: ModelEntry) -> str:
    return model.manifest.files["tokenizer.json"].sha256


def _count(tokenizer: Tokenizer, texts: list[str], limit: int, on_piece: OnPiece) -> int:
    least = sum(map(tokenizer.least_tokens, texts))
    if least > limit:
        return least
    total = 0
    for text in texts:
        total += len(tokenizer.encode(text, on_piece=on_piece))
        if total > limit:
            break
    return total


def prompt_pieces(request: TextRequest) -> Iterator[str | int]:
    """Yield the texts and token ids that the client wrote for the model to read."""
    return _pieces(_prompt_of(request))


def _prompt_of(request: TextRequest) -> list[Any]:
    """Collect the values of a request's text fields."""
    if isinstance(request, CompletionRequest):
        return [request.prompt, request.suffix]
    if isinstance(request, CountTokensRequest):
        return [request.system, *(message.content for message in request.messages)]
    if isinstance(request, ResponsesRequest):
        return [request.instructions, request.input]
    if isinstance(request, OllamaChatRequest):
        return [message.content for message in request.messages or ()]
    if isinstance(request, GenerateRequest):
        return [request.prompt, request.system, request.suffix]
    if isinstance(request, ChatRequest):
        return [message.get("content") for message in request.messages]
    return []


def _pieces(value: Any) -> Iterator[str | int]:
    """Yield the texts and token ids in a prompt, a message or its content."""
    if isinstance(value, str | int):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, dict):
        for key in ("text", "content", "output"):
            yield from _pieces(value.get(key))
    elif isinstance(value, msgspec.Struct):
        for key in ("text", "content", "output"):
            yield from _pieces(getattr(value, key, None))

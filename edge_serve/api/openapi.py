"""Makes ``/openapi.json`` from the types that requests are read with, so that the two agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import msgspec

from edge import __version__

from .answers import (
    ChatCompletion,
    DetokenizeResponse,
    EmbeddingList,
    ErrorResponse,
    LoadResponse,
    ModelCard,
    ModelList,
    RerankResponse,
    TextCompletion,
    TokenizeResponse,
)
from .anthropic.answers import AnswerMessage, CountTokensResponse, MessagesErrorResponse
from .anthropic.protocol import IGNORED as MESSAGES_IGNORED
from .anthropic.protocol import CountTokensRequest, MessagesRequest
from .ollama.answers import (
    EmbedAnswer,
    EmbeddingsAnswer,
    GenerateAnswer,
    OllamaChatAnswer,
    OllamaErrorResponse,
    OllamaModels,
    ShowAnswer,
    VersionAnswer,
)
from .ollama.protocol import IGNORED as OLLAMA_IGNORED
from .ollama.protocol import (
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    OllamaChatRequest,
    ShowRequest,
)
from .protocol import (
    IGNORED,
    NEUTRAL,
    RERANK_NEUTRAL,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    LoadRequest,
    RerankRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from .responses.answers import DeletedResponse, ResponseObject
from .responses.protocol import IGNORED as RESPONSES_IGNORED
from .responses.protocol import NEUTRAL as RESPONSES_NEUTRAL
from .responses.protocol import REFUSED as RESPONSES_REFUSED
from .responses.protocol import Item, ResponsesRequest

_STATUSES = {
    "400": "a wrong request",
    "401": "no valid API key",
    "403": "this host name is not allowed, or this client may not do that",
    "404": "no such path or model",
    "405": "the path does not take this method",
    "408": "the request came too slowly",
    "409": "requests run on the model",
    "413": "the body is too large",
    "415": "not JSON",
    "429": "the queue is full, or too many requests; see Retry-After",
    "431": "the head is too large",
    "500": "the engine failed at this request",
    "501": "a library is missing here",
    "503": "loading, draining, or the engine cannot serve; see Retry-After",
    "504": "it did not end in the time that the server allows",
}
# path: summary, request, response (None is any JSON; a string is a media type)
_POSTS: dict[str, tuple[str, type, type]] = {
    "/v1/chat/completions": ("Answer a chat", ChatRequest, ChatCompletion),
    "/v1/completions": ("Continue a text", CompletionRequest, TextCompletion),
    "/v1/responses": ("Answer items of OpenAI's Responses", ResponsesRequest, ResponseObject),
    "/v1/messages": ("Answer a chat of Anthropic's form", MessagesRequest, AnswerMessage),
    "/v1/messages/count_tokens": (
        "Count the tokens of such a chat",
        CountTokensRequest,
        CountTokensResponse,
    ),
    "/v1/embeddings": ("Texts to vectors", EmbeddingRequest, EmbeddingList),
    "/v1/rerank": ("Judge documents by a query", RerankRequest, RerankResponse),
    "/v1/models/load": ("Load a model", LoadRequest, LoadResponse),
    "/v1/models/unload": ("Unload a model", LoadRequest, LoadResponse),
    "/v1/load_lora_adapter": ("Load an adapter", LoadAdapterRequest, LoadResponse),
    "/v1/unload_lora_adapter": ("Unload an adapter", UnloadAdapterRequest, LoadResponse),
    "/api/chat": ("Answer a chat of Ollama's form", OllamaChatRequest, OllamaChatAnswer),
    "/api/generate": ("Answer a prompt of Ollama's form", GenerateRequest, GenerateAnswer),
    "/api/show": ("One model, in Ollama's form", ShowRequest, ShowAnswer),
    "/api/embed": ("Texts to vectors, in Ollama's form", EmbedRequest, EmbedAnswer),
    "/api/embeddings": (
        "A text to a vector, in its older form",
        EmbeddingsRequest,
        EmbeddingsAnswer,
    ),
    "/tokenize": ("Text to token ids", TokenizeRequest, TokenizeResponse),
    "/detokenize": ("Token ids to text", DetokenizeRequest, DetokenizeResponse),
}
_GETS: dict[str, tuple[str, type | str]] = {
    "/v1/models": ("The models that are served", ModelList),
    "/v1/models/{id}": ("One model", ModelCard),
    "/api/tags": ("The models that are served, in Ollama's form", OllamaModels),
    "/api/ps": ("Those that are loaded, and until when", OllamaModels),
    "/api/version": ("The version of Ollama's API", VersionAnswer),
    "/tokenizer_info": ("What a client needs to know about the tokenizer", dict),
    "/health": ("Whether the process lives", dict),
    "/ready": ("Whether to send requests", dict),
    "/stats": ("Counters and percentiles", dict),
    "/metrics": ("Metrics for Prometheus", "text/plain"),
    "/openapi.json": ("This document", dict),
    "/": ("The page", "text/html"),
}
# Paths with an id in them and no body.
_STORED: dict[tuple[str, str], tuple[str, type]] = {
    ("get", "/v1/responses/{id}"): ("A stored response as it stands", ResponseObject),
    ("delete", "/v1/responses/{id}"): ("Remove a stored response", DeletedResponse),
    ("post", "/v1/responses/{id}/cancel"): ("End one in the background", ResponseObject),
}
# Types that hold a field without effect, by the part of its path above it.
_HOLDERS: dict[str, tuple[str, ...]] = {
    "": ("ChatRequest", "CompletionRequest"),
    "response_format.json_schema": ("JSONSchema",),
}
_MESSAGES_HOLDERS: dict[str, tuple[str, ...]] = {
    "": ("MessagesRequest", "CountTokensRequest"),
    "system[]": ("TextBlock",),
    "messages[].content[]": (
        "TextBlock",
        "ToolUseBlock",
        "ToolResultBlock",
        "ThinkingBlock",
        "RedactedThinkingBlock",
    ),
    "tools[]": ("MessagesTool",),
}
_RESPONSES_HOLDERS: dict[str, tuple[str, ...]] = {
    "": ("ResponsesRequest",),
    "text.format": ("TextFormat",),
    "input[]": ("MessageItem", "FunctionCallItem", "FunctionCallOutputItem", "ReasoningItem"),
    "input[].content[]": ("InputText", "PastText"),
}
_STREAMS = {
    "/v1/chat/completions": "text/event-stream",
    "/v1/completions": "text/event-stream",
    "/v1/responses": "text/event-stream",
    "/v1/messages": "text/event-stream",
    "/api/chat": "application/x-ndjson",
    "/api/generate": "application/x-ndjson",
}
_OLLAMA_HOLDERS: dict[str, tuple[str, ...]] = {
    "": (
        "OllamaChatRequest",
        "GenerateRequest",
        "ShowRequest",
        "EmbedRequest",
        "EmbeddingsRequest",
    ),
    "options": ("OllamaOptions",),
    "messages[].tool_calls[]": ("OllamaCall",),
    "messages[].tool_calls[].function": ("OllamaCalledFunction",),
}
_NEUTRAL = {
    "ChatRequest": NEUTRAL,
    "CompletionRequest": NEUTRAL,
    "RerankRequest": RERANK_NEUTRAL,
    "ResponsesRequest": RESPONSES_NEUTRAL,
}
_ERRORS: dict[str, type] = {
    "/v1/messages": MessagesErrorResponse,
    "/v1/messages/count_tokens": MessagesErrorResponse,
}
_ERRORS |= dict.fromkeys(
    (path for path in (*_POSTS, *_GETS) if path.startswith("/api/")), OllamaErrorResponse
)


@cache
def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    types = [kind for _, *kinds in _POSTS.values() for kind in kinds]
    types += [kind for _, kind in _GETS.values() if isinstance(kind, type) and kind is not dict]
    types += [kind for _, kind in _STORED.values()]
    types += [ErrorResponse, *_ERRORS.values(), *Item.__args__]
    _, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    _describe(components, IGNORED, _HOLDERS)
    _describe(components, MESSAGES_IGNORED, _MESSAGES_HOLDERS)
    _describe(components, RESPONSES_IGNORED, _RESPONSES_HOLDERS)
    _describe(components, OLLAMA_IGNORED, _OLLAMA_HOLDERS)
    for holder, neutral in _NEUTRAL.items():
        for name in neutral.keys() & components[holder]["properties"].keys():
            field = components[holder]["properties"][name]
            field["description"] = f"Only the value that asks for nothing: {neutral[name]}."
    for name, why in RESPONSES_REFUSED.items():
        components["ResponsesRequest"]["properties"][name] = {
            "type": "null",
            "description": f"Refused: {why}.",
        }
    # Items are read one by one, since the type of a message may be left out.
    components["ResponsesRequest"]["properties"]["input"]["description"] = (
        "A text, or items: " + ", ".join(kind.__name__ for kind in Item.__args__) + "."
    )
    paths: dict[str, Any] = {}
    content: dict[str, Any]
    for path, (summary, request, response) in _POSTS.items():
        content = {"application/json": _content(response)}
        if path in _STREAMS:
            content[_STREAMS[path]] = {"schema": {"description": "JSON objects, one per event"}}
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": _content(request)},
                },
                "responses": _responses(content, _ERRORS.get(path, ErrorResponse)),
            }
        }
    bare: dict[tuple[str, str], tuple[str, type | str]] = {
        **{("get", path): described for path, described in _GETS.items()},
        **_STORED,
    }
    for (method, path), (summary, kind) in bare.items():
        if isinstance(kind, str):
            content = {kind: {"schema": {"type": "string"}}}
        else:
            content = {"application/json": _content(kind)}
        responses = _responses(content, _ERRORS.get(path, ErrorResponse))
        operation: dict[str, Any] = {"summary": summary, "responses": responses}
        if "{id}" in path:
            operation["parameters"] = [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "edge-llm", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"key": []}, {"x_api_key": []}],
    }


def _describe(
    components: dict[str, Any], ignored: Mapping[str, str], holders: Mapping[str, Sequence[str]]
) -> None:
    """Describe each field without effect: that it has none, and why."""
    for path, why in ignored.items():
        above, _, name = path.rpartition(".")
        for holder in holders.get(above, ()):  # messages of a chat are free-form objects
            field = components[holder]["properties"].get(name)
            if field is not None:
                field["description"] = f"No effect: {why}."


def _content(kind: type) -> dict[str, Any]:
    if kind is dict:
        return {"schema": {"type": "object"}}
    return {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}


def _responses(content: dict[str, Any], error: type = ErrorResponse) -> dict[str, Any]:
    errors = {
        status: {
            "description": text,
            "content": {"application/json": _content(error)},
        }
        for status, text in _STATUSES.items()
    }
    return {"200": {"description": "success", "content": content}, **errors}

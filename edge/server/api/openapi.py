"""Makes ``/openapi.json`` from the types that requests are read with, so that it cannot differ."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from edge import __version__

from .answers import (
    ChatCompletion,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TextCompletion,
    TokenizeResponse,
)
from .protocol import (
    IGNORED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_STATUSES = {
    "400": "a wrong request",
    "401": "no valid API key",
    "403": "this host name is not allowed",
    "404": "no such path or model",
    "405": "the path does not take this method",
    "408": "the request came too slowly",
    "413": "the body is too large",
    "415": "not JSON",
    "429": "the queue is full, or too many requests; see Retry-After",
    "431": "the head is too large",
    "500": "the engine failed at this request",
    "501": "a library is missing here",
    "503": "loading, draining, or the engine cannot serve; see Retry-After",
}
# path: summary, request, response (None is any JSON; a string is a media type)
_POSTS: dict[str, tuple[str, type, type]] = {
    "/v1/chat/completions": ("Answer a chat", ChatRequest, ChatCompletion),
    "/v1/completions": ("Continue a text", CompletionRequest, TextCompletion),
    "/tokenize": ("Text to token ids", TokenizeRequest, TokenizeResponse),
    "/detokenize": ("Token ids to text", DetokenizeRequest, DetokenizeResponse),
}
_GETS: dict[str, tuple[str, type | str]] = {
    "/v1/models": ("The models that are served", ModelList),
    "/v1/models/{id}": ("One model", ModelCard),
    "/tokenizer_info": ("What a client needs to know about the tokenizer", dict),
    "/health": ("Whether the process lives", dict),
    "/ready": ("Whether to send requests", dict),
    "/stats": ("Counters and percentiles", dict),
    "/metrics": ("Metrics for Prometheus", "text/plain"),
    "/openapi.json": ("This document", dict),
    "/": ("The page", "text/html"),
}
_REQUESTS = ("ChatRequest", "CompletionRequest")
_STREAMING = ("/v1/chat/completions", "/v1/completions")


@cache
def openapi() -> dict[str, Any]:
    """Return the document, OpenAPI 3.1."""
    types = [kind for _, *kinds in _POSTS.values() for kind in kinds]
    types += [kind for _, kind in _GETS.values() if isinstance(kind, type) and kind is not dict]
    types.append(ErrorResponse)
    _, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    for path, why in IGNORED.items():
        *above, name = path.split(".")
        holders = ("JSONSchema",) if above[-1:] == ["json_schema"] else _REQUESTS
        for holder in holders:
            field = components[holder]["properties"].get(name)
            if field is not None:  # messages are free-form objects here
                field["description"] = f"No effect: {why}."
    paths: dict[str, Any] = {}
    content: dict[str, Any]
    for path, (summary, request, response) in _POSTS.items():
        content = {"application/json": _content(response)}
        if path in _STREAMING:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": _content(request)},
                },
                "responses": _responses(content),
            }
        }
    for path, (summary, kind) in _GETS.items():
        if isinstance(kind, str):
            content = {kind: {"schema": {"type": "string"}}}
        else:
            content = {"application/json": _content(kind)}
        operation: dict[str, Any] = {"summary": summary, "responses": _responses(content)}
        if "{id}" in path:
            operation["parameters"] = [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "edge-llm", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _content(kind: type) -> dict[str, Any]:
    if kind is dict:
        return {"schema": {"type": "object"}}
    return {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    errors = {
        status: {
            "description": text,
            "content": {"application/json": _content(ErrorResponse)},
        }
        for status, text in _STATUSES.items()
    }
    return {"200": {"description": "success", "content": content}, **errors}

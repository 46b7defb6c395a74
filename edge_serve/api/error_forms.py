"""Chooses by the path whose form an error is written in: OpenAI's, except on other APIs' paths."""

from __future__ import annotations

import msgspec

from edge_serve.http.errors import APIError
from edge_serve.http.guard import Scope

from .anthropic.errors import error_envelope
from .ollama.answers import OllamaErrorResponse

_MESSAGES = ("/v1/messages", "/messages")
_OLLAMA = "/api/"


def error_body(error: APIError, scope: Scope) -> bytes:
    """Return the JSON of an error that answers a request.

    Args:
        error: the error.
        scope: ASGI's scope, with the id of the request.
    """
    path: str = scope["path"]
    if path.startswith(_MESSAGES):
        return msgspec.json.encode(error_envelope(error, scope["request_id"]))
    if path.startswith(_OLLAMA):
        return msgspec.json.encode(OllamaErrorResponse(error.shown))
    return error.body()

"""Reads from a request what decides which model answers it; see `edge.server.models.route`."""

from __future__ import annotations

from typing import Any

from edge.server.models.route import Facts

from .protocol import ChatRequest, CompletionRequest

_CHARS_PER_TOKEN = 4


def facts_of(request: ChatRequest | CompletionRequest, request_id: str) -> Facts:
    """Return what rules and splits may know about a request."""
    key = request.user or request_id
    if isinstance(request, CompletionRequest):
        chars = _num_chars(request.prompt) + _num_chars(request.suffix)
        return Facts(chars, "completion", key)
    kind = "chat"
    if request.tools and request.tool_choice != "none":
        kind = "tools"
    elif request.response_format is not None and request.response_format.type != "text":
        kind = "json"
    return Facts(sum(_num_chars(m.get("content")) for m in request.messages), kind, key)


def _num_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return _CHARS_PER_TOKEN
    if isinstance(value, list):
        return sum(_num_chars(item) for item in value)
    if isinstance(value, dict):
        return _num_chars(value.get("text"))
    return 0

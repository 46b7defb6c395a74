"""Reads from a request what decides which model answers it; see `edge.server.models.route`."""

from __future__ import annotations

from typing import Any

import msgspec

from edge.server.models.route import Facts

from .anthropic.protocol import CountTokensRequest, MessagesRequest, ToolChoiceNone
from .ollama.protocol import GenerateRequest, OllamaChatRequest, OllamaRequest
from .protocol import ChatRequest, CompletionRequest
from .responses.protocol import ResponsesRequest

_CHARS_PER_TOKEN = 4
TextRequest = (
    ChatRequest
    | CompletionRequest
    | MessagesRequest
    | CountTokensRequest
    | ResponsesRequest
    | OllamaRequest
)


def facts_of(request: TextRequest, request_id: str) -> Facts:
    """Return what rules and splits may know about a request."""
    if isinstance(request, CompletionRequest):
        chars = _num_chars(request.prompt) + _num_chars(request.suffix)
        return Facts(chars, "completion", request.user or request_id)
    if isinstance(request, CountTokensRequest):
        metadata = request.metadata if isinstance(request, MessagesRequest) else None
        user = metadata.user_id if metadata is not None else None
        chars = _num_chars(request.system) + sum(_num_chars(m.content) for m in request.messages)
        calls = bool(request.tools) and not isinstance(request.tool_choice, ToolChoiceNone)
        has_form = request.output_config is not None and request.output_config.format is not None
        return Facts(chars, _kind(calls, has_form), user or request_id)
    if isinstance(request, OllamaRequest):
        return _facts_of_ollama(request, request_id)
    if isinstance(request, ResponsesRequest):
        chars = _num_chars(request.instructions) + _num_chars(request.input)
        calls = bool(request.tools) and request.tool_choice != "none"
        form = request.text.format if request.text is not None else None
        has_form = form is not None and form.type != "text"
        return Facts(chars, _kind(calls, has_form), request.user or request_id)
    chars = sum(_num_chars(m.get("content")) for m in request.messages)
    calls = bool(request.tools) and request.tool_choice != "none"
    has_form = request.response_format is not None and request.response_format.type != "text"
    return Facts(chars, _kind(calls, has_form), request.user or request_id)


def _facts_of_ollama(request: OllamaRequest, request_id: str) -> Facts:
    kind = _kind(calls=False, has_form=bool(request.format))
    chars = 0
    if isinstance(request, OllamaChatRequest):
        chars = sum(_num_chars(message.content) for message in request.messages or ())
        kind = _kind(bool(request.tools), bool(request.format))
    elif isinstance(request, GenerateRequest):
        chars = sum(map(_num_chars, (request.prompt, request.system, request.suffix)))
        if request.raw or request.suffix is not None:
            kind = "completion"
    return Facts(chars, kind, request_id)


def _kind(calls: bool, has_form: bool) -> str:
    return "tools" if calls else "json" if has_form else "chat"


def _num_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return _CHARS_PER_TOKEN
    if isinstance(value, list):
        return sum(_num_chars(item) for item in value)
    if isinstance(value, dict):
        return sum(_num_chars(value.get(key)) for key in ("text", "content", "output"))
    if isinstance(value, msgspec.Struct):
        return sum(_num_chars(getattr(value, key, None)) for key in ("text", "content"))
    return 0

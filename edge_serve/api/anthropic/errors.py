"""Writes errors in the form of Anthropic's API."""

from __future__ import annotations

from typing import Any

from edge_serve.http.errors import APIError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}
NAMES = {
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    "thinking_token_budget": "thinking.budget_tokens",
    "user": "metadata.user_id",
}
"""Fields of a chat, as patterns, and their names here (`edge_serve.http.errors.renamed`)."""


def error_envelope(error: APIError, request_id: str | None = None) -> dict[str, Any]:
    """Return an error as plain data."""
    message = error.shown
    if error.code == "context_length_exceeded":
        # Agents look for these words to know when to shorten their history.
        message = (
            f"prompt is too long: {error.extra['n_prompt_tokens']} tokens > "
            f"{error.extra['n_ctx']} maximum; {message}"
        )
    elif error.code == "deadline_exceeded":
        return _envelope("timeout_error", message, request_id)
    return _envelope(_TYPES.get(error.status, "invalid_request_error"), message, request_id)


def _envelope(kind: str, message: str, request_id: str | None) -> dict[str, Any]:
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }

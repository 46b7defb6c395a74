"""Turns errors into HTTP answers in OpenAI's envelope, and hides what clients must not see.

The envelope is ``{"error": {"message", "type", "param", "code"}}`` with ``code`` a string. Messages
about wrong requests are shown; all others stay in the log, since they may contain paths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from edge.errors import (
    ContextLengthError,
    DeadlineError,
    DependencyError,
    EdgeError,
    OverloadError,
    RequestError,
    ResourceError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable",
    504: "service_unavailable",
    505: "invalid_request_error",
}
# Parts of a message that never belong in an answer: addresses (CVE-2026-22778), and paths except
# those of this API.
_SECRETS = re.compile(
    r"\b0x[0-9a-fA-F]{6,}"
    r"|(?<![\w:/.<])"
    r"(?!/v1/(?:models|embeddings|rerank|(?:chat/)?completions|messages|responses)(?![\w/.+-])|/api/[a-z]+(?![\w/.+-]))"
    r"/(?:[\w.+-]+/)+[\w.+-]*"
)
_MOST_FIELD_CHARS = 200
_MOST_SHOWN_CHARS = 4000  # of a message, besides what it quotes
_FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): ")


class APIError(Exception):
    """An error to answer a request with.

    Args:
        status: HTTP's status code.
        code: OpenAI's short name of the cause.
        message: what was wrong, what was found and what to do.
        param: the field at fault.
        retry_after_s: seconds after which to try again.
        should_retry: tells OpenAI's clients whether to retry, whatever the status says.
        allow: the methods that this path takes.
        close: whether the connection ends with this answer.
        quoted: part of the message that the client itself wrote, so it is no secret.
        extra: further keys of the envelope's error.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        allow: str | None = None,
        close: bool = False,
        quoted: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry
        self.allow = allow
        self.close = close
        self.quoted = quoted
        self.extra = extra or {}

    @property
    def type(self) -> str:
        """OpenAI's class of the error."""
        return _TYPES.get(self.status, "server_error")

    def envelope(self) -> dict[str, Any]:
        """Return the body as plain data."""
        error = {
            "message": self.shown,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error | self.extra}

    @property
    def shown(self) -> str:
        """Message that clients may see."""
        parts = self.message.split(self.quoted) if self.quoted else [self.message]
        shown = (_SECRETS.sub("…", part[:_MOST_SHOWN_CHARS]) for part in parts)
        return (self.quoted or "").join(shown)

    def body(self) -> bytes:
        """Return the body as JSON."""
        return msgspec.json.encode(self.envelope())

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to this error."""
        result = {"content-type": "application/json", "cache-control": "no-store"}
        if self.retry_after_s is not None:
            result["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.should_retry is not None:
            result["x-should-retry"] = "true" if self.should_retry else "false"
        if self.allow is not None:
            result["allow"] = self.allow
        if self.status == 401:
            result["www-authenticate"] = "Bearer"
        if self.close:
            result["connection"] = "close"
        return result


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> APIError:
    """Make a 400: the request is wrong."""
    return APIError(400, code, message, param=param)


def draining() -> APIError:
    """Make a 503: the server is about to stop."""
    return APIError(
        503,
        "draining",
        "the server is shutting down; try again in a moment",
        retry_after_s=5,
        close=True,
    )


def stalled() -> APIError:
    """Make a 503: the engine hangs."""
    return APIError(
        503, "engine_stalled", "the engine does not respond; try again later", retry_after_s=30
    )


def as_api_error(error: BaseException) -> APIError:
    """Turn any exception into an answer; a message that could hold secrets is replaced."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextLengthError):
        rows = getattr(error, "num_rows", 0)  # set by `edge.vision.prompt.PicturesLengthError`
        of_pictures = f" or send fewer pictures, whose rows are {rows} of them" if rows else ""
        return APIError(
            400,
            "context_length_exceeded",
            f"the prompt has {error.num_tokens} tokens{' or more' if error.at_least else ''}, but "
            f"the context holds {error.capacity} and one must be left for the answer; shorten the "
            f"prompt{of_pictures}",
            param="messages",
            extra={"n_prompt_tokens": error.num_tokens, "n_ctx": error.capacity},
        )
    if isinstance(error, RequestError):
        message = str(error)
        field = _FIELD.match(message, 0, _MOST_FIELD_CHARS)
        return invalid(message, param=field[1] if field else None)
    if isinstance(error, OverloadError):
        return APIError(429, "queue_full", str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, DeadlineError):
        return APIError(
            504,  # a proxy asks another device after a 503, and then a third
            "deadline_exceeded",
            "the request did not finish in the time that the server allows; ask for fewer tokens",
            retry_after_s=5,
            should_retry=False,
        )
    if isinstance(error, ResourceError):
        return APIError(
            503,
            "insufficient_memory",
            "the device is short of memory or too busy; try again later",
            retry_after_s=10,
        )
    if isinstance(error, DependencyError):
        return APIError(
            501,
            "not_installed",
            "this server lacks a library that the request needs; its log has the name",
            should_retry=False,
        )
    if isinstance(error, EdgeError):
        return APIError(
            500,
            "engine_error",
            "the engine failed at this request; the server's log has the cause",
            should_retry=False,
        )
    return APIError(
        500,
        "internal_error",
        "the server failed at this request; its log has the cause",
        should_retry=False,
    )


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Rename fields in the errors of the block, for a protocol other than OpenAI's chats.

    Args:
        names: patterns of a chat's fields, as a message may begin with them, and the protocol's
            names; the first that matches counts.

    Raises:
        APIError: it also replaces any `EdgeError`.
    """
    try:
        yield
    except (APIError, EdgeError) as error:
        answer = as_api_error(error)
        _rename(answer, names)
        if answer is error:
            raise
        raise answer from error


def _rename(error: APIError, names: Mapping[str, str]) -> None:
    old = error.param
    for pattern, name in names.items():
        if old is not None and re.match(rf"{pattern}(?!\w)", old):
            error.param = re.sub(pattern, name, old, count=1)
            if error.message.startswith(old):
                error.message = error.param + error.message[len(old) :]
                error.args = (error.message,)
            return

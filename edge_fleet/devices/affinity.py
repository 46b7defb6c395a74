"""Says which requests belong together, so that they find their prefix in one device's cache.

A session is named by the header ``x-session-id``, by OpenAI's ``prompt_cache_key`` or ``user``, or
by Anthropic's ``metadata.user_id``, in this order. Without one it is the beginning of the prompt:
system prompt, tools and first message. Requests of different API keys never belong together, since
devices keep their cached prefixes apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct

from edge.files import MALFORMED

SESSION_HEADER = b"x-session-id"
_BEGIN_BYTES = 4096
"""Of a prompt without messages; more would tell a longer history from its own beginning."""
_LEADING = ("system", "developer")


class _Metadata(Struct):
    user_id: Any = None


class _Message(Struct):
    role: Any = None


class _Body(Struct):
    """The fields that matter here, of all protocols; what has another type counts as absent."""

    model: Raw = Raw()
    prompt_cache_key: Raw = Raw()
    user: Raw = Raw()
    metadata: Raw = Raw()
    system: Raw = Raw()
    instructions: Raw = Raw()
    tools: Raw = Raw()
    messages: Raw = Raw()
    input: Raw = Raw()
    prompt: Raw = Raw()


class Affinity(NamedTuple):
    """Where a request belongs.

    Attributes:
        key: equal for requests that belong together; None where nothing is cached for later.
        model: the model that it names; None if it names none.
    """

    key: str | None
    model: str | None


_NO_PROMPT = ("/embeddings", "/embed", "/rerank", "/tokenize", "/detokenize", "/count_tokens")


def affinity(path: str, headers: Mapping[bytes, bytes], body: bytes, client: str) -> Affinity:
    """Find where a request belongs; a body that is no request belongs nowhere.

    Args:
        path: of the URL.
        headers: by lower-case name.
        body: JSON.
        client: the name of the API key.
    """
    try:
        read = msgspec.json.decode(body, type=_Body)
    except MALFORMED:
        return Affinity(None, None)  # the device says what is wrong with it
    model = _text(read.model)
    if path.endswith(_NO_PROMPT):
        return Affinity(None, model)
    session = headers.get(SESSION_HEADER, b"").decode("latin-1")
    named = session or _text(read.prompt_cache_key) or _text(read.user) or _user_id(read.metadata)
    if named:
        return Affinity(f"{client}\0session\0{named}", model)
    digest = hashlib.blake2b(digest_size=16)
    for part in (read.system, read.instructions, read.tools, *_begin(read)):
        digest.update(bytes(part) + b"\0")
    return Affinity(f"{client}\0prompt\0{digest.hexdigest()}", model)


def _begin(body: _Body) -> list[Raw | bytes]:
    """Take the messages up to the first one that is no system prompt, or the prompt's beginning."""
    for given in (body.messages, body.input):
        messages = _decoded(given, list[Raw])
        if messages is None:
            continue
        begin: list[Raw | bytes] = []
        for message in messages:
            begin.append(message)
            read = _decoded(message, _Message)
            if read is None or read.role not in _LEADING:
                break
        return begin
    return [bytes(body.prompt)[:_BEGIN_BYTES], bytes(body.input)[:_BEGIN_BYTES]]


def _text(raw: Raw) -> str | None:
    text: str | None = _decoded(raw, str)
    return text


def _user_id(raw: Raw) -> str | None:
    read = _decoded(raw, _Metadata)
    return read.user_id if read is not None and isinstance(read.user_id, str) else None


def _decoded(raw: Raw, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind) if bytes(raw) else None
    except MALFORMED:
        return None

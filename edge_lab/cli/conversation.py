"""Conversations in files: the messages of a chat, as JSON that any client of the API takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from edge.bundle.update import replace_durably
from edge.errors import RequestError
from edge.files import MALFORMED, exists, read_file

_MAX_BYTES = 256 << 20


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str | list[dict[str, Any]]


def read_conversation(path: Path) -> list[dict[str, Any]]:
    """Read a conversation: perhaps a system message, then questions and answers in turns.

    Returns:
        The messages, with ``role`` and ``content``.

    Raises:
        RequestError: the file cannot be read, or holds something else.
    """
    try:
        messages = msgspec.json.decode(read_file(path, _MAX_BYTES), type=list[_Message])
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except MALFORMED as error:
        raise RequestError(f"{path} is no conversation: {error}") from error
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise RequestError(
                f"{path} is no conversation: message {len(messages) - len(turns) + number + 1} is "
                f"of {message.role}, where {expected} has the turn"
            )
    if len(turns) % 2:
        raise RequestError(f"{path} is no conversation: its last question has no answer")
    return [{"role": message.role, "content": _content(message)} for message in messages]


def _content(message: _Message) -> Any:
    if isinstance(message.content, str):
        return message.content
    from .pictures import read_question

    return read_question(message.content)


def write_conversation(path: Path, messages: list[dict[str, Any]]) -> None:
    """Write a conversation, whole or not at all; replace no file but another conversation.

    Raises:
        RequestError: the file is there and is no conversation, or cannot be written.
    """
    if exists(path):
        try:
            read_conversation(path)
        except RequestError as error:
            raise RequestError(f"{error}; it is not replaced, so give another name") from error
    if any(isinstance(message["content"], list) for message in messages):
        from .pictures import as_sent

        messages = list(map(as_sent, messages))
    data = msgspec.json.format(msgspec.json.encode(messages), indent=1) + b"\n"
    try:
        # Only the owner may read what was said.
        replace_durably(path, lambda file: file.write(data), mode=0o600)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from error

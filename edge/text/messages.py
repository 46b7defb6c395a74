"""Checks chat messages that a client wrote, and brings them into the form that templates expect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from edge.errors import RequestError
from edge.files import MALFORMED

_KEYS_BY_ROLE = {
    "system": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset(
        {"role", "content", "name", "reasoning_content", "reasoning", "tool_calls"}
    ),
    "tool": frozenset({"role", "content", "tool_call_id", "name"}),
}
# OpenAI's rule for the name of a participant; names of tools are not restricted.
_PARTICIPANT = re.compile(r"[^\s<|\\/>]{1,64}")


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], first: int = 0
) -> list[dict[str, Any]]:
    """Check OpenAI-style messages and bring them into the form that templates expect.

    Roles are ``system``, ``user``, ``assistant`` and ``tool``; ``developer`` is read as
    ``system``. ``content`` is a string or a list of ``{"type": "text", "text": ...}``, joined by
    newlines; an assistant's content may be missing if there are ``tool_calls``. An assistant's
    reasoning, as ``reasoning_content`` or ``reasoning``, goes to the template as
    ``reasoning_content``: R1's template drops it, Qwen3's keeps it if the model wants it. The
    ``name`` of a participant goes to the template; most ignore it. A key with the value None counts
    as absent.

    Args:
        messages: at least one message.
        first: number of the first message, for errors.

    Returns:
        A copy made of plain dicts, lists and scalars; normalizing it again changes nothing.

    Raises:
        RequestError: a message is wrong; the error names its index and the key.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise RequestError("messages: give a list with at least one message")
    return [_normalize(index, message) for index, message in enumerate(messages, first)]


def _normalize(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{index}]: give an object, not {type(message).__name__}")
    if isinstance(message.get("content"), list):  # first, since a picture need not be plain data
        message = {**message, "content": _content(index, message["content"], False)}
    found: dict[str, Any] = plain_copy(dict(message), f"messages[{index}]")
    found = {key: value for key, value in found.items() if value is not None}
    role = "system" if found.get("role") == "developer" else found.get("role")
    if not isinstance(role, str) or role not in _KEYS_BY_ROLE:
        known = ", ".join([*_KEYS_BY_ROLE, "developer"])
        refuse(index, "role", f"must be one of {known}, not {role!r:.80}")
    for key in found.keys() - _KEYS_BY_ROLE[role]:
        refuse(index, key, f"a message of role {role!r} has no such key")

    tool_calls = found.get("tool_calls", [])
    if not isinstance(tool_calls, list) or not all(isinstance(call, dict) for call in tool_calls):
        refuse(index, "tool_calls", "must be a list of objects")
    result: dict[str, Any] = {"role": role}
    result["content"] = _content(index, found.get("content"), bool(tool_calls))
    if tool_calls:
        result["tool_calls"] = tool_calls
    for key in ("reasoning_content", "reasoning", "tool_call_id", "name"):
        if not isinstance(found.get(key, ""), str):
            refuse(index, key, f"must be a string, not {type(found[key]).__name__}")
    if role != "tool" and not _PARTICIPANT.fullmatch(found.get("name", "x")):
        refuse(index, "name", "must have 1 to 64 characters, none of them white space or <|\\/>")
    reasoning = {found[key] for key in ("reasoning_content", "reasoning") if key in found}
    if len(reasoning) > 1:
        refuse(index, "reasoning", "differs from reasoning_content; give one of them")
    if reasoning:
        result["reasoning_content"] = reasoning.pop()
    return result | {key: found[key] for key in ("tool_call_id", "name") if key in found}


def read_arguments(text: str) -> dict[str, Any] | None:
    """Read the arguments of a call, a JSON object; null and an empty text mean no arguments.

    Returns:
        The object; None if the text is anything else.
    """
    try:
        found = msgspec.json.decode(text.encode("utf-8", "surrogatepass")) if text.strip() else None
    except (ValueError, RecursionError):
        return None
    if found is None:
        return {}
    return found if isinstance(found, dict) else None


def parse_arguments(index: int, function: Any) -> None:
    """Replace the JSON text of a call's arguments by the object."""
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return
    parsed = read_arguments(function["arguments"])
    if parsed is None:
        refuse(index, "tool_calls", "arguments must be a JSON object, as text")
    function["arguments"] = parsed


def _content(index: int, content: Any, optional: bool) -> str | None:
    if isinstance(content, str) or (content is None and optional):
        return content
    if not isinstance(content, list):
        refuse(index, "content", "must be a string or a list of text parts")
    texts = []
    for position, part in enumerate(content):
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                texts.append(text)
            case _:
                why = 'must be {"type": "text", "text": "..."}: this bundle reads text only'
                refuse(index, f"content[{position}]", why)
    return "\n".join(texts)


def refuse(index: int, key: str, why: str) -> NoReturn:
    """Raise an error that names the message and the key."""
    raise RequestError(f"messages[{index}].{key}: {why}")


def plain_copy(value: Any, where: str) -> Any:
    """Return a deep copy made through JSON: a template can call methods of its values."""
    try:
        return msgspec.json.decode(msgspec.json.encode(value))
    except (TypeError, *MALFORMED) as error:
        raise RequestError(f"{where}: not plain JSON data ({error})") from error

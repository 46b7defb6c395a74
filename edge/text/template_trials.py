"""Short conversations with which a chat template is tried, and what they tell about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Messages = list[dict[str, Any]]
Try = Callable[[Messages, list[dict[str, Any]] | None], str | None]
"""Renders messages and tools with the opening of an answer; None where the template fails."""

# Turns of every role, and a call.
_CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1}},
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
CONVERSATIONS: list[Messages] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nHi"},
        {"role": "user", "content": "1+1?"},
    ],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "call00001"},
    ],
]
_SYSTEMS: Messages = [
    {"role": "system", "content": "Prefer violet."},
    {"role": "system", "content": "Prefer granite."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "system", "content": "Prefer walnut."},
    {"role": "user", "content": "1+1?"},
]
_KEY = "basalt"  # of a call's arguments; no template has it


def writes_each_system(render: Try) -> bool:
    """Whether a template writes every system message, also a later one."""
    text = render(_SYSTEMS, None) or ""
    return all(m["content"] in text for m in _SYSTEMS if m["role"] == "system")


def wants_objects(render: Try) -> bool:
    """Whether the arguments of a call must be an object, and not its JSON as text.

    Of a text, Qwen2.5's template makes a JSON string, and Qwen3-Coder's, which writes key by
    key, fails. R1's and Qwen3's write it as it is.
    """
    of_object, of_text = (
        _try_call(render, None, arguments) or _try_call(render, "", arguments) or ""
        for arguments in ({_KEY: 1}, f'{{"{_KEY}": 1}}')
    )
    as_json, as_repr = f'"{_KEY}":', f"'{_KEY}':"
    is_printed = as_json in of_object or as_repr in of_object
    return _KEY in of_object and not (is_printed and as_json in of_text)


def wants_content(render: Try, *, objects: bool) -> bool:
    """Whether a template fails with calls beside no content, and not beside an empty one.

    The first template of Qwen3 does; R1's writes calls only where there is none.

    Args:
        render: tries the template.
        objects: what `wants_objects` said.
    """
    arguments = {"a": 1} if objects else '{"a": 1}'
    works = _try_call(render, "", arguments) is not None
    return works and _try_call(render, None, arguments) is None


def _try_call(render: Try, content: str | None, arguments: dict[str, Any] | str) -> str | None:
    question, answer, result = CONVERSATIONS[-1]
    call = {**_CALL, "function": {"name": "add", "arguments": arguments}}
    return render([question, {**answer, "content": content, "tool_calls": [call]}, result], TOOLS)

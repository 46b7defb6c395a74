"""Tries a chat template with short conversations, and says what they show about it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

Messages = list[dict[str, Any]]
Try = Callable[[Messages, list[dict[str, Any]] | None], str | None]
"""Renders messages and tools with the opening of an answer; None if the template fails."""

# Turns of every role, and a tool call.
_CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
_PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
_ADD = {"name": "add", "description": "Adds.", "parameters": _PARAMETERS}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": _ADD}]
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
_KEY = "basalt"  # a key of a call's arguments that no template contains


class Tried:
    """Facts about a template that trying it shows; each is found when it is first needed.

    Args:
        render: tries the template.
    """

    def __init__(self, render: Try) -> None:
        self._render = render

    @cached_property
    def writes_each_system(self) -> bool:
        """Whether it writes every system message, including later ones."""
        text = self._render(_SYSTEMS, None) or ""
        return all(m["content"] in text for m in _SYSTEMS if m["role"] == "system")

    @cached_property
    def wants_objects(self) -> bool:
        """Whether the arguments of a call must be an object, and not its JSON as text.

        Given a text, Qwen2.5's template writes a JSON string, and Qwen3-Coder's, which goes key by
        key, fails. R1's and Qwen3's write the text as it is.
        """
        of_object, of_text = (
            self._call(None, arguments) or self._call("", arguments) or ""
            for arguments in ({_KEY: 1}, f'{{"{_KEY}": 1}}')
        )
        as_json, as_repr = f'"{_KEY}":', f"'{_KEY}':"
        is_printed = as_json in of_object or as_repr in of_object
        return _KEY in of_object and not (is_printed and as_json in of_text)

    @cached_property
    def wants_content(self) -> bool:
        """Whether it fails if a message with calls has no content, but not if that is empty.

        Qwen3's first template does; R1's writes calls only if there is no content.
        """
        arguments = {"a": 1} if self.wants_objects else '{"a": 1}'
        works = self._call("", arguments) is not None
        return works and self._call(None, arguments) is None

    def _call(self, content: str | None, arguments: dict[str, Any] | str) -> str | None:
        """Render a conversation with a call; None if the template fails."""
        question, answer, result = CONVERSATIONS[-1]
        call = {**_CALL, "function": {"name": "add", "arguments": arguments}}
        called = {**answer, "content": content, "tool_calls": [call]}
        return self._render([question, called, result], TOOLS)

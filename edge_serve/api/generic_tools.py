"""Gives tools to a model whose chat template cannot take them, as text in its messages.

The list of tools and the form of a call go into the system message, in Hermes' form, which
`edge_serve.api.tools` reads; past calls and their results become text in the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from edge.files import MALFORMED
from edge.text.chat_template import ChatTemplate
from edge.text.messages import read_arguments
from edge_serve.http.errors import invalid

from .tools import HERMES

_RESULT = "<tool_response>\n{}\n</tool_response>"
_CALL = f'{HERMES.start}\n{{"name": NAME, "arguments": {{...}}}}\n{HERMES.end}'
_HEAD = "You have these functions, one JSON object a line:\n"
_TAIL = (
    "\nTo call a function, write its name and its arguments as one JSON object between "
    f"{HERMES.start} and {HERMES.end}:\n{_CALL}\n"
    "Write one such block for each call, and nothing after the last one. The results come "
    "between <tool_response> and </tool_response>. Where no function helps, answer without one."
)


def place_tools(
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    template: ChatTemplate | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Prepare messages and tools for a template; tools go into messages if it cannot take them.

    Args:
        messages: messages from `edge_serve.api.messages.prepare_messages`.
        tools: tools from `edge_serve.api.tool_use.template_tools`; None gives the model none.
        template: the model's chat template.

    Raises:
        APIError: 400, a past call is malformed.
    """
    # Such a template may write some past calls, but not all: R1's writes only those without text.
    if template is None or "tools" in template.variables:
        return list(messages), tools
    written: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        written.append(_as_text(index, message))
        _join_results(written)
    if tools:
        _instruct(written, tools)
    return [{key: m[key] for key in m if key != "is_result"} for m in written], None


def _as_text(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """Turn a message with calls, or with the result of one, into text."""
    if message.get("role") == "tool":
        result = _text(index, message.get("content"))
        return {"role": "user", "content": _RESULT.format(result), "is_result": True}
    calls = message.get("tool_calls")
    if not calls or message.get("role") != "assistant":
        return message
    if not isinstance(calls, list):
        raise invalid(f"messages[{index}].tool_calls: must be a list", "messages")
    content = _text(index, message.get("content") or "")
    blocks = [f"{HERMES.start}\n{_call_text(index, call)}\n{HERMES.end}" for call in calls]
    text = "\n".join([content, *blocks] if content else blocks)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": text}


def _text(index: int, content: object) -> str:
    """Return a content's text; parts are joined as the template's reader does."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise invalid(f"messages[{index}].content: must be text", "messages")
    return "\n".join(map(str, texts))


def _call_text(index: int, call: object) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    try:
        given = read_arguments(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not isinstance(given, dict):
            raise ValueError
        return msgspec.json.encode({"name": name, "arguments": given}).decode()
    except (TypeError, *MALFORMED):
        where = f"messages[{index}].tool_calls"
        raise invalid(
            f"{where}: each needs a function with a name, and arguments that are a JSON object",
            where,
        ) from None


def _join_results(written: list[dict[str, Any]]) -> None:
    """Put the results of several calls into one message: templates want roles to alternate."""
    if len(written) > 1 and written[-1].get("is_result") and written[-2].get("is_result"):
        last = written.pop()
        written[-1] = {
            **written[-1],
            "content": f"{written[-1]['content']}\n{last['content']}",
        }


def _instruct(written: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    """Put the tools after the system message's own text, or into a system message of their own."""
    lines = "\n".join(msgspec.json.encode(tool["function"]).decode() for tool in tools)
    text = f"{_HEAD}{lines}{_TAIL}"
    first = written[0] if written else {}
    content = first.get("content")
    if first.get("role") not in ("system", "developer"):
        written.insert(0, {"role": "system", "content": text})
    elif isinstance(content, list):
        written[0] = {**first, "content": [*content, {"type": "text", "text": text}]}
    else:
        written[0] = {**first, "content": f"{content}\n\n{text}" if content else text}

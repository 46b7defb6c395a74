"""Reads the messages of a chat request, and whether the answer continues the last one.

Clients ask for that in three ways: by ``continue_final_message`` (vLLM, SGLang, transformers), by
``prefix`` in the message (DeepSeek, Mistral), or by a last message from the assistant (Anthropic,
Ollama), for which those protocols set the first field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_serve.http.errors import invalid

from .protocol import ChatRequest


def read_messages(body: ChatRequest) -> tuple[list[dict[str, Any]], bool]:
    """Return the prepared messages, and whether the answer continues the last one.

    Raises:
        APIError: 400, fields contradict each other, or ``prefix`` is in another message.
    """
    last = len(body.messages) - 1
    for index, message in enumerate(body.messages):
        prefix = message.get("prefix")
        if prefix not in (None, False, True):
            raise invalid(f"messages[{index}].prefix: must be true or false", "messages")
        if prefix and (index != last or message.get("role") != "assistant"):
            raise invalid(
                f"messages[{index}].prefix: only the last message, and one of the assistant, can "
                "be continued",
                "messages",
            )
    continues = bool(body.continue_final_message or body.messages[last].get("prefix"))
    check_prompt_end(continues, body.add_generation_prompt)
    if not continues and body.add_generation_prompt is False:
        raise invalid(
            "add_generation_prompt: false leaves no place for an answer, unless "
            "continue_final_message is true",
            "add_generation_prompt",
        )
    if continues and body.messages[last].get("tool_calls"):
        raise invalid(
            f"messages[{last}].tool_calls: an answer that calls tools has ended and cannot be "
            "continued; send the tools' results after it",
            "messages",
        )
    given = [{key: m[key] for key in m if key != "prefix"} for m in body.messages]
    return prepare_messages(given), continues


def check_prompt_end(continues: bool, add_generation_prompt: bool | None) -> None:
    """Refuse a prompt that should end in two ways.

    Raises:
        APIError: 400, both are asked for.
    """
    if continues and add_generation_prompt:
        raise invalid(
            "add_generation_prompt: begins a new answer, and the last message is to be continued; "
            "set it to false",
            "add_generation_prompt",
        )


def prepare_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn messages of OpenAI's clients into those that `edge.text.chat_template` takes.

    A client that appends the server's own answer also sends empty keys (``refusal``,
    ``annotations``). Texts may carry hints for a cache, which are dropped.
    """
    result = []
    for message in messages:
        copy = {key: value for key, value in message.items() if value is not None}
        if copy.get("annotations") == []:
            del copy["annotations"]
        if isinstance(copy.get("content"), list):
            copy["content"] = [_without_hint(part) for part in copy["content"]]
        result.append(copy)
    return result


def _without_hint(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {key: value for key, value in part.items() if key != "prompt_cache_breakpoint"}


def user_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts of users, whole or in parts; the template reports malformed ones."""
    texts: list[str] = []
    for message in messages:
        if message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [content]
            given = [part.get("text") if isinstance(part, dict) else part for part in parts]
            texts += [text for text in given if isinstance(text, str)]
    return texts

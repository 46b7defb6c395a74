"""Reads the answer that a chat's last message has begun, for the model to go on with it.

A template closes every message, so the last one does not go through it: `encode_chat` renders the
messages before it up to the opening of an answer, and the text that was begun follows there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.errors import RequestError

from .chat_template import THINK_END, THINK_START, ReasoningSplitter, normalize_messages

NO_REASONING = f"\n{THINK_END}\n\n"
"""Ends a reasoning that the template has opened."""


@dataclass(frozen=True)
class BegunAnswer:
    """An answer that is to be continued.

    Attributes:
        content: its text so far.
        reasoning: its reasoning so far; empty without one.
        reasons: whether it goes on inside the reasoning.
    """

    content: str
    reasoning: str = ""
    reasons: bool = False

    def prompt(self, opened: bool, cover: Callable[[str], str]) -> str:
        """Return what follows the opening of an answer.

        Args:
            opened: whether the template has opened a reasoning.
            cover: keeps text of the client's apart from control tokens.
        """
        if not self.reasoning:
            if not self.content or self.reasons:
                return ""
            return (NO_REASONING if opened else "") + cover(self.content)
        start = ("" if opened else f"{THINK_START}\n") + cover(self.reasoning)
        return start if self.reasons else start + NO_REASONING + cover(self.content)


def take_begun_answer(
    messages: Sequence[Mapping[str, Any]], *, reasons: bool
) -> tuple[list[dict[str, Any]], BegunAnswer]:
    """Take the last message, an answer that was begun, from the others.

    Its reasoning is ``reasoning_content``, or stands in the content between its tags. It goes on
    there if no text follows it and no tag closes it.

    Args:
        messages: see `normalize_messages`.
        reasons: whether the model reasons; else tags are plain text.

    Returns:
        The messages before it, normalized, and the answer.

    Raises:
        RequestError: a message is wrong; the last one is not the assistant's, calls tools, or has
            nothing before it; or it breaks off in a reasoning, and the model has none.
    """
    *before, last = normalize_messages(messages)
    where = f"messages[{len(before)}]"
    if last["role"] != "assistant":
        raise RequestError(
            f"{where}.role: only an answer of the assistant can be continued, and the last "
            f"message is of role {last['role']!r}"
        )
    if "tool_calls" in last:
        raise RequestError(f"{where}.tool_calls: an answer that calls tools has ended; send theirs")
    if not before:
        raise RequestError("messages: the answer to continue has nothing before it that it answers")
    content: str = last["content"] or ""
    reasoning: str = last.get("reasoning_content", "")
    closed = bool(content)
    if reasons and not reasoning and (THINK_START in content or THINK_END in content):
        closed = THINK_END in content
        splitter = ReasoningSplitter(opened=closed)
        parts = [splitter.push(content), splitter.flush()]
        reasoning, content = ("".join(texts) for texts in zip(*parts, strict=True))
        closed = closed or bool(content)
    if reasoning and not reasons:
        if not closed:
            raise RequestError(f"{where}.reasoning_content: this model does not reason")
        reasoning = ""
    # Next to the tags there are line breaks already.
    reasoning = reasoning.lstrip("\n")
    if closed:
        reasoning = reasoning.rstrip("\n")
    return before, BegunAnswer(content, reasoning, reasons=bool(reasoning) and not closed)

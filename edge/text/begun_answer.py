"""Reads an answer that a chat's last message begins, so that the model can continue it.

A template closes every message, so the last one does not go through it: `encode_chat` renders the
messages before it up to the opening of an answer, and appends the begun text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edge.errors import RequestError

from .messages import normalize_messages
from .reasoning import THINK_END, THINK_START, ReasoningSplitter

NO_REASONING = f"\n{THINK_END}\n\n"
"""Ends a reasoning that the template has opened."""


@dataclass(frozen=True)
class BegunAnswer:
    """An answer that is to be continued.

    Attributes:
        content: its text so far.
        reasoning: its reasoning so far.
        place: where it continues: in its ``reasoning``; in its ``text``, after all reasoning; or at
            its ``start``, if there is nothing yet.
    """

    content: str = ""
    reasoning: str = ""
    place: Literal["start", "reasoning", "text"] = "start"

    def prompt(self, opened: bool, cover: Callable[[str], str]) -> str:
        """Return the text that follows the opening of an answer.

        Args:
            opened: whether the template has opened a reasoning.
            cover: keeps a client's text apart from control tokens.
        """
        if self.place == "start":
            return ""
        start = "" if opened else f"{THINK_START}\n"
        if self.place == "reasoning":
            return start + cover(self.reasoning)
        if self.reasoning:
            return start + cover(self.reasoning) + NO_REASONING + cover(self.content)
        return (NO_REASONING if opened else "") + cover(self.content)


def take_begun_answer(
    messages: Sequence[Mapping[str, Any]], *, reasons: bool
) -> tuple[Sequence[Mapping[str, Any]], BegunAnswer]:
    """Separate the last message, an answer that was begun, from the others.

    Its reasoning is ``reasoning_content``. Without that key it is the content before ``</think>``,
    or after a leading ``<think>``. The answer continues in its reasoning if no text follows it and
    no tag closes it.

    Args:
        messages: messages as `normalize_messages` takes them.
        reasons: whether the model reasons; else tags are plain text.

    Returns:
        The messages before it, and the answer.

    Raises:
        RequestError: a message is wrong; the last one is not the assistant's, calls tools, or has
            nothing before it; or it ends in a reasoning, and the model has none.
    """
    before, (last,) = messages[:-1], normalize_messages(messages[-1:], len(messages) - 1)
    where = f"messages[{len(before)}]"
    if last["role"] != "assistant":
        raise RequestError(
            f"{where}.role: only an answer of the assistant can be continued, and the last "
            f"message is of role {last['role']!r}"
        )
    if "tool_calls" in last:
        raise RequestError(
            f"{where}.tool_calls: an answer that calls tools has ended; send the tools' results"
        )
    if not before:
        raise RequestError(
            "messages: the answer to continue has nothing before it that it answers; put the "
            "user's message before it"
        )
    reasoning, content = last.get("reasoning_content"), last["content"] or ""
    if not reasons:
        if reasoning and not content:
            raise RequestError(
                f"{where}.reasoning_content: this model does not reason; send the answer's text"
            )
        return before, _place("", content, is_closed=True)
    if reasoning is None:
        return before, _split(content)
    is_closed = bool(content)
    if reasoning and content.lstrip().startswith(THINK_END):
        content = content.lstrip().removeprefix(THINK_END).lstrip("\n")
    return before, _place(reasoning, content, is_closed=is_closed)


def _split(content: str) -> BegunAnswer:
    """Separate the reasoning in a content from its text."""
    head, end, _ = content.partition(THINK_END)
    has_start = content.lstrip().startswith(THINK_START)
    if not has_start and (not end or THINK_START in head):
        return _place("", content, is_closed=True)
    splitter = ReasoningSplitter(opened=not has_start)
    parts = [splitter.push(content), splitter.flush()]
    reasoning, text = ("".join(texts) for texts in zip(*parts, strict=True))
    # Even a tag alone says where the answer continues.
    return replace(
        _place(reasoning, text, is_closed=bool(end)), place="text" if end else "reasoning"
    )


def _place(reasoning: str, content: str, *, is_closed: bool) -> BegunAnswer:
    reasoning = reasoning.lstrip("\n")  # line breaks next to the tags are added again
    if is_closed:
        reasoning = reasoning.rstrip("\n")
        return BegunAnswer(content, reasoning, "text" if content or reasoning else "start")
    return BegunAnswer(content, reasoning, "reasoning" if reasoning else "start")

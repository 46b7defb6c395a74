"""Finds a model's reasoning in a prompt, in a past answer and in the text that it writes."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

THINK_START = "<think>"
THINK_END = "</think>"
_SPLITS_REASONING = re.compile(rf"split\(\s*['\"]{THINK_END}['\"]")


def cut_reasoning(message: dict[str, Any], source: str) -> dict[str, Any]:
    """Cut an assistant's content as its template would, if the template splits it at ``</think>``.

    R1's template keeps the text after the last tag. Qwen3's does so too and drops the newlines
    there, unless the reasoning is given separately.
    """
    content = message["content"]
    if message["role"] != "assistant" or not content or THINK_END not in content:
        return message
    if not _SPLITS_REASONING.search(source):
        return message
    head, *_, answer = content.split(THINK_END)
    if "reasoning_content" not in source:
        return message | {"content": answer}
    if "reasoning_content" in message:
        return message
    reasoning = head.rstrip("\n").split(THINK_START)[-1].lstrip("\n")
    return message | {"reasoning_content": reasoning, "content": answer.lstrip("\n")}


class ReasoningSplitter:
    """Splits streamed text into reasoning and answer.

    Reasoning is the text between the tags at the very beginning; tags further on are plain text.
    Newlines next to the tags are dropped. The result does not depend on how the text is cut into
    pieces.
    """

    def __init__(self, opened: bool, *, goes_on: bool = False) -> None:
        """Start a stream.

        Args:
            opened: whether the prompt already ends with the start tag (`prompt_opens_reasoning`),
                so that the text begins inside the reasoning; a second start tag is dropped then.
            goes_on: whether the text continues a reasoning that has some text already.
        """
        self._opened = opened
        self._phase = "reasoning" if goes_on else "start"
        self._held = ""
        self._trims = False  # whether the next newlines belong to a tag

    def push(self, text: str) -> tuple[str, str]:
        """Add text; return the parts that are certain so far: ``(reasoning, answer)``."""
        self._held += text
        if self._phase == "start" and not self._find_start():
            return "", ""
        reasoning = self._take_reasoning() if self._phase == "reasoning" else ""
        return reasoning, self._take_answer() if self._phase == "answer" else ""

    def flush(self) -> tuple[str, str]:
        """End the text; return what was held back and did not become a tag."""
        if self._phase == "start":
            self._enter("reasoning" if self._opened else "answer", trims=self._opened)
        held = self._trimmed()
        self._held = ""
        return (held, "") if self._phase == "reasoning" else ("", held)

    def _enter(self, phase: str, *, trims: bool) -> None:
        self._phase = phase
        self._trims = trims

    def _find_start(self) -> bool:
        """Leave the phase ``start`` once the beginning is certain; returns whether it is."""
        text = self._held.lstrip()
        if text.startswith(THINK_START):
            self._held = text[len(THINK_START) :]
            self._enter("reasoning", trims=True)
        elif THINK_START.startswith(text):
            return False
        else:
            self._enter("reasoning" if self._opened else "answer", trims=self._opened)
        return True

    def _trimmed(self) -> str:
        if self._trims:
            self._held = self._held.lstrip("\n")
            self._trims = not self._held
        return self._held

    def _take_reasoning(self) -> str:
        held = self._trimmed()
        found = held.find(THINK_END)
        if found >= 0:
            self._held = held[found + len(THINK_END) :]
            self._enter("answer", trims=True)
            return held[:found].rstrip("\n")
        lengths = range(min(len(THINK_END) - 1, len(held)), 0, -1)
        partial = next((size for size in lengths if held.endswith(THINK_END[:size])), 0)
        certain = held[: len(held) - partial].rstrip("\n")
        self._held = held[len(certain) :]
        return certain

    def _take_answer(self) -> str:
        held = self._trimmed()
        self._held = ""
        return held


def prompt_opens_reasoning(rendered: str) -> bool:
    """Tell whether a prompt (or just its end) leaves the model in its reasoning, as R1's does."""
    return rendered.rstrip().endswith(THINK_START)


def template_reasons(source: str, control_tokens: Collection[str] = ()) -> bool:
    """Tell whether to split off reasoning: the template has a tag or switch, or a token is it."""
    marks = (THINK_START, THINK_END, "enable_thinking")
    return any(mark in source for mark in marks) or THINK_START in control_tokens

"""Reads from a chat request whether its last message is an answer to go on with.

Three ways of asking for it are in use: ``continue_final_message`` (vLLM, SGLang, transformers),
``prefix`` in the message (DeepSeek, Mistral), and simply a last message of the assistant
(Anthropic, Ollama), for which those protocols set the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from edge.text.begun_answer import take_begun_answer
from edge_serve.http.errors import invalid

from .pieces import MakeParser
from .protocol import ChatRequest
from .tools import ToolParser, ToolSyntax, has_form

if TYPE_CHECKING:
    from edge.runtime.llm import LLM


def take_prefix(body: ChatRequest) -> bool:
    """Take ``prefix`` out of the messages; return whether the answer goes on with the last one.

    Raises:
        APIError: 400, fields that contradict each other, or a ``prefix`` elsewhere.
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
    body.messages = [
        {key: value for key, value in message.items() if key != "prefix"}
        for message in body.messages
    ]
    if continues and body.messages[last].get("tool_calls"):
        raise invalid(
            f"messages[{last}].tool_calls: an answer that calls tools has ended and cannot be "
            "continued; send the tools' results after it",
            "messages",
        )
    return continues


def check_prompt_end(continues: bool, add_generation_prompt: bool | None) -> None:
    """Refuse a prompt that is to end in two ways.

    Raises:
        APIError: 400.
    """
    if continues and add_generation_prompt:
        raise invalid(
            "add_generation_prompt: begins a new answer, and the last message is to be continued; "
            "set it to false",
            "add_generation_prompt",
        )


def parser_after(
    make_parser: MakeParser,
    syntax: ToolSyntax | None,
    body: ChatRequest,
    messages: Sequence[dict[str, Any]],
    llm: LLM,
) -> MakeParser | None:
    """Return what finds the calls in the rest of an answer whose beginning is known.

    Raises:
        APIError: 400, the answer must be a call and has begun as text, or has begun a call.
        RequestError: see `take_begun_answer`.
    """
    _, begun = take_begun_answer(messages, reasons=llm.reasons)
    if not begun.content:
        return make_parser
    if syntax is None or body.tool_choice not in (None, "auto"):
        raise invalid(
            "tool_choice: the answer has begun as text, so it cannot be made a call; send auto, "
            "none or no tools",
            "tool_choice",
        )
    if syntax.start in begun.content:
        raise invalid(
            f"messages[{len(messages) - 1}].content: an answer that has begun a call cannot be "
            "continued with tools; send no tools, or the calls as tool_calls with their results",
            "messages",
        )
    return None if has_form(body) else partial(ToolParser, syntax)

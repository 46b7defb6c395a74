"""Serves ``POST /api/chat`` and ``POST /api/generate``: their plans, and one render for both.

A request is converted to a chat, or with ``raw`` or ``suffix`` to a completion, and planned as one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from edge_serve.api.answers import ToolCall, Usage
from edge_serve.api.chat import plan_chat
from edge_serve.api.completions import plan_completion
from edge_serve.api.pieces import Piece
from edge_serve.api.protocol import ChatRequest, CompletionRequest, JSONSchema, ResponseFormat
from edge_serve.api.respond import Plan, Render, Turn
from edge_serve.http.errors import APIError, invalid
from edge_serve.json_lines import json_line
from edge_serve.pictures.parts import with_images

from .answers import (
    AnsweredCall,
    AnsweredFunction,
    GenerateAnswer,
    OllamaAnswerMessage,
    OllamaChatAnswer,
    OllamaCounts,
    OllamaErrorResponse,
)
from .protocol import (
    GenerateRequest,
    OllamaChatRequest,
    OllamaMessage,
    OllamaOptions,
    OllamaRequest,
)

NAMES = {
    "response_format": "format",
    "max_tokens": "options.num_predict",
    "stop": "options.stop",
    "enable_thinking": "think",
}
"""Fields of a chat, as patterns, and their names here (`edge_serve.http.errors.renamed`)."""
_log = logging.getLogger("edge_serve")


def plan_ollama_chat(turn: Turn, body: OllamaChatRequest) -> Plan:
    """Turn the body of a chat into a plan.

    Raises:
        APIError, RequestError: the fields contradict each other or do not fit the model.
    """
    messages: list[dict[str, Any]] = []
    thinking: list[str] = []
    for index, given in enumerate(body.messages or ()):
        message = _message_of(index, given)
        if message["role"] == "thinking":
            thinking.append(message["content"])
            continue
        if message["role"] == "assistant" and any(thinking):
            texts = [*thinking, message.get("reasoning_content")]
            message["reasoning_content"] = "\n".join(filter(None, texts))
        thinking = []
        messages.append(message)
    if not messages:
        raise invalid("messages: a thinking alone is no chat; send a user's message", "messages")
    return _plan_messages(turn, body, messages, body.tools)


def plan_generate(turn: Turn, body: GenerateRequest) -> Plan:
    """Turn the body of a prompt into a plan: a chat of one message, or the bare text.

    Raises:
        APIError, RequestError: the fields contradict each other or do not fit the model.
    """
    if body.template:
        raise invalid(
            "template: a model answers by its own chat template; leave it out, or write the whole "
            "prompt and set raw",
            "template",
        )
    if not (body.raw or body.suffix is not None or turn.model.llm.template is None):
        content = with_images(body.prompt or "", body.images, "images")
        messages = [{"role": "user", "content": content}]
        if body.system is not None:
            messages.insert(0, {"role": "system", "content": body.system})
        return _plan_messages(turn, body, messages, None)
    for name in ("system", "think", "format", "images"):
        if getattr(body, name):
            raise invalid(
                f"{name}: needs the chat template, which raw, suffix and models without one leave "
                "out; put what it says into the prompt",
                name,
            )
    text = CompletionRequest(prompt=body.prompt or "", suffix=body.suffix)
    _set_options(turn, text, body.options or OllamaOptions())
    return replace(plan_completion(turn, text), stream=body.stream is not False)


def _plan_messages(
    turn: Turn, body: OllamaRequest, messages: list[dict[str, Any]], tools: Any
) -> Plan:
    chat = ChatRequest(messages=messages, tools=tools)
    *before, last = messages
    if before and last["role"] == "assistant" and not last.get("tool_calls"):
        chat.continue_final_message = True  # as Ollama does
    _set_options(turn, chat, body.options or OllamaOptions())
    if body.think and not turn.model.llm.reasons:  # in Ollama's words, which clients look for
        raise invalid(
            f'"{turn.model.name}" does not support thinking; leave think out, or set it to false',
            "think",
        )
    if isinstance(body.think, bool):
        chat.enable_thinking = body.think
    elif body.think is not None:
        chat.reasoning_effort = body.think
    if body.format == "json":
        chat.response_format = ResponseFormat("json_object")
    elif isinstance(body.format, dict):
        chat.response_format = ResponseFormat("json_schema", JSONSchema("answer", body.format))
    chat.stream = body.stream is not False
    return plan_chat(turn, chat)


def _set_options(
    turn: Turn, request: ChatRequest | CompletionRequest, options: OllamaOptions
) -> None:
    note_context(turn, options.num_ctx)
    if options.num_predict == 0:
        raise invalid(
            "options.num_predict: 0 asks for no answer; give -1 (no limit) or at least 1",
            "options.num_predict",
        )
    if options.num_predict is not None and options.num_predict > 0:
        request.max_tokens = int(options.num_predict)
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        setattr(request, name, getattr(options, name))
    request.top_k = int(options.top_k) if options.top_k is not None else None
    request.repetition_penalty = options.repeat_penalty
    request.seed = int(options.seed) if options.seed not in (None, -1) else None
    request.stop = options.stop


def _message_of(index: int, message: OllamaMessage) -> dict[str, Any]:
    where = f"messages[{index}]"
    allowed = {
        "user": ("images",),
        "assistant": ("thinking", "tool_calls"),
        "tool": ("tool_name", "tool_call_id"),
    }.get(message.role, ())
    for name in ("thinking", "tool_calls", "tool_name", "tool_call_id", "images"):
        if getattr(message, name) and name not in allowed:
            raise invalid(
                f"{where}.{name}: a message of role {message.role} has no such field",
                f"{where}.{name}",
            )
    calls = [
        {
            "id": call.id or f"call_{number}",
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": msgspec.json.encode(call.function.arguments).decode(),
            },
        }
        for number, call in enumerate(message.tool_calls or ())
    ]
    text = message.content if message.content or not calls else None
    content = with_images(text or "", message.images, f"{where}.images") or text
    found = {
        "role": message.role,
        "content": "" if content is None and not calls else content,
        "reasoning_content": message.thinking or None,
        "tool_calls": calls or None,
        "name": message.tool_name,
        "tool_call_id": message.tool_call_id,
    }
    return {key: value for key, value in found.items() if value is not None or key == "content"}


class OllamaRender(Render):
    """Writes the answer to a chat or a prompt in Ollama's form, a line per piece; a `Render`."""

    media_type = "application/x-ndjson"

    def __init__(self, turn: Turn, body: OllamaRequest, name: str | None) -> None:
        # Some clients look for exactly the name that they sent.
        self._model = name or turn.model_name
        self._is_chat = isinstance(body, OllamaChatRequest)
        self._waited_s = turn.waited_s
        self._last = Piece()
        self._num_calls = 0

    def ping(self) -> bytes:
        """Implement `Render.ping`: every line is JSON, so nothing can fill a silence."""
        return b""

    def failed(self, error: APIError) -> bytes:
        """Implement `Render.failed`."""
        return json_line(OllamaErrorResponse(error.shown))

    def events(self, index: int, piece: Piece) -> bytes:
        """Implement `Render.events`."""
        if piece.finish_reason is not None:
            self._last = piece
        if not (piece.text or piece.reasoning or piece.calls):
            return b""
        return json_line(self._answer(piece))

    def last_events(self, usage: Usage) -> bytes:
        """Implement `Render.last_events`."""
        return json_line(self._ended(self._answer(Piece()), self._last, usage))

    def body(self, choices: Sequence[Piece], usage: Usage) -> OllamaCounts:
        """Implement `Render.body`."""
        (piece,) = choices
        return self._ended(self._answer(piece), piece, usage)

    def _answer(self, piece: Piece) -> OllamaCounts:
        now = timestamp(datetime.now(timezone.utc))
        head: dict[str, Any] = {"model": self._model, "created_at": now}
        thinking = piece.reasoning or UNSET
        if not self._is_chat:
            return GenerateAnswer(**head, response=piece.text, thinking=thinking)
        calls = [self._call(call) for call in piece.calls] or UNSET
        message = OllamaAnswerMessage(piece.text, "assistant", thinking, calls)
        return OllamaChatAnswer(**head, message=message)

    def _call(self, call: ToolCall) -> AnsweredCall:
        arguments = msgspec.json.decode(call.function.arguments.encode())
        self._num_calls += 1
        function = AnsweredFunction(call.function.name, arguments, self._num_calls - 1)
        return AnsweredCall(call.id, function)

    def _ended(self, answer: OllamaCounts, piece: Piece, usage: Usage) -> OllamaCounts:
        answer.done = True
        answer.done_reason = "length" if piece.finish_reason == "length" else "stop"
        answer.prompt_eval_count = usage.prompt_tokens
        answer.eval_count = usage.completion_tokens
        answer.load_duration = int(self._waited_s * 1e9)
        stats = piece.stats
        if stats is not None:
            answer.total_duration = int((self._waited_s + stats.total_s) * 1e9)
            answer.prompt_eval_duration = int((stats.ttft_s - stats.queue_s) * 1e9)
            answer.eval_duration = int((stats.total_s - stats.ttft_s) * 1e9)
        return answer


def note_context(turn: Turn, num_ctx: float | None) -> None:
    """Log, once for each model, that a client asks for a longer context than the model has.

    Many clients always do. Nothing is lost in silence: a prompt that does not fit is refused, and
    an answer that fills the context says so.
    """
    capacity = turn.model.llm.kv_capacity
    if num_ctx is not None and num_ctx > capacity:
        _note_once(turn.model.name, capacity)


@cache
def _note_once(name: str, capacity: int) -> None:
    _log.warning(
        "clients ask for a longer context (options.num_ctx) than the %d tokens of the model %s; "
        "prompts that do not fit are refused; if they should, raise --kv-capacity",
        capacity,
        name,
    )


def is_load(body: OllamaChatRequest | GenerateRequest) -> bool:
    """Whether a request has nothing to answer and only wants the model loaded."""
    if isinstance(body, OllamaChatRequest):
        return not body.messages
    return not (body.prompt or body.images) and body.suffix is None


def loaded(
    name: str, body: OllamaChatRequest | GenerateRequest, reason: Literal["load", "unload"]
) -> OllamaCounts:
    """Return the answer to a request that only loads or unloads a model."""
    created_at = timestamp(datetime.now(timezone.utc))
    if isinstance(body, OllamaChatRequest):
        message = OllamaAnswerMessage("", "assistant")
        return OllamaChatAnswer(
            model=name, created_at=created_at, message=message, done=True, done_reason=reason
        )
    return GenerateAnswer(
        model=name, created_at=created_at, response="", done=True, done_reason=reason
    )


def timestamp(when: datetime) -> str:
    """Format a time as Ollama does (RFC 3339)."""
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")

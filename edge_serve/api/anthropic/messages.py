"""Serves ``POST /v1/messages``: `plan_messages` reads the request, `MessagesRender` answers it.

A request is turned into a chat, and planned as one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from edge_serve.api.answers import ToolCall, Usage
from edge_serve.api.chat import plan_chat
from edge_serve.api.pieces import Piece
from edge_serve.api.protocol import (
    ChatRequest,
    FunctionTool,
    JSONSchema,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolName,
)
from edge_serve.api.respond import Plan, Render, Turn
from edge_serve.api.sse import PING, named_event
from edge_serve.http.errors import APIError, invalid, renamed
from edge_serve.http.threads import OnPiece
from edge_serve.pictures.forms import ImageBlock
from edge_serve.pictures.parts import part_of_source

from .answers import (
    SIGNATURE,
    AnswerBlock,
    AnswerMessage,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    CountTokensResponse,
    MessageUsage,
    OutputDetails,
    StopReason,
)
from .errors import NAMES, error_envelope
from .protocol import (
    VERSIONS,
    Block,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    MessagesTool,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingAdaptive,
    ThinkingBlock,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolChoiceAny,
    ToolChoiceAuto,
    ToolChoiceNone,
    ToolChoiceTool,
    ToolResultBlock,
    ToolUseBlock,
)

_LEAST_ROOM_TOKENS = 32_768  # longest text that is always counted, as for /tokenize
_IN_ROLE: dict[str, tuple[type, ...]] = {
    "user": (TextBlock, ToolResultBlock, ImageBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


def check_version(version: str | None) -> None:
    """Refuse a version of the API that this server does not speak.

    Args:
        version: value of the header ``anthropic-version``.

    Raises:
        APIError: 400, the version is unknown.
    """
    if version is not None and version not in VERSIONS:
        raise invalid(
            f"anthropic-version: {version[:40]!r} is not spoken here; send "
            + " or ".join(VERSIONS),
            "anthropic-version",
        )


def plan_messages(turn: Turn, body: MessagesRequest) -> Plan:
    """Turn the body of a request into a plan.

    Raises:
        APIError, RequestError: the fields contradict each other or do not fit the model.
    """
    chat = _chat_of(body)
    chat.max_tokens = body.max_tokens
    chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
    chat.stop = body.stop_sequences
    chat.stream = body.stream
    return plan_chat(turn, chat)


def count_tokens(turn: Turn, body: CountTokensRequest, on_piece: OnPiece) -> CountTokensResponse:
    """Count the tokens of a prompt, even if it is longer than the context.

    Raises:
        APIError, RequestError: `plan_messages` would refuse it; or it surely has more tokens than
            the context, or than 32,768 if the context is smaller.
    """
    llm = turn.model.llm
    capacity = max(llm.kv_capacity, _LEAST_ROOM_TOKENS)
    with renamed(NAMES):
        plan = plan_chat(turn, _chat_of(body), capacity=capacity)
        ids = llm.encode_ask(plan.asks[0], capacity, on_piece)
    return CountTokensResponse(len(ids))


def _chat_of(body: CountTokensRequest) -> ChatRequest:
    """Turn a request into a chat, without the fields that only an answer needs."""
    chat = ChatRequest(model=body.model, messages=list(_messages_of(body)))
    chat.continue_final_message = body.messages[-1].role == "assistant"
    if isinstance(body, MessagesRequest) and body.metadata is not None:
        chat.user = body.metadata.user_id
    if body.tools:
        chat.tools = [_tool_of(index, tool) for index, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if isinstance(choice, ToolChoiceAuto):
        chat.tool_choice = "auto"
    elif isinstance(choice, ToolChoiceAny):
        chat.tool_choice = "required"
    elif isinstance(choice, ToolChoiceTool):
        chat.tool_choice = NamedTool("function", ToolName(choice.name))
    elif isinstance(choice, ToolChoiceNone):
        chat.tool_choice = "none"
    if choice is not None and not isinstance(choice, ToolChoiceNone):
        chat.parallel_tool_calls = not choice.disable_parallel_tool_use
    thinking, config = body.thinking, body.output_config
    if thinking is not None:
        chat.enable_thinking = not isinstance(thinking, ThinkingDisabled)
    if isinstance(thinking, ThinkingEnabled):
        chat.thinking_token_budget = thinking.budget_tokens
    if config is not None:
        if config.effort is not None and chat.enable_thinking is not False:
            chat.reasoning_effort = config.effort
        if config.format is not None:
            schema = JSONSchema("answer", config.format.schema, strict=True)
            chat.response_format = ResponseFormat("json_schema", schema)
    return chat


def _tool_of(index: int, tool: MessagesTool) -> Tool:
    if tool.input_schema.get("type", "object") != "object":
        where = f"tools[{index}].input_schema"
        raise invalid(f"{where}: the type must be object", where)
    schema = {"type": "object", **tool.input_schema}
    return Tool("function", FunctionTool(tool.name, tool.description, schema, tool.strict))


def _messages_of(body: CountTokensRequest) -> Iterator[dict[str, Any]]:
    if isinstance(body.system, str):
        yield {"role": "system", "content": body.system}
    elif body.system:
        yield {"role": "system", "content": [_text_part(block) for block in body.system]}
    for index, message in enumerate(body.messages):
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
            continue
        _check_blocks(message, f"messages[{index}].content")
        if message.role == "assistant":
            yield _assistant_message(message.content)
        else:
            yield from _given_messages(message.role, message.content, index)


def _check_blocks(message: InputMessage, where: str) -> None:
    for index, block in enumerate(message.content):
        if not isinstance(block, _IN_ROLE[message.role]):
            raise _wrong_block(block, f"{where}[{index}]", message.role)


def _wrong_block(block: Any, where: str, holder: str) -> APIError:
    kind = type(block).__struct_config__.tag
    if kind in ("document", "search_result"):
        why = "is not read here; send its text as a block of type text"
    elif kind == "image" and holder == "a result":
        why = f"has no place in {holder}; send it after the result, as a block of the message"
    else:
        why = f"has no place in {holder}"
    return invalid(f"{where}: a block of type {kind} {why}", where)


def _assistant_message(blocks: Sequence[Any]) -> dict[str, Any]:
    texts = [_text_part(block) for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {
                "name": block.name,
                "arguments": msgspec.json.encode(block.input).decode(),
            },
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    content = texts if texts or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _given_messages(role: str, blocks: Sequence[Block], index: int) -> Iterator[dict[str, Any]]:
    """Turn each result of a tool into a message of its own, between texts in their order."""
    parts: list[dict[str, Any]] = []
    for position, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            parts.append(_text_part(block))
            continue
        if isinstance(block, ImageBlock):
            parts.append(
                part_of_source(block.source, f"messages[{index}].content[{position}].source")
            )
            continue
        assert isinstance(block, ToolResultBlock)
        if parts:
            yield {"role": role, "content": parts}
            parts = []
        yield {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _result(block, f"messages[{index}].content[{position}].content"),
        }
    if parts or not blocks:
        yield {"role": role, "content": parts}


def _result(block: ToolResultBlock, where: str) -> Any:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    for index, part in enumerate(block.content):
        if not isinstance(part, TextBlock):
            raise _wrong_block(part, f"{where}[{index}]", "a result")
    return [_text_part(part) for part in block.content if isinstance(part, TextBlock)]


def _text_part(block: TextBlock) -> dict[str, str]:
    return {"type": "text", "text": block.text}


class MessagesRender(Render):
    """Writes the answer to a chat in Anthropic's form; a `Render`."""

    def __init__(self, turn: Turn, body: MessagesRequest) -> None:
        self._id = f"msg_{secrets.token_hex(12)}"
        self._model = turn.model_name
        self._max_tokens = body.max_tokens
        thinking = body.thinking
        shows = isinstance(thinking, ThinkingEnabled | ThinkingAdaptive)
        self._omits = shows and thinking.display == "omitted"  # type: ignore[union-attr]
        self._prompt_tokens = 0
        self._started = False
        self._open: Literal["thinking", "text"] | None = None
        self._num_blocks = 0
        self._last = Piece()

    def begin(self, plan: Plan, prompt_tokens: int) -> None:
        """Implement `Render.begin`."""
        self._prompt_tokens = prompt_tokens

    def ping(self) -> bytes:
        """Implement `Render.ping` by a comment, since a stream must begin with its message."""
        return named_event("ping", {"type": "ping"}) if self._started else PING

    def failed(self, error: APIError) -> bytes:
        """Implement `Render.failed`."""
        return named_event("error", error_envelope(error))

    def events(self, index: int, piece: Piece) -> bytes:
        """Implement `Render.events`."""
        parts = []
        if not self._started:
            self._started = True
            message = self._message([], MessageUsage(self._prompt_tokens, 0))
            parts.append(_event("message_start", message=message))
        if piece.reasoning:
            parts += self._opened("thinking")
            if not self._omits:
                delta = {"type": "thinking_delta", "thinking": piece.reasoning}
                parts.append(self._delta(delta))
        if piece.text:
            parts += self._opened("text")
            parts.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.calls:
            parts += self._called(call)
        if piece.finish_reason is not None:
            self._last = piece
            parts += self._closed()
        return b"".join(parts)

    def last_events(self, usage: Usage) -> bytes:
        """Implement `Render.last_events`."""
        delta = {
            "stop_reason": self._stop_reason(self._last, usage),
            "stop_sequence": _stop_sequence(self._last),
            "stop_details": None,
            "container": None,
        }
        return _event("message_delta", delta=delta, usage=_usage_of(usage)) + _event("message_stop")

    def body(self, choices: Sequence[Piece], usage: Usage) -> AnswerMessage:
        """Implement `Render.body`."""
        (piece,) = choices
        content: list[AnswerBlock] = []
        if piece.reasoning:
            content.append(AnswerThinking("" if self._omits else piece.reasoning, SIGNATURE))
        if piece.text:
            content.append(AnswerText(piece.text))
        content += [
            AnswerToolUse(
                call.id, call.function.name, msgspec.json.decode(call.function.arguments.encode())
            )
            for call in piece.calls
        ]
        message = self._message(content, _usage_of(usage))
        message.stop_reason = self._stop_reason(piece, usage)
        message.stop_sequence = _stop_sequence(piece)
        return message

    def _message(self, content: list[AnswerBlock], usage: MessageUsage) -> AnswerMessage:
        return AnswerMessage(self._id, self._model, content, usage)

    def _opened(self, kind: Literal["thinking", "text"]) -> list[bytes]:
        """Return the events after which a block of this kind is open."""
        if self._open == kind:
            return []
        block = AnswerText("") if kind == "text" else AnswerThinking("", "")
        return [*self._closed(kind), self._start(block)]

    def _closed(self, then: Literal["thinking", "text"] | None = None) -> list[bytes]:
        """Return the events that end the open block, if there is one."""
        was, self._open = self._open, then
        if was is None:
            return []
        signature = {"type": "signature_delta", "signature": SIGNATURE}
        signed = [self._delta(signature)] if was == "thinking" else []
        return [*signed, self._stop()]

    def _called(self, call: ToolCall) -> list[bytes]:
        block = AnswerToolUse(call.id, call.function.name, {})
        delta = {"type": "input_json_delta", "partial_json": call.function.arguments}
        return [*self._closed(), self._start(block), self._delta(delta), self._stop()]

    def _start(self, block: AnswerBlock) -> bytes:
        return _event("content_block_start", index=self._num_blocks, content_block=block)

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _event("content_block_delta", index=self._num_blocks, delta=delta)

    def _stop(self) -> bytes:
        self._num_blocks += 1
        return _event("content_block_stop", index=self._num_blocks - 1)

    def _stop_reason(self, piece: Piece, usage: Usage) -> StopReason:
        if piece.finish_reason == "tool_calls":
            return "tool_use"
        if piece.stop is not None:
            return "stop_sequence"
        if piece.finish_reason != "length":
            return "end_turn"
        if usage.completion_tokens < self._max_tokens:
            return "model_context_window_exceeded"
        return "max_tokens"


def _stop_sequence(piece: Piece) -> str | None:
    """Return the string that ended the turn; one that ended a tool call does not count."""
    return None if piece.finish_reason == "tool_calls" else piece.stop


def _event(name: str, **fields: Any) -> bytes:
    return named_event(name, {"type": name, **fields})


def _usage_of(usage: Usage) -> MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=cached,
        output_tokens_details=OutputDetails(usage.completion_tokens_details.reasoning_tokens),
    )

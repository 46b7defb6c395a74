"""Serves ``POST /v1/chat/completions``: `plan_chat` reads the request, `ChatRender` answers it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET
from msgspec.structs import replace

from edge.runtime.ask import Ask
from edge.runtime.sampling import SampledToken
from edge.text.tokenizer import Tokenizer
from edge_serve.http.errors import invalid
from edge_serve.pictures.parts import has_pictures, read_pictures, why_refused

from .answers import (
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    Choice,
    ChunkChoice,
    Delta,
    Message,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from .generate import (
    answer_head,
    check_choices,
    check_length,
    check_messages,
    check_stream,
    check_texts,
    sampling_params,
    shown_progress,
)
from .generic_tools import place_tools
from .messages import read_messages, user_texts
from .pieces import Piece
from .protocol import ChatRequest, convert
from .respond import Plan, Render, Turn
from .sse import DONE, event
from .tool_use import read_tools
from .voting import read_vote, shown_vote

# Tokens of reasoning for OpenAI's efforts. R1 and Qwen3 know no efforts, so they are budgets here.
_EFFORT_TOKENS = {"minimal": 256, "low": 1024, "medium": 4096}  # higher efforts have no limit


def plan_chat(turn: Turn, body: ChatRequest, *, capacity: int | None = None) -> Plan:
    """Turn the body of a chat request into a plan.

    Args:
        turn: the request's context.
        body: the request; other protocols convert theirs to one.
        capacity: tokens that fit; None takes the context.

    Raises:
        APIError, RequestError: the fields contradict each other or do not fit the model.
    """
    llm = turn.model.llm
    _check_fields(body)
    thinking, budget = _thinking(body, reasons=llm.reasons)
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    check_stream(body)
    check_messages(len(body.messages), turn.settings)
    check_choices(body.n or 1, 1, turn.settings.max_choices)
    params = sampling_params(body, llm, max_tokens=max_tokens, logprobs=logprobs)
    if has_pictures(body.messages):
        refused = why_refused(turn.model.name, turn.picture_models)
        body.messages = read_pictures(body.messages, turn.settings, convert, refused)
    check_texts(llm, [body.messages, body.tools], "messages", capacity=capacity)
    messages, continues = read_messages(body)
    use = read_tools(body, llm.template)
    messages, tools = place_tools(messages, use.shown, llm.template)
    make_parser = use.make_parser
    if continues:
        make_parser = use.parser_after(messages, reasons=llm.reasons)
    # User messages are part of every prompt; templates may drop other messages.
    check_length(llm, user_texts(messages), "messages", capacity=capacity)
    ask = Ask(
        messages,
        params,
        tools=tools,
        thinking=thinking,
        continue_final_message=continues,
        output=use.output,
        thinking_budget=budget,
        stop_when_sure=body.stop_when_sure,
        vote=read_vote(body, turn.settings.max_choices),
        progress=bool(body.return_progress),
    )
    return Plan(
        asks=[ask],
        n=body.n or 1,
        stream=bool(body.stream),
        user=body.user,
        cache_salt=body.cache_salt,
        fallback=use.fallback,
        make_parser=make_parser,
        one_call=use.one_call,
    )


def _check_fields(body: ChatRequest) -> None:
    if len({body.max_tokens, body.max_completion_tokens} - {None}) > 1:
        raise invalid(
            "max_tokens: differs from max_completion_tokens; give one of them", "max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: needs logprobs to be true", "top_logprobs")


def _thinking(body: ChatRequest, *, reasons: bool) -> tuple[bool | None, int | None]:
    """Return whether to reason (None leaves it to the model), and for how many tokens.

    Raises:
        APIError: fields contradict each other.
    """
    said = {}
    if body.enable_thinking is not None:
        said["enable_thinking"] = body.enable_thinking
    if body.chat_template_kwargs is not None:
        wanted = body.chat_template_kwargs.enable_thinking
        if wanted is not None:
            said["chat_template_kwargs"] = wanted
    if body.reasoning_effort is not None:
        said["reasoning_effort"] = body.reasoning_effort != "none"
    if len(set(said.values())) > 1:
        names = " and ".join(said)
        raise invalid(f"{names}: one turns the reasoning on, the other off", next(iter(said)))
    thinking = next(iter(said.values()), None)
    budget = body.thinking_token_budget
    # A model that does not reason complies with any effort.
    if budget is None and body.reasoning_effort is not None and thinking is not False and reasons:
        budget = _EFFORT_TOKENS.get(body.reasoning_effort)
    if budget is not None and thinking is False:
        raise invalid("thinking_token_budget: the reasoning is turned off", "thinking_token_budget")
    return thinking, budget


class ChatRender(Render):
    """Writes the answer to a chat in OpenAI's form; a `Render`."""

    def __init__(self, turn: Turn, body: ChatRequest) -> None:
        self._head = answer_head("chatcmpl", turn)
        self._tokenizer = turn.model.llm.tokenizer
        self._logprobs = bool(body.logprobs)
        self._reasoning = body.include_reasoning is not False
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._greeted: set[int] = set()

    def events(self, index: int, piece: Piece) -> bytes:
        """Implement `Render.events`."""
        choices = []
        if index not in self._greeted:
            self._greeted.add(index)
            choices.append(ChunkChoice(index, Delta(role="assistant", content="")))
        if piece.progress is not None:
            chunk = self._chunk(choices or [ChunkChoice(index, Delta())])
            chunk.prompt_progress = shown_progress(piece.progress)
            return event(chunk)
        reasoning, logprobs = self._shown(piece)
        if piece.text or reasoning or piece.calls or logprobs:
            delta = _delta(piece, reasoning)
            choices.append(ChunkChoice(index, delta, logprobs))
        if piece.finish_reason is not None:
            delta = Delta() if piece.vote is None else Delta(vote=shown_vote(piece.vote))
            choices.append(ChunkChoice(index, delta, finish_reason=piece.finish_reason))
        return b"".join(self._event([choice], None) for choice in choices)

    def last_events(self, usage: Usage) -> bytes:
        """Implement `Render.last_events`."""
        return self._event([], usage) + DONE if self._usage else DONE

    def body(self, choices: Sequence[Piece], usage: Usage) -> ChatCompletion:
        """Implement `Render.body`."""
        return ChatCompletion(
            **self._head,
            choices=[self._choice(index, piece) for index, piece in enumerate(choices)],
            usage=usage,
        )

    def _event(self, choices: list[ChunkChoice], usage: Usage | None) -> bytes:
        return event(self._chunk(choices, usage))

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        shown = usage if self._usage else UNSET
        return ChatChunk(**self._head, choices=choices, usage=shown)

    def _choice(self, index: int, piece: Piece) -> Choice:
        reasoning, logprobs = self._shown(piece)
        message = Message(content=piece.text if piece.text or not piece.calls else None)
        if reasoning:
            message.reasoning = message.reasoning_content = reasoning
        if piece.calls:
            message.tool_calls = [replace(call, index=UNSET) for call in piece.calls]
        if piece.vote is not None:
            message.vote = shown_vote(piece.vote)
        return Choice(index, message, piece.finish_reason or "stop", logprobs)

    def _shown(self, piece: Piece) -> tuple[str, ChatLogprobs | None]:
        """Return the reasoning and the log-probabilities, if they were asked for."""
        logprobs = None
        if self._logprobs and piece.tokens:
            logprobs = ChatLogprobs([_token_logprob(self._tokenizer, t) for t in piece.tokens])
        return piece.reasoning if self._reasoning else "", logprobs


def _delta(piece: Piece, reasoning: str) -> Delta:
    delta = Delta()
    if reasoning:
        delta.reasoning = delta.reasoning_content = reasoning
    if piece.text or not (reasoning or piece.calls):
        delta.content = piece.text
    if piece.calls:
        delta.tool_calls = list(piece.calls)
    return delta


def _token_logprob(tokenizer: Tokenizer, token: SampledToken) -> TokenLogprob:
    """Write a sampled token in OpenAI's form."""

    def text_and_bytes(token_id: int) -> tuple[str, list[int]]:
        data = tokenizer.token_bytes(token_id)
        return data.decode("utf-8", "replace"), list(data)

    def shown(logprob: float | None) -> float:
        return -9999.0 if logprob is None else max(logprob, -9999.0)  # JSON has no -inf

    text, data = text_and_bytes(token.id)
    top = []
    for token_id, logprob in token.top_logprobs or ():
        top_text, top_data = text_and_bytes(token_id)
        top.append(TopLogprob(top_text, shown(logprob), top_data))
    return TokenLogprob(text, shown(token.logprob), data, top)

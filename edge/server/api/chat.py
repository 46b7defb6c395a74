"""``POST /v1/chat/completions``: from a request to generations, and from those to its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from edge.runtime.sampling import SampledToken
from edge.server.http.access import Client
from edge.server.http.threads import in_thread
from edge.server.models.flight import Flight
from edge.server.models.registry import ServedModel
from edge.server.settings import ServerSettings
from edge.text.tokenizer import Tokenizer

from .answers import (
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    Choice,
    ChunkChoice,
    Delta,
    Message,
    TokenLogprob,
    ToolCall,
    TopLogprob,
)
from .chat_plan import ChatPlan, plan_chat
from .generate import (
    check_length,
    json_response,
    new_id,
    now,
    salt_of,
    server_timing,
    usage_of,
    wait_for,
)
from .protocol import ChatRequest
from .sse import DONE, Buffer, EventStream, event
from .tools import ToolParser, WholeCall, syntax_of

if TYPE_CHECKING:
    from edge.runtime.stream import GenerationChunk
    from edge.server.observe.metrics import Metrics


@dataclass
class _Piece:
    """What a chunk adds to an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.calls or self.logprobs)


class _Choice:
    """One answer as it comes: finds tool calls, renders log-probabilities.

    Args:
        tokenizer: for the texts of tokens.
        parser: finds calls; None leaves the text alone.
        one_call: whether the answer ends with its first call.
        logprobs: whether they were asked for.
        reasoning: whether the reasoning is shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: ToolParser | WholeCall | None,
        *,
        one_call: bool,
        logprobs: bool,
        reasoning: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._parser = parser
        self._one_call = one_call
        self._logprobs = logprobs
        self._reasoning = reasoning
        self._called = False
        self.is_cut = False
        """Whether the rest is of no interest: the one call is there."""

    def add(self, chunk: GenerationChunk) -> _Piece:
        """Turn a chunk of text into a piece of the answer."""
        piece = _Piece(reasoning=chunk.reasoning if self._reasoning else "")
        if self._logprobs:
            piece.logprobs = [token_logprob(self._tokenizer, token) for token in chunk.tokens]
        if not self.is_cut:
            piece.content = chunk.text
            if self._parser is not None:
                piece.content, piece.calls = self._parser.push(chunk.text)
                self._called = self._called or bool(piece.calls)
                if self._called and self._one_call:
                    piece.calls = piece.calls[:1]
                    self.is_cut = True
        if chunk.finish_reason is not None:
            if self._parser is not None and not self.is_cut:
                piece.content += self._parser.flush()
            ended = chunk.finish_reason == "stop" or self.is_cut
            piece.finish_reason = (
                "tool_calls" if self._called and ended else str(chunk.finish_reason)
            )
        return piece


async def chat_completions(
    request: Request,
    body: ChatRequest,
    model: ServedModel,
    client: Client,
    settings: ServerSettings,
    metrics: Metrics,
    headers: dict[str, str],
    arm: str | None = None,
) -> Response:
    """Answer a chat.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
    """
    llm = model.llm
    n = body.n or 1

    def submit() -> tuple[ChatPlan, Any]:
        plan = plan_chat(body, model, settings)
        # What users write stands in every prompt; templates may drop other messages.
        texts = [m.get("content") for m in plan.messages if m.get("role") == "user"]
        check_length(llm, [text for text in texts if isinstance(text, str)], "messages")
        generations = llm.submit(
            plan.messages,
            plan.params,
            n=n,
            deadline_s=settings.request_timeout_s,
            salt=salt_of(body, client),
            tools=plan.tools,
            thinking=plan.thinking,
            **plan.options,
        )
        return plan, generations

    with model.lease():
        plan, generations = await in_thread(submit, slow=_has_form(body))
        flight = Flight(model, generations, plan.params, metrics, user=body.user, arm=arm)
    answer = _Answer(body, model, plan, flight, n)
    if body.stream:
        buffer = Buffer(settings.stream_buffer_bytes)
        flight.start(partial(answer.stream, buffer.put))
        return EventStream(flight, buffer, settings.ping_s, headers)
    flight.start(answer.collect)
    await wait_for(flight, request.receive)
    return json_response(answer.whole(), {**headers, "server-timing": server_timing(flight.stats)})


def _has_form(request: ChatRequest) -> bool:
    """Whether a grammar has to be compiled for it."""
    wanted = request.response_format
    if wanted is not None and wanted.type != "text":
        return True
    if request.tool_choice in (None, "auto"):
        return any(tool.function.strict for tool in request.tools or ())
    return request.tool_choice != "none"


class _Answer:
    """All choices of one request."""

    def __init__(
        self, request: ChatRequest, model: ServedModel, plan: ChatPlan, flight: Flight, n: int
    ) -> None:
        self._id = new_id("chatcmpl")
        self._created = now()
        self._model = model
        self._flight = flight
        self._left = n
        self._n = n
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        template = model.llm.template
        syntax = syntax_of(template.source) if template is not None and plan.tools else None
        parser: Callable[[], ToolParser | WholeCall | None] = lambda: None  # noqa: E731
        if plan.forced:
            parser = WholeCall
        elif syntax is not None:
            parser = partial(ToolParser, syntax)
        self._choices = [
            _Choice(
                model.llm.tokenizer,
                parser(),
                one_call=plan.forced or request.parallel_tool_calls is False,
                logprobs=bool(request.logprobs),
                reasoning=request.include_reasoning is not False,
            )
            for _ in range(n)
        ]
        self._pieces: list[list[_Piece]] = [[] for _ in range(n)]
        self._greeted = [False] * n

    def collect(self, index: int, chunk: GenerationChunk) -> None:
        """Keep a piece of a whole answer."""
        self._pieces[index].append(self._add(index, chunk))

    def stream(self, put: Callable[[bytes], None], index: int, chunk: GenerationChunk) -> None:
        """Write a piece as events."""
        piece = self._add(index, chunk)
        if not self._greeted[index]:
            self._greeted[index] = True
            put(self._event(index, Delta(role="assistant", content="")))
        if not piece.is_empty:
            put(self._event(index, _delta(piece), piece.logprobs))
        if piece.finish_reason is None:
            return
        put(self._event(index, Delta(), finish_reason=piece.finish_reason))
        self._left -= 1
        if not self._left:
            if self._usage:
                put(event(self._chunk([], usage=self._usage_of())))
            put(DONE)

    def whole(self) -> ChatCompletion:
        """The answer, once all choices have ended."""
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model.name,
            choices=[_whole_choice(index, pieces) for index, pieces in enumerate(self._pieces)],
            usage=self._usage_of(),
            system_fingerprint=self._model.fingerprint,
        )

    def _add(self, index: int, chunk: GenerationChunk) -> _Piece:
        choice = self._choices[index]
        was_cut = choice.is_cut
        piece = choice.add(chunk)
        if choice.is_cut and not was_cut and chunk.finish_reason is None:
            self._flight.cancel(index)
        return piece

    def _usage_of(self) -> Any:
        return usage_of(self._flight.stats, self._flight.reasoning_tokens, self._n)

    def _event(
        self,
        index: int,
        delta: Delta,
        logprobs: list[TokenLogprob] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        shown = ChatLogprobs(logprobs) if logprobs else None
        return event(self._chunk([ChunkChoice(index, delta, shown, finish_reason)]))

    def _chunk(self, choices: list[ChunkChoice], usage: Any = UNSET) -> ChatChunk:
        if usage is UNSET and self._usage:
            usage = None
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model.name,
            choices=choices,
            system_fingerprint=self._model.fingerprint,
            usage=usage,
        )


def _delta(piece: _Piece) -> Delta:
    delta = Delta()
    if piece.reasoning:
        delta.reasoning = delta.reasoning_content = piece.reasoning
    if piece.content or not (piece.reasoning or piece.calls):
        delta.content = piece.content
    if piece.calls:
        delta.tool_calls = piece.calls
    return delta


def _whole_choice(index: int, pieces: list[_Piece]) -> Choice:
    content = "".join(piece.content for piece in pieces)
    reasoning = "".join(piece.reasoning for piece in pieces)
    calls = [call for piece in pieces for call in piece.calls]
    for call in calls:
        call.index = UNSET
    logprobs = [item for piece in pieces for item in piece.logprobs]
    message = Message(content=content if content or not calls else None)
    if reasoning:
        message.reasoning = message.reasoning_content = reasoning
    if calls:
        message.tool_calls = calls
    return Choice(
        index=index,
        message=message,
        finish_reason=pieces[-1].finish_reason or "stop",
        logprobs=ChatLogprobs(logprobs) if logprobs else None,
    )


def token_logprob(tokenizer: Tokenizer, token: SampledToken) -> TokenLogprob:
    """A sampled token in OpenAI's form."""

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

"""Answers a request for text on any endpoint; an endpoint is a plan and a render.

The plan says what the body of a request wants from the engine, and the render writes the answer.
Everything between the two is the same for all endpoints and is here, in `respond`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic as clock
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.responses import Response

from edge.bundle.tasks import check_task
from edge.errors import DeadlineError, EdgeError, RequestError
from edge.runtime.sampling_params import SamplingParams
from edge_serve.http.access import Client
from edge_serve.http.errors import APIError
from edge_serve.http.guard import Receive
from edge_serve.http.threads import (
    ClientGoneError,
    Lane,
    OnPiece,
    check_there,
    in_thread,
    until_gone,
)
from edge_serve.models.adapters import ChosenAdapter
from edge_serve.models.flight import Flight
from edge_serve.models.registry import ServedModel
from edge_serve.settings import ServerSettings

from .answers import CompletionDetails, PromptDetails, Usage
from .pieces import ChoiceReader, MakeParser, Piece, join_pieces
from .prompt_logprobs import score_prompt
from .sse import PING, Buffer, EventStream, StreamForm, event

if TYPE_CHECKING:
    from edge.runtime.ask import Ask
    from edge.runtime.generation import GenerationStats
    from edge.runtime.llm import LLM
    from edge.runtime.scheduler import Suspended
    from edge.runtime.stream import Generation, GenerationChunk
    from edge.runtime.structured_output import GrammarCompiler, OutputFormat
    from edge_serve.observe.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The context that one request is answered in.

    Attributes:
        model: the model that answers.
        client: the client that asks.
        settings: limits of the server.
        metrics: counts how requests end.
        receive: reads from the client's connection.
        lane: lane that encodes its texts.
        form_lane: lane that compiles the form of its answer.
        headers: headers of the response.
        arm: the arm of the A/B split that chose the model, if any.
        priority: lower runs first.
        waited_s: seconds that the request has waited for the model to load.
        picture_models: names of the served models that take pictures.
        adapter: the adapter that answers with the model, if any.
    """

    model: ServedModel
    client: Client
    settings: ServerSettings
    metrics: Metrics
    receive: Receive
    lane: Lane
    form_lane: Lane
    headers: Mapping[str, str]
    arm: str | None = None
    priority: int = 0
    waited_s: float = 0.0
    picture_models: Sequence[str] = ()
    adapter: ChosenAdapter | None = None

    @property
    def model_name(self) -> str:
        """Name of what answers, as a request gives it."""
        return f"{self.model.name}:{self.adapter.name}" if self.adapter else self.model.name

    def deadline_s(self) -> float | None:
        """Monotonic time by which an answer that begins now must end; None sets no limit."""
        most_s = self.settings.request_timeout_s
        return None if most_s is None else clock() + most_s - self.waited_s


@dataclass(frozen=True)
class Fallback:
    """Looser forms of an answer, for a form that cannot be compiled.

    Attributes:
        names: names of the parts that may be loosened; at least one.
        alone: returns the form with only this part.
        without: returns the form with these parts loosened.
    """

    names: Sequence[str]
    alone: Callable[[str], OutputFormat]
    without: Callable[[Collection[str]], OutputFormat]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a request wants from the engine.

    Attributes:
        asks: one for each prompt, at least one; they differ only in the prompt.
        n: answers per prompt.
        stream: whether the answer is sent while it is generated.
        echo: whether each answer begins with its prompt, which is scored if log-probabilities are
            wanted.
        user: user that the request names.
        cache_salt: the request's salt, in addition to the client's own.
        fallback: looser forms to use if the form cannot be compiled.
        make_parser: makes the parser that finds tool calls in one answer; None looks for none.
        one_call: whether an answer ends with its first tool call.
    """

    asks: Sequence[Ask]
    n: int = 1
    stream: bool = False
    echo: bool = False
    user: str | None = None
    cache_salt: str | None = None
    fallback: Fallback | None = None
    make_parser: MakeParser | None = None
    one_call: bool = False

    @property
    def params(self) -> SamplingParams:
        """Resolved sampling parameters."""
        assert self.asks[0].params is not None
        return self.asks[0].params


@dataclass(frozen=True)
class Resumed:
    """State from which an answer continues that an earlier server began.

    Attributes:
        prompt: token ids of the prompt.
        state: the engine's state of the answer.
        left_s: seconds that it may still take; None sets no limit.
    """

    prompt: list[int]
    state: Suspended
    left_s: float | None


class Render(StreamForm, Protocol):
    """Writes one answer in the form of its endpoint; methods not overridden write OpenAI's form.

    A choice is one answer to one prompt; choices are numbered prompt by prompt.

    Attributes:
        media_type: media type of a stream.
    """

    media_type: str = "text/event-stream"

    def begin(self, plan: Plan, prompt_tokens: int) -> None:
        """Take the plan, and the number of tokens of all prompts, before the first piece."""
        return

    def ping(self) -> bytes:
        """Return bytes to fill a silence in a stream; empty if the form has none."""
        return PING

    def failed(self, error: APIError) -> bytes:
        """Return the last bytes of a stream that fails after its first bytes."""
        return event(error.envelope())

    def events(self, index: int, piece: Piece) -> bytes:
        """Return the events of a piece of choice ``index``; empty if the piece shows nothing."""
        ...

    def last_events(self, usage: Usage) -> bytes:
        """Return the events that follow the last piece of the last choice."""
        ...

    def body(self, choices: Sequence[Piece], usage: Usage) -> msgspec.Struct:
        """Return the whole answer; each choice is joined to one piece."""
        ...


async def respond(turn: Turn, make_plan: Callable[[], Plan], render: Render) -> Response:
    """Answer a request, as a whole or as a stream of events.

    Args:
        turn: the request's context.
        make_plan: makes the plan; called in a thread.
        render: writes the answer; made for this request.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
        ClientGoneError: the client left before it had the answer.
    """
    answer = await begin(turn, make_plan, render)
    return await answer.send(turn)


async def begin(
    turn: Turn, make_plan: Callable[[], Plan], render: Render, resumed: Resumed | None = None
) -> Answer:
    """Queue the answer to a request without reading any of it yet.

    Args:
        turn: the request's context.
        make_plan: makes the plan; called in a thread.
        render: writes the answer; made for this request.
        resumed: state to continue from; None begins a new answer.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
        ClientGoneError: the client left before it had the answer.
    """
    model = turn.model
    with model.lease(counts=False):  # a client's flight counts instead

        def prepare(on_piece: OnPiece) -> Plan:
            check_task(model.llm.manifest, "generate")
            plan = make_plan()
            asks = [_encode(turn, plan, ask, resumed, on_piece) for ask in plan.asks]
            return replace(plan, asks=asks)

        plan = await turn.lane.run(prepare, turn.receive)
        deadline_s = turn.deadline_s()
        if resumed is not None:
            deadline_s = None if resumed.left_s is None else clock() + resumed.left_s
        echoes = await _echoes(turn, plan, deadline_s)
        plan = await _compile(turn, plan, deadline_s)
        check_there(turn.receive)
        _take_out_left(model, len(plan.asks) * plan.n)
        generations = await in_thread(partial(_submit, model.llm, plan, deadline_s))
        if turn.adapter is not None:
            turn.metrics.observe_adapter(model.name, turn.adapter.name)
        flight = Flight(model, generations, plan.params, turn.metrics, user=plan.user, arm=turn.arm)
    render.begin(plan, sum(len(ask.ids or ()) for ask in plan.asks))
    return Answer(model, plan, echoes, flight, render, generations, deadline_s)


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer in JSON."""
    return Response(
        msgspec.json.encode(value),
        headers={"cache-control": "no-store", **(headers or {})},
        media_type="application/json",
    )


class Answer:
    """Reads the choices of one request as they come, and lets a render write them.

    Args:
        model: the model that answers.
        plan: the request's plan.
        echoes: pieces that the answers to each prompt begin with.
        flight: reads the generations.
        render: writes the answer.
        generations: one per choice.
        deadline_s: monotonic time by which it must end; None sets no limit.
    """

    def __init__(
        self,
        model: ServedModel,
        plan: Plan,
        echoes: Sequence[Piece],
        flight: Flight,
        render: Render,
        generations: Sequence[Generation],
        deadline_s: float | None,
    ) -> None:
        self.model = model
        self.flight = flight
        self.generations = generations
        self.deadline_s = deadline_s
        self._plan = plan
        self._n = plan.n
        self._render = render
        self._readers = [
            ChoiceReader(plan.make_parser, one_call=plan.one_call, echo=echo)
            for echo in echoes
            for _ in range(plan.n)
        ]
        self._pieces: list[list[Piece]] = [[] for _ in self._readers]
        self._left = len(self._readers)

    async def send(self, turn: Turn, written: msgspec.Struct | None = None) -> Response:
        """Answer the client, as a whole or as a stream.

        Args:
            turn: the request's context.
            written: the whole answer, if the render writes it piece by piece; it replaces
                `Render.body`.
        """
        flight = self.flight
        if self._plan.stream:
            buffer = Buffer(turn.settings.stream_buffer_bytes)
            flight.start(partial(self.stream, buffer.put))
            return EventStream(flight, buffer, self._render, turn.settings.ping_s, turn.headers)
        flight.start(self.collect if written is None else self.write)
        await _wait_for(flight, turn.receive)
        headers = {**turn.headers, "server-timing": _server_timing(flight.stats)}
        return json_response(written or self.body(), headers)

    def collect(self, index: int, chunk: GenerationChunk) -> None:
        """Keep a chunk for the whole answer."""
        self._pieces[index].append(self._read(index, chunk))

    def stream(self, put: Callable[[bytes], None], index: int, chunk: GenerationChunk) -> None:
        """Write a chunk as events."""
        piece = self._read(index, chunk)
        if events := self._render.events(index, piece):
            put(events)
        if piece.finish_reason is not None:
            self._left -= 1
            if not self._left:
                put(self._render.last_events(self._usage()))

    def write(self, index: int, chunk: GenerationChunk) -> None:
        """Let the render write a chunk that no stream gets."""
        self.stream(lambda _: None, index, chunk)

    def body(self) -> msgspec.Struct:
        """Return the whole answer, once all choices have ended."""
        return self._render.body([join_pieces(parts) for parts in self._pieces], self._usage())

    def _read(self, index: int, chunk: GenerationChunk) -> Piece:
        reader = self._readers[index]
        piece = reader.read(chunk)
        if reader.is_cut:
            self.flight.cut(index)
        return piece

    def _usage(self) -> Usage:
        return _usage_of(self.flight.stats, self.flight.reasoning_tokens, self._n)


def _encode(turn: Turn, plan: Plan, ask: Ask, resumed: Resumed | None, on_piece: OnPiece) -> Ask:
    """Complete an ask with the client and the prompt's token ids."""
    llm, salt = turn.model.llm, turn.client.salt
    # A cached prefix is shared only within one key, and within one `cache_salt` of it.
    salt = f"{salt}/{plan.cache_salt}" if plan.cache_salt else salt
    adapter = turn.adapter and turn.adapter.read()
    ask = replace(
        ask, priority=turn.priority, client=turn.client.origin, salt=salt, adapter=adapter
    )
    if resumed is not None:
        return replace(ask, ids=resumed.prompt, resumed=resumed.state)
    return replace(ask, ids=llm.encode_ask(ask, llm.kv_capacity, on_piece))


def left_s(deadline_s: float | None) -> float | None:
    """Return the seconds left until a monotonic time; None means no limit.

    Raises:
        DeadlineError: the time has passed.
    """
    if deadline_s is None:
        return None
    if (left := deadline_s - clock()) <= 0:
        raise DeadlineError("the request waited longer than it may take")
    return left


async def _echoes(turn: Turn, plan: Plan, deadline_s: float | None) -> list[Piece]:
    """Return, for each prompt, the piece that its answers begin with."""
    if not plan.echo:
        return [Piece() for _ in plan.asks]
    tokenizer, echoes = turn.model.llm.tokenizer, []
    for ask in plan.asks:
        prompt = ask.prompt
        echo = Piece(text=prompt if isinstance(prompt, str) else tokenizer.decode(ask.ids or ()))
        if plan.params.logprobs is not None:
            ask = replace(ask, deadline_s=left_s(deadline_s))
            echo.tokens = await score_prompt(turn.model, ask, plan.params.logprobs, turn.receive)
        echoes.append(echo)
    return echoes


async def _compile(turn: Turn, plan: Plan, deadline_s: float | None) -> Plan:
    """Compile the form of an answer unless it is cached; return the plan with the final form."""
    wanted, fallback, grammars = plan.asks[0].output, plan.fallback, turn.model.llm.grammars
    if wanted is None:
        return plan

    async def run(work: Callable[[OutputFormat], object], form: OutputFormat) -> None:
        await turn.form_lane.run(lambda _: work(form), turn.receive, timeout_s=left_s(deadline_s))

    form = wanted if fallback is None else grammars.used_for(wanted)
    if form not in grammars:
        try:
            await run(grammars.compile, form)
        except RequestError:
            if fallback is None:
                raise
            form = await _loosened(fallback, grammars, run)
            grammars.use_for(wanted, form)
    return replace(plan, asks=[replace(ask, output=form) for ask in plan.asks])


async def _loosened(
    fallback: Fallback,
    grammars: GrammarCompiler,
    run: Callable[[Callable[[OutputFormat], object], OutputFormat], Awaitable[None]],
) -> OutputFormat:
    """Compile a form without the parts that fail to compile alone, or else without all."""
    refused = []
    for name in fallback.names if len(fallback.names) > 1 else ():
        try:
            await run(grammars.check, fallback.alone(name))
        except RequestError:
            refused.append(name)
    if refused:
        form = fallback.without(refused)
        try:
            await run(grammars.compile, form)
        except RequestError:
            pass  # the rest cannot be compiled together
        else:
            return form
    form = fallback.without(fallback.names)
    await run(grammars.compile, form)
    return form


def _take_out_left(model: ServedModel, num_sequences: int) -> None:
    """If the queue has no room for so many, drop sequences of clients that have left."""
    scheduler = model.llm.scheduler
    stats = scheduler.stats()
    if stats.running + stats.waiting + num_sequences > scheduler.max_batch + stats.queue_capacity:
        for flight in list(model.flights):
            flight.end_if_left()


def _submit(llm: LLM, plan: Plan, deadline_s: float | None) -> list[Generation]:
    """Queue every prompt, or none."""
    generations: list[Generation] = []
    try:
        for ask in plan.asks:
            generations += llm.answer(replace(ask, deadline_s=left_s(deadline_s)), plan.n)
    except EdgeError:
        for generation in generations:
            generation.cancel()
        raise
    return generations


async def _wait_for(flight: Flight, receive: Receive) -> None:
    """Wait for a whole answer; a client that leaves ends it.

    Raises:
        ClientGoneError: the client left.
        EdgeError, APIError: the answer failed.
    """
    flight.receive = receive
    gone = asyncio.create_task(until_gone(receive))
    gone.add_done_callback(lambda _: flight.abort(ClientGoneError("the client left")))
    try:
        await asyncio.shield(flight.done)
    finally:
        gone.cancel()


def _usage_of(stats: Sequence[GenerationStats | None], reasoning: Sequence[int], n: int) -> Usage:
    """Count the tokens of all choices; a prompt counts once for its ``n`` answers."""
    there = [item for item in stats if item is not None]
    prompts = there[::n]
    prompt = sum(item.prompt_tokens for item in prompts)
    completion = sum(item.completion_tokens for item in there)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(sum(item.cached_tokens for item in prompts)),
        completion_tokens_details=CompletionDetails(sum(reasoning)),
    )


def _server_timing(stats: Sequence[GenerationStats | None]) -> str:
    """Return the header ``Server-Timing`` (W3C): queue, first token, whole answer, in ms."""
    there = [item for item in stats if item is not None]
    slowest = max(there, key=lambda item: item.total_s, default=None)
    if slowest is None:
        return "total;dur=0"
    return (
        f"queue;dur={slowest.queue_s * 1e3:.1f}, ttft;dur={slowest.ttft_s * 1e3:.1f}, "
        f"total;dur={slowest.total_s * 1e3:.1f}"
    )

"""Answers a request for text, whatever its endpoint; an endpoint is a plan and a render.

The plan says what the body of a request asks of the engine, the render writes what comes back.
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
    from edge.runtime.scheduler import PutAway
    from edge.runtime.stream import Generation, GenerationChunk
    from edge.runtime.structured_output import GrammarCompiler, OutputFormat
    from edge_serve.observe.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The context that one request is answered in.

    Attributes:
        model: the model that answers.
        client: who asks.
        settings: limits of the server.
        metrics: counts every end.
        receive: reads from the client's connection.
        lane: where its texts are encoded.
        form_lane: where the form of its answer is compiled.
        headers: headers of the response.
        arm: the arm of the A/B split that chose the model, if any.
        priority: lower runs first.
        waited_s: seconds for which it has waited for the model to be loaded.
        picture_models: names of the served models that take pictures.
        adapter: what answers besides the model, if anything does.
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
        """What answers, as a request names it."""
        return f"{self.model.name}:{self.adapter.name}" if self.adapter else self.model.name

    def deadline_s(self) -> float | None:
        """When the answer must have ended if it begins now, on the monotonic clock."""
        most_s = self.settings.request_timeout_s
        return None if most_s is None else clock() + most_s - self.waited_s


@dataclass(frozen=True)
class Fallback:
    """What becomes of a form that cannot be compiled: some of its parts are loosened.

    Attributes:
        names: of the parts that may be; one at least.
        alone: returns the form that a part alone has.
        without: returns the form with these parts loosened.
    """

    names: Sequence[str]
    alone: Callable[[str], OutputFormat]
    without: Callable[[Collection[str]], OutputFormat]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a request asks of the engine.

    Attributes:
        asks: one for each prompt, at least one; they differ in that alone.
        n: answers per prompt.
        stream: whether the answer is sent while it is generated.
        echo: whether each answer begins with its prompt, scored if its log-probabilities are
            wanted.
        user: the user that the request names.
        cache_salt: the request's salt, besides the client's own.
        fallback: what takes the place of a form that cannot be compiled.
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
    """Where an answer goes on that a server had begun.

    Attributes:
        prompt: token ids of the prompt.
        state: what the engine had of the answer.
        left_s: seconds that it may still take; None sets no limit.
    """

    prompt: list[int]
    state: PutAway
    left_s: float | None


class Render(StreamForm, Protocol):
    """Writes one answer in the form of its endpoint; what is not overridden is OpenAI's form.

    A choice is one answer to one prompt; choices are numbered prompt by prompt.

    Attributes:
        media_type: of a stream.
    """

    media_type: str = "text/event-stream"

    def begin(self, plan: Plan, prompt_tokens: int) -> None:
        """Take the plan, and the tokens of all prompts, before the first piece."""
        return

    def ping(self) -> bytes:
        """Return what fills a silence in a stream; empty if nothing may."""
        return PING

    def failed(self, error: APIError) -> bytes:
        """Return the last bytes of a stream that fails after its first."""
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
    """Queue the answer to a request; nothing of it is read yet.

    Args:
        turn: see `respond`.
        make_plan: see `respond`.
        render: see `respond`.
        resumed: the answer goes on from there.

    Raises:
        What `respond` raises.
    """
    model = turn.model
    with model.lease(counts=False):  # its flight counts, if it is a client's

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
        model: what answers.
        plan: what was asked of the engine.
        echoes: what the answers to each prompt begin with.
        flight: reads the generations.
        render: writes the answer.
        generations: one per choice.
        deadline_s: when it must have ended, on the monotonic clock; None sets no limit.
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
        """Answer the client, as a whole or as a stream; see `respond`.

        Args:
            turn: the request's context.
            written: what the render writes piece by piece; the whole answer in the place of
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
    """Return what is asked with who asks it, and with the prompt's token ids."""
    llm, salt = turn.model.llm, turn.client.salt
    # Cached prefixes are shared within one key, and within one `cache_salt` of it.
    salt = f"{salt}/{plan.cache_salt}" if plan.cache_salt else salt
    adapter = turn.adapter and turn.adapter.read()
    ask = replace(
        ask, priority=turn.priority, client=turn.client.origin, salt=salt, adapter=adapter
    )
    if resumed is not None:
        return replace(ask, ids=resumed.prompt, resumed=resumed.state)
    return replace(ask, ids=llm.encode_ask(ask, llm.kv_capacity, on_piece))


def left_s(deadline_s: float | None) -> float | None:
    """Return the seconds until a time of the monotonic clock; None is never.

    Raises:
        DeadlineError: it has come.
    """
    if deadline_s is None:
        return None
    if (left := deadline_s - clock()) <= 0:
        raise DeadlineError("the request waited longer than it may take")
    return left


async def _echoes(turn: Turn, plan: Plan, deadline_s: float | None) -> list[Piece]:
    """Return, for each prompt, what its answers begin with."""
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
    """Compile the form of an answer, unless that was done before; return the plan that it fits."""
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
    """Compile a form without those of its parts that cannot be compiled alone, or without all."""
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
            pass  # they cannot be compiled together
        else:
            return form
    form = fallback.without(fallback.names)
    await run(grammars.compile, form)
    return form


def _take_out_left(model: ServedModel, num_sequences: int) -> None:
    """Where the queue has no room for so many, end what is there for clients that have left."""
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

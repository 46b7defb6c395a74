"""Turns sampled tokens into text: `OutputStream` is the engine's end, `Generation` the reader's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from edge.errors import EdgeError, RequestError
from edge.text.reasoning import ReasoningSplitter
from edge.text.streamed_text import Detokenizer, StopMatcher

from .generation import FinishReason, GenerationStats, PromptProgress
from .sampling import SampledToken
from .scheduler import Request, Scheduler, SequenceState

if TYPE_CHECKING:
    from edge.votes.tally import VoteResult

_MOST_UNREAD = 1 << 16  # since an answer that slides may never end


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of a streamed answer.

    Attributes:
        text: new text of the answer.
        reasoning: new text of the reasoning (inside ``<think>``).
        tokens: the tokens sampled for this piece, without an end token; their text may come later.
        finish_reason: on the last piece: ``stop`` (end token or stop string), ``length``
            (``max_tokens`` or the cache is full) or ``cancelled``.
        stats: on the last piece, counts and times.
        progress: progress of the prompt, if `LLM.submit` requested it; such a piece has nothing
            else.
        stop: on the last piece, the stop string that ended the answer, if one did.
        vote: on the last piece, the result of a vote.
    """

    text: str = ""
    reasoning: str = ""
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None
    stop: str | None = None
    progress: PromptProgress | None = None
    vote: VoteResult | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer, with the fields of `GenerationChunk`."""

    text: str
    reasoning: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason
    stats: GenerationStats = field(repr=False)


class OutputStream:
    """Turns the tokens of one sequence into chunks and queues them for one reader.

    An `edge.runtime.scheduler.Sink`: the engine's thread writes and never waits for the reader,
    which may be a thread (`get`) or a task of any asyncio loop (`get_async`). Tokens become whole
    characters first. Then reasoning is split from the answer. Then stop strings are looked for, in
    the answer only: a reasoning often quotes the strings that should end the answer.

    Args:
        detokenizer: turns the tokens of this sequence into text; None gives tokens without text.
        stop: strings that end the answer and are not part of it.
        splitter: splits this sequence's reasoning from its answer; None takes all text as the
            answer.
    """

    def __init__(
        self,
        detokenizer: Detokenizer | None = None,
        stop: Sequence[str] = (),
        splitter: ReasoningSplitter | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stop)
        self._splitter = splitter
        self._last = GenerationChunk()
        self._queue: SimpleQueue[GenerationChunk | EdgeError] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    # ------------------------------------------------------------------ in the engine's thread

    def progress(self, progress: PromptProgress) -> None:
        """Queue how far the prompt has been read."""
        self._put(GenerationChunk(progress=progress))

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        """Queue the chunk of a token; the token that ends the answer waits for `finish`.

        Raises:
            RequestError: nobody reads, and this is not the last token.
        """
        tokens: tuple[SampledToken, ...] = ()
        answer, reasoning, stopped = "", "", False
        if reason != "stop":  # otherwise it is an end token, whose text is not part of the answer
            tokens = (token,)
            if self._detokenizer is not None:
                answer, reasoning = self._split(self._detokenizer.push(token.id))
                answer, stopped = self._stops.push(answer)
        if stopped:
            reason = "stop"
        chunk = GenerationChunk(answer, reasoning, tokens)
        if reason is not None:
            self._last = chunk
        elif self._queue.qsize() < _MOST_UNREAD:
            self._put(chunk)
        else:
            raise RequestError(
                f"{_MOST_UNREAD} tokens of the answer wait to be read, so it was ended; read it as "
                "it comes, or set max_tokens"
            )
        return reason

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        """Queue the last chunk, with all text that was held back up to a stop string."""
        answer = reasoning = ""
        if self._detokenizer is not None:
            answer, reasoning = self._split(self._detokenizer.flush())
        if self._splitter is not None:
            last_reasoning, last_answer = self._splitter.flush()
            answer, reasoning = answer + last_answer, reasoning + last_reasoning
        answer, _ = self._stops.push(answer)
        answer += self._stops.flush()
        last = self._last
        self._put(
            GenerationChunk(
                last.text + answer,
                last.reasoning + reasoning,
                last.tokens,
                reason,
                stats,
                self._stops.matched if reason == "stop" else None,
            )
        )

    def fail(self, error: EdgeError) -> None:
        """Queue the error that ends the sequence."""
        self._put(error)

    def _split(self, text: str) -> tuple[str, str]:
        """Return what the text adds to the answer and to the reasoning."""
        if self._splitter is None:
            return text, ""
        reasoning, answer = self._splitter.push(text)
        return answer, reasoning

    def _put(self, item: GenerationChunk | EdgeError) -> None:
        self._queue.put(item)
        if self._waiter is None:  # a reader checks the queue once more before it waits
            return
        with self._lock:
            loop, future = self._waiter
            self._waiter = None
        try:
            loop.call_soon_threadsafe(_wake, future)
        except RuntimeError:
            # The loop was closed while its reader waited: nobody will continue to read.
            if not loop.is_closed():
                raise

    # ------------------------------------------------------------------ in the reader's thread

    def get(self, timeout_s: float | None = None) -> GenerationChunk | EdgeError:
        """Wait for the next chunk, or for the error that ends the sequence.

        Raises:
            Empty: nothing came within ``timeout_s`` seconds; None waits without limit.
        """
        return self._queue.get(timeout=timeout_s)

    async def get_async(self) -> GenerationChunk | EdgeError:
        """Wait like `get` without blocking the loop."""
        while True:
            try:
                return self._queue.get_nowait()
            except Empty:
                pass
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            with self._lock:
                self._waiter = (loop, future)
            # A chunk may have come before the writer could see that somebody waits.
            if self._queue.empty():
                await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():  # the waiting task was cancelled
        future.set_result(None)


class Generation:
    """One sequence that runs or waits. Iterate over it once, from a thread or from asyncio.

    A generation that is dropped before its end is cancelled. It keeps the engine's thread alive.

    Attributes:
        prompt_ids: token ids of the prompt.
        index: number of this sample among the ``n`` of its submission, from 0.
        sequence: its state in the scheduler.
    """

    def __init__(
        self, scheduler: Scheduler, sequence: SequenceState, stream: OutputStream, index: int = 0
    ) -> None:
        self.prompt_ids = list(sequence.request.ids)
        self.index = index
        self._scheduler, self.sequence = scheduler, sequence
        self._stream, self._ended = stream, False

    @property
    def seed(self) -> int:
        """Return the seed of the random numbers; a fresh one if the parameters have none."""
        return self.sequence.sampler.seed

    def cancel(self) -> None:
        """End it within one step; the last chunk has the reason ``cancelled``."""
        self.sequence.cancelled = True

    def to_suspend(self) -> SequenceState:
        """Return the sequence that `LLM.suspend` takes out.

        Raises:
            RequestError: it is a vote, of several sequences.
        """
        return self.sequence

    def __iter__(self) -> Iterator[GenerationChunk]:
        """Wait for each chunk in turn.

        Raises:
            DeadlineError: the deadline passed.
            BackendError: the engine failed.
            RequestError: the sequence was ended because too many chunks waited to be read.
        """
        while not self._ended:
            yield self._take(self._stream.get())

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        """Wait for each chunk in turn, in any running loop; raises the errors of `__iter__`."""
        while not self._ended:
            yield self._take(await self._stream.get_async())

    def take(self, timeout_s: float) -> GenerationChunk | None:
        """Wait at most ``timeout_s`` seconds for the next chunk; None if none came.

        Raises:
            EdgeError: any error of iterating.
        """
        try:
            return self._take(self._stream.get(timeout_s))
        except Empty:
            return None

    def result(self) -> GenerationResult:
        """Wait for the end and return the chunks not yet iterated over as one answer.

        Raises:
            RequestError: the generation was iterated over to its end.
            EdgeError: any error of iterating.
        """
        return join_chunks(self)

    def _take(self, item: GenerationChunk | EdgeError) -> GenerationChunk:
        if isinstance(item, EdgeError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    def __del__(self) -> None:
        # The attribute is missing if the constructor failed.
        if not self.__dict__.get("_ended", True):
            self.cancel()


def submit(
    scheduler: Scheduler, requests: Sequence[Request], streams: Sequence[OutputStream]
) -> list[Generation]:
    """Queue requests that belong together, all of them or none, and return their generations.

    Raises:
        EdgeError: any error of `Scheduler.submit`.
    """
    pairs = zip(scheduler.submit(requests, streams), streams, strict=True)
    return [
        Generation(scheduler, sequence, stream, index)
        for index, (sequence, stream) in enumerate(pairs)
    ]


def join_chunks(chunks: Generation | Iterator[GenerationChunk]) -> GenerationResult:
    """Join the pieces of one answer.

    Raises:
        RequestError: the last piece is not among them.
    """
    text: list[str] = []
    reasoning: list[str] = []
    tokens: list[SampledToken] = []
    for chunk in chunks:
        text.append(chunk.text)
        reasoning.append(chunk.reasoning)
        tokens += chunk.tokens
        if chunk.finish_reason is not None and chunk.stats is not None:
            return GenerationResult(
                "".join(text), "".join(reasoning), tuple(tokens), chunk.finish_reason, chunk.stats
            )
    raise RequestError(
        "this generation was read to its end before; ask for its result first, or join its chunks"
    )

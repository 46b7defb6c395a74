"""`Generation`: the text of one running sequence, as it comes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from edge.errors import RequestError
from edge.text.chat_template import ReasoningSplitter
from edge.text.tokenizer import Detokenizer, StopMatcher

from .generation import FinishReason, GenerationStats
from .sampling import SampledToken
from .scheduler import Ticket, TokenEvent


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of a streamed answer.

    Attributes:
        text: new text of the answer.
        reasoning: new text of the reasoning (inside ``<think>``).
        tokens: the tokens behind this piece, end token excluded; their text may come later.
        finish_reason: on the last piece: ``stop`` (end token or stop string), ``length``
            (``max_tokens`` or the cache is full) or ``cancelled``.
        stats: on the last piece.
    """

    text: str
    reasoning: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer; see `GenerationChunk`."""

    text: str
    reasoning: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason
    stats: GenerationStats = field(repr=False)


class _Piece(NamedTuple):
    """What one token adds to the text."""

    text: str
    reasoning: str
    tokens: tuple[SampledToken, ...]  # none if it is an end token


class TextWatcher:
    """A `Watcher` that turns tokens into text, and ends the sequence at a stop string.

    Whole characters first, then stop strings, then reasoning and answer apart. It runs in the
    engine's thread; the pieces are taken in the reader's.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: StopMatcher, splitter: ReasoningSplitter | None
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._splitter = splitter
        self._stopped = False
        self._pieces: deque[_Piece] = deque()

    def push(self, token: SampledToken, ended: bool) -> bool:
        """See `Watcher.push`."""
        if ended:
            self._pieces.append(_Piece("", "", ()))
            return False
        text, self._stopped = self._stops.push(self._detokenizer.push(token.id))
        answer, reasoning = self._split(text)
        self._pieces.append(_Piece(answer, reasoning, (token,)))
        return self._stopped

    def take(self) -> _Piece:
        """The piece of the next token in turn, which was pushed before its event went out."""
        return self._pieces.popleft()

    def finish(self) -> tuple[str, str]:
        """What was held back, answer and reasoning; nothing beyond a stop string."""
        answer = reasoning = ""
        if not self._stopped:
            text, stopped = self._stops.push(self._detokenizer.flush())
            answer, reasoning = self._split(text if stopped else text + self._stops.flush())
        if self._splitter is not None:
            last_reasoning, last_answer = self._splitter.flush()
            return answer + last_answer, reasoning + last_reasoning
        return answer, reasoning

    def _split(self, text: str) -> tuple[str, str]:
        if self._splitter is None:
            return text, ""
        reasoning, answer = self._splitter.push(text)
        return answer, reasoning


class Generation:
    """One sequence that runs or waits. Iterate over it once, from a thread or from asyncio.

    One that is dropped before its end is cancelled.

    Attributes:
        prompt_ids: token ids of the prompt.
        index: which of the ``n`` samples of its submission this is.
    """

    def __init__(self, ticket: Ticket, watcher: TextWatcher, index: int = 0) -> None:
        self.prompt_ids = list(ticket.request.ids)
        self.index = index
        self._ticket = ticket
        self._watcher = watcher

    @property
    def seed(self) -> int:
        """Seed of its random numbers, also where the parameters left it open."""
        return self._ticket.seed

    def cancel(self) -> None:
        """End it within one step; the last chunk has the reason ``cancelled``."""
        self._ticket.cancel()

    def __iter__(self) -> Iterator[GenerationChunk]:
        """Wait for each piece in turn.

        Raises:
            DeadlineError: it took longer than it may.
            BackendError: the engine failed.
        """
        for event in self._ticket:
            yield self._chunk(event)

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        """Like iteration, from any running loop."""
        async for event in self._ticket:
            yield self._chunk(event)

    def result(self) -> GenerationResult:
        """Wait for the end and give what has not been iterated over as one answer.

        Raises:
            RequestError: it was iterated over to its end.
            As iteration.
        """
        return join_chunks(self)

    def _chunk(self, event: TokenEvent) -> GenerationChunk:
        piece = _Piece("", "", ()) if event.token is None else self._watcher.take()
        if event.finish_reason is None:
            return GenerationChunk(*piece)
        text, reasoning = self._watcher.finish()
        return GenerationChunk(
            piece.text + text,
            piece.reasoning + reasoning,
            piece.tokens,
            event.finish_reason,
            event.stats,
        )


def join_chunks(chunks: Generation | Iterator[GenerationChunk]) -> GenerationResult:
    """One answer of all its pieces.

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

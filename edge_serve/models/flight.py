"""Defines `Flight`, which reads, counts and ends all generations of one request together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edge.errors import DeadlineError, EdgeError, OverloadError
from edge.runtime.sampling_params import SamplingParams
from edge_lab.measure.drift import ROLLOUT_USER, WATCH_USER
from edge_serve.http.errors import APIError
from edge_serve.http.threads import ClientGoneError, check_there

if TYPE_CHECKING:
    from edge.runtime.generation import GenerationStats
    from edge.runtime.stream import Generation, GenerationChunk
    from edge_serve.observe.metrics import Metrics, Outcome

_log = logging.getLogger("edge_serve")
OnChunk = Callable[[int, "GenerationChunk"], None]


class Carrier(Protocol):
    """The part of a `edge_serve.models.registry.ServedModel` that a flight uses.

    Attributes:
        name: the model's name, for metrics and logs.
        flights: requests that run on it now.
    """

    name: str
    flights: set[Flight]

    def leave(self, flight: Flight, *, counts: bool) -> None:
        """Remove a request that has ended; ``counts`` tells whether it keeps the model loaded."""
        ...


class Flight:
    """Reads the generations of one request, counts them and ends them together.

    It always reads them to their ends, so that the counts are true and the model is not closed
    while they run; after `abort` it passes nothing on.

    Args:
        model: the model that they run on.
        generations: one per choice.
        params: resolved sampling parameters, for the metrics.
        metrics: counts every end.
        user: user that the request names; it tells requests of a watch or a roll-out from clients'.
        arm: the arm of the A/B split that chose the model.

    Attributes:
        done: completes when all have ended, or fails with the first error.
        stats: figures of the generations that have ended, by choice.
        reasoning_tokens: number of tokens of the reasoning, by choice.
        receive: reads from the connection of the client whose leaving ends the flight; None if no
            client's leaving does.
    """

    receive: Callable[[], Awaitable[Any]] | None = None

    def __init__(
        self,
        model: Carrier,
        generations: Sequence[Generation],
        params: SamplingParams,
        metrics: Metrics,
        *,
        user: str | None = None,
        arm: str | None = None,
    ) -> None:
        self._is_client = user not in (WATCH_USER, ROLLOUT_USER)
        self._counts = user != WATCH_USER
        self._arm = arm
        self._model = model
        self._generations = generations
        self._params = params
        self._metrics = metrics
        self._left = len(generations)
        self._cut: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stats: list[GenerationStats | None] = [None] * len(generations)
        self.reasoning_tokens = [0] * len(generations)
        model.flights.add(self)

    def start(self, on_chunk: OnChunk) -> None:
        """Read all generations; ``on_chunk`` gets each piece with the number of its choice."""
        for index, generation in enumerate(self._generations):
            task = asyncio.create_task(self._read(index, generation, on_chunk))
            self._tasks.append(task)  # the loop itself keeps only a weak reference

    def abort(self, error: BaseException) -> None:
        """End all generations within one step; ``done`` fails with this error."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # nobody has to look at it
        for generation in self._generations:
            generation.cancel()

    def end_if_left(self) -> None:
        """End it if its client has left, even if the event loop does not know yet."""
        if self.receive is not None:
            try:
                check_there(self.receive)
            except ClientGoneError as error:
                self.abort(error)

    def cut(self, index: int) -> None:
        """End one choice that is complete within one step; it counts as ``stop``.

        Its last piece comes as usual.
        """
        self._cut.add(index)
        self._generations[index].cancel()

    async def _read(self, index: int, generation: Generation, on_chunk: OnChunk) -> None:
        counter = _ReasoningCounter()
        try:
            async for chunk in generation:
                counter.add(chunk)
                if chunk.stats is not None and chunk.finish_reason is not None:
                    self.stats[index] = chunk.stats
                    self.reasoning_tokens[index] = counter.tokens
                    reason = chunk.finish_reason
                    if reason == "cancelled" and index in self._cut:
                        reason = "stop"
                    has_drifted = self._metrics.observe_finish(
                        self._model.name,
                        chunk.stats,
                        reason,
                        self._params,
                        counter.tokens,
                        is_asked=index == 0 and self._is_client,
                        arm=self._arm,
                    )
                    if has_drifted:
                        _log.warning("requests have drifted from the baseline; see /stats")
                if not self.done.done():
                    on_chunk(index, chunk)
        except OverloadError as error:  # it has not started, and the guard counts it
            self.abort(error)
        except EdgeError as error:
            late = isinstance(error, DeadlineError)
            outcome: Outcome = "deadline" if late else "error"
            self._metrics.observe_error(self._model.name, outcome, arm=self._arm)
            if not late:
                _log.error("a generation on %s failed: %s", self._model.name, error)
            self.abort(error)
        except APIError as error:
            self.abort(error)
        except Exception as error:  # noqa: BLE001 - logged, and the caller is told
            _log.exception("an answer of %s could not be written", self._model.name)
            self.abort(error)
        finally:
            self._left -= 1
            if not self._left:
                self._model.leave(self, counts=self._counts)
                if not self.done.done():
                    self.done.set_result(None)


class _ReasoningCounter:
    """Counts the tokens before the first text of the answer, if they hold reasoning."""

    def __init__(self) -> None:
        self._before = 0
        self._reasons = False
        self._answers = False

    def add(self, chunk: GenerationChunk) -> None:
        self._reasons = self._reasons or bool(chunk.reasoning)
        self._answers = self._answers or bool(chunk.text)
        if not self._answers:
            self._before += len(chunk.tokens)

    @property
    def tokens(self) -> int:
        return self._before if self._reasons else 0

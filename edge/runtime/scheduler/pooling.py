"""Runs texts of which only the last token's output is needed: embeddings, and judged documents.

Nothing is decoded, so a round is one prefill step. Texts of similar length run in it together,
since a step reads all weights however few tokens it has. Shorter ones are padded to the longest;
rows of padding are not counted and never read.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import SamplingDefaults
from edge.errors import BackendError, EdgeError, NonFiniteError, RequestError
from edge.runtime.generation import FinishReason, GenerationStats, PromptProgress
from edge.runtime.kv_cache import Slot
from edge.runtime.sampling import SampledToken, Sampler
from edge.runtime.sampling_params import SamplingParams

from .core import EngineCore
from .request import Request, Sink
from .roster import Roster
from .sequence import SequenceState, slot_of

NEUTRAL = SamplingParams(max_tokens=1).resolve(SamplingDefaults())
"""The ``params`` of a request for which nothing is sampled."""


class Pooled(NamedTuple):
    """The output of a text's last token, float32 ``[width]``, and its figures."""

    row: NDArray[np.float32]
    stats: GenerationStats


class RowSink:
    """Takes the output of one text; a `Sink` that is never given a token.

    Attributes:
        future: completes with the output, or fails with the error that ends the text.
    """

    def __init__(self) -> None:
        self.future: Future[Pooled] = Future()
        self.future.set_running_or_notify_cancel()  # so that a reader cannot cancel it
        self._row: NDArray[np.float32] | None = None

    def take(self, row: NDArray[np.float32]) -> None:
        """Take the output; `finish` comes next."""
        self._row = row

    def progress(self, progress: PromptProgress) -> None:
        """Refuse progress, which no text requests.

        Raises:
            BackendError: always.
        """
        raise BackendError(f"{progress} was told where nobody asked; this is a bug")

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        """Refuse a token, since none is sampled.

        Raises:
            BackendError: always.
        """
        raise BackendError(f"token {token.id} was sampled where nothing is; this is a bug")

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        """Complete the future; without an output the text was cancelled."""
        if self._row is None:
            self.fail(RequestError("the text was cancelled before it was computed"))
        else:
            self.future.set_result(Pooled(self._row, stats))

    def fail(self, error: EdgeError) -> None:
        """Fail the future."""
        self.future.set_exception(error)


class TextRoster(Roster):
    """A `Roster` of texts that end with their prompt."""

    def _place(self, sequence: SequenceState) -> int:
        """Give the sequence a slot, and cached rows if they are most of it.

        A text that continues rows runs alone in most engines. So sharing only a first word with
        another text is not worth it.
        """
        placement = self.pool.place(sequence.ids, sequence.salt)
        assert placement is not None
        if 2 * placement.cached >= len(sequence.ids):
            return super()._place(sequence)
        return self._move_in(sequence, placement._replace(cached=0, source=None))

    def scrub(self, slot: Slot, written: int, first: int = 0) -> None:
        """Zero the rows that the last step may have written, with padding, as `Roster` does."""
        super().scrub(slot, max(written, self.quantum), first)


class PoolingCore(EngineCore):
    """An `EngineCore` whose sequences end with their prompt; their sinks are `RowSink`."""

    roster_type = TextRoster
    _sampler = Sampler(NEUTRAL, 1)  # of all sequences; it is never used

    def sequence(self, request: Request, sink: Sink, salt: str, now_s: float) -> SequenceState:
        """Make a sequence, as `EngineCore.sequence` does."""
        return SequenceState(request, self._sampler, sink, salt, now_s)

    def step(self) -> None:
        """Run one round: end cancelled and late texts, start waiting ones, run one step."""
        self._sweep()
        roster, most = self.roster, self.policy.max_batch
        while self.may_start and roster.pool.num_free and len(roster.running) < most:
            self._start(roster.waiting.first(roster.busy))
        first = self._next_prompt(at_least=1)
        if first is not None:
            self._run(first)

    def _run(self, first: SequenceState) -> None:
        """Run a step of a text, and of texts of similar length that fit beside it."""
        batch = self._companions(first)
        limit = self.policy.step_tokens
        if len(batch) == 1:
            limit = self.steps.chunk(len(first.pending), limit)
        seq = min(max(len(sequence.pending) for sequence in batch), limit)
        parts = [sequence.pending[:seq] for sequence in batch]
        tokens = [[*part, *part[-1:] * (seq - len(part))] for part in parts]
        outputs = self.steps.forward(batch, tokens, [[len(part) - 1] for part in parts])
        if outputs is None:
            return
        for sequence, part, output in zip(batch, parts, outputs, strict=True):
            if sequence.ended:
                continue
            slot = slot_of(sequence)
            slot.extend(part)
            slot.prefilled = slot.length
            sequence.pending = sequence.pending[seq:]
            if not sequence.pending and not sequence.cancelled:
                assert isinstance(output, np.ndarray), "where nothing is drawn, rows come whole"
                self._pool(sequence, output[0])

    def _companions(self, first: SequenceState) -> list[SequenceState]:
        """Return the texts that run in a step with ``first``, which is one of them.

        Texts that have begun already run alone: with attention as one operator, the engine takes
        several tokens after others for one sequence at a time.
        """
        chosen, longest = [first], len(first.pending)
        if self.deterministic or first.slot is None or first.slot.length:
            return chosen
        others = [
            sequence
            for sequence in self.roster.running
            if sequence is not first and sequence.slot is not None and not sequence.slot.length
        ]
        for sequence in sorted(others, key=lambda each: abs(len(each.pending) - longest)):
            widest = max(longest, len(sequence.pending))
            if widest * (len(chosen) + 1) > self.policy.step_tokens:
                break
            chosen.append(sequence)
            longest = widest
        return chosen

    def _pool(self, sequence: SequenceState, output: NDArray[np.float32]) -> None:
        if not np.isfinite(output).all():
            self.delivery.fail(
                sequence,
                NonFiniteError(
                    "the engine computed values that are not finite; if the model overflows FP16, "
                    "export it with --dtype bf16"
                ),
            )
            return
        sink = sequence.sink
        assert isinstance(sink, RowSink), "a text that is pooled has a RowSink"
        sink.take(output.copy())  # a copy, since the engine's next step overwrites it
        sequence.stats.ttft_s = sequence.stats.total_s = self.now() - sequence.submitted_s
        self.delivery.finish(sequence, "stop")

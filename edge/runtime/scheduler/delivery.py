"""Passes sampled tokens and ends to their sinks, and counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from edge.errors import BackendError, DeadlineError, EdgeError, OverloadError, ResourceError
from edge.runtime.generation import PromptProgress
from edge.runtime.sampling import SampledToken

from .policy import StepTimes
from .request import FinishReason
from .roster import Roster
from .sequence import SequenceState, slot_of

_SPOILS = (BackendError, ResourceError)  # these spoil rows; memory may run out within a step
_NEWEST = 0.15  # weight of the newest time in a running mean


class Delivery:
    """Passes each token from the draw to its sink, and ends each sequence.

    Args:
        roster: ended sequences leave it.
        now: returns monotonic seconds.
        slides: whether a full slot makes room instead of ending its sequence.
        most_written: rows of a slot that an uncounted step may have written, besides those of its
            prompt's tokens.

    Attributes:
        times: times of all steps.
        counts: statistics of tokens.
        holds: whether tokens are pushed during the next step, while the CPU waits for a device.
        outcomes: ended sequences by finish reason, ``deadline``, ``error`` or ``rejected``.
        mean_run_s: running mean of a sequence's time from start to end, in seconds.
        mean_tokens: running mean of an answer's tokens.
    """

    def __init__(
        self, roster: Roster, now: Callable[[], float], *, slides: bool, most_written: int
    ) -> None:
        self.roster = roster
        self.holds = False
        self.outcomes: Counter[str] = Counter()
        self.mean_run_s = 0.0
        self.mean_tokens = 0.0
        self.on_end: Callable[[SequenceState], None] | None = None
        self.times, self.counts = StepTimes(), Counter[str]()
        self.now = now
        self._slides = slides
        self._most_written = most_written
        self._drawn: list[tuple[SequenceState, SampledToken]] = []  # drawn, but not pushed yet
        self._told_at = (0, 0)

    # ------------------------------------------------------------------ tokens

    def deliver(self, sequence: SequenceState, token: SampledToken) -> bool:
        """Count a token and pass it on; returns false if it is known to be the last.

        If the CPU waits for a device, that is done during the next step: text, stop strings and
        readers then cost no time between steps. A stop string ends its sequence a step late, and
        that step's token is dropped.
        """
        now = self.now()
        stats = sequence.stats
        stats.completion_tokens += 1
        self.counts["completion"] += 1
        if stats.completion_tokens == 1:
            stats.ttft_s = now - sequence.submitted_s
        else:
            stats.itl_s.append(now - sequence.last_s)
        stats.total_s, sequence.last_s = now - sequence.submitted_s, now
        sequence.ids.append(token.id)
        full = not self._slides and slot_of(sequence).remaining == 0
        reason: FinishReason | None = None
        if token.id in sequence.request.end_ids:
            reason = "stop"
        elif sequence.tokens_left == 0 or full:
            reason = "length"
        if reason is None and self.holds:
            self._drawn.append((sequence, token))
            return True
        return self._push(sequence, token, reason)

    def push_sampled(self) -> None:
        """Push the tokens of the last step to their sinks, and let constraints look ahead."""
        drawn, self._drawn = self._drawn, []
        for sequence, token in drawn:
            if sequence.ended or not self._push(sequence, token, None):
                continue
            try:
                sequence.mask()
            except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
                caused = caused_by("the constraint of a request failed", error)
                self.fail(sequence, caused, scrub=False)

    def forget_drawn(self) -> None:
        """Drop the tokens that were not pushed yet; for a child process."""
        self._drawn = []

    def _push(
        self, sequence: SequenceState, token: SampledToken, reason: FinishReason | None
    ) -> bool:
        """Push a token to its sink; returns false if it was the last."""
        # An error in a sink spoils no row, and the backend may be computing.
        try:
            reason = sequence.sink.push(token, reason)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            caused = caused_by("the output of a request failed", error)
            self.fail(sequence, caused, scrub=False)
        else:
            if reason is not None:
                self.finish(sequence, reason)
        return not sequence.ended

    # ------------------------------------------------------------------ progress

    def tell_waiting(self) -> None:
        """Tell the sinks that want to know how many sequences start before theirs."""
        roster = self.roster
        now = roster.waiting.changes, len(roster.running)
        if now == self._told_at or not any(s.request.wants_progress for s in roster.waiting):
            return
        self._told_at = now
        order = roster.waiting.order(roster.busy, preempted_first=roster.is_crowded)
        for ahead, sequence in enumerate(list(order)):
            if sequence.request.wants_progress and not sequence.stats.has_started:
                self._tell(sequence, PromptProgress(len(sequence.request.ids), ahead=ahead))

    def tell_read(self, sequence: SequenceState) -> None:
        """Tell a running sequence's sink how much of its prompt is read, if it wants to know."""
        if not sequence.request.wants_progress:
            return
        stats, total = sequence.stats, len(sequence.request.ids)
        read_s = self.now() - sequence.submitted_s - stats.queue_s
        done = max(total - len(sequence.pending), 0)
        self._tell(sequence, PromptProgress(total, stats.cached_tokens, done, read_s))

    def _tell(self, sequence: SequenceState, progress: PromptProgress) -> None:
        """Tell the sink a new place in the queue, or a new percent of the prompt."""
        told = progress.ahead, 100 * progress.processed // progress.total
        if told == sequence.told:
            return
        sequence.told = told
        try:
            sequence.sink.progress(progress)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            self.fail(sequence, caused_by("the output of a request failed", error))

    # ------------------------------------------------------------------ ends

    def finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        """End a sequence; its rows stay for others."""
        stats, books = sequence.stats, sequence.slot or sequence.saved_rows
        if stats.has_started:
            stats.model_s = self.times.model_s - sequence.model_s_before
            run_s = self.now() - sequence.submitted_s - stats.queue_s
            newest = _NEWEST if self.mean_run_s else 1.0
            self.mean_run_s += newest * (run_s - self.mean_run_s)
            if sequence.request.on_logits is None:
                self.mean_tokens += newest * (stats.completion_tokens - self.mean_tokens)
        if books is not None and not self._slides:
            stats.context_left = self.roster.backend.capacity - len(books.ids)
        self._end(sequence, sound=True)
        self.roster.see(sequence.request.client)
        self.outcomes[reason] += 1
        try:
            sequence.sink.finish(reason, sequence.stats)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            sequence.sink.fail(caused_by("the output of a request failed", error))

    def fail(self, sequence: SequenceState, error: EdgeError, *, scrub: bool = True) -> None:
        """End a sequence with an error; its rows cannot be trusted."""
        if scrub and isinstance(error, _SPOILS) and sequence.slot is not None:
            # No more than that: on the CPU a row that nobody has touched takes no memory.
            newest = max(len(sequence.pending), self._most_written)
            newest = min(newest, self.roster.backend.max_step_tokens)
            self.roster.scrub(sequence.slot, sequence.slot.length + newest)
        self._end(sequence, sound=False)
        known = {DeadlineError: "deadline", OverloadError: "rejected"}
        self.outcomes[known.get(type(error), "error")] += 1
        sequence.sink.fail(error)

    def _end(self, sequence: SequenceState, *, sound: bool) -> None:
        sequence.ended = True
        if self.on_end is not None:
            self.on_end(sequence)
        self.roster.leave(sequence, sound=sound)


def caused_by(what: str, cause: BaseException) -> EdgeError:
    """Make an error for the caller; a panic in a Rust library is not an Exception."""
    if isinstance(cause, EdgeError):
        return cause
    error = BackendError(f"{what}: {cause!r}")
    error.__cause__ = cause
    return error

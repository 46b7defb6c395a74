"""Defines what callers give to the scheduler, what plugs into it, and its counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import EdgeError
from edge.model.slot_rows import SlotRows
from edge.runtime.generation import FinishReason as FinishReason
from edge.runtime.generation import GenerationStats, PromptProgress
from edge.runtime.kv_cache import SavedRows
from edge.runtime.sampling import SampledToken
from edge.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from edge.adapters.weights import AdapterWeights

_SEEDS = 1 << 64


class Constraint(Protocol):
    """Decides which tokens may come next; one object serves one sequence.

    Examples are a grammar, a JSON schema and a thinking budget. A constraint sees only tokens that
    were really sampled, so a rejected draft never has to be taken back.
    """

    def mask(self) -> NDArray[np.float32] | None:
        """Return numbers to add to the next logits, ``[vocab]`` of 0 and -inf; None allows all.

        The array is valid until the next call. End tokens are masked like all others.
        """

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token."""


class Sink(Protocol):
    """Takes the output of one sequence, in the engine's thread; never waits for a reader.

    The engine calls `progress` any number of times if `Request.wants_progress`, `push` any number
    of times, then `finish` or `fail` once.
    """

    def progress(self, progress: PromptProgress) -> None:
        """Take how far the prompt has been read, or a new place in the queue."""

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        """Take one token.

        Args:
            token: the sampled token.
            reason: why this token is the last, as far as the engine knows: ``stop`` for an end
                token, whose text is not part of the answer; None if more may follow.

        Returns:
            The given reason, or ``stop`` if the answer ends here with a stop string. If it is not
            None, `finish` is called next.

        Raises:
            EdgeError: no more tokens are taken; the sequence ends with that error.
        """

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        """Take the end of the sequence."""

    def fail(self, error: EdgeError) -> None:
        """Take the error that ends the sequence."""


class Overflow(Protocol):
    """Makes room in a full cache, so that a sequence can continue."""

    def slide(self, rows: SlotRows, ids: list[int]) -> tuple[SlotRows, list[int]]:
        """Drop some rows of a full slot and let the others move up.

        Called in the engine's thread, for one sequence at a time.

        Args:
            rows: rows from `Backend.read_slot`, keys rotated for the position of their row.
            ids: the token of each row, ``length`` of them.

        Returns:
            Rows to write from row 0 on, keys rotated for their new positions, and the token of
            each: at least one and fewer than ``length``. The next token gets the position after.
        """


class StoredPrefix(NamedTuple):
    """The rows of a prompt's beginning, kept outside the cache.

    Attributes:
        length: number of the prompt's tokens that it covers.
        load: returns the rows for `Backend.write_slot`, or None if they turn out to be damaged;
            called in the engine's thread.
    """

    length: int
    load: Callable[[], SlotRows | None]


class PrefixSource(Protocol):
    """Finds prefixes that are kept outside the cache, for example on disk."""

    def lookup(self, ids: Sequence[int]) -> StoredPrefix | None:
        """Find the longest stored prefix that ``ids`` begin with, whatever their salt.

        Called in the engine's thread each time a request starts, so it must be quick; the rows
        are loaded only if no match in the cache is longer. A prefix may be as long as the prompt;
        the scheduler still runs the last token, for its logits.
        """


class Suspended(NamedTuple):
    """The state from which a sequence taken out of a scheduler continues, by `Request.resume_from`.

    Attributes:
        seed: seed of its sampler, also if its parameters have none.
        answer: the tokens sampled so far.
        pending: how many of the last tokens of prompt and answer have no row in ``saved_rows``.
        saved_rows: its rows, valid only for the same bundle, engine and scales; None if nothing
            has run.
    """

    seed: int
    answer: tuple[int, ...] = ()
    pending: int = 0
    saved_rows: SavedRows | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate.

    Attributes:
        ids: token ids of the prompt, at least one.
        params: resolved sampling parameters (`SamplingParams.resolve`).
        end_ids: ids that end the answer.
        priority: lower runs first.
        client: name of the client; at equal priority clients take turns, and the requests of each
            run in order of arrival.
        deadline_s: seconds from submission after which the request ends with `DeadlineError`,
            waiting or running; None sets no limit.
        salt: sequences share cached prefixes only with those of the same salt, so that timing
            tells one tenant nothing about another's prompts.
        adapter: adapter that is added to the model's linears; sequences of different adapters share
            no rows, whatever their salts.
        constraint: decides which tokens may come next. It has state, so it serves one sequence.
        wants_progress: whether the sink is told of each change of the place in the queue, and of
            each percent of the prompt that has been read.
        resume_from: state from `Scheduler.suspend` of this request: it continues, and the sink gets
            only the tokens to come. Prompt, parameters and end ids must be the same as then, and
            the constraint must have accepted the answer so far. If ``saved_rows`` is None, prompt
            and answer are read again.
        on_logits: takes a chunk of the logits of the prompt's places, float32 ``[n, vocab]``, valid
            during the call, and the first of these places; runs in the engine's thread. After its
            prompt the sequence ends with ``length``, and nothing is sampled. An error that it
            raises ends the sequence.
        pictures: objects that hold the rows of pictures among ``ids`` (`edge.vision.rows`).
    """

    ids: tuple[int, ...]
    params: SamplingParams
    end_ids: frozenset[int]
    priority: int = 0
    client: str = ""
    deadline_s: float | None = None
    salt: str = ""
    adapter: AdapterWeights | None = None
    constraint: Constraint | None = None
    wants_progress: bool = False
    resume_from: Suspended | None = None
    on_logits: Callable[[int, NDArray[np.float32]], None] | None = None
    pictures: tuple[object, ...] = ()

    def sample(self, index: int) -> Request:
        """Return the request for sample ``index`` of several; the index is added to the seed."""
        seed = self.params.seed
        if not index or seed is None:
            return self
        return replace(self, params=replace(self.params, seed=(seed + index) % _SEEDS))


class SlotState(NamedTuple):
    """The contents of one slot of the cache.

    Attributes:
        in_use: whether a sequence runs in it.
        rows: rows that hold tokens of that sequence, or that are kept for reuse.
        cached_rows: number of these rows that nobody had to compute for that sequence, or would
            have to for the next one that begins with the same tokens.
    """

    in_use: bool
    rows: int
    cached_rows: int


@dataclass(frozen=True)
class SchedulerStats:
    """Counters since the start, and the state of this moment.

    Attributes:
        running: sequences that hold a slot and compute.
        waiting: requests in the queue.
        calls: work that needs the engine to itself, e.g. scoring, waiting or running.
        queue_capacity: requests that the queue can hold.
        num_slots: slots of the cache.
        kv_used_tokens: cache rows that running sequences use.
        kv_cached_tokens: rows kept of finished sequences, for reuse.
        kv_capacity_tokens: rows of all slots.
        slots: contents of each slot, by its number.
        prompt_tokens: prompt tokens of all requests that ran.
        cached_tokens: prompt tokens that were in the cache already.
        completion_tokens: tokens that were sampled.
        preempted: how often a sequence had to wait with its rows, for another client's.
        drafted_tokens, accepted_tokens: tokens that speculative decoding ran, and that were right.
        draft_steps: decode steps for which tokens were drafted.
        draft_saved_s: seconds that drafts have saved so far against plain decode at its measured
            pace, with their own time; negative while they have cost more than they gave.
        drafts_failed: why nothing is drafted any more; None while the drafter works.
        steps: calls of the backend.
        last_step_s: monotonic clock when a step last ended; a heartbeat while anything runs.
        full_step_s: expected seconds of a step with the most tokens allowed, at the pace of the
            slowest step so far; None before the first step.
        failed: why the backend cannot run any more; None while it can.
        outcomes: ended sequences by finish reason, ``deadline``, ``error`` or ``rejected``.
    """

    running: int = 0
    waiting: int = 0
    calls: int = 0
    queue_capacity: int = 0
    num_slots: int = 0
    kv_used_tokens: int = 0
    kv_cached_tokens: int = 0
    kv_capacity_tokens: int = 0
    slots: tuple[SlotState, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preempted: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_steps: int = 0
    draft_saved_s: float = 0.0
    drafts_failed: str | None = None
    steps: int = 0
    last_step_s: float = 0.0
    full_step_s: float | None = None
    failed: str | None = None
    outcomes: dict[str, int] = field(default_factory=dict)

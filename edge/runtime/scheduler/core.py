"""Decides step by step which sequence runs in which slot. There are no threads here.

`EngineCore` is deterministic given its backend and clock, so that its tests can take it through any
interleaving of events. `edge.runtime.scheduler.scheduler` gives it a thread.

A sequence waits for its client's turn (`fair_queue`), and is placed into a slot (`roster`), with
the rows that it shares with others (`edge.runtime.kv_cache`). Then it prefills in chunks and
decodes (`steps`); its tokens go to its sink (`delivery`). Prompts prefill one at a time and in
order, so that a prompt that shares a prefix with the one before finds it complete. Only a shorter
prompt of a client with nothing running is read alongside another client's. A round
(`EngineCore.step`) is one decode step of all sequences that have one token to run, and one chunk of
the prompt whose turn it is. Alternatively that prompt's next token joins the decode step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from edge.backends import Backend
from edge.bundle.embeddings import EmbeddingTable
from edge.engine_config import LEAST_CHUNK, EngineConfig
from edge.errors import DeadlineError, EdgeError
from edge.runtime.kv_cache import SlotPool
from edge.runtime.sampling import Sampler

from .delivery import Delivery
from .policy import Policy
from .request import Overflow, PrefixSource, Request, Sink, Suspended
from .roster import Roster
from .sequence import SequenceState, slot_of
from .steps import SHORT, Steps

if TYPE_CHECKING:
    from .drafter import Drafter
    from .drafting import Drafting

_Result = TypeVar("_Result")
_BRIEF = 8  # an answer is brief beside a prompt that is more than this many times as long
_BLOCKS = 32  # tokens; block sizes are multiples of it: twice a head of 16, 32, ... values
_WHOLE = 4  # chunks; a rest of a prompt that is no longer runs in one step


class EngineCore:
    """Runs many sequences over the slots of one backend.

    Args:
        backend: the engine; only `step` and `call` touch it.
        embeddings: its token table.
        vocab_size: length of a row of logits.
        config: how many sequences run at once, how long a step may be, and what is kept.
            Without ``reuse_prefix`` only the samples of one submission share rows.
        overflow: what to do when a slot is full; None ends the sequence.
        drafter: guesses tokens of all sequences; None runs without speculation.
        prefix_store: prefixes that are kept outside the cache.
        clock: returns monotonic seconds.
    """

    roster_type = Roster
    sampler_type: type[Sampler] = Sampler

    def __init__(
        self,
        backend: Backend,
        embeddings: EmbeddingTable,
        vocab_size: int,
        config: EngineConfig,
        *,
        overflow: Overflow | None = None,
        drafter: Drafter | None = None,
        prefix_store: PrefixSource | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.backend = backend
        self.vocab_size = vocab_size
        self.deterministic = config.deterministic
        # Looked up at each call, so that tests can replace it.
        self._clock = clock or (lambda: time.perf_counter())
        batch = min(config.max_batch or backend.num_slots, backend.num_slots)
        tokens = min(config.prefill_chunk, backend.max_step_tokens)
        # With rounded activations, another last bit soon makes another token.
        even = self.deterministic or (backend.rounds_activations and tokens >= LEAST_CHUNK)
        only = self.deterministic
        pool = SlotPool(backend.num_slots, backend.capacity, even=even, prompts_only=only)
        self.policy = Policy(batch, tokens, config.target_itl_s)
        self.roster = self.roster_type(
            backend, pool, tokens, prefix_store, config.reuse_prefix, self.now
        )
        drafts = min(config.max_draft_tokens, backend.max_step_tokens - 1)
        self.delivery = Delivery(
            self.roster, self.now, slides=overflow is not None, most_written=1 + drafts
        )
        self.times, self.counts = self.delivery.times, self.delivery.counts
        blocks = (2 if self.deterministic else _BLOCKS) if even else 0
        parts = embeddings, self.delivery, self.policy, overflow, blocks
        self.steps = Steps(*parts)
        self.drafting: Drafting | None = None
        if drafter is not None:
            from .drafted_steps import DraftedSteps
            from .drafting import Drafting

            self.steps = drafted = DraftedSteps(*parts)
            drafted.drafting = self.drafting = Drafting(drafter, drafts, self.policy, self.delivery)
        self._overlaps = self.delivery.holds = backend.meanwhile is not None
        if self._overlaps:
            backend.meanwhile = self.delivery.push_sampled
        self._chunks = 0  # chunks of prompts so far
        self._read_at: dict[str, int] = {}  # the newest chunk of each client that runs
        self._rested = False  # whether the prompt whose turn it was had to wait a round
        self._reading, self._turn_read = "", 0  # whose turn it is, and tokens read in it
        self.hold = False  # while set, only sequences whose turn it is are started
        self.turn = 0  # sequences that start before the next `call`
        self._call_began_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not (self.roster.waiting or self.roster.running)

    @property
    def may_start(self) -> bool:
        """Whether a sequence waits that may start before a `call`."""
        return bool(self.roster.waiting) and (self.turn > 0 or not self.hold)

    def now(self) -> float:
        """Return the seconds of the core's clock."""
        return self._clock()

    def sequence(self, request: Request, sink: Sink, salt: str, now_s: float) -> SequenceState:
        """Make a sequence that is not queued yet.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        params, state = request.params, request.resume_from
        if state is not None:
            params = replace(params, seed=state.seed)
        sampler = self.sampler_type(params, self.vocab_size, request.ids)
        if request.adapter is not None:
            salt = f"{request.adapter.digest}\0{salt}"
        sequence = SequenceState(request, sampler, sink, salt, now_s)
        if state is not None:
            sampler.replay(state.answer)
            sequence.ids += state.answer
            sequence.stats.completion_tokens = len(state.answer)
            if state.saved_rows is not None:
                sequence.saved_rows = state.saved_rows
                sequence.pending = sequence.ids[-state.pending :]
        return sequence

    def suspend(self, sequence: SequenceState) -> Suspended | None:
        """Take a sequence out for good; its sink is told that it was cancelled.

        Its rows are left out if they cannot be read.

        Returns:
            The state from which it can continue; None if it has ended.
        """
        self.delivery.push_sampled()
        if sequence.ended:
            return None
        kept, seed, pending = sequence.saved_rows, sequence.sampler.seed, len(sequence.pending)
        if sequence.slot is not None:
            # Without its rows it must be read again, which is better than not continuing.
            with contextlib.suppress(EdgeError, MemoryError):
                kept = self.roster.save_rows(sequence.slot)
        answer = tuple(sequence.ids[len(sequence.request.ids) :])
        self.delivery.finish(sequence, "cancelled")
        return Suspended(seed, answer, pending, kept)

    def add(self, sequence: SequenceState) -> None:
        """Put a sequence into the `FairQueue`."""
        self.roster.see(sequence.request.client)
        self.roster.waiting.add(sequence, self.roster.busy)

    def step(self) -> None:
        """Run one round: end cancelled and late sequences, start waiting ones, decode, prefill."""
        steps = self.times.steps
        if self.drafting is not None:
            self.drafting.begin_round()
            self.delivery.holds = self._overlaps and not self.drafting.in_round
            if self.drafting.in_round:
                self.delivery.push_sampled()  # tokens of a round without drafts
        self._sweep()
        self._start_waiting()
        self.delivery.tell_waiting()
        decoding = [s for s in self.roster.running if s.decodes]
        prefilling = self._next_prompt(at_least=2)
        chunk, joins_decode = 0, False
        if prefilling is not None and self._skips_round(prefilling):
            prefilling = None
        if prefilling is not None:
            chunk = self._chunk(prefilling, len(decoding))
            joins_decode = not (chunk or self.deterministic or prefilling.request.on_logits)
        if decoding:
            joins_decode = self.steps.decode(decoding, prefilling if joins_decode else None)
        if prefilling is not None and not (joins_decode or prefilling.ended):
            self._turn_read += self.steps.prefill(prefilling, max(chunk, 1))
        if self.times.steps == steps:
            self.delivery.push_sampled()  # since there was no step to do it

    def call(self, work: Callable[[], _Result]) -> _Result:
        """Let ``work`` use the backend as it likes, while no sequence runs."""
        assert not self.roster.running, "sequences own the cache"
        self._call_began_s = self.now()
        try:
            return work()
        finally:
            self.roster.pool.forget()

    def report_step(self, tokens: int) -> None:
        """Count a step of the backend that work in `call` has just finished."""
        now = self.now()
        self.times.count(tokens, now - max(self._call_began_s, self.times.ended_s), now)

    def end_all(self, error: EdgeError | None) -> None:
        """End every sequence with an error, or as cancelled; the backend is not touched."""
        self.delivery.push_sampled()
        for sequence in [*self.roster.running, *self.roster.waiting]:
            if error is None:
                self.delivery.finish(sequence, "cancelled")
            else:
                self.delivery.fail(sequence, error, scrub=False)

    def abandon_all(self) -> None:
        """Drop all sequences without notifying their readers; for a child process."""
        self.roster.clear()
        self.delivery.forget_drawn()

    # ------------------------------------------------------------------ who runs

    def _sweep(self) -> None:
        now = self.now()
        for sequence in [*self.roster.running, *self.roster.waiting]:
            late = sequence.deadline_s is not None and now >= sequence.deadline_s
            if late or sequence.cancelled:
                self.delivery.push_sampled()
            if sequence.ended:
                continue
            if sequence.cancelled:
                self.delivery.finish(sequence, "cancelled")
            elif sequence.dropped is not None and sequence.may_be_dropped:
                self.delivery.fail(sequence, sequence.dropped)
            elif late:
                tokens = sequence.stats.completion_tokens
                began = not sequence.may_be_dropped
                what = f"sampled {tokens} tokens" if began else "was still waiting"
                self.delivery.fail(
                    sequence,
                    DeadlineError(
                        f"the request {what} when its {sequence.request.deadline_s:g} s were over; "
                        "allow more time, or send fewer requests at once"
                    ),
                )

    def _start_waiting(self) -> None:
        """Start waiting sequences, in their order, that find room or for which others make way."""
        roster = self.roster
        while self.may_start:
            sequence = roster.waiting.first(roster.busy, preempted_first=roster.is_crowded)
            if any(self._waits_for(sequence, s) for s in roster.running):
                return
            has_room = roster.pool.num_free and self.policy.allows(len(roster.running))
            if not (has_room or self._make_way(sequence)):
                return
            self._start(sequence)

    def _make_way(self, sequence: SequenceState) -> bool:
        """Preempt a running sequence for a waiting one, if one gives way and fits.

        Preempted sequences have at most the rows of one slot, and half of that is for newcomers.
        """
        roster = self.roster
        room = self.backend.capacity // (1 if sequence.is_newcomer else 2) - roster.preempted_rows
        other = roster.waiting.gives_way(sequence, roster.running, room)
        if other is None:
            return False
        running = len(roster.running)
        self.delivery.push_sampled()
        return len(roster.running) < running or self._preempt(other)

    def _preempt(self, sequence: SequenceState) -> bool:
        """Make a running sequence wait with its rows; returns whether its slot is free."""
        try:
            self.roster.preempt(sequence)
        except EdgeError as error:
            self.delivery.fail(sequence, error)
            return True
        except MemoryError:  # it continues, and the other one waits
            return False
        self.counts["preempted"] += 1
        return True

    def _waits_for(self, sequence: SequenceState, other: SequenceState) -> bool:
        """Whether a sequence waits until the prompt of another, which runs, has been read.

        It may then share its rows. It does not wait if its priority is higher, or if it was
        preempted. Nor does it wait for a longer rest of another client's prompt, if its own client
        runs nothing and it shares no row that is still to come.
        """
        ahead = sequence.request.priority - other.request.priority
        if len(other.pending) == 1 or ahead < 0 or sequence.saved_rows is not None:
            return False
        if ahead or sequence.request.client in self.roster.busy:
            return True
        known = slot_of(other).length + 1
        shares = sequence.salt == other.salt and sequence.ids[:known] == other.ids[:known]
        return shares or len(sequence.pending) >= len(other.pending)

    def _next_prompt(self, at_least: int) -> SequenceState | None:
        """Return the running sequence to read next, of those with this much to read, or None.

        It is the first one of the highest priority, but clients of equal priority take turns. A new
        client comes before the one that was read last, and after those that have waited since. A
        turn is one chunk, or for the shortest prompt as many as make up a full one's tokens.
        """
        running = self.roster.running
        prompts = [s for s in running if len(s.pending) >= at_least or not s.decodes]
        if not prompts:
            return None
        newest, known = self._chunks, self._read_at
        turns = {client: known.get(client, newest - 1) for client in self.roster.busy}
        self._read_at = turns
        found = min(prompts, key=lambda s: (s.request.priority, len(s.pending)))
        if found.request.client != self._reading or self._turn_read >= self.policy.step_tokens:
            found = min(prompts, key=lambda s: (s.request.priority, turns[s.request.client]))
            self._reading, self._turn_read = found.request.client, 0
        self._chunks = turns[found.request.client] = newest + 1
        return found

    def _chunk(self, prefilling: SequenceState, decoding: int) -> int:
        """Choose how many tokens of a prompt to run, by `Policy.chunk_tokens`.

        A short rest of the prompt joins the chunk: two steps would take longer, for others too.
        """
        rest, alert = len(prefilling.pending), not self.roster.is_alone(prefilling.request.client)
        chunk = self.policy.chunk_tokens(decoding, alert=alert)
        short = min(max(_WHOLE * chunk, SHORT), self.policy.step_tokens)
        return rest if alert and rest <= short and self.policy.target_itl_s is None else chunk

    def _skips_round(self, prefilling: SequenceState) -> bool:
        """Whether a prompt is not read in this round, but in the next.

        It rests every second round while another client writes a brief answer, which halves its
        speed: a client that writes a few tokens then waits for few chunks.
        """
        client, priority = prefilling.request.client, prefilling.request.priority
        self._rested = not self._rested and any(
            other.decodes
            and _BRIEF * len(other.ids) < len(prefilling.ids)
            and other.request.client != client
            and other.request.priority <= priority
            for other in self.roster.running
        )
        return self._rested and self.policy.target_itl_s is None

    def _start(self, sequence: SequenceState) -> None:
        """Start a sequence, or continue it."""
        self.turn = max(self.turn - 1, 0)
        stats, is_new = sequence.stats, sequence.saved_rows is None
        if not stats.has_started:
            stats.queue_s = self.now() - sequence.submitted_s
            sequence.model_s_before = self.times.model_s
        try:
            cached = self.roster.enter(sequence)
        except EdgeError as error:
            self.delivery.fail(sequence, error)
            return
        if is_new:
            sequence.pending = sequence.ids[cached:]
        sequence.began_at = len(sequence.ids) - len(sequence.pending)
        self.roster.waiting.charge(sequence)
        sequence.is_newcomer = False
        if self.drafting is not None:
            self.drafting.begin(sequence)
        if stats.has_started:
            return
        stats.has_started, stats.cached_tokens = True, min(cached, stats.prompt_tokens)
        self.counts["prompt"] += len(sequence.ids)
        self.counts["cached"] += cached
        self.delivery.tell_read(sequence)

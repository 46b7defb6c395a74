"""Decides step by step which sequence runs in which slot, and runs it. There are no threads here.

`EngineCore` is deterministic given its backend and clock, so that its tests can take it through any
interleaving of events. `edge.runtime.scheduler.scheduler` gives it a thread.

A sequence waits for its client's turn (`fair_queue`), is placed into a slot (with the rows that it
shares with others, see `edge.runtime.kv_cache`), prefills in chunks and decodes. Prompts prefill
one at a time and in order, so that a prompt that shares a prefix with the one before finds it
complete; only a shorter one of a client with nothing running is read beside another client's. A
round (`EngineCore.step`) is one decode step of all sequences that have one token to run, and one
chunk of the prompt whose turn it is. Alternatively that prompt's next token runs in the decode step
(it rides).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend, BestLogits, Floats
from edge.backends.step import step_after, zero_rows
from edge.bundle.embeddings import EmbeddingTable
from edge.engine_config import LEAST_CHUNK, EngineConfig
from edge.errors import BackendError, DeadlineError, EdgeError, OverloadError, ResourceError
from edge.runtime.generation import PromptProgress
from edge.runtime.kv_cache import KeptRows, Placement, Slot, SlotPool
from edge.runtime.sampling import SampledToken, Sampler, is_sound
from edge.runtime.sampling_reference import non_finite

from .drafting import Drafting
from .fair_queue import FairQueue
from .policy import DecodeRun, Policy
from .request import Drafter, FinishReason, Overflow, PrefixSource, PutAway, Request, Sink
from .sequence import SequenceState, slot_of

_Result = TypeVar("_Result")
_Rows: TypeAlias = NDArray[np.float32] | list[BestLogits]  # of one sequence
_OnLogits: TypeAlias = Callable[[int, NDArray[np.float32]], None]
_SPOILS = (BackendError, ResourceError)  # rows; memory may run out in the middle of a step, too
_NEWEST = 0.15  # weight of the newest time in a running mean
_BRIEF = 8  # times a sequence goes into a prompt beside which it should end soon
_ALERT_S = 10.0  # a client may well come back within that time
_MOST_LOGITS = 64  # places of a chunk: 39 MB at a vocabulary of 151,936
_SHORT = 31  # tokens that no engine's attention cuts into blocks
_BLOCKS = 32  # tokens: their size is a multiple, since it is twice a head of 16, 32, ... values
_WHOLE = 4  # chunks: a prompt that is no longer goes in one


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
        self.embeddings = embeddings
        self.vocab_size = vocab_size
        self.reuse_prefix = config.reuse_prefix
        self.overflow = overflow
        self.prefix_store = prefix_store
        self.deterministic = config.deterministic
        batch = min(config.max_batch or backend.num_slots, backend.num_slots)
        tokens = min(config.prefill_chunk, backend.max_step_tokens)
        # Where activations are rounded, another last bit soon makes another token.
        self.even = self.deterministic or (backend.rounds_activations and tokens >= LEAST_CHUNK)
        only = self.deterministic
        self.pool = SlotPool(backend.num_slots, backend.capacity, even=self.even, prompts_only=only)
        self.policy = Policy(batch, tokens, config.target_itl_s)
        # Looked up at each call, so that tests can replace it.
        self._clock = clock or (lambda: time.perf_counter())
        self.waiting = FairQueue(self.policy.step_tokens)
        self.running: list[SequenceState] = []
        self._chunks = 0  # of prompts
        self._read_at: dict[str, int] = {}  # the newest one of each client that runs
        self._seen: dict[str, float] = {}  # when the last two clients came or left
        self._rested = False  # whether the prompt whose turn it was had to wait a round
        self._reading, self._turn_read = "", 0  # whose turn it is, and tokens read in it
        self._told_at = (0, 0)
        self._drawn: list[tuple[SequenceState, SampledToken]] = []  # and not pushed yet
        self._overlaps = backend.meanwhile is not None
        if self._overlaps:
            backend.meanwhile = self._push_drawn
        self.hold = False  # while set, no sequence is started but those whose turn it is
        self.turn = 0  # sequences that start before the next `call`
        self.steps = 0
        self.model_s = 0.0
        self._last_step_s = 0.0
        self.longest_step_s = 0.0
        self.most_step_tokens = 0
        self._forward_s = 0.0  # of the newest step
        self._call_began_s = 0.0
        self.mean_run_s = 0.0  # of a sequence from start to end, running mean
        self.mean_tokens = 0.0  # of an answer, running mean
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        drafts = min(config.max_draft_tokens, backend.max_step_tokens - 1)
        self.drafting = Drafting(drafter, drafts, self.policy, self.counts, self.now)
        self._drafts = self.drafting.is_on  # in this round; others may switch it in the middle

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not (self.waiting or self.running)

    @property
    def may_start(self) -> bool:
        """Whether a sequence waits that need not wait for a `call`."""
        return bool(self.waiting) and (self.turn > 0 or not self.hold)

    @property
    def last_step_s(self) -> float:
        """When the backend or the drafter last ended a piece of work, on the core's clock."""
        return max(self._last_step_s, self.drafting.last_s)

    def now(self) -> float:
        """Seconds on the core's clock."""
        return self._clock()

    def sequence(self, request: Request, sink: Sink, salt: str, now_s: float) -> SequenceState:
        """Make a sequence that is not queued yet.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        params, begun = request.params, request.begun
        if begun is not None:
            params = replace(params, seed=begun.seed)
        sampler = Sampler(params, self.vocab_size, request.ids)
        sequence = SequenceState(request, sampler, sink, salt, now_s)
        if begun is not None:
            sampler.go_on(begun.answer)
            sequence.ids += begun.answer
            sequence.stats.completion_tokens = len(begun.answer)
            if begun.kept is not None:
                sequence.aside = begun.kept
                sequence.pending = sequence.ids[-begun.pending :]
        return sequence

    def put_away(self, sequence: SequenceState) -> PutAway | None:
        """Take a sequence out for good; its sink is told that it was cancelled.

        Its rows are left out where they cannot be read.

        Returns:
            None if it has ended.
        """
        self._push_drawn()
        if sequence.ended:
            return None
        kept, seed, pending = sequence.aside, sequence.sampler.seed, len(sequence.pending)
        if sequence.slot is not None:
            # Without its rows it has to be read anew, which is better than not to go on.
            with contextlib.suppress(EdgeError, MemoryError):
                kept = self._keep_rows(sequence.slot)
        answer = tuple(sequence.ids[len(sequence.request.ids) :])
        self._finish(sequence, "cancelled")
        return PutAway(seed, answer, pending, kept)

    def add(self, sequence: SequenceState) -> None:
        """Put a sequence into the queue; see `FairQueue`."""
        self._see(sequence)
        self.waiting.add(sequence, self._busy)

    def _see(self, sequence: SequenceState) -> None:
        """Note that a client has come, or an answer of it has ended."""
        client = sequence.request.client
        before = [each for each in self._seen.items() if each[0] != client]
        self._seen = dict([*before[-1:], (client, self.now())])

    def _is_alone(self, client: str) -> bool:
        """Whether no other client runs or waits, or was here in the last seconds."""
        since = self.now() - _ALERT_S
        if any(each != client and seen_s >= since for each, seen_s in self._seen.items()):
            return False
        return all(s.request.client == client for s in (*self.running, *self.waiting))

    def step(self) -> None:
        """Run one round: end cancelled and late sequences, start waiting ones, decode, prefill."""
        steps = self.steps
        self._drafts = self.drafting.is_on
        if self._drafts:
            self._push_drawn()  # of a round without drafts
        self._sweep()
        self._start_waiting()
        self._tell_waiting()
        decoding = [s for s in self.running if s.decodes]
        prefilling = self._next_prompt(at_least=2)
        chunk = 0
        if prefilling is not None and self._rests(prefilling):
            prefilling = None
        if prefilling is not None:
            chunk = self._chunk(prefilling, len(decoding))
        rides = prefilling is not None and chunk == 0 and not self.deterministic
        if prefilling is not None and prefilling.request.on_logits is not None:
            rides = False
        if decoding:
            rides = self._decode(decoding, prefilling if rides else None)
        if prefilling is not None and not (rides or prefilling.ended):
            self._prefill(prefilling, max(chunk, 1))
        if self.steps == steps:
            self._push_drawn()  # no step was there to do it

    def call(self, work: Callable[[], _Result]) -> _Result:
        """Let ``work`` use the backend as it likes, while no sequence runs."""
        assert not self.running, "sequences own the cache"
        self._call_began_s = self.now()
        try:
            return work()
        finally:
            self.pool.forget()

    def report_step(self, tokens: int) -> None:
        """Count a step of the backend that work in `call` has just ended."""
        self._count_step(tokens, self.now() - max(self._call_began_s, self.last_step_s))

    @property
    def full_step_s(self) -> float | None:
        """Seconds of the longest step so far, scaled to the tokens of a full step; None before any.

        A step reads all weights however few its tokens are, so scaled from a short one it is high.
        """
        if not self.most_step_tokens:
            return None
        return self.longest_step_s * max(1.0, self.policy.step_tokens / self.most_step_tokens)

    def end_all(self, error: EdgeError | None) -> None:
        """End every sequence with an error, or as cancelled; the backend is not touched."""
        self._push_drawn()
        for sequence in [*self.running, *self.waiting]:
            if error is None:
                self._finish(sequence, "cancelled")
            else:
                self._fail(sequence, error, scrub=False)

    def abandon_all(self) -> None:
        """Forget every sequence without a word to anyone; for a child process."""
        self.running, self._drawn = [], []
        self.waiting = FairQueue(self.policy.step_tokens)

    # ------------------------------------------------------------------ who runs

    def _sweep(self) -> None:
        now = self.now()
        for sequence in [*self.running, *self.waiting]:
            late = sequence.deadline_s is not None and now >= sequence.deadline_s
            if late or sequence.cancelled:
                self._push_drawn()
            if sequence.ended:
                continue
            if sequence.cancelled:
                self._finish(sequence, "cancelled")
            elif sequence.dropped is not None and sequence.may_be_dropped:
                self._fail(sequence, sequence.dropped)
            elif late:
                tokens = sequence.stats.completion_tokens
                began = not sequence.may_be_dropped
                what = f"sampled {tokens} tokens" if began else "was still waiting"
                self._fail(
                    sequence,
                    DeadlineError(
                        f"the request {what} when its {sequence.request.deadline_s:g} s were over; "
                        "allow more time, or send fewer requests at once"
                    ),
                )

    def _start_waiting(self) -> None:
        """Start waiting sequences that find room, or for which others make way, in their order."""
        while self.may_start:
            sequence = self.waiting.first(self._busy, aside=self._is_crowded)
            if sequence.aside is None and any(self._waits_for(sequence, s) for s in self.running):
                return
            has_room = self.pool.num_free and self.policy.allows(len(self.running))
            if not (has_room or self._make_way(sequence)):
                return
            self._start(sequence)

    def _make_way(self, sequence: SequenceState) -> bool:
        """Put a running sequence aside for one that waits, if one gives way and fits.

        All that is aside has at most the rows of one slot, and half of that is for newcomers.
        """
        room = self.backend.capacity // (1 if sequence.is_newcomer else 2) - self._aside_rows
        other = self.waiting.gives_way(sequence, self.running, room)
        if other is None:
            return False
        running = len(self.running)
        self._push_drawn()
        return len(self.running) < running or self._put_aside(other)

    def _put_aside(self, sequence: SequenceState) -> bool:
        """Have a running sequence wait with its rows; returns whether its slot is free."""
        slot = slot_of(sequence)
        try:
            sequence.aside = self._keep_rows(slot)
        except EdgeError as error:
            self._fail(sequence, error)
            return True
        except MemoryError:  # it runs on, and the other waits
            return False
        self.pool.give_back(slot, keep=self.reuse_prefix)
        sequence.slot, sequence.came_back = None, True
        self.waiting.add(sequence)  # first, so that another thread's count misses none
        self.running.remove(sequence)
        self.counts["put_aside"] += 1
        return True

    def _keep_rows(self, slot: Slot) -> KeptRows | None:
        """Read the rows of a slot; None if there is none."""
        if not slot.length:
            return None
        return KeptRows.of(slot, self.backend.read_slot(slot.index, slot.length))

    @property
    def _aside_rows(self) -> int:
        """Rows of all that was put aside."""
        return sum(len(sequence.aside.ids) for sequence in self.waiting if sequence.aside)

    @property
    def _is_crowded(self) -> bool:
        """Whether so much is aside that it should go on before more is started."""
        return 2 * self._aside_rows > self.backend.capacity

    @property
    def _busy(self) -> set[str]:
        """Clients of which a sequence runs."""
        return {sequence.request.client for sequence in self.running}

    def _waits_for(self, sequence: SequenceState, other: SequenceState) -> bool:
        """Whether one waits until the prompt of another, which runs, has been read.

        It may then share its rows. It does not wait if it is of higher priority, nor for a longer
        rest of another client's prompt if its own client runs nothing and it shares no row that is
        still to come.
        """
        ahead = sequence.request.priority - other.request.priority
        if len(other.pending) == 1 or ahead < 0:
            return False
        if ahead or sequence.request.client in self._busy:
            return True
        known = slot_of(other).length + 1
        shares = sequence.salt == other.salt and sequence.ids[:known] == other.ids[:known]
        return shares or len(sequence.pending) >= len(other.pending)

    def _next_prompt(self, at_least: int) -> SequenceState | None:
        """The running sequence to read next, of those with so much to read; None if there is none.

        The first one of the highest priority, but clients of equal priority take turns. A new one
        comes before who was read last, and behind who has waited since. A turn is a chunk, and of
        the shortest prompt as many as a full one has tokens.
        """
        prompts = [s for s in self.running if len(s.pending) >= at_least or not s.decodes]
        if not prompts:
            return None
        newest, known = self._chunks, self._read_at
        turns = self._read_at = {client: known.get(client, newest - 1) for client in self._busy}
        found = min(prompts, key=lambda s: (s.request.priority, len(s.pending)))
        if found.request.client != self._reading or self._turn_read >= self.policy.step_tokens:
            found = min(prompts, key=lambda s: (s.request.priority, turns[s.request.client]))
            self._reading, self._turn_read = found.request.client, 0
        self._chunks = turns[found.request.client] = newest + 1
        return found

    def _chunk(self, prefilling: SequenceState, decoding: int) -> int:
        """How many tokens of a prompt to run; see `Policy.chunk_tokens`.

        A short rest of it goes with the chunk: two steps would take longer, for others too.
        """
        rest, alert = len(prefilling.pending), not self._is_alone(prefilling.request.client)
        chunk = self.policy.chunk_tokens(decoding, alert=alert)
        short = min(max(_WHOLE * chunk, _SHORT), self.policy.step_tokens)
        return rest if alert and rest <= short and self.policy.target_itl_s is None else chunk

    def _rests(self, prefilling: SequenceState) -> bool:
        """Whether a prompt is not read in this round, but in the next.

        It has every second round while another client writes a brief answer, and so about half of
        its speed: who writes a few tokens waits for few chunks.
        """
        client, priority = prefilling.request.client, prefilling.request.priority
        self._rested = not self._rested and any(
            other.decodes
            and _BRIEF * len(other.ids) < len(prefilling.ids)
            and other.request.client != client
            and other.request.priority <= priority
            for other in self.running
        )
        return self._rested and self.policy.target_itl_s is None

    def _start(self, sequence: SequenceState) -> None:
        """Start a sequence, or let it go on."""
        self.running.append(sequence)  # first, so that another thread's count misses none
        self.waiting.remove(sequence)
        self.turn = max(self.turn - 1, 0)
        stats, kept = sequence.stats, sequence.aside
        if not stats.has_started:
            stats.queue_s = self.now() - sequence.submitted_s
            sequence.model_s_before = self.model_s
        try:
            cached = self._place(sequence) if kept is None else self._bring_back(sequence, kept)
        except EdgeError as error:
            self._fail(sequence, error)
            return
        if kept is None:
            sequence.pending = sequence.ids[cached:]
        sequence.began_at = len(sequence.ids) - len(sequence.pending)
        self.waiting.charge(sequence)
        sequence.is_newcomer = False
        self.drafting.begin(sequence)
        if stats.has_started:
            return
        stats.has_started, stats.cached_tokens = True, min(cached, stats.prompt_tokens)
        self.counts["prompt"] += len(sequence.ids)
        self.counts["cached"] += cached
        self._tell_read(sequence)

    def _tell_waiting(self) -> None:
        """Tell those who want to know how many start before them."""
        now = self.waiting.changes, len(self.running)
        if now == self._told_at or not any(s.request.wants_progress for s in self.waiting):
            return
        self._told_at = now
        order = self.waiting.order(self._busy, aside=self._is_crowded)
        for ahead, sequence in enumerate(list(order)):
            if sequence.request.wants_progress and not sequence.stats.has_started:
                self._tell(sequence, PromptProgress(len(sequence.request.ids), ahead=ahead))

    def _tell_read(self, sequence: SequenceState) -> None:
        """Tell a sequence that runs how much of its prompt has been read, if it wants to know."""
        if not sequence.request.wants_progress:
            return
        stats, total = sequence.stats, len(sequence.request.ids)
        read_s = self.now() - sequence.submitted_s - stats.queue_s
        done = max(total - len(sequence.pending), 0)
        self._tell(sequence, PromptProgress(total, stats.cached_tokens, done, read_s))

    def _tell(self, sequence: SequenceState, progress: PromptProgress) -> None:
        """Tell the sink what is new to it: a place in the queue, or a percent of the prompt."""
        told = progress.ahead, 100 * progress.processed // progress.total
        if told == sequence.told:
            return
        sequence.told = told
        try:
            sequence.sink.progress(progress)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            self._fail(sequence, _caused("the output of a request failed", error))

    def _place(self, sequence: SequenceState) -> int:
        """Give the sequence a slot and the cached rows of its prompt; returns their number."""
        ids = sequence.ids
        if sequence.request.on_logits is not None:
            ids = []  # the logits of rows that are there already are lost
        placement = self.pool.place(ids, sequence.salt)
        assert placement is not None
        stored = self.prefix_store.lookup(ids) if self.prefix_store else None
        cached = self.pool.usable(stored.length, ids) if stored is not None else 0
        rows = stored.load() if stored is not None and cached > placement.cached else None
        if rows is not None:
            placement = placement._replace(cached=cached, source=None)
        return self._move_in(sequence, placement, rows)

    def _bring_back(self, sequence: SequenceState, kept: KeptRows) -> int:
        """Give a sequence that was aside a slot with its rows; returns how many it has.

        They are written also where a slot has rows of the same tokens: those may differ in bits.
        """
        placement = self.pool.place([], sequence.salt)
        assert placement is not None
        self._move_in(sequence, placement, kept.rows)
        slot_of(sequence).restore(kept)
        sequence.aside = None
        return len(kept.ids)

    def _move_in(
        self, sequence: SequenceState, placement: Placement, rows: Floats | None = None
    ) -> int:
        """Give the sequence its slot, with ``rows`` or those of the placement's source."""
        slot, cached, source, refuge = placement
        if source is not None and source is refuge:
            rows = self.backend.read_slot(source.index, cached)
        if refuge is not None:
            refuge.reset()
            self.backend.copy_slot(slot.index, refuge.index, slot.length)
            refuge.inherit(slot)
        slot.reset()
        if rows is not None:
            self.backend.write_slot(slot.index, rows)
        elif source is not None:
            self.backend.copy_slot(source.index, slot.index, cached)
        self.pool.take(slot, sequence.ids[:cached], sequence.salt)
        sequence.slot = slot
        return cached

    # ------------------------------------------------------------------ steps

    def _prefill(self, sequence: SequenceState, limit: int) -> None:
        on_logits = sequence.request.on_logits
        if on_logits is not None:
            limit = min(limit, _MOST_LOGITS)
        if self.even:
            limit = self._even_chunk(len(sequence.pending), limit)
        part = sequence.pending[:limit]
        places = list(range(len(part)) if on_logits else [len(part) - 1])
        logits = self._forward([sequence], [part], [places])
        if logits is None or sequence.ended:
            return
        slot = slot_of(sequence)
        if on_logits is not None and not self._hand_on(sequence, on_logits, logits[0], len(part)):
            return
        slot.extend(part)
        slot.prefilled = slot.length
        sequence.pending = sequence.pending[limit:]
        self._turn_read += len(part)
        self._tell_read(sequence)
        if sequence.pending or sequence.cancelled or sequence.ended:
            return
        if on_logits is None:
            self._sample(sequence, logits[0])
        else:
            self._finish(sequence, "length")

    def _even_chunk(self, pending: int, limit: int) -> int:
        return even_chunk(pending, limit, 2 if self.deterministic else _BLOCKS)

    def _hand_on(
        self, sequence: SequenceState, on_logits: _OnLogits, logits: _Rows, count: int
    ) -> bool:
        """Give a prompt's logits to whoever wants them; returns false if that ended it."""
        if len(logits) < count:
            self._fail(sequence, non_finite(np.nan))
            return False
        assert isinstance(logits, np.ndarray), "those come whole"
        try:
            on_logits(slot_of(sequence).length, logits)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            self._fail(sequence, _caused("scoring a prompt failed", error), scrub=False)
            return False
        return True

    def _decode(self, decoding: list[SequenceState], rider: SequenceState | None) -> bool:
        """Run the next token of each, and of ``rider``'s prompt; returns whether the rider ran."""
        ready = [sequence for sequence in decoding if self._has_room(sequence)]
        if not ready:
            return False
        if not self._drafts:
            self._decode_run(ready if rider is None else [*ready, rider], DecodeRun((), 0))
            return rider is not None
        ridden = False
        contexts = [self.drafting.context(sequence) for sequence in ready]
        drafts = self.drafting.offers(
            ready, contexts, running=len(self.running), mean_tokens=self.mean_tokens
        )
        plan, is_trial = self.drafting.plan(drafts)
        before = self.counts["completion"]
        took_s = 0.0
        for run in plan:
            rows = [ready[i] for i in run.rows]
            guessing_s = 0.0
            if run.drafted or self.drafting.is_free:
                asked = [contexts[i] for i in run.rows]
                guessing_s = self.drafting.propose(rows, asked, run.drafted)
                if not self.drafting.is_free:
                    self.model_s += guessing_s
            if rider is not None and not run.drafted:
                rows.append(rider)
                rider, ridden = None, True
            self._decode_run(rows, run, guessing_s)
            took_s += guessing_s + self._forward_s
        tokens = self.counts["completion"] - before
        if any(run.drafted for run in plan):
            self.drafting.count_step(tokens, took_s, len(ready), is_trial=is_trial)
        else:
            self.drafting.count_plain(took_s)
        return ridden

    def _decode_run(
        self, sequences: list[SequenceState], run: DecodeRun, guessing_s: float = 0.0
    ) -> None:
        """Run one token of each sequence and its drafted ones; shorter drafts are padded.

        Rows of padding and of wrong drafts are not counted, so later tokens overwrite them.
        """
        # A drafter may stop early, and padding must not pass the end of anyone's slot.
        longest = max(len(sequence.draft) for sequence in sequences)
        rooms = (slot_of(sequence).remaining - 1 for sequence in sequences)
        drafted = min([run.drafted, longest, *rooms])
        rows = []
        for sequence in sequences:
            tail, first = sequence.draft[:drafted], sequence.pending[:1]
            rows.append([*first, *tail, *first * (drafted - len(tail))])
        places = list(range(1 + drafted))
        batch = len(sequences)
        logits = self._forward(sequences, rows, [places] * len(rows))
        if logits is None:
            return
        for sequence, row in zip(sequences, logits, strict=True):
            if sequence.cancelled or sequence.ended:  # by a stop string that was found meanwhile
                continue
            slot_of(sequence).extend(sequence.pending[:1])
            rides = len(sequence.pending) > 1
            if rides or not sequence.stats.completion_tokens:  # a prompt's token
                sequence.pending = sequence.pending[1:]
                self._tell_read(sequence)
            if not (rides or sequence.ended):
                self._sample(sequence, row, run.drafted)
        if run.drafted and not self.drafting.is_free:
            took_s = guessing_s + self._forward_s
            self.policy.costs.observe_drafted(batch, run.drafted, took_s)

    def _forward(
        self,
        sequences: list[SequenceState],
        tokens: list[list[int]],
        wanted: list[list[int]],
    ) -> list[_Rows] | None:
        """Run a step; if it fails, its sequences end with the error and None is returned.

        Of a step that succeeds, those end whose first token has a NaN, and drafts from one on are
        dropped: what is returned of a sequence ends before it.
        """
        slots = [slot_of(sequence) for sequence in sequences]
        lengths = [slot.length for slot in slots]
        seq = len(tokens[0])
        try:
            step = step_after(
                [slot.index for slot in slots],
                lengths,
                self.embeddings[np.array(tokens, dtype=np.int64)],
                np.array(wanted, dtype=np.int64),
            )
            started = self.now()
            whole = any(sequence.request.on_logits for sequence in sequences)
            best = None if whole else self.backend.forward_best
            logits = (best or self.backend.forward)(step)
        except EdgeError as error:
            self._push_drawn()
            for sequence, slot, length in zip(sequences, slots, lengths, strict=True):
                self._spoil(sequence, slot, length + seq, error)
            return None
        seconds = self._forward_s = self.now() - started
        hidden = self.backend.hidden_states
        if hidden is not None:
            self.drafting.show_hidden(slots, tokens, hidden)
        self._count_step(len(sequences) * seq, seconds)
        self.model_s += seconds
        costs = self.policy.costs
        if len(wanted[0]) > 1 and not whole:
            costs.observe_verify(len(sequences), seq, seconds)
        elif seq == 1:
            costs.observe_plain(len(sequences), seconds)
        if len(sequences) == 1 and len(wanted[0]) == 1:
            costs.prefill.observe(seq, seconds)
        found: list[_Rows] = []
        for sequence, slot, length, rows in zip(sequences, slots, lengths, logits, strict=True):
            sound = _count_sound(rows)  # also where nothing is drawn
            if not sound:
                self._spoil(sequence, slot, length + seq, non_finite(np.nan))
            elif sound < len(rows):
                self._scrub(slot, length + seq, first=length + sound)
            found.append(rows[:sound])
        return found

    def _count_step(self, tokens: int, seconds: float) -> None:
        self._last_step_s = self.now()
        self.steps += 1
        self.longest_step_s = max(self.longest_step_s, seconds)
        self.most_step_tokens = max(self.most_step_tokens, tokens)

    # ------------------------------------------------------------------ tokens

    def _sample(
        self,
        sequence: SequenceState,
        logits: _Rows,
        planned: int = 0,
    ) -> None:
        """Draw a token at each place, as long as the draft was what was drawn."""
        draft, drafted = sequence.draft, len(logits) - 1
        sequence.draft = []
        accepted = 0
        slot = slot_of(sequence).index
        for place, row in enumerate(logits):
            token = self._draw(sequence, row)
            if token is None or not self._deliver(sequence, token):
                break
            right = place < len(draft) and token.id == draft[place]
            if place < len(draft):
                # A drafted token that was not run is still a guess to learn from.
                self.drafting.judge(sequence, right)
            elif place < min(planned, sequence.offered) and not self.drafting.is_free:
                # It dared no guess, which ends a draft just as well.
                self.drafting.judge(sequence, False)
            if not right or place == drafted:
                sequence.pending = [token.id]
                break
            slot_of(sequence).extend([token.id])
            accepted += 1
        if draft:
            self.drafting.observe(slot, min(len(draft), drafted), accepted)

    def _draw(
        self, sequence: SequenceState, logits: NDArray[np.float32] | BestLogits
    ) -> SampledToken | None:
        try:
            token = sequence.sampler.sample(logits, sequence.mask())
            sequence.accept(token.id)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            self._fail(sequence, _caused("the constraint of a request failed", error))
        else:
            return token
        return None

    def _deliver(self, sequence: SequenceState, token: SampledToken) -> bool:
        """Count a token and hand it on; returns false if it is known to be the last.

        Where the CPU waits for a device, that is done during the next step: text, stop strings and
        readers then cost no time between steps. A stop string ends its sequence a step late, whose
        token is dropped.
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
        full = self.overflow is None and slot_of(sequence).remaining == 0
        reason: FinishReason | None = None
        if token.id in sequence.request.end_ids:
            reason = "stop"
        elif sequence.tokens_left == 0 or full:
            reason = "length"
        if reason is None and self._overlaps and not self._drafts:
            self._drawn.append((sequence, token))
            return True
        return self._push(sequence, token, reason)

    def _push_drawn(self) -> None:
        """Push the tokens of the last step to their sinks, and let constraints look ahead."""
        drawn, self._drawn = self._drawn, []
        for sequence, token in drawn:
            if sequence.ended or not self._push(sequence, token, None):
                continue
            try:
                sequence.mask()
            except BaseException as error:  # noqa: BLE001 - as above
                caused = _caused("the constraint of a request failed", error)
                self._fail(sequence, caused, scrub=False)

    def _push(
        self, sequence: SequenceState, token: SampledToken, reason: FinishReason | None
    ) -> bool:
        """Push a token to its sink; returns false if it was the last."""
        # What goes wrong there spoils no row, and the backend may be computing.
        try:
            reason = sequence.sink.push(token, reason)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            caused = _caused("the output of a request failed", error)
            self._fail(sequence, caused, scrub=False)
        else:
            if reason is not None:
                self._finish(sequence, reason)
        return not sequence.ended

    def _finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        stats, books = sequence.stats, sequence.slot or sequence.aside
        if stats.has_started:
            stats.model_s = self.model_s - sequence.model_s_before
            run_s = self.now() - sequence.submitted_s - stats.queue_s
            newest = _NEWEST if self.mean_run_s else 1.0
            self.mean_run_s += newest * (run_s - self.mean_run_s)
            if sequence.request.on_logits is None:
                self.mean_tokens += newest * (stats.completion_tokens - self.mean_tokens)
        if books is not None and self.overflow is None:
            stats.context_left = self.backend.capacity - len(books.ids)
        self._leave(sequence, keep=self.reuse_prefix)
        self._see(sequence)
        self.outcomes[reason] += 1
        try:
            sequence.sink.finish(reason, sequence.stats)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            sequence.sink.fail(_caused("the output of a request failed", error))

    def _fail(self, sequence: SequenceState, error: EdgeError, *, scrub: bool = True) -> None:
        """End a sequence with an error; its rows cannot be trusted."""
        if scrub and isinstance(error, _SPOILS) and sequence.slot is not None:
            # No more than that: on the CPU a row that nobody has touched takes no memory.
            newest = max(len(sequence.pending), 1 + self.drafting.max_tokens)
            newest = min(newest, self.backend.max_step_tokens)
            self._scrub(sequence.slot, sequence.slot.length + newest)
        self._leave(sequence, keep=False)
        known = {DeadlineError: "deadline", OverloadError: "rejected"}
        self.outcomes[known.get(type(error), "error")] += 1
        sequence.sink.fail(error)

    def _spoil(self, sequence: SequenceState, slot: Slot, written: int, error: EdgeError) -> None:
        """End a sequence whose step spoilt its rows; it may have ended in the meantime."""
        if sequence.ended:
            self._scrub(slot, written)
            self.pool.forget()
        else:
            self._fail(sequence, error)

    def _scrub(self, slot: Slot, written: int, first: int = 0) -> None:
        """Zero spoilt rows from ``first`` on, those that the last step may have written included.

        See `zero_rows`.
        """
        if self.backend.failed is not None:
            return
        # A backend that cannot even write will say so in its next step.
        with contextlib.suppress(EdgeError):
            zero_rows(self.backend, slot.index, min(written, slot.capacity), first)

    def _leave(self, sequence: SequenceState, *, keep: bool) -> None:
        sequence.ended = True
        self.drafting.end(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        if sequence.slot is not None:
            self.pool.give_back(sequence.slot, keep=keep)
        sequence.slot = sequence.aside = None

    # ------------------------------------------------------------------ room

    def _has_room(self, sequence: SequenceState) -> bool:
        """Whether the next token has a row; makes one where the slot is full."""
        slot = slot_of(sequence)
        if slot.remaining:
            return True
        assert self.overflow is not None, "a full slot ends its sequence"
        try:
            rows = self.backend.read_slot(slot.index, slot.length)
            rows, ids = self.overflow.slide(rows, list(slot.ids))
            if not 0 < len(ids) == rows.shape[2] < slot.length:
                raise BackendError(
                    f"sliding a full slot of {slot.length} rows gave {rows.shape[2]} rows and "
                    f"{len(ids)} tokens; this is a bug in the overflow policy"
                )
            slot.shareable = False
            self.backend.write_slot(slot.index, rows)
        except EdgeError as error:
            self._fail(sequence, error)
            return False
        before, slot.ids = slot.ids, ids
        self.drafting.slide(slot.index, before, ids)
        return True


def _count_sound(rows: _Rows) -> int:
    """Count the rows before the first that came of a NaN; the last token saw all before it."""
    if is_sound(rows[-1]):
        return len(rows)
    return next(place for place, row in enumerate(rows) if not is_sound(row))


def even_chunk(pending: int, limit: int, blocks: int = 2) -> int:
    """A chunk of about ``limit`` tokens, of two or more ``pending``, that leaves none alone.

    An engine may compute a lone token in other bits than one of several, also the odd one that its
    attention leaves behind blocks of 32 tokens or more. So long prompts run in even chunks, and
    those that may leave such a one end with three.

    Args:
        pending: tokens that are left of the prompt.
        limit: tokens of the chunk.
        blocks: what the size of any block is a multiple of.
    """
    if pending <= max(limit, 3) and (pending <= _SHORT or pending % blocks != 1):
        return pending
    if pending % 2 and pending - 3 <= limit:
        return pending - 3
    return min(pending, max(limit, 2)) // 2 * 2


def _caused(what: str, cause: BaseException) -> EdgeError:
    """An error for the caller; a panic in a library of Rust is no Exception."""
    if isinstance(cause, EdgeError):
        return cause
    error = BackendError(f"{what}: {cause!r}")
    error.__cause__ = cause
    return error

"""Runs the steps of the backend, checks the resulting logits, and draws tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge.backends import BestLogits
from edge.backends.step import step_after
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError, EdgeError
from edge.runtime.kv_cache import Slot
from edge.runtime.sampling import SampledToken, is_sound
from edge.runtime.sampling_reference import non_finite

from .delivery import Delivery, caused_by
from .policy import Policy
from .request import Overflow
from .sequence import SequenceState, slot_of

Rows: TypeAlias = NDArray[np.float32] | list[BestLogits]
"""Logits of one sequence, ``[n, vocab]``, or the best of each of its rows."""
_OnLogits: TypeAlias = Callable[[int, NDArray[np.float32]], None]
_MOST_LOGITS = 64  # places of a chunk: 39 MB at a vocabulary of 151,936
SHORT = 31
"""Most tokens that no engine's attention cuts into blocks."""


class Steps:
    """Decode steps and chunks of prompts, from the tokens to run to the tokens that are drawn.

    Args:
        embeddings: the token table.
        delivery: takes drawn tokens, and ends sequences.
        policy: learns the times of steps.
        overflow: makes room in a full slot; None if a full slot ends its sequence.
        blocks: block size with which `even_chunk` leaves no token of a prompt alone; 0 if that
            changes no bits.
    """

    def __init__(
        self,
        embeddings: EmbeddingTable,
        delivery: Delivery,
        policy: Policy,
        overflow: Overflow | None,
        blocks: int,
    ) -> None:
        self.embeddings = embeddings
        self.delivery = delivery
        self.policy = policy
        self._roster = delivery.roster
        self._backend = delivery.roster.backend
        self._overflow = overflow
        self._blocks = blocks
        self._now = delivery.now

    def decode(self, decoding: list[SequenceState], rider: SequenceState | None) -> bool:
        """Run the next token of each, and of ``rider``'s prompt; returns whether the rider ran."""
        ready = [sequence for sequence in decoding if self._has_room(sequence)]
        if not ready:
            return False
        if rider is not None:
            ready.append(rider)
        logits = self.forward(ready, [s.pending[:1] for s in ready], [[0]] * len(ready))
        if logits is not None:
            self._advance(ready, logits)
        return rider is not None

    def prefill(self, sequence: SequenceState, limit: int) -> int:
        """Run a chunk of a prompt of up to ``limit`` tokens; returns how many it read."""
        on_logits = sequence.request.on_logits
        if on_logits is not None:
            limit = min(limit, _MOST_LOGITS)
        part = sequence.pending[: self.chunk(len(sequence.pending), limit)]
        places = list(range(len(part)) if on_logits else [len(part) - 1])
        logits = self.forward([sequence], [part], [places])
        if logits is None or sequence.ended:
            return 0
        slot = slot_of(sequence)
        if on_logits is not None and not self._hand_on(sequence, on_logits, logits[0], len(part)):
            return 0
        slot.extend(part)
        slot.prefilled = slot.length
        sequence.pending = sequence.pending[len(part) :]
        self.delivery.tell_read(sequence)
        if not (sequence.pending or sequence.cancelled or sequence.ended):
            if on_logits is None:
                self._sample(sequence, logits[0])
            else:
                self.delivery.finish(sequence, "length")
        return len(part)

    def chunk(self, pending: int, limit: int) -> int:
        """Choose a chunk of up to about ``limit`` of a prompt's ``pending`` tokens."""
        return even_chunk(pending, limit, self._blocks) if self._blocks else limit

    def forward(
        self,
        sequences: list[SequenceState],
        tokens: list[list[int]],
        wanted: list[list[int]],
    ) -> list[Rows] | None:
        """Run a step; if it fails, its sequences end with the error and None is returned.

        After a step that succeeds, sequences whose first token has a NaN end. Drafts are cut before
        the first NaN, and so are the returned logits.
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
            started = self._now()
            whole = any(sequence.request.on_logits for sequence in sequences)
            best = None if whole else self._backend.forward_best
            logits = (best or self._backend.forward)(step)
        except EdgeError as error:
            self.delivery.push_sampled()
            for sequence, slot, length in zip(sequences, slots, lengths, strict=True):
                self._spoil(sequence, slot, length + seq, error)
            return None
        self._account(slots, tokens, 0 if whole else len(wanted[0]), self._now() - started)
        found: list[Rows] = []
        for sequence, slot, length, rows in zip(sequences, slots, lengths, logits, strict=True):
            sound = _count_sound(rows)  # also if nothing is drawn
            if not sound:
                self._spoil(sequence, slot, length + seq, non_finite(np.nan))
            elif sound < len(rows):
                self._roster.scrub(slot, length + seq, first=length + sound)
            found.append(rows[:sound])
        return found

    def _account(
        self, slots: list[Slot], tokens: list[list[int]], places: int, seconds: float
    ) -> None:
        """Count a step that has just run, and learn from its time.

        Args:
            slots: slots whose rows it wrote.
            tokens: tokens of each that ran.
            places: number of rows of logits of each that were drawn from.
            seconds: time of the step.
        """
        batch, seq = len(tokens), len(tokens[0])
        self.delivery.times.count(batch * seq, seconds, self._now())
        self.delivery.times.model_s += seconds
        if seq == 1:
            self.policy.costs.observe_plain(batch, seconds)
        if batch == 1 and places == 1:
            self.policy.costs.prefill.observe(seq, seconds)

    def _advance(self, sequences: list[SequenceState], logits: list[Rows]) -> None:
        """Count the token of each that has run, and draw the next one."""
        for sequence, rows in zip(sequences, logits, strict=True):
            if sequence.cancelled or sequence.ended:  # by a stop string that was found meanwhile
                continue
            slot_of(sequence).extend(sequence.pending[:1])
            joins_decode = len(sequence.pending) > 1
            if joins_decode or not sequence.stats.completion_tokens:  # it was a prompt's token
                sequence.pending = sequence.pending[1:]
                self.delivery.tell_read(sequence)
            if not (joins_decode or sequence.ended):
                self._sample(sequence, rows)

    def _sample(self, sequence: SequenceState, logits: Rows) -> None:
        """Draw the next token."""
        token = self._draw(sequence, logits[0])
        if token is not None and self.delivery.deliver(sequence, token):
            sequence.pending = [token.id]

    def _draw(
        self, sequence: SequenceState, logits: NDArray[np.float32] | BestLogits
    ) -> SampledToken | None:
        try:
            token = sequence.sampler.sample(logits, sequence.mask())
            sequence.accept(token.id)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            caused = caused_by("the constraint of a request failed", error)
            self.delivery.fail(sequence, caused)
        else:
            return token
        return None

    def _hand_on(
        self, sequence: SequenceState, on_logits: _OnLogits, logits: Rows, count: int
    ) -> bool:
        """Pass a prompt's logits to its ``on_logits``; returns false if that ended it."""
        if len(logits) < count:
            self.delivery.fail(sequence, non_finite(np.nan))
            return False
        assert isinstance(logits, np.ndarray), "those come whole"
        try:
            on_logits(slot_of(sequence).length, logits)
        except BaseException as error:  # noqa: BLE001 - others go on; the caller is told
            caused = caused_by("scoring a prompt failed", error)
            self.delivery.fail(sequence, caused, scrub=False)
            return False
        return True

    def _spoil(self, sequence: SequenceState, slot: Slot, written: int, error: EdgeError) -> None:
        """End a sequence whose step spoilt its rows; it may have ended in the meantime."""
        if sequence.ended:
            self._roster.scrub(slot, written)
            self._roster.pool.forget()
        else:
            self.delivery.fail(sequence, error)

    def _has_room(self, sequence: SequenceState) -> bool:
        """Whether the next token has a row; makes one if the slot is full."""
        slot = slot_of(sequence)
        if slot.remaining:
            return True
        assert self._overflow is not None, "a full slot ends its sequence"
        try:
            rows = self._backend.read_slot(slot.index, slot.length)
            rows, ids = self._overflow.slide(rows, list(slot.ids))
            if not 0 < len(ids) == rows.length < slot.length:
                raise BackendError(
                    f"sliding a full slot of {slot.length} rows gave {rows.length} rows and "
                    f"{len(ids)} tokens; this is a bug in the overflow policy"
                )
            slot.shareable = False
            self._backend.write_slot(slot.index, rows)
        except EdgeError as error:
            self.delivery.fail(sequence, error)
            return False
        self._slide(slot, ids)
        return True

    def _slide(self, slot: Slot, ids: list[int]) -> None:
        """Update the slot after a slide; ``ids`` are the tokens of the rows that are left."""
        slot.ids = ids


def _count_sound(rows: Rows) -> int:
    """Count the rows before the first with a NaN; the last token attends to all before it."""
    if is_sound(rows[-1]):
        return len(rows)
    return next(place for place, row in enumerate(rows) if not is_sound(row))


def even_chunk(pending: int, limit: int, blocks: int = 2) -> int:
    """Choose a chunk of about ``limit`` of two or more ``pending`` tokens that leaves none alone.

    An engine may compute a lone token with other last bits than one of several. The same holds for
    the odd token that its attention leaves after blocks of 32 tokens or more. So long prompts run
    in even chunks, and chunks that may leave such a token end with three.

    Args:
        pending: tokens that are left of the prompt.
        limit: tokens of the chunk.
        blocks: number of which any block size is a multiple.
    """
    if pending <= max(limit, 3) and (pending <= SHORT or pending % blocks != 1):
        return pending
    if pending % 2 and pending - 3 <= limit:
        return pending - 3
    return min(pending, max(limit, 2)) // 2 * 2

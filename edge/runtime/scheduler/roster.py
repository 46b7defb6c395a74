"""Holds the running and the waiting sequences, and moves rows into and out of slots."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from edge.backends import Backend
from edge.backends.step import zero_rows
from edge.errors import EdgeError
from edge.model.slot_rows import SlotRows
from edge.runtime.kv_cache import Placement, SavedRows, Slot, SlotPool

from .fair_queue import FairQueue
from .request import PrefixSource
from .sequence import SequenceState, slot_of

_ALERT_S = 10.0  # a client may well come back within this time


class Roster:
    """The running and the waiting sequences, and the rows of the former.

    Args:
        backend: the engine, whose rows are moved.
        pool: tracks its slots.
        quantum: tokens of a client's turn, for `FairQueue`.
        prefix_store: prefixes that are kept outside the cache.
        reuse_prefix: whether the rows of an ended sequence stay for others.
        now: returns monotonic seconds.

    Attributes:
        running: sequences that run, each in a slot.
        waiting: the queue of the others.
    """

    def __init__(
        self,
        backend: Backend,
        pool: SlotPool,
        quantum: int,
        prefix_store: PrefixSource | None,
        reuse_prefix: bool,
        now: Callable[[], float],
    ) -> None:
        self.backend = backend
        self.pool = pool
        self.quantum = quantum
        self.reuse_prefix = reuse_prefix
        self._prefix_store = prefix_store
        self._now = now
        self._seen: dict[str, float] = {}  # when the last two clients came or left
        self.clear()

    def clear(self) -> None:
        """Drop every sequence without notifying its reader."""
        self.running: list[SequenceState] = []
        self.waiting = FairQueue(self.quantum)

    @property
    def busy(self) -> set[str]:
        """Return the clients of which a sequence runs."""
        return {sequence.request.client for sequence in self.running}

    @property
    def preempted_rows(self) -> int:
        """Return the number of rows of preempted sequences."""
        return sum(len(sequence.saved_rows.ids) for sequence in self.waiting if sequence.saved_rows)

    @property
    def is_crowded(self) -> bool:
        """Whether so much is preempted that it should continue before more is started."""
        return 2 * self.preempted_rows > self.backend.capacity

    def see(self, client: str) -> None:
        """Note that a client has come, or that an answer of it has ended."""
        before = [each for each in self._seen.items() if each[0] != client]
        self._seen = dict([*before[-1:], (client, self._now())])

    def is_alone(self, client: str) -> bool:
        """Whether no other client runs or waits, or was here in the last seconds."""
        since = self._now() - _ALERT_S
        if any(each != client and seen_s >= since for each, seen_s in self._seen.items()):
            return False
        return all(s.request.client == client for s in (*self.running, *self.waiting))

    # ------------------------------------------------------------------ coming and going

    def enter(self, sequence: SequenceState) -> int:
        """Make a waiting sequence run, with the rows that are there for it.

        Returns:
            How many of its tokens have a row.

        Raises:
            EdgeError: the backend cannot move rows; the sequence runs without a slot.
        """
        self.running.append(sequence)  # first, so that another thread's count misses none
        self.waiting.remove(sequence)
        kept = sequence.saved_rows
        return self._place(sequence) if kept is None else self._bring_back(sequence, kept)

    def preempt(self, sequence: SequenceState) -> None:
        """Make a running sequence wait with its rows.

        Raises:
            EdgeError: the rows cannot be read; it continues to run.
            MemoryError: there is no room for them outside the cache; it continues to run.
        """
        slot = slot_of(sequence)
        sequence.saved_rows = self.save_rows(slot)
        self._give_back(sequence, slot, keep=self.reuse_prefix)
        sequence.came_back = True
        self.waiting.add(sequence)  # first, so that another thread's count misses none
        self.running.remove(sequence)

    def leave(self, sequence: SequenceState, *, sound: bool) -> None:
        """Take out an ended sequence; only ``sound`` rows stay for others."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        if sequence.slot is not None:
            self._give_back(sequence, sequence.slot, keep=sound and self.reuse_prefix)
        sequence.saved_rows = None

    # ------------------------------------------------------------------ rows

    def save_rows(self, slot: Slot) -> SavedRows | None:
        """Read the rows of a slot; None if there is none."""
        if not slot.length:
            return None
        return SavedRows.of(slot, self.backend.read_slot(slot.index, slot.length))

    def scrub(self, slot: Slot, written: int, first: int = 0) -> None:
        """Zero spoilt rows from ``first`` on, and rows that the last step may have written.

        `zero_rows` does it.
        """
        if self.backend.failed is not None:
            return
        # A backend that cannot even write will report it in its next step.
        with contextlib.suppress(EdgeError):
            zero_rows(self.backend, slot.index, min(written, slot.capacity), first)

    def _give_back(self, sequence: SequenceState, slot: Slot, *, keep: bool) -> None:
        self.pool.give_back(slot, keep=keep)
        sequence.slot = None
        if sequence.request.adapter is not None:
            self.backend.set_adapter(slot.index, None)

    def _place(self, sequence: SequenceState) -> int:
        """Give the sequence a slot and the cached rows of its prompt; returns their number."""
        ids = sequence.ids
        if sequence.request.on_logits is not None:
            ids = []  # the logits of rows that are there already are lost
        placement = self.pool.place(ids, sequence.salt)
        assert placement is not None
        # Stored rows are those of the model without an adapter.
        store = self._prefix_store if sequence.request.adapter is None else None
        stored = store.lookup(ids) if store else None
        cached = self.pool.usable(stored.length, ids) if stored is not None else 0
        rows = stored.load() if stored is not None and cached > placement.cached else None
        if rows is not None:
            placement = placement._replace(cached=cached, source=None)
        return self._move_in(sequence, placement, rows)

    def _bring_back(self, sequence: SequenceState, kept: SavedRows) -> int:
        """Give a preempted sequence a slot with its rows; returns how many it has.

        They are written even if a slot has rows of the same tokens, whose bits may differ.
        """
        placement = self.pool.place([], sequence.salt)
        assert placement is not None
        self._move_in(sequence, placement, kept.rows)
        slot_of(sequence).restore(kept)
        sequence.saved_rows = None
        return len(kept.ids)

    def _move_in(
        self, sequence: SequenceState, placement: Placement, rows: SlotRows | None = None
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
        if sequence.request.adapter is not None:
            self.backend.set_adapter(slot.index, sequence.request.adapter)
        return cached

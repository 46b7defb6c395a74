"""Tracks which tokens the rows of each slot hold, and who may use them.

No array is touched here. A sequence takes a slot and gives it back. Its rows stay there as a prefix
that a later sequence may begin with, until another sequence needs the slot (least recently used
first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edge.errors import ContextLengthError
from edge.model.slot_rows import SlotRows


@dataclass(eq=False)
class Slot:
    """One sequence's rows of the cache.

    Attributes:
        index: the slot's number in the backend.
        capacity: rows of the slot.
        ids: the token of each valid row, in row order.
        salt: sequences of another salt never see these rows.
        in_use: whether a running sequence owns the slot.
        prefilled: leading rows that steps of several tokens computed.
        shared: leading rows that were there when the sequence started.
        shareable: whether row 0 still holds the sequence's first token; false after a slide.
        used_at: when a sequence gave it back, on the pool's own clock.
    """

    index: int
    capacity: int
    ids: list[int] = field(default_factory=list)
    salt: str = ""
    in_use: bool = False
    prefilled: int = 0
    shared: int = 0
    shareable: bool = True
    used_at: int = 0

    @property
    def length(self) -> int:
        """Return the number of valid rows, which is the position of the next token."""
        return len(self.ids)

    @property
    def remaining(self) -> int:
        """Return the number of free rows."""
        return self.capacity - len(self.ids)

    @property
    def cached_rows(self) -> int:
        """Count rows that the sequence did not compute; in a free slot all rows."""
        return min(self.shared, self.length) if self.in_use else self.length

    def extend(self, ids: Sequence[int]) -> None:
        """Record rows that were just written.

        Raises:
            ContextLengthError: there are more rows than are free.
        """
        if len(ids) > self.remaining:
            raise ContextLengthError(self.length + len(ids), self.capacity)
        self.ids.extend(ids)

    def reset(self) -> None:
        """Forget all rows; after a failed step they cannot be trusted."""
        self.ids, self.prefilled, self.shared = [], 0, 0
        self.shareable = True

    def inherit(self, other: Slot) -> None:
        """Copy the records of another slot, whose rows were copied here."""
        self.ids, self.salt = other.ids, other.salt
        self.prefilled, self.used_at = other.prefilled, other.used_at

    def restore(self, kept: SavedRows) -> None:
        """Restore the records of rows that were written back here."""
        self.ids, self.prefilled, self.shared = list(kept.ids), kept.prefilled, kept.shared
        self.shareable = kept.shareable

    def shared_with(self, ids: list[int], salt: str) -> int:
        """Count the rows that a sequence beginning with ``ids`` could use."""
        if not self.shareable or self.salt != salt:
            return 0
        return common_prefix(self.ids, ids)


class SavedRows(NamedTuple):
    """A sequence's rows outside the cache, and the records of the slot that they came from.

    Attributes:
        rows: rows from `Backend.read_slot`.
        ids: the token of each row.
        prefilled, shared, shareable: fields of `Slot`.
    """

    rows: SlotRows
    ids: list[int]
    prefilled: int
    shared: int
    shareable: bool

    @classmethod
    def of(cls, slot: Slot, rows: SlotRows) -> SavedRows:
        """Keep all rows of a slot, which have been read."""
        return cls(rows, list(slot.ids), slot.prefilled, slot.shared, slot.shareable)


class Placement(NamedTuple):
    """Where a new sequence goes, and what must be copied before it starts.

    Attributes:
        slot: its slot, not yet taken.
        cached: rows that it need not compute; fewer than the prompt's tokens.
        source: the slot to copy those rows from; None if they are in ``slot`` already.
        refuge: the slot to which the old rows of ``slot`` go, in place of its own; it may be
            ``source``. None if they are dropped.
    """

    slot: Slot
    cached: int
    source: Slot | None = None
    refuge: Slot | None = None


class SlotPool:
    """The slots of a backend.

    Args:
        num_slots: how many slots there are.
        capacity: rows of each slot.
        even: whether to share an even number of rows and leave two tokens or more to run. Engines
            that compute a lone or last odd token with other last bits need it.
        prompts_only: whether to share no rows that decoding wrote.
    """

    def __init__(
        self, num_slots: int, capacity: int, *, even: bool = False, prompts_only: bool = False
    ) -> None:
        self.slots = [Slot(index, capacity) for index in range(num_slots)]
        self.even, self.prompts_only = even, prompts_only
        self._clock = 0

    @property
    def num_free(self) -> int:
        """Return the number of slots that no sequence owns."""
        return sum(not slot.in_use for slot in self.slots)

    @property
    def used_tokens(self) -> int:
        """Return the number of rows of running sequences."""
        return sum(slot.length for slot in self.slots if slot.in_use)

    @property
    def cached_tokens(self) -> int:
        """Return the number of rows kept of sequences that have ended."""
        return sum(slot.length for slot in self.slots if not slot.in_use)

    def place(self, ids: list[int], salt: str) -> Placement | None:
        """Choose a slot for a prompt, and the rows that it shares with any slot.

        The rows that are given up are those of the slot that is mostly a prefix of the prompt; of
        several, of the one that loses the fewest. Else they are an empty slot's, else the least
        recently used slot's. The sequence runs there, unless that slot is not next to computing
        ones and another free one is. A step over neighbours reads the weights once, so then the
        rows of that other slot are moved (copying 1,000 tokens takes as long as computing a few).

        Args:
            ids: the prompt; empty for rows that come from elsewhere.
            salt: the sequence's salt, as in `Slot.salt`.

        Returns:
            The placement; None while every slot is in use.
        """
        free = [slot for slot in self.slots if not slot.in_use]
        if not free:
            return None
        shared = {slot: self._shared(slot, ids, salt) for slot in self.slots}
        best = max(shared.values())
        active = {slot.index for slot in self.slots if slot.in_use}

        def cost(slot: Slot) -> tuple[bool, bool, int]:
            lost = _loses(slot, shared[slot]) or shared[slot] < best
            return lost, slot.length > 0, slot.used_at if lost else slot.length - best

        def is_apart(slot: Slot) -> bool:
            return bool(active) and not active & {slot.index - 1, slot.index + 1}

        given_up = min(free, key=cost)
        slot = min(free, key=lambda slot: (is_apart(slot), slot is not given_up, slot.length))
        source = None
        if shared[slot] < best:
            source = next(slot for slot in self.slots if shared[slot] == best)
        refuge = given_up if slot is not given_up and slot.length else None
        return Placement(slot, best, source, refuge)

    def usable(self, rows: int, ids: list[int]) -> int:
        """Count those of a prompt's ``rows`` that need not run; the last token must, for logits."""
        least = 2 if self.even else 1
        return max(min(rows, len(ids) - least), 0) // least * least

    def take(self, slot: Slot, ids: list[int], salt: str) -> None:
        """Give a slot to a sequence; ``ids`` are the tokens of the rows that it starts with."""
        slot.ids, slot.salt, slot.prefilled = list(ids), salt, len(ids)
        slot.shared = len(ids)
        slot.in_use = slot.shareable = True

    def give_back(self, slot: Slot, *, keep: bool) -> None:
        """End a sequence; its rows stay as a prefix if ``keep`` allows."""
        self._clock += 1
        slot.in_use, slot.used_at = False, self._clock
        if not (keep and slot.shareable):
            slot.reset()

    def _shared(self, slot: Slot, ids: list[int], salt: str) -> int:
        shared = slot.shared_with(ids, salt)
        return self.usable(min(shared, slot.prefilled) if self.prompts_only else shared, ids)

    def forget(self) -> None:
        """Drop every row that no sequence owns."""
        for slot in self.slots:
            if not slot.in_use:
                slot.reset()


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common prefix; slices are compared in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    # a[:low] == b[:low], and they differ before high.
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _loses(slot: Slot, shared: int) -> bool:
    """Whether a sequence that uses ``shared`` rows of a slot in place would drop most of it."""
    return 2 * shared < slot.length

"""The books of one cache slot: which tokens its rows hold. No device, no arrays."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ContextLengthError


class SlotCursor:
    """Token ids whose keys and values are valid in a slot, in row order.

    Attributes:
        capacity: rows of the slot.
        ids: the token of each valid row.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        """Valid rows; the position of the next token."""
        return len(self.ids)

    @property
    def remaining(self) -> int:
        """Rows still free."""
        return self.capacity - len(self.ids)

    def start(self, prompt: Sequence[int], *, reuse: bool) -> int:
        """Begin a new sequence and keep what it shares with the old one.

        Args:
            prompt: its token ids, at least one.
            reuse: keep the longest common prefix; else start empty.

        Returns:
            Rows kept: always fewer than the prompt's tokens, since the last one must run to
            give logits.

        Raises:
            ContextLengthError: the prompt leaves no row for the answer.
        """
        if len(prompt) >= self.capacity:
            raise ContextLengthError(len(prompt), self.capacity)
        shared = 0
        if reuse:
            for ours, theirs in zip(self.ids, prompt[:-1], strict=False):
                if ours != theirs:
                    break
                shared += 1
        del self.ids[shared:]
        return shared

    def advance(self, ids: Sequence[int]) -> None:
        """Count rows that were just written.

        Raises:
            ContextLengthError: more rows than are free.
        """
        if len(ids) > self.remaining:
            raise ContextLengthError(self.length + len(ids), self.capacity)
        self.ids.extend(ids)

    def reset(self) -> None:
        """Forget everything; after a failed step the rows cannot be trusted."""
        self.ids.clear()

"""Drafts for speculative decoding without a second model: the text that followed last time.

Answers repeat their prompt (summaries, edits of code) and themselves. `NgramIndex` finds the last
place where the newest tokens occurred before and proposes the tokens that followed there. The idea
is prompt look-up decoding (https://github.com/apoorvumang/prompt-lookup-decoding) and LLMA (arXiv
2304.04487). The core of the scheduler runs the drafted tokens in one step and draws from the true
distribution at each place. So a wrong draft costs time but never changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from edge.bundle.embeddings import PICTURE_IDS
from edge.errors import ConfigError

from .scheduler.drafter import DraftContext, Drafter, DraftWorth

LONGEST_NGRAM = 4
SHORTEST_NGRAM = 2
_FIRST_LENGTH = 4


class NgramDrafter(Drafter):
    """An index for the sequence of each slot; it looks at tokens only."""

    is_free = True  # a look-up takes microseconds
    first_guess = 0.3  # of a text about which nothing is known yet
    newest = 0.15

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}
        self._found: dict[int, list[int]] = {}

    def begin(self, slot: int, salt: str) -> None:
        """Forget the slot's previous sequence; a sequence learns from itself alone."""
        self._indexes[slot] = NgramIndex()
        self._found.pop(slot, None)

    def offer(self, context: DraftContext) -> int:
        """Look up what followed the end of the text, and return its length."""
        found = self._indexes[context.slot].propose(context.ids, context.limit)
        self._found[context.slot] = found
        return len(found)

    def propose(
        self, contexts: Sequence[DraftContext], count: int, worth: DraftWorth
    ) -> list[list[int]]:
        """Return the beginnings of the texts that `offer` found."""
        return [self._found[context.slot][:count] for context in contexts]

    def observe(self, slot: int, proposed: int, accepted: int) -> None:
        """Adapt the length of the slot's next draft."""
        self._indexes[slot].observe(proposed, accepted)


class NgramIndex:
    """Drafts for one sequence from its own tokens.

    The n-grams of the sequence are indexed once each. A token costs one dictionary entry per length
    of n-gram (about 350 bytes for the three lengths), and a proposal one look-up per length and one
    copy per drafted token. If two places match, the longer n-gram wins, then the later place.

    The length of a draft adapts: it doubles when all of a draft was right, and otherwise becomes
    one more than the tokens that were right. The scheduler decides whether a draft is run at all.

    Args:
        longest: tokens of the longest n-gram that is looked up.
        shortest: tokens of the shortest one; shorter ones match more often and are wrong more
            often.

    Raises:
        ConfigError: ``1 <= shortest <= longest`` does not hold.
    """

    def __init__(self, longest: int = LONGEST_NGRAM, shortest: int = SHORTEST_NGRAM) -> None:
        if not 1 <= shortest <= longest:
            raise ConfigError(
                f"n-grams of {shortest} to {longest} tokens: give 1 <= shortest <= longest"
            )
        # Longest first: for each n-gram, the place after its last occurrence.
        self._places: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(longest, shortest - 1, -1)
        }
        self._indexed = 0  # n-grams that end before this place are in the index
        self._length = _FIRST_LENGTH

    def propose(self, ids: Sequence[int], limit: int) -> list[int]:
        """Guess up to ``limit`` tokens that follow ``ids``; none if the end of ``ids`` is new.

        Args:
            ids: prompt and answer so far: the ids of the call before, and those since.
            limit: most tokens to return.
        """
        self._index(ids)
        count = min(limit, self._length)
        if count < 1:
            return []
        for n, places in self._places.items():
            place = places.get(tuple(ids[-n:])) if n <= len(ids) else None
            if place is not None:
                return list(takewhile(PICTURE_IDS.__gt__, _copy(ids, place, count)))
        return []

    def observe(self, proposed: int, accepted: int) -> None:
        """Adapt the length of the next draft.

        Args:
            proposed: tokens of the last draft that were run; 0 teaches nothing.
            accepted: how many of them were right, from the first on.
        """
        if proposed == 0:
            return
        if accepted >= proposed:
            self._length = max(self._length, 2 * proposed)
        else:
            self._length = accepted + 1

    def _index(self, ids: Sequence[int]) -> None:
        """Add the n-grams that end before the last token, since a token follows them."""
        assert len(ids) >= self._indexed, "a drafter follows one sequence, which only grows"
        for end in range(max(self._indexed, 1), len(ids)):
            for n, places in self._places.items():
                if n <= end:
                    places[tuple(ids[end - n : end])] = end
        self._indexed = max(len(ids), 1)


def _copy(ids: Sequence[int], place: int, count: int) -> list[int]:
    """Copy ``count`` tokens from ``place`` on; past the end, text that repeats continues."""
    found = list(ids[place : place + count])
    period = len(found)
    while len(found) < count:
        found.append(found[-period])
    return found

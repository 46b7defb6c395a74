"""Defines what guesses tokens for the scheduler, and what it sees of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.runtime.sampling import Sampler


@dataclass(frozen=True, eq=False)
class DraftContext:
    """One running sequence as a drafter sees it, for one decode step.

    Attributes:
        slot: its slot in the target's cache; no other sequence has it while this one runs.
        ids: prompt and answer so far.
        rows: the tokens that the target attends to: those of its cache, and the one that runs
            next. They are ``ids``, unless the slot has slid.
        limit: guesses that can be of use at most.
        sampler: the sequence's own; `Sampler.guess` draws with the random numbers that decide the
            answer's next tokens.
    """

    slot: int
    ids: list[int]
    rows: list[int]
    limit: int
    sampler: Sampler


class DraftWorth(NamedTuple):
    """From which probability on a guess is worth its time, those before it being right, too.

    Attributes:
        run: that the target runs it; 0 where that time is not known yet.
        go_on: that another one is made after it.
    """

    run: float = 0.0
    go_on: float = 0.0


class Drafter(Protocol):
    """Guesses the next tokens of running sequences; the target then verifies them in one step.

    What a drafter has no use for it need not define: it is then up to date, and learns nothing.
    One drafter serves all slots of an engine, in the engine's thread. What it guesses changes no
    answer, so it may be wrong in every way; it costs time. A head that reads the target's hidden
    states gets those of every step (`saw`), where the target's engine puts them out.

    Attributes:
        is_free: proposals take no time that counts, so they are also made where none is run, to
            learn how often they are right. How right they are is the text's doing: each sequence
            starts anew. Otherwise it is the model's, and starts with what others had.
        first_guess: how probable it is that a proposed token is right, before any was run.
        newest: weight of the newest verdict in the running mean of that probability.
    """

    is_free: bool = False
    first_guess: float
    newest: float

    def begin(self, slot: int, salt: str) -> None:
        """Take note that a new sequence runs in a slot; see `Request` for ``salt``."""

    def slide(self, slot: int, before: list[int], after: list[int]) -> None:
        """Take note that the target dropped rows of a slot.

        Args:
            slot: which one.
            before: the tokens of its rows until now.
            after: those that are left: the first ones, and the newest.
        """
        return

    def saw(
        self, slot: int, before: list[int], tokens: Sequence[int], hidden: NDArray[np.float32]
    ) -> None:
        """Take note of the hidden states of a step that the target has just run.

        Args:
            slot: whose rows it wrote.
            before: the tokens of the slot's rows before the step.
            tokens: those of the rows that it wrote, perhaps with drafts and padding at the end.
            hidden: ``[len(tokens), width]``, valid during the call.

        Raises:
            EdgeError: it can guess no more.
        """
        return

    def behind(self, context: DraftContext) -> int:
        """Tokens that must be read (`read`) before it can propose anything; 0 if it can now.

        Raises:
            EdgeError: it can guess no more.
        """
        return 0

    def read(self, context: DraftContext, most: int) -> None:
        """Read up to ``most`` of the tokens that it is behind.

        Raises:
            EdgeError: it can guess no more.
        """
        return

    def offer(self, context: DraftContext) -> int:
        """Return how many tokens it could propose now, up to the limit."""

    def propose(
        self, contexts: Sequence[DraftContext], count: int, worth: DraftWorth
    ) -> list[list[int]]:
        """Guess what follows each sequence.

        Args:
            contexts: sequences that are not behind.
            count: guesses per sequence at most.
            worth: where to stop, for a drafter that knows how sure it is.

        Raises:
            EdgeError: it can guess no more.
        """

    def observe(self, slot: int, proposed: int, accepted: int) -> None:
        """Take note of how many of the last proposal's tokens were run, and were right."""
        return

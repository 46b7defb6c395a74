"""Defines what a drafter is, and what it sees of a sequence."""

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
        limit: most guesses that can be used.
        sampler: the sequence's own sampler; `Sampler.guess` draws with the random numbers that
            decide the answer's next tokens.
    """

    slot: int
    ids: list[int]
    rows: list[int]
    limit: int
    sampler: Sampler


class DraftWorth(NamedTuple):
    """The probability from which a guess is worth its time, if those before it are right.

    Attributes:
        run: least probability for the target to run it; 0 if that time is not known yet.
        continue_threshold: least probability for making another guess after it.
    """

    run: float = 0.0
    continue_threshold: float = 0.0


class Drafter(Protocol):
    """Guesses the next tokens of running sequences; the target then verifies them in one step.

    A drafter need not define methods that it does not use: it is then up to date, and learns
    nothing. One drafter serves all slots of an engine, in the engine's thread. Its guesses change
    no answer, so they may be wrong in every way; they only cost time. A head that reads the
    target's hidden states gets those of every step (`saw`), if the target's engine puts them out.

    Attributes:
        is_free: whether proposals take no time that counts. Then they are also made where none is
            run, to learn how often they are right. Their quality depends on the text, so each
            sequence starts anew. Otherwise it depends on the model, and a sequence starts with the
            figures of others.
        first_guess: probability that a proposed token is right, assumed before any was run.
        newest: weight of the newest verdict in the running mean of that probability.
    """

    is_free: bool = False
    first_guess: float
    newest: float

    def begin(self, slot: int, salt: str) -> None:
        """Note that a new sequence runs in a slot, with the ``salt`` of its `Request`."""

    def slide(self, slot: int, before: list[int], after: list[int]) -> None:
        """Note that the target dropped rows of a slot.

        Args:
            slot: the slot.
            before: the tokens of its rows until now.
            after: the tokens that are left: the first ones, and the newest.
        """
        return

    def saw(
        self, slot: int, before: list[int], tokens: Sequence[int], hidden: NDArray[np.float32]
    ) -> None:
        """Note the hidden states of a step that the target has just run.

        Args:
            slot: the slot whose rows it wrote.
            before: the tokens of the slot's rows before the step.
            tokens: tokens of the rows that it wrote, perhaps with drafts and padding at the end.
            hidden: ``[len(tokens), width]``, valid during the call.

        Raises:
            EdgeError: it cannot guess any more.
        """
        return

    def behind(self, context: DraftContext) -> int:
        """Return how many tokens it must `read` before it can propose anything; 0 if it can now.

        Raises:
            EdgeError: it cannot guess any more.
        """
        return 0

    def read(self, context: DraftContext, most: int) -> None:
        """Read up to ``most`` of the tokens that it lacks.

        Raises:
            EdgeError: it cannot guess any more.
        """
        return

    def offer(self, context: DraftContext) -> int:
        """Return how many tokens it could propose now, up to the limit."""

    def propose(
        self, contexts: Sequence[DraftContext], count: int, worth: DraftWorth
    ) -> list[list[int]]:
        """Guess the next tokens of each sequence.

        Args:
            contexts: sequences that are not behind.
            count: most guesses per sequence.
            worth: where to stop, for a drafter that knows how sure it is.

        Raises:
            EdgeError: it cannot guess any more.
        """

    def observe(self, slot: int, proposed: int, accepted: int) -> None:
        """Note how many of the last proposal's tokens were run, and how many were right."""
        return

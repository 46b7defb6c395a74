"""Collects the guesses of one step by a drafter that guesses token by token, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.errors import NonFiniteError

from .scheduler.drafter import DraftContext, DraftWorth


class Guesses:
    """Guesses for some sequences; as a context manager it makes samplers forget them at the end.

    Args:
        contexts: the sequences.
        limits: most guesses of each.
        worth: probability below which a draft stops.

    Attributes:
        drafts: the guesses of each.
        spoilt: indices of sequences that ended with a row that is not finite.
    """

    def __init__(
        self, contexts: Sequence[DraftContext], limits: Sequence[int], worth: DraftWorth
    ) -> None:
        self._contexts, self._limits, self._worth = contexts, limits, worth
        self._chances = [1.0] * len(contexts)  # probability that all of a draft is right
        self.drafts: list[list[int]] = [[] for _ in contexts]
        self.spoilt: list[int] = []

    def add(self, index: int, logits: NDArray[np.float32]) -> bool:
        """Guess a sequence's next token; returns whether one more after it is worth its time.

        Args:
            index: index of the sequence.
            logits: a row of the target's length, -inf for tokens that cannot be guessed.

        Raises:
            BackendError: the row has another length.
        """
        try:
            guess, chance = self._contexts[index].sampler.guess(logits)
        except NonFiniteError:
            self.spoilt.append(index)
            return False
        self._chances[index] *= chance
        if self._chances[index] < self._worth.run:
            return False
        draft = self.drafts[index]
        draft.append(guess)
        has_room = len(draft) < self._limits[index]
        return has_room and self._chances[index] >= self._worth.continue_threshold

    def __enter__(self) -> Guesses:
        return self

    def __exit__(self, *exc: object) -> None:
        for context in self._contexts:
            context.sampler.forget_guesses()

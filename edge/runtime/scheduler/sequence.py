"""Holds the state of one sequence while it waits and runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.errors import EdgeError
from edge.runtime.generation import GenerationStats
from edge.runtime.kv_cache import SavedRows, Slot
from edge.runtime.sampling import Sampler

from .request import Request, Sink


class SequenceState:
    """The state of one sequence between submission and end.

    Attributes:
        request: the request.
        sink: the sink of its tokens.
        ids: prompt and answer so far.
        pending: tokens that must run before the next can be sampled.
        slot: the sequence's slot while it runs, else None.
        saved_rows: its rows while it waits to continue; else None.
        arrival: its place in the order of arrivals; None before it is queued.
        is_newcomer: whether it may come before others, as in `FairQueue`; true until it starts.
        came_back: whether it has been preempted before.
        cancelled: whether to end it; anyone may set it at any time.
        dropped: the error that ends it unless it has started; anyone may set it at any time.
        submission: the number of its submission.
        deadline_s: time on the core's clock; None without a deadline.
    """

    def __init__(
        self, request: Request, sampler: Sampler, sink: Sink, salt: str, now_s: float
    ) -> None:
        self.request = request
        self.sampler = sampler
        self.sink = sink
        self.salt = salt
        self.ids = list(request.ids)
        self.pending: list[int] = self.ids[:]
        self.slot: Slot | None = None
        self.saved_rows: SavedRows | None = None
        self.arrival: int | None = None
        self.is_newcomer = self.came_back = False
        self.began_at = 0  # tokens that had run when it started or continued
        self.cancelled = False
        self.dropped: EdgeError | None = None
        self.submission = 0
        self.ended = False
        self.submitted_s = self.last_s = now_s
        self.deadline_s = None if request.deadline_s is None else now_s + request.deadline_s
        self.stats = GenerationStats(prompt_tokens=len(request.ids))
        self.model_s_before = 0.0
        self.draft: list[int] = []
        self.offered = 0  # tokens that could be drafted for this step
        self.acceptance = 0.0
        self.verdicts = 0  # number of verdicts on its drafts
        self.told: tuple[int | None, int] | None = None  # progress that its sink was told
        self._mask: NDArray[np.float32] | None = None
        self._masked = False  # whether `_mask` is the next token's

    def mask(self) -> NDArray[np.float32] | None:
        """Return the mask of the next token, which its constraint computes once."""
        if not self._masked and self.request.constraint is not None:
            self._mask, self._masked = self.request.constraint.mask(), True
        return self._mask

    def accept(self, token_id: int) -> None:
        """Let its constraint see the drawn token."""
        if self.request.constraint is not None:
            self._masked = False
            self.request.constraint.accept(token_id)

    @property
    def decodes(self) -> bool:
        """Whether its next token is the last to run before one is sampled."""
        return len(self.pending) == 1 and self.request.on_logits is None

    @property
    def ran(self) -> int:
        """Return the number of tokens that have run since it started or continued."""
        return len(self.ids) - len(self.pending) - self.began_at

    @property
    def may_be_dropped(self) -> bool:
        """Whether nothing of it has run yet."""
        return not (self.stats.has_started or self.stats.completion_tokens)

    @property
    def tokens_left(self) -> int | None:
        """Return the number of tokens that it may still sample; None without a limit."""
        limit = self.request.params.max_tokens
        return None if limit is None else limit - self.stats.completion_tokens


def slot_of(sequence: SequenceState) -> Slot:
    """Return the slot of a running sequence."""
    assert sequence.slot is not None, "the sequence does not run"
    return sequence.slot

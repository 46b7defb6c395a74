"""Runs prompts with pictures: encoding a tile takes the turn of one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from edge.bundle.embeddings import PICTURE_IDS
from edge.errors import EdgeError
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from edge.vision.rows import PictureRows, PictureTable

from .core import EngineCore
from .request import Request, Sink
from .sequence import SequenceState


class TokenSampler(Sampler):
    """A `Sampler` that sees only the tokens of a prompt: penalties do not apply to pictures."""

    def __init__(
        self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int] = ()
    ) -> None:
        """Prepare as `Sampler` does, without the ids of pictures."""
        super().__init__(params, vocab_size, [id_ for id_ in prompt_ids if id_ < PICTURE_IDS])


class PictureCore(EngineCore):
    """An `EngineCore` whose token table has rows of pictures, a `PictureTable`.

    The rows are computed in its thread, one tile in each round, before the first chunk of the rest
    of a prompt. So others wait for at most one tile, a request can end after each, and rows in the
    cache are not computed again.
    """

    sampler_type = TokenSampler

    @property
    def _table(self) -> PictureTable:
        return cast(PictureTable, self.steps.embeddings)

    def sequence(self, request: Request, sink: Sink, salt: str, now_s: float) -> SequenceState:
        """Make a sequence, as `EngineCore.sequence` does.

        Raises:
            RequestError: it has rows of a picture that `Request.pictures` does not hold.
        """
        self._table.check_held(request.ids, cast("Sequence[PictureRows]", request.pictures))
        return super().sequence(request, sink, salt, now_s)

    def _skips_round(self, prefilling: SequenceState) -> bool:
        """Whether a prompt is not read in this round; one of its tiles may be encoded instead."""
        if super()._skips_round(prefilling):
            return True
        try:
            if not self._table.prepare(prefilling.pending):
                return False
        except EdgeError as error:
            self.delivery.fail(prefilling, error)
        self.times.ended_s, self._turn_read = self.now(), self.policy.step_tokens
        return True

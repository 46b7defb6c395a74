"""Runs prompts with pictures: a tile that the encoder has yet to see takes the turn of a chunk."""

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
    """A `Sampler` that sees the tokens of a prompt alone: no penalty is about a picture."""

    def __init__(
        self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int] = ()
    ) -> None:
        """See `Sampler`."""
        super().__init__(params, vocab_size, [id_ for id_ in prompt_ids if id_ < PICTURE_IDS])


class PictureCore(EngineCore):
    """An `EngineCore` whose token table has rows of pictures, a `PictureTable`.

    The rows are computed in its thread, a tile in each round, before the first chunk of what is
    left of a prompt. So others wait for one tile at most, a request can end after each, and what is
    in the cache is not computed at all.
    """

    sampler_type = TokenSampler

    @property
    def _table(self) -> PictureTable:
        return cast(PictureTable, self.steps.embeddings)

    def sequence(self, request: Request, sink: Sink, salt: str, now_s: float) -> SequenceState:
        """Make a sequence; see `EngineCore.sequence`.

        Raises:
            RequestError: it has rows of a picture that `Request.pictures` does not hold.
        """
        self._table.check_held(request.ids, cast("Sequence[PictureRows]", request.pictures))
        return super().sequence(request, sink, salt, now_s)

    def _rests(self, prefilling: SequenceState) -> bool:
        """Whether a prompt is not read in this round; one of its tiles may be encoded instead."""
        if super()._rests(prefilling):
            return True
        try:
            if not self._table.prepare(prefilling.pending):
                return False
        except EdgeError as error:
            self.delivery.fail(prefilling, error)
        self.times.ended_s, self._turn_read = self.now(), self.policy.step_tokens
        return True

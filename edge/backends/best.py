"""What an engine says of a row of logits that stays where it was computed.

A token of an answer needs few of a row's numbers. An engine whose graph has the outputs for it
(`edge.bundle.io_spec.BEST_VALUES`) hands out the best logits of a row, their ids, and how much
there is in all. From these `edge.runtime.best_draw` draws the token that the whole row would give;
where they do not suffice, the row is fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class BestLogits(NamedTuple):
    """The best logits of one row.

    Attributes:
        values: float32 ``[k]``, falling, exactly those of the row.
        ids: integers ``[k]``: their tokens; of equal values in any order.
        logsumexp: logarithm of the sum of ``exp`` over the whole row, float32 on the engine.
        error: bound on the error of that sum, relative to it, before its logarithm was rounded.
        vocab_size: length of the row.
        row: fetches the row, float32 ``[vocab]``; like the row, valid until the engine's next step.
    """

    values: NDArray[np.float32]
    ids: NDArray[np.integer]
    logsumexp: float
    error: float
    vocab_size: int
    row: Callable[[], NDArray[np.float32]]

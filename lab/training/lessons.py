"""What an EAGLE-3 head learns from: the model's output for one text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Lesson:
    """The model's output for one text of ``n`` tokens.

    Attributes:
        ids: int64 ``[n]``.
        states: inputs of the three layers, float16 ``[n, 3 * hidden]``.
        best: the most probable tokens after each, int64 ``[n, BEST]``, best first.
        probabilities: float32 ``[n, BEST]``.
        first: the first token that the model wrote or would write; in a chat, of the last turn.
    """

    ids: NDArray[np.int64]
    states: NDArray[np.float16]
    best: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    first: int

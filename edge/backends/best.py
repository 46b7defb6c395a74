"""Describes a row of logits that stays where it was computed, by its best entries.

A token of an answer needs few of a row's numbers. An engine that was built with the outputs for it
(`edge.bundle.io_spec.best_outputs`) returns the best logits of a row, their ids, and the mass of
all others. From these `edge.runtime.best_draw` draws the token that the whole row would give; if
they do not suffice, the row is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.bundle.io_spec import sum_error

if TYPE_CHECKING:
    from edge.bundle.manifest import FloatType

_UNITS: dict[FloatType, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}
_FAR = 12.0
_MOST = 8e4  # in units; the exponential of twice as much is still finite


class BestLogits(NamedTuple):
    """The best logits of one row.

    Attributes:
        values: float32 ``[k]``, descending, exactly those of the row.
        ids: integers ``[k]``: their tokens; equal values come in any order.
        rest: the mass of all other tokens, relative to the best one's, as the engine computed
            it; NaN if there is no such number.
        vocab_size: length of the row.
        dtype: the row's float type.
        row: fetches the row, float32 ``[vocab]``; valid until the engine's next step.
    """

    values: NDArray[np.float32]
    ids: NDArray[np.integer]
    rest: float
    vocab_size: int
    dtype: FloatType
    row: Callable[[], NDArray[np.float32]]

    def rest_bound(self) -> float:
        """Bound the true mass of all other tokens.

        There are two kinds of rounding. The engine's sums round (`sum_error`). And a compiler may
        sum logits before it rounds them to the graph's type, as ONNX Runtime does. Then each logit,
        also the best one, is off by half a unit in the last place, which scales a mass by a factor.
        Tokens too far below the best for that factor have less than ``exp(-_FAR)`` in all. Own
        kernels sum only the others, from rounded logits, and err less (`engines.graph.own_top_k`).
        """
        greatest, far = float(self.values[0]), math.log(self.vocab_size) + _FAR
        best = float(np.exp(self.values - self.values[0]).sum())
        moved = math.exp(_UNITS[self.dtype] * min(2 * abs(greatest) + far, _MOST))
        rest = max(self.rest, 0.0)
        # Both sums are of logits as the compiler has them, and the difference keeps their errors.
        rest += 2.2 * sum_error(self.vocab_size) * (best * moved + rest)
        return rest * moved + math.exp(-_FAR)

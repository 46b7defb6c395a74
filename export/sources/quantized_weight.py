"""Holds the weight of one quantized linear module, in one form whichever tool wrote it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers in groups: ``w[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])``.

    Attributes:
        bits: bits of a code.
        codes: int8 ``[out, in]``, stored minus half the range: -8..7 with 4 bits.
        zeros: int16 ``[out, groups]``, minus half the range, too; all 0 if the weight is symmetric.
        scales: float32 ``[out, groups]``; finite, of any sign (AutoRound's may be negative).
        group_of: the group of each input channel, int64 ``[in]``; None if groups are equally long
            and in the order of the channels.
        input_scale: scale of the symmetric static INT8 range of the inputs, or None.
    """

    bits: int
    codes: NDArray[np.int8]
    zeros: NDArray[np.int16]
    scales: NDArray[np.float32]
    group_of: NDArray[np.int64] | None = None
    input_scale: float | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """Compute the weights, float32 ``[out, in]``."""
        out, width = self.codes.shape
        if self.group_of is not None:
            result = self.codes.astype(np.float32)
            result -= self.zeros.astype(np.float32)[:, self.group_of]
            result *= self.scales[:, self.group_of]
            return result
        groups = self.codes.reshape(out, self.scales.shape[1], -1).astype(np.float32)
        groups -= self.zeros[..., None]
        groups *= self.scales[..., None]
        return groups.reshape(out, width)

    def take_rows(self, rows: NDArray[Any]) -> QuantizedWeight:
        """Keep the outputs with these indices."""
        return replace(
            self, codes=self.codes[rows], zeros=self.zeros[rows], scales=self.scales[rows]
        )

    def channel_order(self) -> NDArray[np.int64] | None:
        """Order the input channels so that groups are equally long and follow each other.

        Returns:
            A permutation, int64 ``[in]``, or None if the groups are not equally long.
        """
        width, groups = self.codes.shape[1], self.scales.shape[1]
        if self.group_of is None:
            return np.arange(width, dtype=np.int64)
        order = np.argsort(self.group_of, kind="stable").astype(np.int64)
        expected = np.repeat(np.arange(groups), width // groups)
        return order if np.array_equal(self.group_of[order], expected) else None

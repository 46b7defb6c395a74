"""Flips channels so that INT4's extra value serves the largest weights of most groups.

-8 has no counterpart above zero. A group whose largest magnitude is negative needs a step that is
an eighth smaller, and TensorRT takes no negative scales that would flip the other groups. Flipping
an input channel, in the linear and in the layer before, changes nothing in float and flips the
weights of one column. Which flips are best depends on all rows, so each weight states a preference:
a smooth stand-in for being the largest of its group.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme

from .rtn import TILE_ELEMENTS

Array = NDArray[np.float32]


def channel_signs(
    weights: Array,
    scheme: TensorScheme,
    importance: Array,
    shared: NDArray[np.int64] | None = None,
) -> Array:
    """Choose -1 or 1 for each input channel of an INT4 linear, float32 ``[in]``.

    Args:
        weights: finite float32 ``[out, in]``, as they will be rounded.
        scheme: int4; group size 0 is one group per row.
        importance: mean square of each channel's inputs, float32 ``[in]``.
        shared: int64 ``[in]``; channels with the same number get the same sign.
    """
    width = weights.shape[1]
    size = scheme.group_size or width
    group_importance = importance.reshape(-1, size).mean(axis=1)
    wish: NDArray[np.float64] = np.zeros(width)
    step = max(1, TILE_ELEMENTS // width)
    for start in range(0, len(weights), step):
        groups = weights[start : start + step].reshape(-1, width // size, size)
        largest = np.abs(groups).max(axis=-1, keepdims=True)
        relative = groups / np.maximum(largest, np.finfo(np.float32).tiny)
        # The ninth power is odd, and close to 0 except for weights that are nearly the largest.
        power = np.square(np.square(np.square(relative)))
        power *= relative
        # A finer step gains in proportion to its square and to the inputs of the whole group.
        power *= np.square(largest) * group_importance[:, None]
        wish += power.sum(axis=0, dtype=np.float64).reshape(-1)
    if shared is not None:
        together = np.zeros(width)
        np.add.at(together, shared, wish)
        wish = together[shared]
    signs: Array = np.where(wish > 0, np.float32(-1), np.float32(1))
    return signs

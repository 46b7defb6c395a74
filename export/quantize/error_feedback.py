"""Changes a linear's weights, before they are rounded, to make up for errors of earlier ones.

With the float model's inputs X, the inputs Y that carry the earlier errors, and R, what the
residual stream has lost where the linear's result is added to it, ``W + C`` is to give from Y what
the float model has there:

    minimise  |X W^T + R - Y (W + C)^T|^2 / tokens + damping * |C|^2

The part with X is that of GPTAQ (Li et al., arXiv 2504.02692); R is added here. The damping is
large, so that only what many tokens share is made up for: a few thousand tokens say little about
the rest, and made up for it is lost on every other text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .gptq import gptq_factor

Array = NDArray[np.float32]
# Of the mean second moment of the inputs; docs/quantization-measured.md has others.
_DAMPING = 1.0


def feedback(
    weights: Array, lost: Array, rounded: Array, moments: Array, missing: Array | None
) -> Array:
    """Compute C, float32 ``[out, in]``.

    Args:
        weights: W, float32 ``[out, in]``.
        lost: X - Y, float32 ``[tokens, in]``.
        rounded: Y, float32 ``[tokens, in]``.
        moments: `statistics.second_moment` of Y; overwritten.
        missing: R, float32 ``[tokens, out]``, or None.
    """
    tokens = np.float32(len(rounded))
    if len(weights) < weights.shape[1]:  # whichever is the smaller product
        change = lost @ weights.T
        if missing is not None:
            change += missing
        wanted = rounded.T @ change
    else:
        wanted = (rounded.T @ lost) @ weights.T
        if missing is not None:
            wanted += rounded.T @ missing
    wanted /= tokens
    factor = gptq_factor(moments, _DAMPING)
    change = np.empty_like(wanted)
    change[factor.order] = factor.upper.T @ (factor.upper @ wanted[factor.order])
    return np.ascontiguousarray(change.T)

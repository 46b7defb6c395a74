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

from .triangular import damp, factor_upper, solve_factored

Array = NDArray[np.float32]
# Of the mean second moment of the inputs; docs/quantization-measured.md has others.
_DAMPING = 1.0


def to_make_up(weights: Array, lost: Array, rounded: Array, missing: Array | None) -> Array:
    """Compute ``Y^T ((X - Y) W^T + R) / tokens``, float32 ``[in, out]``.

    Args:
        weights: W, float32 ``[out, in]``.
        lost: X - Y, float32 ``[tokens, in]``.
        rounded: Y, float32 ``[tokens, in]``.
        missing: R, float32 ``[tokens, out]``, or None.
    """
    if len(weights) < weights.shape[1]:  # whichever is the smaller product
        change = lost @ weights.T
        if missing is not None:
            change += missing
        result: Array = rounded.T @ change
    else:
        result = (rounded.T @ lost) @ weights.T
        if missing is not None:
            result += rounded.T @ missing
    result /= np.float32(len(rounded))
    return result


def feedback(wanted: Array, moments: Array, factors: Array) -> Array:
    """Compute C, float32 ``[out, in]``, in the channels of ``wanted``.

    Args:
        wanted: what `to_make_up` says; overwritten.
        moments: `statistics.second_moment` of Y, float32 ``[in, in]``.
        factors: AWQ's factors, by which Y and W are scaled here, float32 ``[in]``. The damping is
            of the model's own channels, without them.
    """
    damped = moments * factors
    damped *= factors[:, None]
    damp(damped, _DAMPING)
    factor_upper(damped)
    wanted *= factors[:, None]
    solve_factored(damped, wanted)
    wanted *= factors[:, None]
    return np.ascontiguousarray(wanted.T)

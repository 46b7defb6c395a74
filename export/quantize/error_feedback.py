"""Changes a linear's weights, before they are rounded, to make up for errors of earlier ones.

With the inputs Y that carry the earlier errors, and S, what the linear's result must be for the
float model's value where it goes to, the weights V that are rounded instead of W

    minimise  |S - Y V^T|^2 / tokens + damping * |V - W|^2

Where the result goes to the residual stream, S is what the float model has there after the linear
without what the rounded one has there before it; elsewhere it is the float model's result X W^T,
as in GPTAQ (Li et al., arXiv 2504.02692). The damping is large, so that only what many tokens
share is made up for: a few thousand tokens say little about the rest, and made up for it is lost
on every other text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .triangular import damp, factor_upper, solve_factored

Array = NDArray[np.float32]
# Of the mean second moment of the inputs; docs/measured.md has others.
_DAMPING = 1.0


def cross_moment(inputs: Array, values: Array) -> Array:
    """Compute ``Y^T S / tokens``, float32 ``[in, width]``.

    Args:
        inputs: Y, float32 ``[tokens, in]``.
        values: S, or the float model's inputs X, float32 ``[tokens, width]``.
    """
    result: Array = inputs.T @ values
    result /= np.float32(len(inputs))
    return result


def made_up(weights: Array, wanted: Array, moments: Array, factors: Array) -> Array:
    """Compute V, float32 ``[out, in]``.

    Args:
        weights: W, float32 ``[out, in]``.
        wanted: `cross_moment` of Y and S, float32 ``[in, out]``; overwritten.
        moments: `statistics.second_moment` of Y, float32 ``[in, in]``.
        factors: AWQ's factors, by which Y and W are scaled here, float32 ``[in]``. The damping is
            of the model's own channels, without them.
    """
    damped = moments * factors
    damped *= factors[:, None]
    damping = damp(damped, _DAMPING)
    factor_upper(damped)
    wanted *= factors[:, None]
    wanted += (weights * (damping / factors)).T
    solve_factored(damped, wanted)
    wanted *= factors[:, None]
    return np.ascontiguousarray(wanted.T)

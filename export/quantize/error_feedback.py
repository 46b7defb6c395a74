"""Changes a linear's weights, before they are rounded, to make up for errors of earlier ones.

Y are the inputs that carry the earlier errors. S is the result that the linear must have for the
float model's value at its destination. The weights V that are rounded instead of W

    minimise  |S - Y V^T|^2 / tokens + damping * |V - W|^2

If the result goes to the residual stream, S is the float model's stream after the linear minus the
rounded model's stream before it. Elsewhere S is the float model's result X W^T, as in GPTAQ (Li et
al., arXiv 2504.02692). The damping is large, so that only errors that many tokens share are made up
for: a few thousand tokens say little about the rest, and a correction of it is lost on every other
text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .triangular import damp, factor_upper, solve_factored

Array = NDArray[np.float32]
# As a share of the inputs' mean second moment; docs/measured.md has others.
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
        factors: AWQ's factors, by which Y and W are scaled here, float32 ``[in]``. The damping
            applies to the model's own channels, without them.
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

"""Computes how alike two rows of numbers are, in float64: KL divergence, cosine."""

from __future__ import annotations

import numpy as np

from edge.logprobs import Rows, Vector


def kl_divergence(log_p: Vector, log_q: Vector) -> Vector:
    """Compute KL(p || q) over the last axis, in nats; never negative.

    Args:
        log_p: a result of `edge.logprobs.log_softmax`.
        log_q: another of the same shape.
    """
    result: Vector = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    # Rounding can leave -1e-17 where both are equal.
    return np.maximum(result, 0.0)


def cosine_similarity(a: Rows, b: Rows) -> Vector:
    """Compute the cosine over the last axis, -1 to 1.

    Two rows of zeros give 1, one row of zeros gives 0. A row that holds NaN or an infinity gives
    NaN, which fails every threshold.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf / inf is the NaN that is promised
        norms = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
        result: Vector = (x * y).sum(axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    both_zero = ~(x.any(axis=-1) | y.any(axis=-1))
    return np.where(both_zero, 1.0, np.clip(result, -1.0, 1.0))

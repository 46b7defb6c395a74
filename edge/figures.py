"""Computes figures of logits and of the cache: log-probabilities, KL divergence, cosine.

Logits that hold NaN or an infinity are a `NonFiniteError`, never a figure. Everything is computed
in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import NonFiniteError

Rows = NDArray[np.floating]
Vector = NDArray[np.float64]

_ROWS = 4  # rows at a time: 5 MB each at a vocabulary of 151,936


def log_softmax(logits: Rows) -> Vector:
    """Compute log-probabilities over the last axis, in nats, without overflow.

    Args:
        logits: ``[..., vocab]``.

    Returns:
        float64 of the same shape.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    x = logits.astype(np.float64)
    check_finite(x)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def check_finite(logits: Rows) -> None:
    """Refuse logits of any shape that leave the range of their type.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            "the logits hold NaN or infinite values; export the bundle again, with --dtype bf16 "
            "if activations leave the range of FP16"
        )


def token_logprobs(logits: Rows, ids: NDArray[np.int64]) -> Vector:
    """Compute the log-probability of one token per row, in nats; a few rows at a time.

    Args:
        logits: ``[n, vocab]``.
        ids: ``[n]``, each in the vocabulary.

    Returns:
        float64 ``[n]``.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    result = np.empty(len(ids))
    for at in range(0, len(ids), _ROWS):
        rows = slice(at, at + _ROWS)
        log_p = log_softmax(logits[rows])
        result[rows] = np.take_along_axis(log_p, ids[rows, None], axis=1)[:, 0]
    return result


def kl_divergence(log_p: Vector, log_q: Vector) -> Vector:
    """Compute KL(p || q) over the last axis, in nats; never negative.

    Args:
        log_p: a result of `log_softmax`.
        log_q: another of the same shape.
    """
    result: Vector = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    # Rounding can leave -1e-17 where both are equal.
    return np.maximum(result, 0.0)


def cosine_similarity(a: Rows, b: Rows) -> Vector:
    """Compute the cosine over the last axis, -1 to 1.

    Two rows of zeros give 1, one row of zeros gives 0. A row that holds NaN or an infinity gives
    NaN, which reaches no threshold.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf / inf is the NaN that is promised
        norms = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
        result: Vector = (x * y).sum(axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    both_zero = ~(x.any(axis=-1) | y.any(axis=-1))
    return np.where(both_zero, 1.0, np.clip(result, -1.0, 1.0))

"""Computes log-probabilities of logits.

Logits with NaN or an infinity raise `NonFiniteError` instead of giving a figure. Everything is
computed in float64.
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

"""Computes the log-probabilities that a model gives to given tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import ContextLengthError, RequestError
from edge.logprobs import token_logprobs

# Logits of 64 positions at a time take 39 MB at a vocabulary of 151,936.
_SCORE_CHUNK = 64


def score(
    backend: Backend,
    embeddings: EmbeddingTable,
    ids: Sequence[int],
    on_step: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Compute the log-probability of every token but the first, given those before it.

    Overwrites the first slot of the backend, which nothing else may use meanwhile.

    Args:
        backend: the engine.
        embeddings: its token table.
        ids: at least two tokens.
        on_step: called after each step with the number of tokens that it ran.

    Returns:
        Natural logarithms, float64 ``[len(ids) - 1]``.

    Raises:
        RequestError: there are fewer than two tokens, or an id is outside the table.
        ContextLengthError: there are more tokens than the cache holds.
        BackendError: the engine failed, or its logits are not finite.
    """
    num_run = len(ids) - 1  # the last token is only looked up
    if num_run < 1:
        raise RequestError(f"scoring needs at least two tokens, got {len(ids)}")
    tokens = np.asarray(ids, dtype=np.int64)
    embeddings.check(tokens)
    if num_run >= backend.capacity:
        raise ContextLengthError(num_run, backend.capacity)
    result = np.empty(num_run, dtype=np.float64)
    for part, logits in prefill(
        backend, embeddings, tokens[:-1], max_tokens=_SCORE_CHUNK, wanted=all_tokens
    ):
        if on_step is not None:
            on_step(len(logits))
        result[part] = token_logprobs(logits, tokens[1:][part])
    return result

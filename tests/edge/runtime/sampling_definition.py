"""Defines what `Sampler` draws from: every step of `sampling_reference`, on all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.runtime.sampling_params import SamplingParams
from edge.runtime.sampling_reference import (
    Ids,
    Logits,
    apply_logit_bias,
    apply_presence_frequency,
    apply_repetition_penalty,
    best_token,
    check_ids,
    is_greedy,
    kept_probabilities,
    knobs_of,
    scale,
)


def final_probabilities(
    logits: Logits,
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int] | Ids = (),
    generated_ids: Sequence[int] | Ids = (),
    mask: Logits | None = None,
) -> NDArray[np.float64]:
    """Compute the distribution that a token is drawn from: the definition of what `Sampler` does.

    Args:
        logits: float32 ``[vocab]``, left as they are.
        params: resolved parameters.
        prompt_ids: the prompt; only the repetition penalty looks at it.
        generated_ids: the answer so far.
        mask: float32 ``[vocab]``, added to the logits: 0, or -inf to forbid a token.

    Returns:
        Float64 ``[vocab]``, sums to 1.

    Raises:
        BackendError: a logit is NaN or +inf, or all are -inf.
        RequestError: the parameters are not resolved, or an id is outside the vocabulary.
    """
    knobs = knobs_of(params)
    prompt = check_ids("the prompt", prompt_ids, logits.size)
    generated = check_ids("the answer", generated_ids, logits.size)
    check_ids("logit_bias", tuple(params.logit_bias), logits.size)
    with np.errstate(over="ignore", invalid="ignore"):
        logits = logits.copy()
        seen = np.concatenate((prompt, generated))
        apply_repetition_penalty(logits, seen, knobs.repetition_penalty)
        ids, counts = np.unique(generated, return_counts=True)
        apply_presence_frequency(
            logits, ids, counts, params.presence_penalty, params.frequency_penalty
        )
        apply_logit_bias(logits, params.logit_bias)
        if mask is not None:
            logits += mask
        if is_greedy(knobs):
            probabilities = np.zeros(logits.size)
            probabilities[best_token(logits)] = 1.0
            return probabilities
        return kept_probabilities(scale(logits, knobs.temperature), knobs)

"""Defines the distribution that a token is drawn from, step by step, by a plain full sort.

In order:

1. Repetition penalty, presence and frequency penalty, logit bias, mask.
2. Temperature: ``x = (logits - max(logits)) / temperature`` in float32, so that ``exp(x)`` is a
   token's probability relative to the best one. Tokens are ranked by ``x``; equal ones by lower id.
3. Top-k keeps the first k tokens of that ranking.
4. Top-p keeps the tokens that have less than ``top_p`` of the mass before them, and always the
first
   token. The mass is that of the tokens kept by top-k.
5. Min-p keeps the tokens that are at least ``min_p`` times as probable as the best one.
6. The rest is renormalised.

This is the order of the warpers of Hugging Face ``generate``. That differs in one point: its top-k
keeps every token that ties with the k-th, and its ranking of equal tokens is left to the sort.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import SamplingDefaults
from edge.errors import BackendError, NonFiniteError, RequestError

from .sampling_params import DEFAULTED, SamplingParams

Logits = NDArray[np.float32]
Mask = NDArray[np.bool_]
Ids = NDArray[np.int64]

GREEDY_TEMPERATURE = 1e-5  # below it float32 cannot hold the scaled logits; it counts as 0
DROPPED = np.float32(-np.inf)


def apply_repetition_penalty(logits: Logits, seen_ids: Ids, penalty: float) -> None:
    """Divide positive and multiply negative logits of seen tokens by ``penalty``, in place.

    CTRL (arXiv 1909.05858, section 4.1) divides; that rewards a negative logit, so this is the form
    of Hugging Face's ``RepetitionPenaltyLogitsProcessor``.

    Args:
        logits: ``[vocab]``.
        seen_ids: tokens of the prompt and the answer; repeats make no difference.
        penalty: greater than 0; 1 changes nothing.
    """
    seen = logits[seen_ids]
    logits[seen_ids] = np.where(seen > 0, seen / penalty, seen * penalty)


def apply_presence_frequency(
    logits: Logits,
    ids: Ids,
    counts: NDArray[np.integer],
    presence_penalty: float,
    frequency_penalty: float,
) -> None:
    """Subtract ``presence + count * frequency`` from generated tokens, in place.

    The formula of the OpenAI API reference ("Frequency and presence penalties").

    Args:
        logits: ``[vocab]``.
        ids: the distinct tokens of the answer so far.
        counts: how often each of ``ids`` was generated, at least once.
        presence_penalty: subtracted once.
        frequency_penalty: subtracted per occurrence.
    """
    logits[ids] -= (presence_penalty + frequency_penalty * counts).astype(np.float32)


def apply_logit_bias(logits: Logits, bias: Mapping[int, float]) -> None:
    """Add ``bias`` to the logits of its token ids, in place (``logit_bias`` of the OpenAI API)."""
    for token_id, value in bias.items():
        logits[token_id] += value


def scale(logits: Logits, temperature: float, out: Logits | None = None) -> Logits:
    """Divide by the temperature and shift so that the greatest value is exactly 0.

    Args:
        logits: ``[vocab]``, not changed unless it is ``out``.
        temperature: at least `GREEDY_TEMPERATURE`.
        out: array to write to; a new array by default.

    Raises:
        BackendError: a logit is NaN or +inf, or all are -inf.
    """
    best = logits.max()
    check_best(best)
    x: Logits = np.subtract(logits, best, out=out)
    x *= np.float32(1.0 / temperature)
    return x


def keep_top_k(logits: Logits, k: int) -> Mask:
    """Mark the ``k`` greatest logits; of equal ones, those with the lower ids.

    Args:
        logits: ``[vocab]``; -inf marks a token that was dropped before.
        k: 0 keeps all.
    """
    kept = np.ones(logits.size, bool)
    if k:
        kept[ranking(logits)[k:]] = False
    return kept


def keep_top_p(logits: Logits, top_p: float) -> Mask:
    """Mark the tokens of the nucleus: each has less than ``top_p`` of the mass before it.

    The smallest set of the most probable tokens with a mass of at least ``top_p`` (nucleus
    sampling, arXiv 1904.09751, section 3.1), and never empty.

    Args:
        logits: ``[vocab]``; -inf marks a token that was dropped before and counts for nothing.
        top_p: 1 keeps all, 0 keeps the first token of the ranking.
    """
    if top_p >= 1:
        return np.ones(logits.size, bool)
    order = ranking(logits)
    until = np.cumsum(np.exp(logits - logits.max())[order], dtype=np.float64)
    kept = np.zeros(logits.size, bool)
    kept[order[0]] = True
    kept[order[1:]] = until[:-1] < top_p * until[-1]
    return kept


def keep_min_p(logits: Logits, min_p: float) -> Mask:
    """Mark the tokens at least ``min_p`` times as probable as the best one (arXiv 2407.01082).

    Args:
        logits: ``[vocab]``.
        min_p: 0 keeps all; 1 keeps the best one and its equals.
    """
    kept: Mask = logits - logits.max() >= min_p_floor(min_p)
    return kept


def kept_probabilities(x: Logits, knobs: SamplingDefaults) -> NDArray[np.float64]:
    """Do steps 3 to 6 of the module's docstring on a row of `scale`."""
    x = np.where(keep_top_k(x, knobs.top_k), x, DROPPED)
    x = np.where(keep_top_p(x, knobs.top_p), x, DROPPED)
    x = np.where(keep_min_p(x, knobs.min_p), x, DROPPED)
    weights = np.exp(x).astype(np.float64)
    return weights / float(weights.sum())


def ranking(logits: Logits) -> Ids:
    """Return token ids from the greatest logit to the least; of equal ones, the lower id first."""
    order: Ids = np.argsort(-logits, kind="stable")
    return order


def best_token(logits: Logits) -> int:
    """Return the first of the greatest logits.

    Raises:
        BackendError: `check_best` refuses the row.
    """
    token_id = int(logits.argmax())  # the first of equal ones; in a row with NaN, the NaN
    check_best(logits[token_id])
    return token_id


def check_best(best: np.float32) -> None:
    """Refuse a row by its greatest logit: NaN and +inf win every maximum.

    Raises:
        BackendError: it is NaN or +inf, or all are -inf.
    """
    if np.isfinite(best):
        return
    if best == DROPPED:
        raise BackendError(
            "no token is left to choose from: every logit is -inf; if a mask is in use, it forbids "
            "the whole vocabulary, otherwise check the model with: edge-llm eval"
        )
    raise non_finite(best)


def non_finite(best: float | np.float32) -> NonFiniteError:
    """Make the error for a row whose greatest logit is NaN or +inf."""
    return NonFiniteError(
        f"the model produced non-finite logits ({best}); an activation has probably overflowed "
        "its 16-bit type, so export a bfloat16 bundle or check this one with: edge-llm eval"
    )


def min_p_floor(min_p: float) -> np.float32:
    """Return the scaled logit below which min-p drops a token."""
    floor: np.float32 = np.float32(math.log(min_p) if min_p > 0 else -math.inf)
    return floor


def is_greedy(knobs: SamplingDefaults) -> bool:
    """Whether only the best token can be drawn."""
    return knobs.temperature < GREEDY_TEMPERATURE or knobs.top_k == 1 or knobs.top_p == 0


def knobs_of(params: SamplingParams) -> SamplingDefaults:
    """Return the knobs of ``params`` that are all set.

    Raises:
        RequestError: one of them is None.
    """
    values = {name: getattr(params, name) for name in DEFAULTED}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise RequestError(
            f"the sampling parameters leave {', '.join(missing)} open; "
            "fill them from the bundle with SamplingParams.resolve(manifest.sampling)"
        )
    return SamplingDefaults(**values)


def check_ids(what: str, token_ids: Sequence[int] | Ids, vocab_size: int) -> Ids:
    """Return token ids as an array.

    Raises:
        RequestError: one is outside the vocabulary.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise RequestError(
            f"{what} has the token id {wrong}, the model's vocabulary ends at {vocab_size - 1}; "
            "use the ids of the bundle's own tokenizer"
        )
    return ids

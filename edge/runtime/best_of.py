"""Chooses the most probable of several answers, for `LLM.generate_best`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edge.errors import RequestError

from .ask import Prompt
from .sampling_params import SamplingParams
from .stream import Generation, GenerationResult


def best_of(
    submit: Callable[..., list[Generation]],
    prompt: Prompt,
    params: SamplingParams | None,
    best_of: int,
    n: int,
    rank_by: str,
    options: Mapping[str, Any],
) -> list[GenerationResult]:
    """Generate ``best_of`` answers and return the ``n`` most probable, as `LLM.generate_best`."""
    if not 1 <= n <= best_of:
        raise RequestError(f"best_of ({best_of}) must be at least n ({n}), and n at least 1")
    if rank_by not in ("mean", "sum"):
        raise RequestError(f"rank_by must be mean or sum, not {rank_by!r}")
    params = params or SamplingParams()
    if params.logprobs is None:
        params = replace(params, logprobs=0)
    generations = submit(prompt, params, n=best_of, **options)
    try:
        results = [generation.result() for generation in generations]
    finally:
        for generation in generations:
            generation.cancel()
    return sorted(results, key=lambda result: _rank(result, rank_by), reverse=True)[:n]


def _rank(result: GenerationResult, rank_by: str) -> float:
    logprobs = [token.logprob for token in result.tokens if token.logprob is not None]
    if not logprobs:
        return -math.inf
    total = sum(logprobs)
    return total / len(logprobs) if rank_by == "mean" else total

"""Log-probabilities of a prompt's own tokens, for ``echo`` with ``logprobs``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.embeddings import EmbeddingTable
from edge.errors import BackendError, ContextLengthError, OverloadError
from edge.sampling import SampledToken

if TYPE_CHECKING:
    from .registry import ServedModel

_CHUNK = 64  # logits of 64 places are 39 MB at a vocabulary of 151,936
# Scoring waits for an idle engine, so it has a thread of its own and never holds up the others.
_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edge-score")


async def score_prompt(model: ServedModel, ids: list[int], top: int) -> list[SampledToken]:
    """Every token of a prompt with its log-probability and the ``top`` likeliest at its place.

    The first token has none. It waits until the engine runs nothing else.

    Raises:
        ContextLengthError: the prompt does not fit.
        OverloadError: too many prompts wait to be scored.
        BackendError: the engine failed.
    """
    llm = model.llm
    if len(ids) > llm.kv_capacity:
        raise ContextLengthError(len(ids), llm.kv_capacity)
    if model.scoring >= llm.scheduler.queue_capacity:
        raise OverloadError("too many prompts wait to be scored; try again later", 1.0)
    model.scoring += 1
    try:
        return await asyncio.get_running_loop().run_in_executor(
            _executor, llm.call, lambda: _score(llm.backend, llm.embeddings, ids, top)
        )
    finally:
        model.scoring -= 1


def _score(
    backend: Backend, embeddings: EmbeddingTable, ids: Sequence[int], top: int
) -> list[SampledToken]:
    result = [SampledToken(ids[0])]
    chunk = min(_CHUNK, backend.max_step_tokens)
    for at in range(0, len(ids) - 1, chunk):
        part = ids[at : min(at + chunk, len(ids) - 1)]
        embeds = embeddings[np.asarray(part, dtype=np.int64)[None]]
        places = np.arange(len(part), dtype=np.int64)[None]
        logits = backend.forward([0], embeds, places + at, at + len(part), places)[0]
        if not np.isfinite(logits.max(axis=-1)).all():
            raise BackendError("the engine returned logits that are not finite")
        following = ids[at + 1 : at + 1 + len(part)]
        result += [_token(row, id_, top) for row, id_ in zip(logits, following, strict=True)]
    return result


def _token(logits: NDArray[np.float32], token_id: int, top: int) -> SampledToken:
    exact = logits.astype(np.float64)
    best = exact.max()
    logprobs = exact - (best + np.log(np.exp(exact - best).sum()))
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        # Of equal ones the lower id first, as everywhere else.
        candidates = np.argpartition(-logprobs, min(top, logprobs.size - 1))[: top + 1]
        floor = logprobs[candidates].min()
        ids = np.flatnonzero(logprobs >= floor)
        order = ids[np.argsort(-logprobs[ids], kind="stable")][:top]
        likeliest = tuple((int(i), float(logprobs[i])) for i in order)
    return SampledToken(token_id, float(logprobs[token_id]), likeliest)

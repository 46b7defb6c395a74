"""Computes the log-probabilities of a prompt's own tokens, for ``echo`` with ``logprobs``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import ContextLengthError
from edge.figures import log_softmax
from edge.runtime.sampling import SampledToken

if TYPE_CHECKING:
    from edge_serve.http.guard import Receive
    from edge_serve.http.threads import OnPiece
    from edge_serve.models.registry import ServedModel

_CHUNK = 64  # logits of 64 places are 39 MB at a vocabulary of 151,936


async def score_prompt(
    model: ServedModel,
    ids: list[int],
    top: int,
    *,
    receive: Receive,
    timeout_s: float | None = None,
) -> list[SampledToken]:
    """Return each token of a prompt with its log-probability and the ``top`` likeliest there.

    The first token has no log-probability. Scoring waits until the engine runs nothing else. When
    the client leaves or the time is up, it ends with the running step.

    Args:
        model: the model that scores.
        ids: the prompt.
        top: how many of the likeliest tokens to return.
        receive: reads from the client's connection.
        timeout_s: seconds that it may take, the wait included.

    Raises:
        ContextLengthError: the prompt does not fit.
        OverloadError: too many prompts wait to be scored.
        BackendError: the engine failed, or its logits are not finite.
        APIError: ``timeout_s`` passed, the engine hangs, or the server is shut down.
        ClientGoneError: the client left.
    """
    llm = model.llm
    if len(ids) > llm.kv_capacity:
        raise ContextLengthError(len(ids), llm.kv_capacity)

    def work(on_piece: OnPiece) -> list[SampledToken]:
        def on_step(tokens: int) -> None:
            llm.scheduler.report_step(tokens)
            on_piece()

        def scored() -> list[SampledToken]:
            on_piece()  # the engine may have been busy for long
            return _score(llm.backend, llm.embeddings, ids, top, on_step)

        return llm.call(scored)

    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    model.scoring.add(ended)
    try:
        return await model.score_lane.run(work, receive, timeout_s=timeout_s, ended=ended)
    finally:
        model.scoring.discard(ended)


def _score(
    backend: Backend,
    embeddings: EmbeddingTable,
    ids: Sequence[int],
    top: int,
    on_step: Callable[[int], None],
) -> list[SampledToken]:
    result, following = [SampledToken(ids[0])], ids[1:]
    for part, logits in prefill(
        backend, embeddings, ids[:-1], max_tokens=_CHUNK, wanted=all_tokens
    ):
        on_step(len(logits))
        result += [_token(row, id_, top) for row, id_ in zip(logits, following[part], strict=True)]
    return result


def _token(logits: NDArray[np.float32], token_id: int, top: int) -> SampledToken:
    logprobs = log_softmax(logits)
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        # Of equal tokens the lower id comes first, as everywhere else.
        candidates = np.argpartition(-logprobs, min(top, logprobs.size - 1))[: top + 1]
        floor = logprobs[candidates].min()
        ids = np.flatnonzero(logprobs >= floor)
        order = ids[np.argsort(-logprobs[ids], kind="stable")][:top]
        likeliest = tuple((int(i), float(logprobs[i])) for i in order)
    return SampledToken(token_id, float(logprobs[token_id]), likeliest)

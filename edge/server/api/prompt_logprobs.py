"""Computes the log-probabilities of a prompt's own tokens, for ``echo`` with ``logprobs``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import ContextLengthError, DeadlineError, OverloadError
from edge.figures import log_softmax
from edge.runtime.sampling import SampledToken
from edge.server.http.threads import ClientGoneError, until_gone

if TYPE_CHECKING:
    from edge.server.http.guard import Receive
    from edge.server.models.registry import ServedModel

_CHUNK = 64  # logits of 64 places are 39 MB at a vocabulary of 151,936
# Scoring waits for an idle engine, so it has a thread of its own and holds up no other work.
_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edge-score")


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
        DeadlineError: ``timeout_s`` passed.
        BackendError: the engine failed, or its logits are not finite.
        APIError: the engine hangs, or the server is shut down.
        ClientGoneError: the client left.
    """
    llm = model.llm
    if len(ids) > llm.kv_capacity:
        raise ContextLengthError(len(ids), llm.kv_capacity)
    if len(model.scoring) >= llm.scheduler.queue_capacity:
        raise OverloadError("too many prompts wait to be scored; try again later", 1.0)
    left = threading.Event()

    def on_step(tokens: int) -> None:
        llm.scheduler.report_step(tokens)
        if left.is_set():
            raise ClientGoneError("nobody waits for this prompt any more")

    def work() -> list[SampledToken]:
        if left.is_set():  # while it waited for this thread
            return []
        return llm.call(lambda: _score(llm.backend, llm.embeddings, ids, top, on_step))

    loop = asyncio.get_running_loop()
    scored = loop.run_in_executor(_executor, work)
    scored.add_done_callback(lambda future: future.cancelled() or future.exception())
    ended: asyncio.Future[None] = loop.create_future()
    gone = asyncio.create_task(until_gone(receive))
    model.scoring.add(ended)
    try:
        waiting: set[asyncio.Future[Any]] = {scored, ended, gone}
        done, _ = await asyncio.wait(
            waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        left.set()
        gone.cancel()
        model.scoring.discard(ended)
    if ended in done:
        ended.result()
    if scored in done:
        return scored.result()
    if gone in done:
        raise ClientGoneError("the client left")
    raise DeadlineError(f"the prompt was not scored within {timeout_s:g} s")


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

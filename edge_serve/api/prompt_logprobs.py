"""Computes the log-probabilities of a prompt's own tokens, for ``echo`` with ``logprobs``."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.logprobs import log_softmax
from edge.runtime.sampling import SampledToken
from edge.runtime.scheduler import Request
from edge.runtime.scheduler.pooling import NEUTRAL
from edge.runtime.stream import Generation, OutputStream, submit
from edge_serve.http.threads import ClientGoneError, in_thread, until_gone

if TYPE_CHECKING:
    from edge.runtime.ask import Ask
    from edge_serve.http.guard import Receive
    from edge_serve.models.registry import ServedModel


async def score_prompt(
    model: ServedModel, ask: Ask, top: int, receive: Receive
) -> list[SampledToken]:
    """Return each token of a prompt with its log-probability and the ``top`` likeliest there.

    The first token has no log-probability. Scoring waits in the queue and runs beside answers, like
    one of them. If the client leaves or time runs out, it ends with the running step.

    Args:
        model: the model that scores.
        ask: the encoded prompt, the client, and how long it may take.
        top: how many of the likeliest tokens to return.
        receive: reads from the client's connection.

    Raises:
        ContextLengthError: the prompt does not fit.
        OverloadError: the queue is full.
        DeadlineError: the time is up.
        BackendError: the engine failed, or its logits are not finite.
        APIError: the engine hangs, or the server shuts down.
        ClientGoneError: the client left.
    """
    ids = ask.ids or ()
    result, following = [SampledToken(ids[0])], ids[1:]
    if not following:
        return result

    def take(first: int, logits: NDArray[np.float32]) -> None:
        result.extend(
            _token(row, id_, top)
            for row, id_ in zip(logits, following[first : first + len(logits)], strict=True)
        )

    request = Request(
        ids=tuple(ids[:-1]),
        params=NEUTRAL,
        end_ids=frozenset(),
        priority=ask.priority,
        client=ask.client,
        deadline_s=ask.deadline_s,
        salt=ask.salt,
        adapter=model.llm.adapter_of(ask),
        on_logits=take,
    )
    work = partial(submit, model.llm.scheduler, [request], [OutputStream()])
    (generation,) = await in_thread(work)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    model.scoring.add(ended)
    reading = asyncio.create_task(_read(generation))
    gone = asyncio.create_task(until_gone(receive))
    try:
        waiting: set[asyncio.Future[Any]] = {reading, gone, ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        if not reading.done():
            raise ClientGoneError("the client left")
        reading.result()
    finally:
        model.scoring.discard(ended)
        generation.cancel()
        reading.cancel()
        gone.cancel()
    return result


async def _read(generation: Generation) -> None:
    async for _ in generation:
        pass


def _token(logits: NDArray[np.float32], token_id: int, top: int) -> SampledToken:
    logprobs = log_softmax(logits)
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        # Among equal tokens the lower id comes first, as everywhere.
        candidates = np.argpartition(-logprobs, min(top, logprobs.size - 1))[: top + 1]
        floor = logprobs[candidates].min()
        ids = np.flatnonzero(logprobs >= floor)
        order = ids[np.argsort(-logprobs[ids], kind="stable")][:top]
        likeliest = tuple((int(i), float(logprobs[i])) for i in order)
    return SampledToken(token_id, float(logprobs[token_id]), likeliest)

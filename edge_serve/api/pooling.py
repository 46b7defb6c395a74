"""Serves ``POST /v1/embeddings`` and ``POST /v1/rerank``: texts in, numbers out."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from edge.errors import ContextLengthError, DeadlineError, EdgeError, OverloadError
from edge.runtime.embedding import DocumentJudge, EmbeddingReader, check_lengths, groups, submit
from edge.runtime.scheduler import SequenceState
from edge.runtime.scheduler.pooling import Pooled, RowSink
from edge_serve.http.errors import APIError, invalid
from edge_serve.http.threads import ClientGoneError, OnPiece, check_there, in_thread, until_gone

from .answers import (
    EmbeddingItem,
    EmbeddingList,
    InputUsage,
    RankedDocument,
    RankedResult,
    RerankResponse,
)
from .protocol import MAX_TEXTS, EmbeddingRequest, RerankRequest
from .respond import Turn, json_response, left_s

_Prepared = TypeVar("_Prepared")
_FULL_S = 0.05  # between two looks at a full queue


async def embed(turn: Turn, body: EmbeddingRequest) -> Response:
    """Answer a request for vectors.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
        ClientGoneError: the client left before it had the answer.
    """
    texts = _split_input(body.input)
    vectors, found = await read_vectors(
        turn, texts, dimensions=body.dimensions, prompt_name=body.prompt_name
    )

    def write() -> Response:
        items = [
            EmbeddingItem(i, encoded(vector, body.encoding_format))
            for i, vector in enumerate(vectors)
        ]
        return json_response(EmbeddingList(items, turn.model.name, _usage(found)), turn.headers)

    return await in_thread(write)


async def read_vectors(
    turn: Turn,
    texts: Sequence[str | list[int]],
    *,
    dimensions: int | None,
    prompt_name: str | None = None,
    truncate: bool = False,
) -> tuple[NDArray[np.float32], list[Pooled]]:
    """Turn texts into vectors ``[n, dimensions]``; also return what each text took.

    Args:
        turn: the request's context.
        texts: texts or lists of token ids, none empty.
        dimensions: length of a vector; None is the model's full length.
        prompt_name: name of the prompt before each text; None is the model's default.
        truncate: cut texts that do not fit instead of refusing them.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
        ClientGoneError: the client left before it had the answer.
    """
    llm = turn.model.llm
    most = llm.kv_capacity - 1 if truncate else llm.kv_capacity

    def prepare(on_piece: OnPiece) -> tuple[EmbeddingReader, list[list[int]]]:
        reader = EmbeddingReader(llm.manifest, llm.tokenizer)
        reader.check_dimensions(dimensions)
        prompt = reader.prompt(prompt_name)
        return reader, [
            reader.encode(text, prompt, max_tokens=most, truncate=truncate, on_piece=on_piece)
            for text in texts
        ]

    with turn.model.lease():
        reader, ids = await _prepare(turn, prepare, "input")
        found = await _run(turn, ids)
    rows = np.stack([each.row for each in found])
    return await in_thread(lambda: reader.finish(rows, dimensions)), found


async def rerank(turn: Turn, body: RerankRequest) -> Response:
    """Answer a request to rank documents.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
        ClientGoneError: the client left before it had the answer.
    """
    llm = turn.model.llm
    documents = [each if isinstance(each, str) else each.text for each in body.documents]

    def prepare(on_piece: OnPiece) -> tuple[DocumentJudge, list[list[int]]]:
        judge = DocumentJudge(llm.manifest, llm.tokenizer)
        own, most = body.instruction, llm.kv_capacity
        return judge, [
            judge.encode(body.query, document, own, max_tokens=most, on_piece=on_piece)
            for document in documents
        ]

    with turn.model.lease():
        judge, ids = await _prepare(turn, prepare, "documents")
        found = await _run(turn, ids)
    scores = judge.scores(np.stack([each.row for each in found]))
    best = np.argsort(-scores, kind="stable")[: body.top_n]
    results = [RankedResult(int(i), float(scores[i])) for i in best]
    if body.return_documents:
        for result in results:
            result.document = RankedDocument(documents[result.index])
    answer = RerankResponse(f"rerank-{uuid.uuid4().hex}", turn.model.name, results, _usage(found))
    return json_response(answer, turn.headers)


async def _prepare(
    turn: Turn, prepare: Callable[[OnPiece], tuple[_Prepared, list[list[int]]]], param: str
) -> tuple[_Prepared, list[list[int]]]:
    """Encode the texts in the lane of the request, and refuse those that do not fit."""
    try:
        reader, ids = await turn.lane.run(prepare, turn.receive)
        check_lengths(ids, turn.model.llm.kv_capacity)
    except ContextLengthError as error:
        most = error.capacity - 1
        raise APIError(
            400,
            "context_length_exceeded",
            f"{param}: a text has {error.num_tokens} tokens{' or more' if error.at_least else ''} "
            f"with what the model adds, and at most {most} fit; cut it into parts",
            param=param,
            extra={"n_prompt_tokens": error.num_tokens, "n_ctx": error.capacity},
        ) from error
    return reader, ids


async def _run(turn: Turn, ids: Sequence[list[int]]) -> list[Pooled]:
    """Run texts, a few at a time, until all are done, the client leaves or time runs out."""
    check_there(turn.receive)
    model, metrics = turn.model, turn.metrics
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    deadline_s = turn.deadline_s()
    feeding = asyncio.create_task(_feed(turn, ids, deadline_s))
    gone = asyncio.create_task(until_gone(turn.receive))
    model.scoring.add(ended)
    try:
        waiting: set[asyncio.Future[Any]] = {feeding, ended, gone}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if feeding.done():
            found = feeding.result()
        else:
            metrics.observe_error(model.name, "abort" if gone.done() else "error", arm=turn.arm)
            if ended.done():
                ended.result()
            raise ClientGoneError("the client left")
    except OverloadError:
        raise  # nothing ran, and the guard counts it
    except EdgeError as error:
        late = isinstance(error, DeadlineError)
        metrics.observe_error(model.name, "deadline" if late else "error", arm=turn.arm)
        raise
    finally:
        model.scoring.discard(ended)
        gone.cancel()
        feeding.cancel()
    for each in found:
        metrics.observe_pooled(model.name, each.stats)
    return found


async def _feed(turn: Turn, ids: Sequence[list[int]], deadline_s: float | None) -> list[Pooled]:
    """Keep one group of texts in the engine, and the next one while half of the queue is free.

    So a long request leaves room for others. A full queue refuses only the first group; later ones
    wait, and so do texts that made room in the queue for another client's.
    """
    scheduler = turn.model.llm.scheduler
    found: list[Pooled | None] = [None] * len(ids)
    flying: list[tuple[list[int], list[asyncio.Future[Pooled]]]] = []
    sequences: list[SequenceState] = []

    most = scheduler.max_batch + scheduler.queue_capacity // 2

    async def begin(group: list[int]) -> None:
        some, may_wait = [ids[i] for i in group], bool(sequences)
        states, sinks = await _submit(turn, some, deadline_s, may_wait=may_wait)
        sequences.extend(states)
        flying.append((group, [asyncio.wrap_future(sink.future) for sink in sinks]))

    async def collect() -> None:
        places, futures = flying.pop(0)
        dropped = []
        for place, future in zip(places, futures, strict=True):
            try:
                found[place] = await future
            except OverloadError:
                dropped.append(place)
        if dropped:
            await begin(dropped)

    try:
        for group in groups(ids, scheduler.max_batch):
            stats = scheduler.stats()
            if flying and stats.running + stats.waiting + len(group) > most:
                await collect()
            await begin(group)
            if len(flying) > 1:
                await collect()
        while flying:
            await collect()
    finally:
        for sequence in sequences:
            sequence.cancelled = True  # has no effect on ended ones
        for _, futures in flying:
            for future in futures:
                future.add_done_callback(lambda each: each.cancelled() or each.exception())
    return [each for each in found if each is not None]


async def _submit(
    turn: Turn, ids: list[list[int]], deadline_s: float | None, *, may_wait: bool
) -> tuple[list[SequenceState], list[RowSink]]:
    """Queue texts; if there is no room for them, wait or raise."""
    while True:
        try:
            return submit(
                turn.model.llm.scheduler,
                ids,
                priority=turn.priority,
                client=turn.client.origin,
                deadline_s=left_s(deadline_s),
                salt=turn.client.salt,
            )
        except OverloadError:
            if not may_wait:
                raise
        await asyncio.sleep(_FULL_S)


def _split_input(given: str | list[Any]) -> list[str | list[int]]:
    """Split a request's input: one text, one list of ids, or a list of either.

    Raises:
        APIError: 400 for a mixture, an empty text, or too many.
    """
    texts: list[str | list[int]]
    if isinstance(given, str):
        texts = [given]
    elif all(isinstance(item, int) for item in given):
        texts = [cast("list[int]", given)]
    elif any(isinstance(item, int) for item in given) or len({type(i) for i in given}) > 1:
        raise invalid(
            "input: give one text, one list of token ids, or a list of either, not a mixture",
            "input",
        )
    else:
        texts = given
    if not all(texts):
        raise invalid("input: a text is empty; give at least one token", "input")
    check_number(texts)
    return texts


def check_number(texts: Sequence[Any]) -> None:
    """Refuse more texts than a request may have.

    Raises:
        APIError: 400, they are too many.
    """
    if len(texts) > MAX_TEXTS:
        raise invalid(f"input: has {len(texts)} texts; at most {MAX_TEXTS} are taken", "input")


def encoded(vector: NDArray[np.float32], form: str | None) -> list[float] | str:
    """Write a vector as numbers, or for ``base64`` as float32 in little-endian order."""
    if form != "base64":
        return cast("list[float]", vector.tolist())
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _usage(found: Sequence[Pooled]) -> InputUsage:
    tokens = sum(each.stats.prompt_tokens for each in found)
    return InputUsage(tokens, tokens)

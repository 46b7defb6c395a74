"""Serves ``POST /api/embed`` and the older ``POST /api/embeddings``: texts to vectors."""

from __future__ import annotations

import time
from typing import cast

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from edge.runtime.scheduler.pooling import Pooled
from edge_serve.api.pooling import check_number, read_vectors
from edge_serve.api.respond import Turn, json_response
from edge_serve.http.errors import invalid
from edge_serve.http.threads import in_thread

from .answers import EmbedAnswer, EmbeddingsAnswer
from .protocol import EmbeddingsRequest, EmbedRequest, OllamaOptions
from .text import note_context


async def embed(turn: Turn, body: EmbedRequest) -> Response:
    """Answer a request for vectors; a request without text gets none.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
        ClientGoneError: the client left before it had the answer.
    """
    started = time.perf_counter()
    texts = [body.input] if isinstance(body.input, str) and body.input else body.input or []
    if not all(texts):
        raise invalid("input: a text is empty; give at least one character", "input")
    vectors, found = await _vectors(
        turn, list(texts), body.options, body.dimensions, truncate=body.truncate is not False
    )
    took_ns = int((time.perf_counter() - started) * 1e9)
    waited_ns = int(turn.waited_s * 1e9)
    tokens = sum(each.stats.prompt_tokens for each in found)
    name = body.model or turn.model.name

    def write() -> Response:
        numbers = cast("list[list[float]]", vectors.tolist())
        return json_response(
            EmbedAnswer(name, numbers, waited_ns + took_ns, waited_ns, tokens), turn.headers
        )

    return await in_thread(write)


async def embed_prompt(turn: Turn, body: EmbeddingsRequest) -> Response:
    """Answer the older form of the request; a request without text gets an empty vector.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
        ClientGoneError: the client left before it had the answer.
    """
    texts = [body.prompt] if body.prompt else []
    vectors, _ = await _vectors(turn, texts, body.options, None, truncate=False)
    numbers = cast("list[float]", vectors[0].tolist()) if texts else []
    return json_response(EmbeddingsAnswer(numbers), turn.headers)


async def _vectors(
    turn: Turn,
    texts: list[str],
    options: OllamaOptions | None,
    dimensions: int | None,
    *,
    truncate: bool,
) -> tuple[NDArray[np.float32], list[Pooled]]:
    if options is not None:
        note_context(turn, options.num_ctx)
    check_number(texts)
    if not texts:
        return np.zeros((0, 0), np.float32), []
    return await read_vectors(turn, texts, dimensions=dimensions, truncate=truncate)

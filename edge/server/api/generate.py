"""What chats and completions share: parameters, submission, and waiting for a whole answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from edge.runtime.sampling import SamplingParams
from edge.server.http.access import Client
from edge.server.http.errors import APIError, invalid
from edge.server.http.guard import Receive
from edge.server.models.flight import ClientGoneError, Flight, until_gone

from .answers import CompletionDetails, PromptDetails, Usage
from .protocol import Sampling

if TYPE_CHECKING:
    from edge.runtime.generation import GenerationStats
    from edge.runtime.llm import LLM

_KNOBS = ("temperature", "top_p", "min_p", "repetition_penalty", "seed")


def sampling_params(
    request: Sampling, llm: LLM, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Resolved parameters of a request: what it leaves open is the bundle's generation config.

    Raises:
        APIError, RequestError: a value that does not fit the model.
    """
    bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    vocab_size = llm.manifest.model.vocab_size
    for name, ids in (("logit_bias", bias), ("stop_token_ids", request.stop_token_ids or ())):
        for token_id in ids:
            if token_id >= vocab_size:
                raise invalid(
                    f"{name}: token {token_id} is not in the vocabulary of {vocab_size}", name
                )
    stop = request.stop
    params = SamplingParams(
        **{name: getattr(request, name) for name in _KNOBS},
        top_k=0 if request.top_k == -1 else request.top_k,  # other servers' word for "off"
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        max_tokens=max_tokens,
        stop=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=logprobs,
        ignore_eos=bool(request.ignore_eos),
    )
    return params.resolve(llm.manifest.sampling)


def check_choices(n: int, prompts: int, limit: int) -> None:
    """Refuse more answers than one request may have.

    Raises:
        APIError: 400.
    """
    if n * prompts > limit:
        raise invalid(f"n: {n} times {prompts} prompts exceeds {limit} answers per request", "n")


def check_length(llm: LLM, texts: Sequence[str], param: str) -> None:
    """Refuse texts that cannot fit, before seconds are spent on making tokens of them.

    Raises:
        APIError: 400.
    """
    least = sum(map(llm.tokenizer.least_tokens, texts))
    if least >= llm.kv_capacity:
        raise APIError(
            400,
            "context_length_exceeded",
            f"the prompt has {least} tokens or more, but the context holds {llm.kv_capacity}; "
            "shorten the prompt",
            param=param,
            extra={"n_prompt_tokens": least, "n_ctx": llm.kv_capacity},
        )


def salt_of(request: Sampling, client: Client) -> str:
    """What cached prefixes are shared under: within one key, and one ``cache_salt`` of it."""
    return f"{client.salt}/{request.cache_salt}" if request.cache_salt else client.salt


async def wait_for(flight: Flight, receive: Receive) -> None:
    """Wait for a whole answer; a client that leaves ends it.

    Raises:
        ClientGoneError: it left.
        EdgeError, APIError: the answer failed.
    """
    gone = asyncio.create_task(until_gone(receive))
    gone.add_done_callback(lambda _: flight.abort(ClientGoneError("the client left")))
    try:
        await asyncio.shield(flight.done)
    finally:
        gone.cancel()


def usage_of(stats: Sequence[GenerationStats | None], reasoning: Sequence[int], n: int) -> Usage:
    """Tokens of all choices; a prompt counts once for its ``n`` answers."""
    there = [item for item in stats if item is not None]
    prompts = there[::n]
    prompt = sum(item.prompt_tokens for item in prompts)
    completion = sum(item.completion_tokens for item in there)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(sum(item.cached_tokens for item in prompts)),
        completion_tokens_details=CompletionDetails(sum(reasoning)),
    )


def server_timing(stats: Sequence[GenerationStats | None]) -> str:
    """The header ``Server-Timing`` (W3C): queue, first token, whole answer, in milliseconds."""
    there = [item for item in stats if item is not None]
    slowest = max(there, key=lambda item: item.total_s, default=None)
    if slowest is None:
        return "total;dur=0"
    return (
        f"queue;dur={slowest.queue_s * 1e3:.1f}, ttft;dur={slowest.ttft_s * 1e3:.1f}, "
        f"total;dur={slowest.total_s * 1e3:.1f}"
    )


def new_id(prefix: str) -> str:
    """A fresh id of an answer."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Unix seconds."""
    return int(time.time())


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(
        msgspec.json.encode(value),
        headers={"cache-control": "no-store", **(headers or {})},
        media_type="application/json",
    )

"""Helpers that the plans and renders of chats and completions share."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge.runtime.sampling import KNOBS, SamplingParams
from edge.server.http.errors import APIError, invalid
from edge.server.models.registry import ServedModel

from .protocol import Sampling

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

_KNOBS = KNOBS.keys() - {"max_tokens"}  # chats have two names for it


def sampling_params(
    request: Sampling, llm: LLM, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Return resolved parameters: what a request leaves open comes from the bundle.

    Raises:
        APIError, RequestError: a value does not fit the model.
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
    knobs = {name: value for name in _KNOBS if (value := getattr(request, name)) is not None}
    if request.top_k == -1:  # other servers' word for "off"
        knobs["top_k"] = 0
    params = SamplingParams(
        **knobs,
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
    """Refuse texts that cannot fit, before seconds are spent on encoding them.

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


def answer_head(prefix: str, model: ServedModel) -> dict[str, Any]:
    """Return the fields that every event of an answer begins with, a fresh id among them."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }

"""Collects helpers that the plans and renders of chats and completions share."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from edge.runtime.sampling_params import KNOBS, SamplingParams
from edge_serve.http.errors import APIError, invalid
from edge_serve.settings import ServerSettings

from .answers import PromptProgress
from .protocol import Sampling

if TYPE_CHECKING:
    from edge.runtime import generation
    from edge.runtime.llm import LLM

    from .respond import Turn

_KNOBS = KNOBS.keys() - {"max_tokens"}  # chats have two names for it


def sampling_params(
    request: Sampling, llm: LLM, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Resolve sampling parameters: the bundle has defaults for what a request leaves open.

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
    if request.top_k == -1:  # means "off" for other servers
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
        APIError: 400, they are too many.
    """
    if n * prompts > limit:
        raise invalid(f"n: {n} times {prompts} prompts exceeds {limit} answers per request", "n")


def check_stream(request: Sampling) -> None:
    """Refuse options of a stream for an answer that comes as a whole.

    Raises:
        APIError: 400, such an option is set.
    """
    for name, wanted in (
        ("stream_options", request.stream_options is not None),
        ("return_progress", bool(request.return_progress)),
    ):
        if wanted and not request.stream:
            raise invalid(f"{name}: needs stream to be true", name)


def check_messages(num: int, settings: ServerSettings) -> None:
    """Refuse a chat with more messages than the settings allow.

    Raises:
        APIError: 400, they are too many.
    """
    if num > settings.max_messages:
        raise invalid(
            f"messages: {num} are more than {settings.max_messages}; send fewer", "messages"
        )


def check_length(
    llm: LLM, texts: Sequence[str], param: str, *, capacity: int | None = None
) -> None:
    """Refuse texts that cannot fit into a prompt, before seconds are spent on encoding them.

    Args:
        llm: the model.
        texts: parts of the prompt.
        param: field that an error names.
        capacity: tokens that fit; None takes the context.

    Raises:
        APIError: 400, they cannot fit.
    """
    least = sum(map(llm.tokenizer.least_tokens, texts))
    capacity = llm.kv_capacity if capacity is None else capacity
    if least >= capacity:
        raise APIError(
            400,
            "context_length_exceeded",
            f"the prompt has {least} tokens or more, but there is room for {capacity}; "
            "shorten the prompt",
            param=param,
            extra={"n_prompt_tokens": least, "n_ctx": capacity},
        )


def check_texts(llm: LLM, values: Any, param: str, *, capacity: int | None = None) -> None:
    """Refuse a request with more text than the context could hold even if all tokens were long.

    Every text counts, even in messages that a chat template may leave out: all of them are copied
    and rendered. `LLM.encode` looks more closely at the text that is left.

    Args:
        llm: the model.
        values: plain JSON data, and types of `edge_serve.api.protocol`.
        param: field that an error names.
        capacity: tokens that fit; None takes the context.

    Raises:
        APIError: 400, there is too much text.
    """
    found, longest = count_chars(values), llm.tokenizer.longest_token
    capacity = llm.kv_capacity if capacity is None else capacity
    if found > capacity * longest:
        least = found // longest
        raise APIError(
            400,
            "context_length_exceeded",
            f"the texts have {found} characters, but there is room for {capacity} tokens of "
            f"{longest} characters at most; shorten them",
            param=param,
            extra={"n_prompt_tokens": least, "n_ctx": capacity},
        )


def count_chars(value: Any) -> int:
    """Count the characters of every text in a value, keys included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(count_chars, value)) + sum(map(count_chars, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(count_chars, value))
    if isinstance(value, msgspec.Struct):
        return sum(count_chars(getattr(value, name)) for name in value.__struct_fields__)
    return 0


def shown_progress(progress: generation.PromptProgress) -> PromptProgress:
    """Write the progress of a prompt as llama-server does, with its place in the queue."""
    shown = PromptProgress(
        progress.total, progress.cached, progress.processed, round(1000 * progress.prefill_s)
    )
    if progress.ahead is not None:
        shown.ahead = progress.ahead
    return shown


def answer_head(prefix: str, turn: Turn) -> dict[str, Any]:
    """Return the fields that every event of an answer begins with, including a fresh id."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": turn.model_name,
        "system_fingerprint": turn.model.fingerprint,
    }

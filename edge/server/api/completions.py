"""``POST /v1/completions``: text or token ids in, text out, without a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from edge.errors import EdgeError
from edge.runtime.sampling import SampledToken, SamplingParams
from edge.server.http.access import Client
from edge.server.http.errors import invalid
from edge.server.http.guard import Receive
from edge.server.http.threads import in_thread
from edge.server.models.flight import Flight
from edge.server.models.registry import ServedModel
from edge.server.settings import ServerSettings
from edge.text.tokenizer import Tokenizer

from .answers import TextChoice, TextCompletion, TextLogprobs
from .generate import (
    check_choices,
    check_length,
    json_response,
    new_id,
    now,
    salt_of,
    sampling_params,
    server_timing,
    usage_of,
    wait_for,
)
from .prompt_logprobs import score_prompt
from .protocol import CompletionRequest
from .sse import DONE, Buffer, EventStream, event

if TYPE_CHECKING:
    from edge.runtime.stream import Generation, GenerationChunk
    from edge.server.observe.metrics import Metrics


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a request: one text, one list of ids, or a list of either.

    Raises:
        APIError: 400 for a mixture, or an empty prompt.
    """
    if isinstance(prompt, str):
        prompts: list[str | list[int]] = [prompt]
    elif all(isinstance(item, int) for item in prompt):
        prompts = [cast("list[int]", prompt)]
    elif any(isinstance(item, int) for item in prompt) or len({type(i) for i in prompt}) > 1:
        raise invalid(
            "prompt: give one text, one list of token ids, or a list of either, not a mixture",
            "prompt",
        )
    else:
        prompts = prompt
    if not all(prompts):
        raise invalid("prompt: is empty; give at least one token", "prompt")
    return prompts


async def completions(
    request: Request,
    body: CompletionRequest,
    model: ServedModel,
    client: Client,
    settings: ServerSettings,
    metrics: Metrics,
    headers: dict[str, str],
    arm: str | None = None,
) -> Response:
    """Continue one or more prompts.

    Raises:
        EdgeError, APIError: the request is wrong, cannot be served now, or failed.
    """
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: needs stream to be true", "stream_options")
    n = body.n or 1
    prompts = split_prompts(body.prompt)
    check_choices(n, len(prompts), settings.max_choices)
    params = sampling_params(body, model.llm, max_tokens=body.max_tokens, logprobs=body.logprobs)

    def encode() -> list[list[int]]:
        for prompt in prompts:
            check_length(model.llm, [prompt] if isinstance(prompt, str) else [], "prompt")
        encoded = [model.llm.encode(prompt) for prompt in prompts]
        vocab_size = model.llm.manifest.model.vocab_size
        for ids in encoded:
            for token_id in ids:
                if token_id >= vocab_size:
                    raise invalid(
                        f"prompt: token {token_id} is not in the vocabulary of {vocab_size}",
                        "prompt",
                    )
        return encoded

    with model.lease():
        encoded = await in_thread(encode)
        answer = _Answer(body, model, encoded, n)
        if body.echo:
            await answer.score_prompts(request.receive, settings.request_timeout_s)

        def submit() -> list[Generation]:
            return _submit_all(model, encoded, params, n, salt_of(body, client), settings)

        generations = await in_thread(submit)
        flight = Flight(model, generations, params, metrics, user=body.user, arm=arm)
    answer.flight = flight
    if body.stream:
        buffer = Buffer(settings.stream_buffer_bytes)
        flight.start(partial(answer.stream, buffer.put))
        return EventStream(flight, buffer, settings.ping_s, headers)
    flight.start(answer.collect)
    await wait_for(flight, request.receive)
    return json_response(answer.whole(), {**headers, "server-timing": server_timing(flight.stats)})


def _submit_all(
    model: ServedModel,
    encoded: Sequence[list[int]],
    params: SamplingParams,
    n: int,
    salt: str,
    settings: ServerSettings,
) -> list[Generation]:
    """Queue every prompt, or none."""
    generations: list[Generation] = []
    try:
        for ids in encoded:
            generations += model.llm.submit(
                ids, params, n=n, deadline_s=settings.request_timeout_s, salt=salt
            )
    except EdgeError:
        for generation in generations:
            generation.cancel()
        raise
    return generations


class _Text:
    """One choice: its text so far, and where each token begins in it."""

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._offset = 0

    def logprobs(self, tokens: Sequence[SampledToken]) -> TextLogprobs | None:
        """Log-probabilities of the next tokens, or None if nobody asked."""
        if self._logprobs is None or not tokens:
            return None
        result = TextLogprobs([], [], [] if self._logprobs else None, [])
        for token in tokens:
            text = self._text(token.id)
            result.tokens.append(text)
            result.token_logprobs.append(token.logprob)
            result.text_offset.append(self._offset)
            if result.top_logprobs is not None:
                result.top_logprobs.append(self._top(token))
            self._offset += len(self._tokenizer.token_bytes(token.id).decode("utf-8", "ignore"))
        return result

    def _top(self, token: SampledToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        # The sampled token is among them even where it is not one of the likeliest.
        top = {self._text(id_): logprob for id_, logprob in token.top_logprobs or ()}
        top.setdefault(self._text(token.id), token.logprob)
        return top

    def _text(self, token_id: int) -> str:
        """A token's text; bytes that are no text as OpenAI spells them."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class _Answer:
    """All choices of one request, prompt by prompt."""

    flight: Flight

    def __init__(
        self, request: CompletionRequest, model: ServedModel, encoded: list[list[int]], n: int
    ) -> None:
        self._request = request
        self._model = model
        self._encoded = encoded
        self._n = n
        self._id = new_id("cmpl")
        self._created = now()
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        count = n * len(encoded)
        self._left = count
        self._texts = [_Text(model.llm.tokenizer, request.logprobs) for _ in range(count)]
        self._echoes: list[tuple[str, TextLogprobs | None] | None] = [None] * count
        self._chunks: list[list[TextChoice]] = [[] for _ in range(count)]

    async def score_prompts(self, receive: Receive, timeout_s: float | None) -> None:
        """Prepare what ``echo`` puts in front of every answer."""
        logprobs = self._request.logprobs
        tokenizer = self._model.llm.tokenizer
        for place, ids in enumerate(self._encoded):
            scored: list[SampledToken] = []
            if logprobs is not None:
                scored = await score_prompt(
                    self._model, ids, logprobs, receive=receive, timeout_s=timeout_s
                )
            text = tokenizer.decode(ids)
            for index in range(place * self._n, (place + 1) * self._n):
                self._echoes[index] = (text, self._texts[index].logprobs(scored))

    def collect(self, index: int, chunk: GenerationChunk) -> None:
        """Keep a piece of a whole answer."""
        self._chunks[index].append(self._choice(index, chunk))

    def stream(self, put: Callable[[bytes], None], index: int, chunk: GenerationChunk) -> None:
        """Write a piece as an event."""
        choice = self._choice(index, chunk)
        if choice.text or choice.logprobs is not None or choice.finish_reason is not None:
            put(event(self._completion([choice], None if self._usage else UNSET)))
        if choice.finish_reason is None:
            return
        self._left -= 1
        if not self._left:
            if self._usage:
                put(event(self._completion([], self._usage_of())))
            put(DONE)

    def whole(self) -> TextCompletion:
        """The answer, once all choices have ended."""
        choices = [_join(index, parts) for index, parts in enumerate(self._chunks)]
        return self._completion(choices, self._usage_of())

    def _choice(self, index: int, chunk: GenerationChunk) -> TextChoice:
        # Without a chat there is no reasoning apart; it is part of the text.
        text = chunk.reasoning + chunk.text
        logprobs = self._texts[index].logprobs(chunk.tokens)
        echo, self._echoes[index] = self._echoes[index], None
        if echo is not None:
            text = echo[0] + text
            logprobs = _concat([echo[1], logprobs])
        reason = None if chunk.finish_reason is None else str(chunk.finish_reason)
        return TextChoice(index, text, logprobs, reason)

    def _usage_of(self) -> Any:
        return usage_of(self.flight.stats, self.flight.reasoning_tokens, self._n)

    def _completion(self, choices: list[TextChoice], usage: Any) -> TextCompletion:
        return TextCompletion(
            id=self._id,
            created=self._created,
            model=self._model.name,
            choices=choices,
            system_fingerprint=self._model.fingerprint,
            usage=usage,
        )


def _join(index: int, parts: list[TextChoice]) -> TextChoice:
    return TextChoice(
        index,
        "".join(part.text for part in parts),
        _concat([part.logprobs for part in parts]),
        parts[-1].finish_reason,
    )


def _concat(parts: Sequence[TextLogprobs | None]) -> TextLogprobs | None:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    has_top = there[0].top_logprobs is not None
    return TextLogprobs(
        [token for part in there for token in part.tokens],
        [value for part in there for value in part.token_logprobs],
        [top for part in there for top in part.top_logprobs or ()] if has_top else None,
        [offset for part in there for offset in part.text_offset],
    )

"""Serves ``POST /v1/completions``: text or token ids in, text out, without a chat template.

`plan_completion` reads the request, `CompletionRender` writes the answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from msgspec import UNSET

from edge.runtime.ask import Ask
from edge.runtime.sampling import SampledToken
from edge.text.fill_in_middle import fill_in_middle
from edge.text.streamed_text import Detokenizer
from edge_serve.http.errors import invalid

from .answers import TextChoice, TextCompletion, TextLogprobs, Usage
from .generate import (
    answer_head,
    check_choices,
    check_length,
    check_stream,
    check_texts,
    sampling_params,
    shown_progress,
)
from .pieces import Piece
from .protocol import CompletionRequest
from .respond import Plan, Render, Turn
from .sse import DONE, event

if TYPE_CHECKING:
    from edge.runtime.llm import LLM


def plan_completion(turn: Turn, body: CompletionRequest) -> Plan:
    """Turn the body of a completion request into a plan.

    Raises:
        APIError, RequestError: the fields contradict each other or do not fit the model.
    """
    check_stream(body)
    llm, n = turn.model.llm, body.n or 1
    prompts = _split_prompts(body.prompt, may_be_empty=body.suffix is not None)
    if body.suffix is not None:
        _check_suffix(llm, prompts, body)
    check_choices(n, len(prompts), turn.settings.max_choices)
    params = sampling_params(body, llm, max_tokens=body.max_tokens, logprobs=body.logprobs)
    suffixes = [] if body.suffix is None else [body.suffix]
    check_texts(llm, [prompts, suffixes], "prompt")
    for prompt in prompts:
        check_length(llm, [prompt, *suffixes] if isinstance(prompt, str) else [], "prompt")
    vocab_size = llm.manifest.model.vocab_size
    given = [ids for ids in prompts if not isinstance(ids, str)]
    outside = next((id_ for ids in given for id_ in ids if id_ >= vocab_size), None)
    if outside is not None:
        raise invalid(f"prompt: token {outside} is not in the vocabulary of {vocab_size}", "prompt")
    progress = bool(body.return_progress)
    return Plan(
        asks=[Ask(prompt, params, body.suffix, progress=progress) for prompt in prompts],
        n=n,
        stream=bool(body.stream),
        echo=bool(body.echo),
        user=body.user,
        cache_salt=body.cache_salt,
    )


def _check_suffix(llm: LLM, prompts: Sequence[str | list[int]], body: CompletionRequest) -> None:
    """Refuse a suffix if the server cannot fill in text before it.

    Raises:
        APIError, RequestError: the prompt is token ids, it should be echoed despite its two ends,
            or the model lacks the tokens.
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise invalid("suffix: needs prompts that are texts, not token ids", "suffix")
    if body.echo:
        raise invalid("echo: cannot be combined with suffix; put the texts together", "echo")
    fill_in_middle(llm.tokenizer)


def _split_prompts(prompt: str | list[Any], *, may_be_empty: bool = False) -> list[str | list[int]]:
    """Split a request's prompt: one text, one list of ids, or a list of either.

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
    if not prompts or not (may_be_empty or all(prompts)):
        raise invalid("prompt: is empty; give at least one token", "prompt")
    return prompts


class CompletionRender(Render):
    """Writes the answer to a completion in OpenAI's form; a `Render`."""

    def __init__(self, turn: Turn, body: CompletionRequest) -> None:
        self._head = answer_head("cmpl", turn)
        self._tokenizer = turn.model.llm.tokenizer
        self._logprobs = body.logprobs
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        # Text of each choice up to the next token, in whole characters, as the answer has it.
        self._texts: defaultdict[int, Detokenizer] = defaultdict(
            lambda: Detokenizer(self._tokenizer, goes_on=not body.echo)
        )
        self._offsets: Counter[int] = Counter()  # the length of that text
        self._echoed: dict[int, str] = {}  # prompts that came as texts

    def begin(self, plan: Plan, prompt_tokens: int) -> None:
        """Implement `Render.begin`."""
        if not plan.echo:
            return
        asks = [ask for ask in plan.asks for _ in range(plan.n)]
        for index, ask in enumerate(asks):
            if isinstance(ask.prompt, str):
                self._echoed[index] = ask.prompt
                bos = self._tokenizer.tokens.bos  # precedes the text and is not part of it
                self._texts[index] = Detokenizer(
                    self._tokenizer, skip=() if bos is None else (bos,)
                )

    def events(self, index: int, piece: Piece) -> bytes:
        """Implement `Render.events`."""
        choice = self._choice(index, piece)
        if piece.progress is not None:
            chunk = self._chunk([choice])
            chunk.prompt_progress = shown_progress(piece.progress)
            return event(chunk)
        if not choice.text and choice.logprobs is None and choice.finish_reason is None:
            return b""
        return self._event([choice], None)

    def last_events(self, usage: Usage) -> bytes:
        """Implement `Render.last_events`."""
        return self._event([], usage) + DONE if self._usage else DONE

    def body(self, choices: Sequence[Piece], usage: Usage) -> TextCompletion:
        """Implement `Render.body`."""
        shown = [self._choice(index, piece) for index, piece in enumerate(choices)]
        return TextCompletion(**self._head, choices=shown, usage=usage)

    def _event(self, choices: list[TextChoice], usage: Usage | None) -> bytes:
        return event(self._chunk(choices, usage))

    def _chunk(self, choices: list[TextChoice], usage: Usage | None = None) -> TextCompletion:
        shown = usage if self._usage else UNSET
        return TextCompletion(**self._head, choices=choices, usage=shown)

    def _choice(self, index: int, piece: Piece) -> TextChoice:
        logprobs = None
        if self._logprobs is not None and piece.tokens:
            logprobs = self._logprobs_of(index, piece)
        return TextChoice(index, piece.text, logprobs, piece.finish_reason)

    def _logprobs_of(self, index: int, piece: Piece) -> TextLogprobs:
        result = TextLogprobs([], [], [] if self._logprobs else None, [])
        for number, token in enumerate(piece.tokens, 1):
            result.tokens.append(self._text(token.id))
            result.token_logprobs.append(token.logprob)
            result.text_offset.append(self._offsets[index])
            if result.top_logprobs is not None:
                result.top_logprobs.append(self._top(token))
            self._offsets[index] += len(self._texts[index].push(token.id))
            if index in self._echoed and number <= piece.echoed:
                # Tokens may spell a text differently, e.g. in NFC; the answer begins at its end.
                end = len(self._echoed[index])
                self._offsets[index] = min(self._offsets[index], end)
                if number == piece.echoed:
                    self._offsets[index] = end
                    self._texts[index] = Detokenizer(self._tokenizer, goes_on=True)
        return result

    def _top(self, token: SampledToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
            # The sampled token is listed even if it is not one of the likeliest.
        top = {self._text(id_): logprob for id_, logprob in token.top_logprobs or ()}
        top.setdefault(self._text(token.id), token.logprob)
        return top

    def _text(self, token_id: int) -> str:
        """Return a token's text; incomplete bytes are spelled as OpenAI does."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

"""Defines `Ask`: a prompt, and all that decides how it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

import numpy as np

from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from edge.adapters.weights import AdapterWeights
    from edge.votes.tally import VoteRule

    from .scheduler import PutAway
    from .structured_output import OutputFormat

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or chat messages ``{"role": ..., "content": ...}``."""


class AnswerOptions(TypedDict, total=False):
    """Options of `LLM.submit`, `LLM.stream`, `LLM.generate` and `LLM.generate_best`: see `Ask`."""

    priority: int
    client: str
    deadline_s: float | None
    salt: str
    adapter: str | AdapterWeights | None
    suffix: str | None
    tools: Sequence[Mapping[str, Any]] | None
    output: OutputFormat | None
    thinking: bool | None
    thinking_budget: int | None
    stop_when_sure: float | None
    vote: VoteRule | None
    continue_final_message: bool
    ids: Sequence[int] | None
    progress: bool
    resumed: PutAway | None


@dataclass(frozen=True)
class Ask:
    """What is asked of a model; the methods of `LLM` make one of their keywords.

    Attributes:
        prompt: plain text, token ids or messages.
        params: sampling; what is None comes from the bundle.
        suffix: see `LLM.encode`; the answer ends at the tokens that end a middle, too.
        tools: see `LLM.encode`.
        thinking: see `LLM.encode`.
        continue_final_message: see `LLM.encode`; what comes back is only what is new.
        output: the form that the answer must have, what was begun included; reasoning is free.
        thinking_budget: tokens after which the reasoning is ended, what was begun included; for
            chats of models that reason.
        stop_when_sure: how probable the answer must be, in two trials one after the other, for the
            thought to be ended: above 0 and at most 1; 0 is off, None what the engine's options
            say.
        vote: how several samples choose the answer, see `LLM.vote`; None is one answer.
        progress: whether pieces with `GenerationChunk.progress` come before the answer: one
            for each place in the queue, and for each percent of the prompt that is read.
        priority: lower runs first.
        client: who asks; clients take turns. When the queue is full, the newest answers that
            wait of the client with most end with `OverloadError` to make room for another's.
        deadline_s: seconds after which an answer ends with `DeadlineError`.
        salt: prompts share cached prefixes only with those of the same salt.
        adapter: the adapter that answers, by its name (`LLM.adapters`); None is the model alone.
        ids: what `LLM.encode` made of the prompt with the same arguments, where the caller has it.
        resumed: what `LLM.put_away` returned of one answer to this prompt, with the same arguments.
            It goes on with the same tokens; those that it had come again first, without
            log-probabilities.
    """

    prompt: Prompt
    params: SamplingParams | None = None
    suffix: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool | None = None
    continue_final_message: bool = False
    output: OutputFormat | None = None
    thinking_budget: int | None = None
    stop_when_sure: float | None = None
    vote: VoteRule | None = None
    progress: bool = False
    priority: int = 0
    client: str = ""
    deadline_s: float | None = None
    salt: str = ""
    adapter: str | AdapterWeights | None = None
    ids: Sequence[int] | None = None
    resumed: PutAway | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is messages."""
        return not isinstance(self.prompt, str) and not is_ids(self.prompt)


def is_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is token ids."""
    # A numpy integer is an Integral, but no int.
    if isinstance(prompt, str | bytes | bytearray) or not isinstance(prompt, Sequence | np.ndarray):
        return False
    return len(prompt) > 0 and isinstance(prompt[0], Integral)

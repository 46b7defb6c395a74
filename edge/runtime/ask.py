"""Defines `Ask`: a prompt and all options that decide how it is answered."""

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

    from .scheduler import Suspended
    from .structured_output import OutputFormat

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or chat messages ``{"role": ..., "content": ...}``."""


class AnswerOptions(TypedDict, total=False):
    """Options of `LLM.submit`, `stream`, `generate` and `generate_best`: the fields of `Ask`."""

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
    resumed: Suspended | None


@dataclass(frozen=True)
class Ask:
    """One request to a model; the methods of `LLM` make one from their keywords.

    Attributes:
        prompt: plain text, token ids or messages.
        params: sampling; a value that is None comes from the bundle.
        suffix: text after the gap, as in `LLM.encode`; the tokens that end a middle end the answer,
            too.
        tools: JSON schemas of functions, as in `LLM.encode`.
        thinking: whether to reason, as in `LLM.encode`.
        continue_final_message: whether to continue the last message, as in `LLM.encode`; only new
            text is returned.
        output: the form that the answer must have, with the text that was begun; reasoning is free.
        thinking_budget: tokens after which the reasoning is ended, with those that were begun; for
            chats of models that reason.
        stop_when_sure: how probable the answer must be, in two consecutive trials, for the thought
            to be ended: above 0 and at most 1. 0 is off; None is the engine's option.
        vote: how several samples choose the answer, as in `LLM.vote`; None is one answer.
        progress: whether pieces with `GenerationChunk.progress` come before the answer: one
            for each place in the queue, and for each percent of the prompt that is read.
        priority: lower runs first.
        client: name of the client; clients take turns. When the queue is full, another client may
            push out the newest waiting answers of the client with most; they end with
            `OverloadError`.
        deadline_s: seconds after which an answer ends with `DeadlineError`.
        salt: prompts share cached prefixes only with those of the same salt.
        adapter: name of the adapter that answers (`LLM.adapters`); None is the model alone.
        ids: result of `LLM.encode` for the prompt and the same arguments, if the caller has it.
        resumed: result of `LLM.suspend` for one answer to this prompt, with the same arguments.
            It continues with the same tokens; those that it had come again first, without
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
    resumed: Suspended | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is messages."""
        return not isinstance(self.prompt, str) and not is_ids(self.prompt)


def is_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is token ids."""
    # A numpy integer is an Integral, but not an int.
    if isinstance(prompt, str | bytes | bytearray) or not isinstance(prompt, Sequence | np.ndarray):
        return False
    return len(prompt) > 0 and isinstance(prompt[0], Integral)

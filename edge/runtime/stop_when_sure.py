"""Ends a thought once its answer is stable, by trials at its boundaries.

After a paragraph, or before a turn such as "Wait", a trial asks for the answer at once. It is an
ordinary request of prompt, thought so far and the beginning of the answer, greedy and short. It
shares the rows of the thought, runs beside other decoding, and is made only while a slot is free.
If two consecutive trials give one answer, each with enough confidence, the thought is ended
(dynamic early exit, https://arxiv.org/abs/2504.15895).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from edge.errors import EdgeError, RequestError
from edge.text.tokenizer import Tokenizer
from edge.votes.boundaries import BLANK_LINE, PLAIN, THINKING

from .ask import Ask
from .generation import FinishReason, GenerationStats, PromptProgress
from .sampling import SampledToken
from .scheduler import Constraint, Request, Scheduler
from .thinking import _ANSWER, ThinkingBudget

if TYPE_CHECKING:
    from edge.backends import Backend
    from edge.bundle.manifest import Manifest
    from edge.engine_config import EngineConfig

TRIAL_TOKENS = 10
_SPACING = 20  # least tokens of the thought between two trials
_ROW = 0.1  # cost of one more row in a step, as a share of the step
_SHARE = 0.05  # share of the thought's steps that all of its trials may cost
_TAIL = 8  # tokens in which a turn is looked for


class StopWhenSure(ThinkingBudget):
    """Follows one thought, makes trials, and ends it as `ThinkingBudget` does.

    Args:
        trials: makes the trials.
        vocab_size: length of a row of logits.
        confidence: how probable the answers of two trials must be, above 0 and at most 1.
        thinks: whether the model thinks between tags; else its answer is the thought.
        opened, budget, answer: arguments of `ThinkingBudget`.

    Raises:
        RequestError: confidence or budget is out of its range.
    """

    def __init__(
        self,
        trials: Trials,
        vocab_size: int,
        confidence: float,
        thinks: bool,
        *,
        opened: bool,
        budget: int | None = None,
        answer: Constraint | None = None,
    ) -> None:
        given: Any = confidence
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
            raise RequestError(
                f"stop_when_sure must be a confidence above 0 and at most 1, not {given!r:.80}"
            )
        self._trials, self._confidence = trials, confidence
        tokenizer = trials.tokenizer
        self._thinks, self._family = thinks, THINKING if thinks else PLAIN
        self._suffix = tokenizer.encode(self._family.close, control=True, goes_on=True)
        self._turns = [turn.encode() for turn in self._family.turns]
        self._ids: list[int] = []
        self._pieces: list[bytes] = []
        self._thought = self._tried_at = self._spent = 0
        self._trial: _Trial | None = None
        self._last: str | None = None
        self._is_sure = self._is_over = False
        super().__init__(
            tokenizer, vocab_size, opened=opened or not thinks, budget=budget, answer=answer
        )

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token."""
        self._ids.append(token_id)
        super().accept(token_id)

    def _accept_reasoning(self, token_id: int) -> None:
        super()._accept_reasoning(token_id)
        self._thought += 1
        self._pieces = [*self._pieces[1 - _TAIL :], self._tokenizer.token_bytes(token_id)]
        if self._is_over:
            return
        self._take_trial()
        if self._is_sure:
            self._trials.counts["stopped"] += 1
            self._force_close()
        elif len(self._ids) > self._trials.repeated and (back := self._boundary()) is not None:
            self._try(len(self._ids) - back)

    def _close(self, rest: bytes) -> None:
        self._is_over = True
        super()._close(rest)

    def _force_close(self) -> None:
        self._is_over = True
        if self._thinks:
            super()._force_close()
        else:
            self._force(list(self._suffix), _ANSWER)

    def _boundary(self) -> int | None:
        """Return how many tokens before this place the thought can be ended; None if it cannot."""
        tail = b"".join(self._pieces)
        old = len(tail) - len(self._pieces[-1])
        line = BLANK_LINE.encode()
        if tail.find(line, max(old - len(line) + 1, 0)) >= 0:
            return 0
        for turn in self._turns:
            at = tail.find(turn, max(old - len(turn) + 1, 0))
            if at >= 0:
                back, size = 0, 0
                while size < len(tail) - at:
                    back += 1
                    size += len(self._pieces[-back])
                return back
        return None

    def _try(self, place: int) -> None:
        """Make a trial of the thought up to a place, unless it would cost too much."""
        if self._trial is not None or self._thought - self._tried_at < _SPACING:
            return
        rows = len(self._suffix) + TRIAL_TOKENS
        if _ROW * (self._spent + rows) > _SHARE * self._thought:
            self._trials.counts["too_expensive"] += 1
            return
        self._trial = self._trials.make([*self._ids[:place], *self._suffix])
        if self._trial is not None:
            self._tried_at = self._thought
            self._spent += rows

    def _take_trial(self) -> None:
        trial = self._trial
        if trial is None or not trial.has_ended:
            return
        self._trial = None
        sure = trial.answer is not None and trial.confidence >= self._confidence
        self._is_sure = sure and trial.answer == self._last
        self._last = trial.answer if sure else None


class Trials:
    """Makes the trials of one answer; only the engine's thread calls it.

    Args:
        llm: the open bundle.
        request: the request of the answer.

    Attributes:
        tokenizer: the bundle's tokenizer.
        counts: ``tried``, ``no_slot``, ``too_expensive`` and ``stopped`` of the bundle.
        repeated: tokens of a continued answer that come again first; they have no trials.
    """

    def __init__(self, llm: Opened, request: Request) -> None:
        self.counts, self.tokenizer = llm.stop_counts, llm.tokenizer
        self.repeated = 0 if request.resume_from is None else len(request.resume_from.answer)
        self._scheduler, self._capacity = llm.scheduler, llm.backend.capacity
        params = replace(
            request.params,
            temperature=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            max_tokens=TRIAL_TOKENS,
            stop=(),
            logprobs=0,
        )
        request = replace(request, params=params, wants_progress=False, resume_from=None)
        # Waiting requests come first, since a late trial is worth nothing.
        self._request = replace(request, priority=request.priority + 1)

    def make(self, ids: Sequence[int]) -> _Trial | None:
        """Queue a trial of the prompt and these tokens; None if no slot is free."""
        load = self._scheduler.stats()
        whole = (*self._request.ids, *ids)
        fits = len(whole) + TRIAL_TOKENS < self._capacity
        if load.waiting or load.running >= self._scheduler.max_batch or not fits:
            self.counts["no_slot"] += 1
            return None
        trial = _Trial(self.tokenizer.token_bytes)
        try:
            self._scheduler.submit([replace(self._request, ids=whole)], [trial])
        except EdgeError:  # the scheduler drains, or others came first
            self.counts["no_slot"] += 1
            return None
        self.counts["tried"] += 1
        return trial


class _Trial:
    """The sink of a trial: it ends with the brace that closes the answer."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._text = b""
        self._logprob = 0.0
        self.has_ended = False
        self.answer: str | None = None

    @property
    def confidence(self) -> float:
        """Return the probability of the whole answer."""
        return math.exp(self._logprob)

    def progress(self, progress: PromptProgress) -> None:
        """Do nothing: a trial requests no progress."""

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        """Take a token; the one with the closing brace is the last."""
        if reason == "stop":
            return reason
        self._text += self._token_bytes(token.id)
        self._logprob += token.logprob or 0.0
        depth = 0
        for at, byte in enumerate(self._text):
            depth += (byte == ord("{")) - (byte == ord("}"))
            if depth < 0:
                text = self._text[:at].decode("utf-8", "replace")
                self.answer = " ".join(text.split()) or None
                return "stop"
        return reason

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        """Take the end."""
        self.has_ended = True

    def fail(self, error: EdgeError) -> None:
        """Take an error: then there is no answer."""
        self.has_ended, self.answer = True, None


class Opened(Protocol):
    """The part of an open bundle that trials need; `edge.LLM` has it."""

    config: EngineConfig
    scheduler: Scheduler
    tokenizer: Tokenizer
    manifest: Manifest
    backend: Backend
    stop_counts: Counter[str]


def until_sure(
    llm: Opened,
    ask: Ask,
    request: Request,
    opened: bool,
    budget: int | None,
    answer: Constraint | None,
    *,
    reasons: bool,
) -> Constraint | None:
    """Return the constraint of an answer whose thought ends once it is sure.

    The engine's option applies only to chats that think, in tags or in a free answer. Code, tool
    calls and forms have no thought that could be ended.

    Args:
        llm: the open bundle.
        ask: the prompt and its options.
        request: the request of the answer.
        opened: argument of `ThinkingBudget`.
        budget: argument of `ThinkingBudget`.
        answer: argument of `ThinkingBudget`.
        reasons: whether the answer may begin with reasoning between tags.

    Raises:
        RequestError: the request sets the option, but there is no thought to end.
    """
    vocab_size, confidence = llm.manifest.model.vocab_size, ask.stop_when_sure
    if confidence is None and ask.is_chat and (reasons or not (answer or ask.tools)):
        confidence = llm.config.stop_when_sure
    if confidence:
        _check_possible(llm, has_thought=reasons or answer is None)
        trials = Trials(llm, request)
        return StopWhenSure(
            trials, vocab_size, confidence, reasons, opened=opened, budget=budget, answer=answer
        )
    if not reasons or (budget is None and answer is None):
        return answer
    return ThinkingBudget(llm.tokenizer, vocab_size, opened=opened, budget=budget, answer=answer)


def _check_possible(llm: Opened, *, has_thought: bool) -> None:
    config, why = llm.config, None
    if config.deterministic:
        why = "what else runs would decide on trials; open the bundle without deterministic"
    elif not config.reuse_prefix:
        why = "trials share the rows of the thought; open the bundle with reuse_prefix"
    elif llm.scheduler.max_batch < 2:
        why = "trials take a second slot, and one sequence runs; raise num_slots and max_batch"
    elif not has_thought:
        why = "the form of the answer leaves no thought to end; leave one of the two out"
    if why is not None:
        raise RequestError(f"stop_when_sure: {why}")

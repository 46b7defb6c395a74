"""Bounds the length of a model's reasoning, and gives the answer after it a form.

R1 and its distills reason between ``<think>`` and ``</think>`` before they answer. A grammar must
leave that text alone, and a caller may want it to end in time. Once the budget of tokens is used
up, the closing tag is forced, and the model answers with what it has (budget forcing, arXiv
2501.19393).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import RequestError
from edge.text.reasoning import THINK_END, THINK_START

if TYPE_CHECKING:
    from edge.text.tokenizer import Tokenizer

    from .scheduler import Constraint

# R1 writes this after the tag; the answer's text begins after it.
_AFTER_TAG = "\n\n"
_BEGIN, _END = THINK_START.encode(), THINK_END.encode()
_START, _REASONING, _FORCING, _ANSWER = range(4)


class ThinkingBudget:
    """Lets the reasoning run for ``budget`` tokens, then the answer under another constraint.

    An `edge.runtime.scheduler.Constraint` for one sequence. The tags may be one token or several.
    The reasoning may be ended by the model or by the budget. If an answer's constraint follows, the
    blank line after the tag is written too, so that the constraint sees the answer's first
    character first.

    With an answer's constraint, no end token is allowed inside the reasoning. If the prompt has not
    opened the reasoning, the model may open it with ``<think>`` or answer at once.

    Args:
        tokenizer: the bundle's tokenizer.
        vocab_size: length of a row of logits.
        opened: whether the prompt ends inside the reasoning.
        budget: tokens of reasoning, 0 or more; None sets no bound.
        answer: constraint from the first token of the answer on; None leaves it free.

    Raises:
        RequestError: the budget is negative or not an integer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        opened: bool,
        budget: int | None = None,
        answer: Constraint | None = None,
    ) -> None:
        given: Any = 0 if budget is None else budget  # from a caller, perhaps of the wrong type
        if isinstance(given, bool) or not isinstance(given, Integral) or given < 0:
            raise RequestError(f"the thinking budget must be 0 or more tokens, not {given!r:.80}")
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._answer, self._left = answer, budget
        self._tail = b""  # end of the text, long enough for a tag
        self._forced: list[int] = []
        self._after_forced = _ANSWER
        self._no_end = (
            None if answer is None else _mask(vocab_size, 0, tokenizer.tokens.eos, -np.inf)
        )
        self._opening = tokenizer.encode(THINK_START, control=True)
        self._state = _START
        if opened:
            self._reason()

    def mask(self) -> NDArray[np.float32] | None:
        """Return numbers to add to the next logits, as `edge.runtime.scheduler.Constraint`."""
        if self._state == _FORCING:
            return _mask(self._vocab_size, -np.inf, self._forced[:1], 0)
        if self._state == _REASONING:
            return self._no_end
        mask = self._answer.mask() if self._answer is not None else None
        if self._state == _START and mask is not None and mask[self._opening[0]] != 0:
            mask = mask.copy()
            mask[self._opening[0]] = 0
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token."""
        if self._state == _FORCING:
            self._accept_forced(token_id)
        elif self._state == _REASONING:
            self._accept_reasoning(token_id)
        elif self._state == _START:
            self._accept_start(token_id)
        elif self._answer is not None:
            self._answer.accept(token_id)

    def _accept_start(self, token_id: int) -> None:
        if self._answer is None:
            self._tail += self._tokenizer.token_bytes(token_id)
            text = self._tail.lstrip()
            if text.startswith(_BEGIN):
                self._reason()
            elif not _BEGIN.startswith(text):
                self._state = _ANSWER
        elif token_id == self._opening[0] and not self._may_answer_with(token_id):
            if self._opening[1:]:
                self._force(self._opening[1:], _REASONING)
            else:
                self._reason()
        else:
            self._state = _ANSWER
            self._answer.accept(token_id)

    def _may_answer_with(self, token_id: int) -> bool:
        mask = self._answer.mask() if self._answer is not None else None
        return mask is None or bool(mask[token_id] == 0)

    def _accept_reasoning(self, token_id: int) -> None:
        self._tail += self._tokenizer.token_bytes(token_id)
        _, found, rest = self._tail.partition(_END)
        if found:
            self._close(rest)
            return
        self._tail = self._tail[-len(_END) :]
        if self._left is not None:
            self._left -= 1
        # A token of ">" and more would write past the tag, where the answer's constraint begins.
        if self._left == 0 or (self._answer is not None and self._tail.endswith(_END[:-1])):
            self._force_close()

    def _accept_forced(self, token_id: int) -> None:
        assert token_id == self._forced[0], "the mask allows one token"
        del self._forced[0]
        if not self._forced:
            if self._after_forced == _REASONING:
                self._reason()
            else:
                self._state = _ANSWER

    def _reason(self) -> None:
        self._state = _REASONING
        self._tail = b""
        if self._left == 0:
            self._force_close()

    def _close(self, rest: bytes) -> None:
        """Begin the answer; ``rest`` is the text after the tag in the model's last token."""
        self._state = _ANSWER
        if self._answer is None:
            return
        text = rest.decode("utf-8", "replace")
        if text.strip("\n"):
            for token_id in self._tokenizer.encode(text.lstrip("\n"), goes_on=True):
                self._answer.accept(token_id)
        elif len(text) < len(_AFTER_TAG):
            self._force(self._encode(_AFTER_TAG[len(text) :]), _ANSWER)

    def _force_close(self) -> None:
        """Force the closing tag; if the model has begun one of several tokens, it is finished."""
        closing = self._encode(THINK_END)
        if len(closing) > 1:
            begun = next(n for n in range(len(_END) - 1, -1, -1) if self._tail.endswith(_END[:n]))
            closing = self._encode(THINK_END[begun:])
        self._force([*closing, *self._encode(_AFTER_TAG)], _ANSWER)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, control=True, goes_on=True)

    def _force(self, ids: list[int], then: int) -> None:
        self._state, self._forced, self._after_forced = _FORCING, ids, then


def _mask(
    vocab_size: int, elsewhere: float, ids: Sequence[int], there: float
) -> NDArray[np.float32]:
    mask = np.full(vocab_size, elsewhere, np.float32)
    mask[list(ids)] = there
    return mask

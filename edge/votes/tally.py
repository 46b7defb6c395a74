"""Counts the answers of samples, and says when one of them has won.

The test is sequential. After each sample it computes how likely the second answer is to be the more
frequent one after all, and ends when that is below the allowed error. The shares of the two have a
uniform prior (adaptive consistency, https://arxiv.org/abs/2305.11860).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import comb
from typing import Any

from edge.errors import RequestError

MOST_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class VoteRule:
    """How a vote is held.

    Attributes:
        answers: rule that finds the answer of a sample, for `edge.votes.answers.answer_finder`.
        first: samples that are drawn before any is counted, 2 or more; None for all.
        most: most samples that are drawn.
        error: allowed probability, 0..0.5, that more samples would have another winner.

    Raises:
        RequestError: a value has a wrong type or is out of its range.
    """

    answers: str = "number"
    first: int | None = None
    most: int = 8
    error: float = 0.1

    def __post_init__(self) -> None:
        from .answers import answer_finder

        answer_finder(self.answers)
        _check_count("most", self.most, 2, MOST_SAMPLES)
        if self.first is not None:
            _check_count("first", self.first, 2, self.most)
        error: Any = self.error
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error <= 0.5:
            raise RequestError(f"vote: error must be above 0 and at most 0.5, not {error!r:.80}")


@dataclass(frozen=True)
class VoteSample:
    """One sample of a vote.

    Attributes:
        answer: the answer found in it; None if it has none or was cancelled.
        confidence: its weight, the geometric mean of the probabilities of its tokens.
        text, reasoning: what the model wrote.
        tokens: number of sampled tokens.
        finish_reason: why it ended; ``cancelled`` once the vote was decided.
    """

    answer: str | None
    confidence: float
    text: str
    reasoning: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class VoteResult:
    """The result of a vote.

    Attributes:
        answer: the answer that won, or the leading one if nothing was decided; None if no sample
            has one.
        agreed: samples that gave it.
        counted: samples that finished, including those without an answer.
        decided: whether the test ended the vote, rather than the limit on samples, a full queue or
            the caller.
        samples: all samples, in the order in which they were started.
    """

    answer: str | None
    agreed: int
    counted: int
    decided: bool
    samples: tuple[VoteSample, ...]


@dataclass
class Tally:
    """The votes so far.

    Attributes:
        rule: how the vote is held.
        votes: number of samples that gave each answer.
        weights: sum of the confidences of those samples, by answer.
        samples: samples that have finished, including those without an answer.
    """

    rule: VoteRule
    votes: Counter[str] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)
    samples: int = 0

    def add(self, answer: str | None, confidence: float) -> None:
        """Count a sample; one without an answer votes for nothing."""
        self.samples += 1
        if answer is not None:
            self.votes[answer] += 1
            self.weights[answer] = self.weights.get(answer, 0.0) + confidence

    @property
    def leader(self) -> str | None:
        """Return the answer with the highest sum of confidences; of equal ones, the first one."""
        return max(self.weights, key=lambda answer: self.weights[answer], default=None)

    @property
    def agreed(self) -> int:
        """Return how many samples gave the leading answer."""
        return 0 if self.leader is None else self.votes[self.leader]

    @property
    def is_decided(self) -> bool:
        """Whether the error is small enough, and votes and confidence have the same leader."""
        agreed, second = self.agreed, self._second
        return agreed > second and doubt(agreed, second) <= self.rule.error

    def missing(self, running: int) -> int:
        """Return how many more samples to start while ``running`` run; 0 once it is decided.

        That is the smallest number that could decide it if all agreed with the leader.
        """
        if self.is_decided:
            return 0
        if not self.samples:
            return max((self.rule.first or self.rule.most) - running, 0)
        left, wanted = self.rule.most - self.samples, 1
        agreed = max(self.votes.values(), default=0)
        while wanted < left and doubt(agreed + wanted, self._second) > self.rule.error:
            wanted += 1
        return max(min(wanted, left) - running, 0)

    @property
    def _second(self) -> int:
        others = [number for answer, number in self.votes.items() if answer != self.leader]
        return max(others, default=0)


def doubt(agreed: int, second: int) -> float:
    """Return the probability that the second answer is the more frequent one, given these votes.

    With a uniform prior on the shares of both, it is the mass below one half: the regularised
    incomplete beta function at 1/2, which is a sum of binomials.
    """
    tries = agreed + second + 1
    return sum(comb(tries, hits) for hits in range(agreed + 1, tries + 1)) / (1 << tries)


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(
            f"vote: {name} must be an integer from {low} to {high}, not {value!r:.80}"
        )

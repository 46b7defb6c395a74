"""Decides whether and how far to draft, from the measured times of steps. Pure, as `policy` is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .drafter import DraftWorth
from .policy import FADE, TICK_S, CostCurve, CostPoint, Policy, StepCosts

_GAIN = 1.05  # speculation must promise to be this much faster than plain decode
_MOST_CHANCE = 0.9  # a surer guess is always worth its time


class DraftCosts:
    """Seconds of each kind of step that drafts need.

    Args:
        plain: times of steps without drafts.

    Attributes:
        guess: seconds of one guess of a drafter for each sequence, by number of sequences.
        reading: seconds in which a drafter reads text, by number of tokens.
    """

    def __init__(self, plain: StepCosts) -> None:
        self.plain = plain
        self.guess = CostCurve()
        self.reading = CostCurve()
        self._verify: dict[tuple[int, int], CostPoint] = {}
        self._drafted: dict[tuple[int, int], CostPoint] = {}

    def observe_verify(self, batch: int, seq: int, seconds: float) -> None:
        """Count a step of ``seq`` tokens for each of ``batch`` sequences, logits at each place."""
        _observe(self._verify, batch, seq, seconds)

    def observe_drafted(self, batch: int, count: int, seconds: float) -> None:
        """Count a decode step for which up to ``count`` tokens were drafted; includes drafting.

        A drafter may stop before that. So the seconds are the average cost of this choice, not the
        cost of ``count`` tokens.
        """
        _observe(self._drafted, batch, count, seconds)

    def estimate_run(self, batch: int, drafted: int) -> float | None:
        """Estimate the seconds of a decode step with ``drafted`` tokens; low if none was measured.

        None before the first decode step.
        """
        plain = self.plain.decode.estimate(batch)
        if not drafted or plain is None:
            return plain
        whole = self._drafted.get((batch, drafted))
        if whole is not None:
            return whole.seconds
        return self._estimate_verify(batch, drafted, plain) + drafted * (
            self.guess.estimate(batch) or 0.0
        )

    def row_s(self, batch: int) -> float | None:
        """Return the seconds that one more token per sequence adds; None before a measurement."""
        plain = self.plain.decode.estimate(batch)
        longest = max((seq for size, seq in self._verify if size == batch), default=1)
        if plain is None or longest == 1:
            return None
        return max((self._verify[batch, longest].seconds - plain) / (longest - 1), 0.0)

    def reading_s(self, tokens: int) -> float:
        """Estimate the seconds in which a drafter reads this much; 0 before it has read any."""
        seconds, most = self.reading.estimate(tokens), self.reading.largest_size
        return 0.0 if seconds is None else seconds * max(tokens / most, 1.0)

    def _estimate_verify(self, batch: int, drafted: int, plain: float) -> float:
        point = self._verify.get((batch, 1 + drafted))
        if point is not None:
            return point.seconds
        wide, narrow = self.plain.prefill.estimate(1 + drafted), self.plain.decode.estimate(1)
        if wide is None or narrow is None:
            return plain
        return plain + max(wide - narrow, 0.0)

    def fade_verify(self, batch: int, seq: int) -> None:
        """Lower the time of such a step slightly, so that it is tried again some day."""
        for point in (self._verify.get((batch, seq)), self._drafted.get((batch, seq - 1))):
            if point is not None:
                point.seconds *= 1 - FADE


class Draft(NamedTuple):
    """One sequence of the decode batch.

    Attributes:
        length: tokens that its drafter proposes; 0 if none.
        acceptance: probability that one of them is right, given that those before it are.
    """

    length: int
    acceptance: float


class DecodeRun(NamedTuple):
    """Sequences (indices into the batch) that decode in one step with ``drafted`` tokens each."""

    rows: tuple[int, ...]
    drafted: int


class _DraftOption(NamedTuple):
    """Runs of one decode step with drafts, and the expected tokens and seconds."""

    runs: list[DecodeRun]
    tokens: float
    seconds: float


class DraftPolicy:
    """Decides from measured times what to draft.

    Args:
        plain: times of steps without drafts.

    Attributes:
        costs: times of drafts.
    """

    def __init__(self, plain: Policy) -> None:
        self.plain = plain
        self.costs = DraftCosts(plain.costs)

    def draft_plan(self, drafts: Sequence[Draft]) -> list[DecodeRun]:
        """Split the decode batch into the runs with the most expected tokens per second.

        Either nothing is drafted; or all run in one step, padded to the longest draft; or sequences
        with a draft run apart from those without.
        """
        plain = [DecodeRun(tuple(range(len(drafts))), 0)]
        seconds = self.plain.costs.decode.estimate(len(drafts))
        if seconds is None:
            return plain
        best, best_rate = plain, _GAIN * len(drafts) / seconds
        passed_over: list[DecodeRun] = []
        for option in self._draft_options(drafts, seconds):
            rate = option.tokens / option.seconds
            if rate > best_rate:
                best, best_rate = option.runs, rate
            else:
                passed_over.append(option.runs[0])
        for run in passed_over:
            self.costs.fade_verify(len(run.rows), 1 + run.drafted)
        return best

    def trial(self, drafts: Sequence[Draft], budget_s: float) -> list[DecodeRun] | None:
        """Draft where it does not seem to pay, to learn whether it does by now.

        Args:
            drafts: the decode batch, as in `draft_plan`.
            budget_s: seconds that may be lost.

        Returns:
            The runs with the least expected loss; None if that is more than ``budget_s``.
        """
        seconds = self.plain.costs.decode.estimate(len(drafts))
        if seconds is None:
            return None
        token_s = seconds / len(drafts)
        losses = [
            (option.seconds - token_s * option.tokens, option)
            for option in self._draft_options(drafts, seconds)
        ]
        loss, option = min(losses, key=lambda each: each[0], default=(math.inf, None))
        return option.runs if option is not None and loss <= budget_s else None

    def _draft_options(self, drafts: Sequence[Draft], plain_s: float) -> Iterator[_DraftOption]:
        """Yield each way to draft: all padded to one length, or those with a draft apart."""
        everyone = tuple(range(len(drafts)))
        with_draft = tuple(i for i in everyone if drafts[i].length)
        without = tuple(i for i in everyone if not drafts[i].length)
        longest = max((draft.length for draft in drafts), default=0)
        for drafted in range(1, longest + 1):
            tokens = sum(_expected(draft, drafted) for draft in drafts)
            options = [[DecodeRun(everyone, drafted)]]
            if without:
                options.append([DecodeRun(with_draft, drafted), DecodeRun(without, 0)])
            for runs in options:
                times = [self.costs.estimate_run(len(run.rows), run.drafted) for run in runs]
                yield _DraftOption(runs, tokens, sum(time or plain_s for time in times))

    def draft_worth(self, batch: int) -> DraftWorth:
        """Return the probability from which a guess is worth its time; 0 before that is known."""
        costs = self.costs
        row, guess = costs.row_s(batch), costs.guess.estimate(batch)
        plain = self.plain.costs.decode.estimate(batch)
        if row is None or guess is None or plain is None:
            return DraftWorth()
        run, continue_threshold = row / plain, (row + guess) / plain
        return DraftWorth(min(run, _MOST_CHANCE), min(continue_threshold, _MOST_CHANCE))

    def reads(
        self, behind: int, draft: Draft, batch: int, *, written: int, expected: float
    ) -> bool:
        """Return whether a drafter should read the tokens of a sequence that it lacks.

        This is the problem of renting or buying, with a guess at how long the need will last.
        Buying once the rent has reached the price never costs more than twice the optimum.

        Args:
            behind: tokens to read.
            draft: the draft that would then be possible.
            batch: sequences that decode.
            written: tokens that the sequence has got without drafts.
            expected: tokens that it may still get, judging by other sequences.
        """
        plain = self.plain.costs.decode.estimate(batch)
        if plain is None or not draft.length:
            return False
        counts = range(1, draft.length + 1)
        token_s = min(
            (self.costs.estimate_run(batch, count) or plain) / _expected(draft, count)
            for count in counts
        )
        saved_s = plain - _GAIN * token_s
        if saved_s <= 0:
            for count in counts:
                self.costs.fade_verify(batch, 1 + count)
            return False
        return self.costs.reading_s(behind) <= saved_s * max(float(written), expected)


def _observe(
    points: dict[tuple[int, int], CostPoint], batch: int, size: int, seconds: float
) -> None:
    """Count a step of ``batch`` sequences."""
    seconds = max(seconds, TICK_S)
    points.setdefault((batch, size), CostPoint(size, seconds)).observe(size, seconds)


def _expected(draft: Draft, drafted: int) -> float:
    """Return how many tokens a step should give a sequence: the right drafts, and one more."""
    count, p = min(draft.length, drafted), draft.acceptance
    return float(count + 1) if p >= 1 else (1 - p ** (count + 1)) / (1 - p)

"""Decides what to run next, from what steps have cost so far. Pure: no clock, no backend.

It answers three questions: how many tokens of a prompt to run between two decode steps
(`Policy.chunk_tokens`), whether one more sequence may join (`Policy.allows`), and whether and how
far to draft (`Policy.draft_plan`, `Policy.trial`, `Policy.draft_worth`, `Policy.reads`). All
answers come from measured times, so they follow the engine, the length of the context and whatever
else the machine does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .request import DraftWorth

_NEWEST = 0.25  # weight of the newest time in a running mean
_NEWEST_OF_MEAN = 0.05  # likewise, of a mean that takes slow times as they are
_FADE = 1 / 2048  # how fast the estimate of an option that is not taken falls, so it is tried again
_GAIN = 1.05  # speculation must promise this much more than plain decode
_PROMPT_SHARE = 0.9  # of the speed that a prompt has alone, which it keeps while others decode
_ALERT_STEPS = 2.0  # decode steps that a chunk may last while other clients are about
_ALERT_CHUNK = 16  # tokens of a chunk then at least: smaller ones cost too much
_MOST_CHANCE = 0.9  # a guess that is surer than this is always of use
_TICK_S = 1e-9  # no step takes no time, whatever the clock says


@dataclass
class _Point:
    """Running means of a kind of step: its size and its seconds."""

    size: float
    seconds: float

    def observe(self, size: int, seconds: float) -> None:
        # A lone slow step (a page fault, a captured graph) must not count for long, so faster
        # times are believed sooner than slower ones.
        weight = _NEWEST if seconds > self.seconds else 2 * _NEWEST
        self.size += weight * (size - self.size)
        self.seconds += weight * (seconds - self.seconds)


class CostCurve:
    """Seconds of a step by its size, as measured; between two sizes, a roofline through them.

    A step reads all weights whatever its size and computes in proportion to it, so between two
    measured sizes the time is taken as the greater of the smaller one's and the larger one's share.
    Beyond the largest measured size its time is taken. Such an estimate can only be too low, and
    then the step is measured and known.
    """

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}
        self._keys: list[int] = []

    def observe(self, size: int, seconds: float) -> None:
        """Count a step."""
        seconds = max(seconds, _TICK_S)
        key = _bucket(size)
        point = self._points.get(key)
        if point is None:
            self._points[key] = _Point(size, seconds)
            self._keys = sorted(self._points)
        else:
            point.observe(size, seconds)

    def estimate(self, size: int) -> float | None:
        """Seconds that a step of ``size`` should take; None before the first one."""
        if not self._keys:
            return None
        at = bisect_left(self._keys, _bucket(size))
        if at < len(self._keys) and self._keys[at] == _bucket(size):
            point = self._points[self._keys[at]]
            return point.seconds * max(size / point.size, 1.0)
        below = self._points[self._keys[at - 1]] if at > 0 else None
        if at == len(self._keys):
            return self._points[self._keys[-1]].seconds
        above = self._points[self._keys[at]]
        return max(below.seconds if below else 0.0, above.seconds * size / above.size)

    @property
    def largest_size(self) -> float:
        """The largest measured size; 0 before any."""
        return self._points[self._keys[-1]].size if self._keys else 0.0

    def largest(self, seconds: float, limit: int) -> int:
        """Return the largest size up to ``limit`` that should take at most ``seconds``; at least 1.

        It is never more than twice the largest measured size: nothing is known of larger steps.
        """
        low, high = 1, limit
        if self._keys:
            high = max(min(limit, int(2 * self._points[self._keys[-1]].size)), 1)
        while low < high:
            middle = (low + high + 1) // 2
            expected = self.estimate(middle)
            if expected is not None and expected > seconds:
                high = middle - 1
            else:
                low = middle
        return low

    def fade(self, size: int) -> None:
        """Lower a little the time of a step of ``size``, or of the next larger known size.

        A size that is passed over is not measured, so a time from a slow hour would stay for ever.
        """
        at = bisect_left(self._keys, _bucket(size))
        if at < len(self._keys):
            self._points[self._keys[at]].seconds *= 1 - _FADE

    def smallest(self, share: float, beside_s: float, limit: int) -> int:
        """Return the smallest size at ``share`` of the highest known speed; ``limit`` if none.

        Args:
            share: share of the highest tokens per second.
            beside_s: seconds that pass between two such steps.
            limit: the largest size to return.
        """
        slowest = min((p.seconds / p.size for p in self._points.values()), default=0.0) / share
        low, high = 1, limit
        while low < high:
            middle = (low + high) // 2
            expected = self.estimate(middle)
            if expected is None or beside_s + expected <= slowest * middle:
                high = middle
            else:
                low = middle + 1
        return low


class StepCosts:
    """Seconds of each kind of step.

    Attributes:
        prefill: seconds by tokens of one sequence's prompt.
        decode: seconds by sequences, one token each.
        guess: seconds of one guess of a drafter for each sequence, by sequences.
        reading: seconds in which a drafter reads text, by tokens.
    """

    def __init__(self) -> None:
        self.prefill = CostCurve()
        self.decode = CostCurve()
        self.guess = CostCurve()
        self.reading = CostCurve()
        self._plain: dict[int, float] = {}
        self._verify: dict[tuple[int, int], _Point] = {}
        self._drafted: dict[tuple[int, int], _Point] = {}

    def observe_verify(self, batch: int, seq: int, seconds: float) -> None:
        """Count a step of ``seq`` tokens for each of ``batch`` sequences, logits at each place."""
        seconds = max(seconds, _TICK_S)
        point = self._verify.get((batch, seq))
        if point is None:
            self._verify[batch, seq] = _Point(seq, seconds)
        else:
            point.observe(seq, seconds)

    def observe_plain(self, batch: int, seconds: float) -> None:
        """Count a decode step, one token for each of ``batch`` sequences, and its mean time."""
        self.decode.observe(batch, seconds)
        mean = self._plain.setdefault(batch, seconds)
        self._plain[batch] = mean + _NEWEST_OF_MEAN * (seconds - mean)

    def mean_plain_s(self, batch: int) -> float | None:
        """Mean seconds of a decode step, slow ones included; else the estimate, if there is one."""
        return self._plain.get(batch, self.decode.estimate(batch))

    def observe_drafted(self, batch: int, count: int, seconds: float) -> None:
        """Count a decode step for which up to ``count`` tokens were drafted, their time included.

        A drafter may stop before that. So the seconds are what this choice costs on average, and
        not those of ``count`` tokens.
        """
        seconds = max(seconds, _TICK_S)
        point = self._drafted.get((batch, count))
        if point is None:
            self._drafted[batch, count] = _Point(count, seconds)
        else:
            point.observe(count, seconds)

    def estimate_run(self, batch: int, drafted: int) -> float | None:
        """Estimate the seconds of a decode step with ``drafted`` tokens; low if none was measured.

        None before the first decode step.
        """
        plain = self.decode.estimate(batch)
        if not drafted or plain is None:
            return plain
        whole = self._drafted.get((batch, drafted))
        if whole is not None:
            return whole.seconds
        return self._estimate_verify(batch, drafted, plain) + drafted * (
            self.guess.estimate(batch) or 0.0
        )

    def row_s(self, batch: int) -> float | None:
        """Seconds that one token more per sequence adds to a step; None before one was measured."""
        plain = self.decode.estimate(batch)
        longest = max((seq for size, seq in self._verify if size == batch), default=1)
        if plain is None or longest == 1:
            return None
        return max((self._verify[batch, longest].seconds - plain) / (longest - 1), 0.0)

    def reading_s(self, tokens: int) -> float:
        """Seconds in which a drafter should read so many tokens; 0 before it has read any."""
        seconds, most = self.reading.estimate(tokens), self.reading.largest_size
        return 0.0 if seconds is None else seconds * max(tokens / most, 1.0)

    def _estimate_verify(self, batch: int, drafted: int, plain: float) -> float:
        point = self._verify.get((batch, 1 + drafted))
        if point is not None:
            return point.seconds
        wide, narrow = self.prefill.estimate(1 + drafted), self.decode.estimate(1)
        if wide is None or narrow is None:
            return plain
        return plain + max(wide - narrow, 0.0)

    def fade_verify(self, batch: int, seq: int) -> None:
        """Lower a little the time of such a step, so that it is tried again some day."""
        for point in (self._verify.get((batch, seq)), self._drafted.get((batch, seq - 1))):
            if point is not None:
                point.seconds *= 1 - _FADE


class Draft(NamedTuple):
    """One sequence of the decode batch.

    Attributes:
        length: tokens that its drafter proposes; 0 if none.
        acceptance: probability that one of them is right, given those before it.
    """

    length: int
    acceptance: float


class DecodeRun(NamedTuple):
    """Sequences (indices into the batch) that decode in one step with ``drafted`` tokens each."""

    rows: tuple[int, ...]
    drafted: int


class _DraftOption(NamedTuple):
    """Runs of one decode step with drafts, and the tokens and seconds to expect of them."""

    runs: list[DecodeRun]
    tokens: float
    seconds: float


class Policy:
    """Decides what to run from measured costs.

    Args:
        max_batch: sequences that run at once.
        step_tokens: most tokens of a prompt in one step.
        target_itl_s: longest gap between two tokens of a stream; None aims at the most tokens per
            second and short waits for the first one.
    """

    def __init__(self, max_batch: int, step_tokens: int, target_itl_s: float | None = None) -> None:
        self.max_batch = max_batch
        self.step_tokens = step_tokens
        self.target_itl_s = target_itl_s
        self.costs = StepCosts()

    def allows(self, running: int) -> bool:
        """Return whether one more sequence may join ``running`` ones."""
        if running == 0:
            return True
        if running >= self.max_batch:
            return False
        expected = self.costs.decode.estimate(running + 1)
        if self.target_itl_s is None or expected is None or expected <= self.target_itl_s:
            return True
        self.costs.decode.fade(running + 1)
        return False

    def chunk_tokens(self, decoding: int, *, alert: bool = False) -> int:
        """Choose how many tokens of a prompt to run while ``decoding`` sequences wait for a token.

        Without a target a prompt that nobody waits for runs in full steps. Beside others it gets a
        share of the speed that it has alone, in the smallest chunks that give it: they are
        efficient, and long enough that the decode step between two of them costs little. With a
        target it gets what the target leaves.

        Args:
            decoding: sequences that decode.
            alert: whether other clients are about, for whose sake a chunk lasts a few decode steps.

        Returns:
            The tokens of the chunk; 0 where the prompt's next token should run in the decode step,
            as one sequence more: if no chunk keeps the target, or if riding gives the prompt more
            tokens per second than a chunk that keeps it.
        """
        if not (decoding or alert):
            return self.step_tokens
        prefill = self.costs.prefill
        decode = self.costs.decode.estimate(max(decoding, 1))
        if decode is None:
            return min(self.step_tokens, _UNMEASURED_CHUNK)
        if self.target_itl_s is None or not decoding:
            size = self.step_tokens
            if decoding:
                size = prefill.smallest(_PROMPT_SHARE, decode, size)
            if alert:
                most = prefill.largest(_ALERT_STEPS * decode, size)
                size = min(max(most, _ALERT_CHUNK), size)
            return size
        budget = self.target_itl_s - decode
        size = prefill.largest(budget, self.step_tokens)
        if size < self.step_tokens:
            prefill.fade(size + 1)
        chunk_s = prefill.estimate(size) or 0.0
        wider = self.costs.decode.estimate(decoding + 1) or decode
        if chunk_s > budget or size / (decode + chunk_s) < 1 / wider:
            return 0
        return size

    def draft_plan(self, drafts: Sequence[Draft]) -> list[DecodeRun]:
        """Split the decode batch into the runs with the most expected tokens per second.

        Either nothing is drafted, or all run in one step padded to the longest draft, or those with
        a draft run apart from those without.
        """
        plain = [DecodeRun(tuple(range(len(drafts))), 0)]
        seconds = self.costs.decode.estimate(len(drafts))
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
            drafts: see `draft_plan`.
            budget_s: seconds that may be lost.

        Returns:
            The runs that should lose least; None if they should lose more than ``budget_s``.
        """
        seconds = self.costs.decode.estimate(len(drafts))
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
        """Each way to draft: all padded to one length, or those with a draft apart from others."""
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
        """From which probability on a guess is worth its time; all are before that is known."""
        costs = self.costs
        row, guess, plain = (
            costs.row_s(batch),
            costs.guess.estimate(batch),
            costs.decode.estimate(batch),
        )
        if row is None or guess is None or plain is None:
            return DraftWorth()
        run, go_on = row / plain, (row + guess) / plain
        return DraftWorth(min(run, _MOST_CHANCE), min(go_on, _MOST_CHANCE))

    def reads(
        self, behind: int, draft: Draft, batch: int, *, written: int, expected: float
    ) -> bool:
        """Return whether a drafter should read what it is behind in a sequence.

        That is the problem of renting or buying, with a guess at how long the need will last: who
        buys once the rent has reached the price never pays more than twice what was possible.

        Args:
            behind: tokens to read.
            draft: what could then be drafted.
            batch: sequences that decode.
            written: tokens that the sequence has got without drafts.
            expected: tokens that it may still get, from those of others.
        """
        plain = self.costs.decode.estimate(batch)
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


_UNMEASURED_CHUNK = 32


def _expected(draft: Draft, drafted: int) -> float:
    """The tokens that a step should give a sequence: the right drafts, and one more."""
    count, p = min(draft.length, drafted), draft.acceptance
    return float(count + 1) if p >= 1 else (1 - p ** (count + 1)) / (1 - p)


def _bucket(size: int) -> int:
    """The group in which a size is measured: alone up to 16, then four groups per doubling."""
    if size <= 16:
        return size
    step = 1 << max(size.bit_length() - 3, 0)
    return size // step * step

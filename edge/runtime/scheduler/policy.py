"""Decides what to run next, from the measured times of steps. Pure: no clock, no backend.

It answers two questions: how many tokens of a prompt to run between two decode steps
(`Policy.chunk_tokens`), and whether one more sequence may join (`Policy.allows`). The answers come
from measured times, so they follow the engine, the length of the context and whatever else the
machine does.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

_NEWEST = 0.25  # weight of the newest time in a running mean
_NEWEST_OF_MEAN = 0.05  # the same, for a mean that takes slow times as they are
FADE = 1 / 2048  # how fast the estimate of an unused option falls, so that it is tried again
_PROMPT_SHARE = 0.9  # share of its speed alone that a prompt keeps while others decode
_ALERT_STEPS = 2.0  # decode steps that a chunk may last while other clients are about
_ALERT_CHUNK = 16  # least tokens of a chunk then: smaller ones cost too much
TICK_S = 1e-9  # no step takes less, whatever the clock says


@dataclass
class CostPoint:
    """Running means of a kind of step: its size and its seconds."""

    size: float
    seconds: float

    def observe(self, size: int, seconds: float) -> None:
        """Count a step."""
        # A single slow step (a page fault, a captured graph) must not count for long, so faster
        # times are believed sooner than slower ones.
        weight = _NEWEST if seconds > self.seconds else 2 * _NEWEST
        self.size += weight * (size - self.size)
        self.seconds += weight * (seconds - self.seconds)


class CostCurve:
    """Seconds of a step by its size, as measured; between two sizes, a roofline through them.

    A step reads all weights whatever its size, and computes in proportion to it. So between two
    measured sizes the time is the greater of two values: the smaller one's time, and the larger
    one's in proportion. Beyond the largest measured size its time is taken. Such an estimate can
    only be too low, and then the step is measured and known.
    """

    def __init__(self) -> None:
        self._points: dict[int, CostPoint] = {}
        self._keys: list[int] = []

    def observe(self, size: int, seconds: float) -> None:
        """Count a step."""
        seconds = max(seconds, TICK_S)
        key = _bucket(size)
        if key not in self._points:
            self._points[key] = CostPoint(size, seconds)
            self._keys = sorted(self._points)
        self._points[key].observe(size, seconds)

    def estimate(self, size: int) -> float | None:
        """Estimate the seconds of a step of ``size``; None before the first one."""
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
        """Return the largest measured size; 0 before any."""
        return self._points[self._keys[-1]].size if self._keys else 0.0

    def largest(self, seconds: float, limit: int) -> int:
        """Return the largest size up to ``limit`` that should take at most ``seconds``; at least 1.

        It is never more than twice the largest measured size: nothing is known of larger steps.
        """
        most = limit
        if self._keys:
            most = max(min(limit, int(2 * self.largest_size)), 1)

        def fits(size: int) -> bool:
            expected = self.estimate(size)
            return expected is None or expected <= seconds

        return most - bisect_left(range(most, 1, -1), True, key=fits)

    def fade(self, size: int) -> None:
        """Lower the time of a step of ``size``, or of the next larger known size, slightly.

        A size that is never chosen is not measured, so a time from a slow hour would stay forever.
        """
        at = bisect_left(self._keys, _bucket(size))
        if at < len(self._keys):
            self._points[self._keys[at]].seconds *= 1 - FADE

    def smallest(self, share: float, beside_s: float, limit: int) -> int:
        """Return the smallest size at ``share`` of the highest known speed; ``limit`` if none.

        Args:
            share: share of the highest tokens per second.
            beside_s: seconds that pass between two such steps.
            limit: the largest size to return.
        """
        slowest = min((p.seconds / p.size for p in self._points.values()), default=0.0) / share

        def is_fast(size: int) -> bool:
            expected = self.estimate(size)
            return expected is None or beside_s + expected <= slowest * size

        return 1 + bisect_left(range(1, limit), True, key=is_fast)


class StepCosts:
    """Seconds of each kind of step.

    Attributes:
        prefill: seconds by tokens of one sequence's prompt.
        decode: seconds by sequences, one token each.
    """

    def __init__(self) -> None:
        self.prefill = CostCurve()
        self.decode = CostCurve()
        self._plain: dict[int, float] = {}

    def observe_plain(self, batch: int, seconds: float) -> None:
        """Count a decode step, one token for each of ``batch`` sequences, and its mean time."""
        self.decode.observe(batch, seconds)
        mean = self._plain.setdefault(batch, seconds)
        self._plain[batch] = mean + _NEWEST_OF_MEAN * (seconds - mean)

    def mean_plain_s(self, batch: int) -> float | None:
        """Return the mean seconds of a decode step with slow ones; else the estimate, if any."""
        return self._plain.get(batch, self.decode.estimate(batch))


@dataclass
class StepTimes:
    """Times of the backend's steps so far.

    Attributes:
        steps: number of steps.
        model_s: seconds of the backend, and of a drafter whose time counts.
        newest_s: seconds of the newest step.
        ended_s: when the backend or the drafter last ended a piece of work, on the core's clock.
        longest_s: seconds of the longest step.
        most_tokens: tokens of the largest step.
    """

    steps: int = 0
    model_s: float = 0.0
    newest_s: float = 0.0
    ended_s: float = 0.0
    longest_s: float = 0.0
    most_tokens: int = 0

    def count(self, tokens: int, seconds: float, ended_s: float) -> None:
        """Count a step."""
        self.steps += 1
        self.newest_s, self.ended_s = seconds, ended_s
        self.longest_s = max(self.longest_s, seconds)
        self.most_tokens = max(self.most_tokens, tokens)

    def full_step_s(self, tokens: int) -> float | None:
        """Return seconds of the longest step, scaled to the ``tokens`` of a full step, or None.

        A step reads all weights however few tokens it has, so scaling a short one gives too much.
        """
        if not self.most_tokens:
            return None
        return self.longest_s * max(1.0, tokens / self.most_tokens)


class Policy:
    """Decides what to run from measured times.

    Args:
        max_batch: sequences that run at once.
        step_tokens: most tokens of a prompt in one step.
        target_itl_s: longest gap between two tokens of a stream; None aims at many tokens per
            second and a short time to the first one.
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

        Without a target, a prompt runs in full steps if nobody waits. Beside others it gets a share
        of the speed that it has alone, in the smallest chunks that give it. These are efficient,
        and long enough that the decode step between two of them costs little. With a target it gets
        the time that the target leaves.

        Args:
            decoding: sequences that decode.
            alert: whether other clients are about; then a chunk lasts a few decode steps.

        Returns:
            The tokens of the chunk. It is 0 if the prompt's next token should run in the decode
            step, as one more sequence: no chunk keeps the target, or riding gives the prompt more
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


_UNMEASURED_CHUNK = 32


def _bucket(size: int) -> int:
    """Return the group in which a size is measured: alone up to 16, then four per doubling."""
    if size <= 16:
        return size
    step = 1 << max(size.bit_length() - 3, 0)
    return size // step * step

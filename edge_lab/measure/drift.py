"""Finds drift in what clients ask for: prompt lengths and sampling against a stored baseline.

Each value falls into a bin of a fixed, fine grid, so counts of a server, of a file and of another
day can be added, subtracted and compared. The population stability index of a parameter is::

    PSI = sum over bins of (p - q) * ln(p / q)

with the shares p of the baseline and q of the window. If nothing has changed,
``PSI / (1/N + 1/M)`` follows a chi-square distribution with (bins - 1) degrees of freedom. N and M
are the requests of window and baseline (Yurdakul and Naranjo, "Statistical properties of the
population stability index", Journal of Risk Model Validation 14(4), 2020). So the customary alarm
above a fixed 0.2 is far too nervous for small windows and says nothing about large ones: for 50
requests in ten bins, 0.18 is the mean without any change. Here an alarm needs both:

- a p-value below ``alpha / number of parameters`` (Bonferroni), so that a window of unchanged
  traffic raises a false alarm with a probability of at most ``alpha``,
- and a PSI of at least ``min_psi``, so that a large window does not report tiny changes.

Bins for the comparison are made of neighbours of the grid, about `MAX_BINS` of equal share in the
baseline. Values that the baseline has never seen keep bins of their own. Half a request is added to
every bin, so that an empty one does not make the sum infinite.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from edge.bundle.update import replace_durably
from edge.errors import ConfigError
from edge.files import MALFORMED, read_file

ALPHA = 0.001
"""Probability of a false alarm per window, over all parameters."""
MIN_PSI = 0.2
"""The customary bound of a large shift (Siddiqi, Credit Risk Scorecards, 2006: 0.25; 0.1 small)."""
MAX_BINS = 10
MIN_REQUESTS = 50
"""With fewer, ten bins hold too few requests each for the chi-square distribution."""
DEFAULT_WINDOW = 500
WATCH_USER = "edge-llm-watch"
"""Value of ``user`` in the requests of ``edge-llm watch``, which are no client's."""
ROLLOUT_USER = "edge-llm-rollout"
"""Value of ``user`` in those of ``bundle rollout``, for which a server loads its model."""
GRID_VERSION = 1

_PSEUDO_COUNT = 0.5


def _geometric_edges(last: float) -> tuple[float, ...]:
    """Return the edges 0, 1 and on by factors of the square root of 2, up to ``last``.

    A value that doubles moves by two bins.
    """
    edges, power = [0.0], 0
    while edges[-1] < last:
        edges.append(float(math.floor(2 ** (power / 2))))
        power += 1
    return tuple(sorted(set(edges)))


def _linear_edges(step: float, count: int) -> tuple[float, ...]:
    """Return edges between the multiples of ``step``, so that a round value is inside its bin."""
    return tuple(round((i + 0.5) * step, 6) for i in range(count))


GRIDS: dict[str, tuple[float, ...]] = {
    "prompt_tokens": _geometric_edges(131072),
    "answer_tokens": _geometric_edges(131072),
    "temperature": _linear_edges(0.05, 40),
    "top_k": _geometric_edges(1024),
    "top_p": _linear_edges(0.01, 100),
    "min_p": _linear_edges(0.01, 100),
    "repetition_penalty": _linear_edges(0.05, 40),
    "max_tokens": _geometric_edges(131072),
}
"""Upper edges of the bins of each parameter, inclusive; one more bin holds what is above."""
_MAX_COUNTS_BYTES = 1 << 24


class Counts(msgspec.Struct, forbid_unknown_fields=True):
    """How often each parameter fell into each bin of its grid.

    Attributes:
        grid_version: counts of another grid cannot be compared.
        requests: number of requests counted.
        bins: counts by parameter, one per bin of `GRIDS`.
    """

    grid_version: int = GRID_VERSION
    requests: int = 0
    bins: dict[str, list[int]] = msgspec.field(
        default_factory=lambda: {name: [0] * (len(edges) + 1) for name, edges in GRIDS.items()}
    )

    def add(self, values: Mapping[str, float | None]) -> None:
        """Count one request by all parameters of `GRIDS`; None (no limit) is above any number."""
        found = {name: values[name] for name in GRIDS}
        self.requests += 1
        for name, value in found.items():
            at = math.inf if value is None else value
            self.bins[name][bisect_left(GRIDS[name], at)] += 1

    def since(self, earlier: Counts) -> Counts:
        """Subtract earlier counts; if the counters were reset in between, keep all of these."""
        pairs = {
            name: list(zip(row, earlier.bins[name], strict=True)) for name, row in self.bins.items()
        }
        if any(now < before for row in pairs.values() for now, before in row):
            return self
        return Counts(
            requests=self.requests - earlier.requests,
            bins={name: [now - before for now, before in row] for name, row in pairs.items()},
        )

    def plus(self, other: Counts) -> Counts:
        """Add two counts."""
        pairs = {n: zip(row, other.bins[n], strict=True) for n, row in self.bins.items()}
        bins = {name: [a + b for a, b in rows] for name, rows in pairs.items()}
        return Counts(requests=self.requests + other.requests, bins=bins)


class Drift(msgspec.Struct, frozen=True):
    """One parameter of a window against the baseline.

    Attributes:
        psi: the index, at least 0.
        p_value: probability of an index this large if nothing had changed.
        num_bins: bins that were compared.
        alarm: whether the index is significant and large.
    """

    psi: float
    p_value: float
    num_bins: int
    alarm: bool


@dataclass(frozen=True)
class Thresholds:
    """Bounds above which a drift is an alarm; the module's docstring explains them.

    Raises:
        ConfigError: a value out of its range.
    """

    alpha: float = ALPHA
    min_psi: float = MIN_PSI

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha is {self.alpha}; a probability between 0 and 1 is needed")
        if not self.min_psi >= 0:
            raise ConfigError(f"the least PSI of an alarm is {self.min_psi}; 0 or more is needed")


def psi(expected: Sequence[int], actual: Sequence[int]) -> float:
    """Population stability index of two rows of counts over the same bins."""
    p_total = sum(expected) + _PSEUDO_COUNT * len(expected)
    q_total = sum(actual) + _PSEUDO_COUNT * len(actual)
    result = 0.0
    for wanted, found in zip(expected, actual, strict=True):
        p, q = (wanted + _PSEUDO_COUNT) / p_total, (found + _PSEUDO_COUNT) / q_total
        result += (p - q) * math.log(p / q)
    return result


def chi_square_tail(x: float, degrees: int) -> float:
    """P(chi-square > x); exact for whole degrees of freedom (Abramowitz and Stegun 26.4.4-5)."""
    if x <= 0 or degrees < 1:
        return 1.0
    half, odd = x / 2, degrees % 2
    # Terms of a Poisson series; half-integer gamma function for odd degrees.
    term = math.exp(-half) * (math.sqrt(half) / math.gamma(1.5) if odd else 1.0)
    total = math.erfc(math.sqrt(half)) if odd else 0.0
    place = 1.5 if odd else 1.0
    for _ in range((degrees - odd) // 2):
        total += term
        term *= half / place
        place += 1
    return min(1.0, total)


def merge_bins(expected: Sequence[int], max_bins: int = MAX_BINS) -> list[tuple[int, int]]:
    """Merge neighbouring bins into ranges ``[first, last)`` of about equal shares of ``expected``.

    Bins below the first and above the last value of ``expected`` are a range of their own: values
    that the baseline has never seen must not hide beside those that it knows.
    """
    seen = [at for at, count in enumerate(expected) if count]
    if not seen:
        return [(0, len(expected))]
    total, cuts, sofar = sum(expected), [0, seen[0]], 0
    for at in range(seen[0], seen[-1] + 1):
        # A bin that holds a whole share (everybody's default) stays alone.
        if expected[at] * max_bins >= total or sofar * max_bins >= total:
            cuts.append(at)
            sofar = 0
        sofar += expected[at]
        if expected[at] * max_bins >= total:
            cuts.append(at + 1)
            sofar = 0
    cuts += [seen[-1] + 1, len(expected)]
    edges = sorted(set(cuts))
    return list(pairwise(edges))


def compare(
    baseline: Counts, window: Counts, thresholds: Thresholds | None = None
) -> dict[str, Drift]:
    """Compare every parameter of a window with the baseline.

    Raises:
        ConfigError: one of them has fewer than `MIN_REQUESTS` requests.
    """
    limits = thresholds or Thresholds()
    for what, counts in (("baseline", baseline), ("window", window)):
        if counts.requests < MIN_REQUESTS:
            raise ConfigError(
                f"the {what} has {counts.requests} requests; at least {MIN_REQUESTS} are needed to "
                "tell a drift from chance"
            )
    scale = 1 / baseline.requests + 1 / window.requests
    result = {}
    for name, row in baseline.bins.items():
        sums = [(sum(row[a:b]), sum(window.bins[name][a:b])) for a, b in merge_bins(row)]
        # A bin that nobody fell into adds no degree of freedom.
        expected, actual = zip(*(pair for pair in sums if any(pair)), strict=True)
        index = psi(expected, actual)
        p_value = chi_square_tail(index / scale, len(expected) - 1)
        significant = p_value < limits.alpha / len(baseline.bins)
        result[name] = Drift(
            index, p_value, len(expected), bool(significant and index >= limits.min_psi)
        )
    return result


class DriftMonitor:
    """Counts a running server's requests and compares each full window with a baseline.

    Windows do not overlap, so the rate of false alarms is ``alpha`` per window. Not thread-safe.

    Args:
        baseline: the usual counts, or None to count only.
        window: requests per comparison, at least `MIN_REQUESTS`.
        thresholds: when a drift is an alarm.

    Raises:
        ConfigError: too few requests in the baseline or the window.
    """

    def __init__(
        self,
        baseline: Counts | None = None,
        window: int = DEFAULT_WINDOW,
        thresholds: Thresholds | None = None,
    ) -> None:
        if window < MIN_REQUESTS:
            raise ConfigError(f"a window of {window} requests is too small; use {MIN_REQUESTS}+")
        if baseline is not None:
            compare(baseline, baseline, thresholds)  # refuses one that is too small
        self.total = Counts()
        self.last: dict[str, Drift] = {}
        self.windows = 0
        self._baseline = baseline
        self._size = window
        self._window = Counts()
        self._thresholds = thresholds

    def add(self, values: Mapping[str, float | None]) -> bool:
        """Count one request; return True if a window ended with an alarm."""
        self.total.add(values)
        if self._baseline is None:
            return False
        self._window.add(values)
        if self._window.requests < self._size:
            return False
        self.last = compare(self._baseline, self._window, self._thresholds)
        self.windows += 1
        self._window = Counts()
        return any(drift.alarm for drift in self.last.values())


# ------------------------------------------------------------------------------- files


def decode_counts(data: bytes | str, where: str) -> Counts:
    """Read counts from JSON.

    Args:
        data: JSON of `Counts`.
        where: file or address that it came from, for the message.

    Raises:
        ConfigError: no counts, or counts of another grid.
    """
    try:
        counts = msgspec.json.decode(data, type=Counts)
    except MALFORMED as error:
        raise ConfigError(f"{where} holds no counts of requests: {error}") from error
    check_counts(counts, where)
    return counts


def check_counts(counts: Counts, where: str) -> None:
    """Refuse counts of another grid, and numbers that contradict each other.

    Raises:
        ConfigError: the counts are such; ``where`` says what they came from.
    """
    shape = {name: len(edges) + 1 for name, edges in GRIDS.items()}
    if counts.grid_version != GRID_VERSION or shape != {n: len(r) for n, r in counts.bins.items()}:
        raise ConfigError(
            f"{where} counts on another grid: other parameters or bins than version {GRID_VERSION} "
            "has here; record a new baseline"
        )
    rows = counts.bins.values()
    if any(min(row) < 0 or sum(row) != counts.requests for row in rows):
        raise ConfigError(f"{where} holds counts that contradict its {counts.requests} requests")


def read_counts(path: Path) -> Counts:
    """Read counts from a file.

    Raises:
        ConfigError: it cannot be read or holds no counts.
    """
    try:
        return decode_counts(read_file(path, _MAX_COUNTS_BYTES), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all: a reader never sees half of it.

    Raises:
        ConfigError: the directory is missing or full, or not writable, or another process is
            writing the file.
    """
    try:
        # A metrics collector that runs as another user reads it.
        replace_durably(path, lambda file: file.write(data), mode=0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error

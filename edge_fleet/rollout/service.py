"""Observes a running service during a trial: the bundle it serves, its speed, its errors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

from edge.errors import BackendError, ConfigError
from edge_lab.measure.watch import Answerer, GoldenItem
from edge_lab.measure.watch_server import ServerAnswerer

POLL_S = 5.0
MAX_SLOWDOWN = 1.5
"""Ratio of seconds per token after the first to the old bundle's from which on it is slow."""
_PROBES = 4
_PROBE_TOKENS = 32
_LEAST_PROBES = 8
_SILENCE_S = 30.0
_LEAST_ERRORS = 3
_MORE_ERRORS = 0.02
_ERRORS = ("error", "deadline")
_ENDED = "the service ended during the trial and was started again; look at its log"


class LoadingError(BackendError):
    """The service has just started and has not opened the bundle yet."""


class UnknownModelError(ConfigError):
    """The service has only other models."""


@dataclass(frozen=True)
class Sight:
    """The state of the service at one moment.

    Attributes:
        fingerprint: identifies the bundle that it serves under the name; None while it serves none.
        failed: whether its engine has failed.
        ended: number of sequences of all models that have ended since it started.
        errors: how many of them ended with an error.
        drifting: parameters of requests with an alarm about drift.
        uptime_s: seconds since it started.
    """

    fingerprint: str | None
    failed: bool
    ended: int
    errors: int
    drifting: frozenset[str]
    uptime_s: float


class Service:
    """A running ``edge-llm serve``.

    Args:
        server: client of the service.
        model: name under which it serves the bundle; None if it serves only one.
    """

    def __init__(self, server: ServerAnswerer, model: str | None) -> None:
        self.answerer: Answerer = server
        self.server = server
        self._model = model
        self._was_open = False

    def look(self) -> Sight:
        """Ask for its state.

        Raises:
            ConfigError: it refuses the key, or is an older edge-llm.
            UnknownModelError: it does not serve the model.
            LoadingError: it is opening its bundles.
            BackendError: it does not answer.
        """
        stats = self.server.stats()
        try:
            models: dict[str, Any] = stats["models"]
            name = self._model
            if not models or (self._was_open and name not in models):
                raise LoadingError("the service has not opened the bundle yet; try again later")
            if name is None:
                if len(models) != 1:
                    raise ConfigError(
                        f"the service has {len(models)} models ({', '.join(models)}); say with "
                        "--model which one is rolled out"
                    )
                (name,) = models
                self._model = self.server.model = name
            model = models.get(name)
            if model is None:
                raise UnknownModelError(
                    f"the service has no model {name!r}, only {', '.join(models)}"
                )
            requests: dict[str, int] = stats["requests"]
            drift: dict[str, Any] = stats["drift"]["params"]
            self._was_open = True
            return Sight(
                model.get("fingerprint"),
                bool(model.get("failed")),
                sum(requests.values()),
                sum(requests.get(outcome, 0) for outcome in _ERRORS),
                frozenset(key for key, value in drift.items() if value["alarm"]),
                float(stats["uptime_s"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"/stats of the service has another form ({error!r}); is it this edge-llm?"
            ) from error

    def is_loading(self) -> bool:
        """Whether it answers but is still opening its bundles."""
        try:
            self.look()
        except LoadingError:
            return True
        except BackendError:
            return False
        return False

    def wait_for(self, fingerprint: str, timeout_s: float) -> bool:
        """Wait until it serves a bundle; return whether it does in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self.look().fingerprint == fingerprint:
                    return True
            except BackendError:
                pass  # it may be restarting; the deadline counts
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def pace(self, items: Sequence[GoldenItem]) -> list[float]:
        """Ask a few prompts; return seconds per token after the first, for each longer answer.

        They are the service's own figures, without the wait in its queue and the prefill.

        Raises:
            ConfigError, BackendError: the service refuses or fails (`ServerAnswerer.answer`).
        """
        answers = [self.answerer.answer(item.prompt, _PROBE_TOKENS) for item in items[:_PROBES]]
        return [answer.tpot_s for answer in answers if answer.tpot_s is not None]

    def watch(
        self,
        fingerprint: str,
        before: Sight,
        paces: list[float],
        items: Sequence[GoldenItem],
        watch_s: float,
        progress: Callable[[float], None],
    ) -> str | None:
        """Watch a new bundle for a while; return what is wrong with it, None if nothing is.

        Args:
            fingerprint: fingerprint of the new bundle.
            before: state of the service with the old one.
            paces: the old bundle's paces, from `pace`, two or more; empty leaves speed out.
            items: prompts to ask.
            watch_s: seconds to watch.
            progress: called with the seconds that have passed.

        Raises:
            BackendError: it falls silent or answers only with errors, turns to another bundle, or
                was restarted meanwhile by anybody.
        """
        began = time.monotonic()
        silent: float | None = None
        lost: BackendError | None = None
        first: Sight | None = None
        uptime_s = 0.0
        found: list[float] = []
        while True:
            try:
                found += self.pace(items) if paces else []
                lost = None
            except BackendError as error:
                if not _is_busy(error):  # a full queue says nothing about the bundle
                    lost = error
            asked = time.monotonic()
            try:
                sight = self.look()
            except LoadingError as error:
                raise BackendError(_ENDED) from error
            except BackendError as error:
                lost = error
            else:
                if sight.uptime_s < uptime_s:
                    raise BackendError(_ENDED)
                if sight.fingerprint not in (None, fingerprint):
                    raise BackendError(
                        f"the service turned to {sight.fingerprint}; look at its log"
                    )
                uptime_s, first = sight.uptime_s, first or sight
                fault = _fault(sight, first, before) or _late(found, paces)
                if fault is not None:
                    return fault
            if lost is None:
                silent = None
            else:
                silent = silent or asked
                if time.monotonic() - silent > min(_SILENCE_S, watch_s):
                    raise lost
            passed = time.monotonic() - began
            progress(min(passed, watch_s))
            if passed >= watch_s and lost is None:
                return None
            time.sleep(min(POLL_S, watch_s / 10))


def _is_busy(error: BackendError) -> bool:
    """Whether a server refused a request because it has too many."""
    cause = error.__cause__
    return isinstance(cause, HTTPError) and cause.code == 429


def _fault(sight: Sight, first: Sight, before: Sight) -> str | None:
    if sight.failed:
        return "the engine has failed"
    if sight.fingerprint is None:
        return "the service serves the new bundle no more"
    errors, ended = sight.errors - first.errors, sight.ended - first.ended
    usual = before.errors / before.ended if before.ended else 0.0
    if errors >= _LEAST_ERRORS and errors / max(ended, 1) > usual + _MORE_ERRORS:
        return f"{errors} of {ended} requests ended with an error, before {usual:.1%}"
    if new := sight.drifting - before.drifting:
        return f"what clients ask for drifts: {', '.join(sorted(new))}"
    return None


def _late(found: list[float], paces: list[float]) -> str | None:
    if len(found) < _LEAST_PROBES or not paces:
        return None
    now, then = statistics.median(found), statistics.median(paces)
    if now <= MAX_SLOWDOWN * then:
        return None
    return f"a token takes {now * 1e3:.1f} ms, with the old bundle {then * 1e3:.1f} ms"

"""Counts what the server does: Prometheus text for ``/metrics``, plain JSON for ``/stats``.

Names follow Prometheus: prefix ``edgellm_``, base units, ``_total`` on counters. Histograms have
vLLM's bucket edges, so that its dashboards need only other names; ``vllm_names`` adds the names
themselves. The state of the scheduler and of the device is read on each scrape, never copied.
Percentiles of ``/stats`` are exact over the last requests (at most `WINDOW_VALUES` values, at most
``window_s`` old), so memory is bounded however long the server runs.

One "request" here is one generated sequence: a request with ``n = 3`` counts three times.
"""

from __future__ import annotations

import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edge import __version__
from edge.errors import DependencyError, install_command
from edge.runtime.generation import FinishReason, GenerationStats
from edge.runtime.sampling_params import KNOBS, SamplingParams
from edge.runtime.scheduler.request import SchedulerStats
from edge_lab.measure.drift import DriftMonitor
from edge_lab.telemetry import Snapshot

from .metric_families import (
    VLLM_NAMES,
    BulkHistogram,
    EngineInfo,
    Pulled,
    View,
    device_families,
    engine_families,
    engine_state,
    gauge,
    scheduler_families,
    scheduler_state,
)

if TYPE_CHECKING:
    from prometheus_client.core import Metric

WINDOW_VALUES = 4096
"""Values kept per model and kind for the percentiles: 32 kB each."""
MAX_LABELS = 32
"""The most different values of one label; any further one counts as ``other``."""

Outcome = Literal["stop", "length", "abort", "error", "deadline"]

_FAST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
TTFT_BUCKETS_S = (*_FAST_S, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
ITL_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
PARAM_BUCKETS: dict[str, tuple[float, ...]] = {
    "temperature": (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0),
    "top_k": (0.0, 1.0, 10.0, 20.0, 40.0, 50.0, 100.0, 1000.0),
    "top_p": (0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0),
    "min_p": (0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0),
    "repetition_penalty": (0.9, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0),
    "max_tokens": tuple(float(f * 10**e) for e in range(5) for f in (1, 2, 5)),
}
"""Upper bucket edges of the histograms of sampling parameters."""
_PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_TELEMETRY_AGE_S = 1.0  # a reading takes some 2 ms; scrapes and pages share one


class Metrics:
    """Counters, histograms and gauges of one server, in a registry of their own.

    All methods may be called from any thread.

    Args:
        scheduler_stats: returns the schedulers' state by model; called on each scrape.
        telemetry: returns the device's state; called at most once a second and once at a time. None
            leaves it out.
        engines: describes the engine of each model.
        drift: compares requests with a baseline; the default has none.
        vllm_names: whether to expose vLLM's names, too.
        window_s: age up to which ``/stats`` looks back.
        clock: returns monotonic seconds.

    Raises:
        DependencyError: prometheus-client is missing.
    """

    def __init__(
        self,
        scheduler_stats: Callable[[], Mapping[str, SchedulerStats]],
        *,
        telemetry: Callable[[], Snapshot] | None = None,
        engines: Callable[[], Mapping[str, EngineInfo]] | None = None,
        drift: DriftMonitor | None = None,
        vllm_names: bool = False,
        window_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise DependencyError(
                f"the server's metrics need prometheus-client; run: {install_command('serve')}"
            ) from error
        self._scheduler_stats = scheduler_stats
        self._engines = engines
        self._telemetry = telemetry
        self._snapshot = (-float("inf"), Snapshot())
        self._looking = threading.Lock()
        self._drift = drift or DriftMonitor()
        self._vllm_names = vllm_names
        self._window_s = window_s
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._windows: dict[str, dict[str, _Window]] = {}
        self._arm_windows: dict[str, dict[str, _Window]] = {}
        self._known: dict[str, set[str]] = {}
        self.registry = prometheus_client.CollectorRegistry()
        self._make(prometheus_client)
        self.registry.register(Pulled(self._collect))
        build = prometheus_client.Info("edgellm_build", "Versions.", registry=self.registry)
        build.info({"version": __version__, "python": platform.python_version()})

    def _make(self, prometheus: Any) -> None:
        def histogram(name: str, text: str, edges: Iterable[float], label: str = "model") -> Any:
            return prometheus.Histogram(
                f"edgellm_{name}", text, [label], registry=self.registry, buckets=tuple(edges)
            )

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"edgellm_{name}", text, labels, registry=self.registry)

        self._ttft = histogram(
            "time_to_first_token_seconds", "Submission to first token.", TTFT_BUCKETS_S
        )
        self._itl = BulkHistogram("inter_token_seconds", "Gap between tokens.", ITL_BUCKETS_S)
        self._queue = histogram(
            "request_queue_seconds", "Submission to start of prefill.", REQUEST_BUCKETS_S
        )
        self._total = histogram("request_seconds", "Submission to last token.", REQUEST_BUCKETS_S)
        self._prefill = histogram(
            "request_prefill_seconds", "Start of prefill to first token.", REQUEST_BUCKETS_S
        )
        self._decode = histogram(
            "request_decode_seconds", "First to last token.", REQUEST_BUCKETS_S
        )
        self._params = {
            name: histogram(f"request_{name}", f"{name} asked for.", buckets)
            for name, buckets in PARAM_BUCKETS.items()
        }
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model", "cached")
        self._generated = counter("generation_tokens", "Tokens sampled.", "model", "phase")
        self._asked = counter("prefix_cache_queries", "Prompt tokens looked up.", "model")
        self._hit = counter("prefix_cache_hit_tokens", "Prompt tokens found.", "model")
        self._requests = counter("requests", "Sequences by outcome.", "model", "outcome")
        self._rejections = counter("rejections", "Requests refused, by reason.", "reason")
        self._ignored_clients = counter(
            "ignored_client_headers", "Headers x-edge-client that no trusted proxy sent."
        )
        self._ignored_fields = counter("ignored_fields", "Unknown fields of requests, ignored.")
        self._routes = counter("route_decisions", "Choices of the model 'auto'.", "rule", "model")
        self._adapters = counter("adapter_requests", "Requests by adapter.", "model", "adapter")
        self._loads = counter("model_loads", "Models loaded for a request.", "model", "outcome")
        self._unloads = counter("model_unloads", "Models unloaded, by reason.", "model", "reason")
        self._load_s = histogram("model_load_seconds", "Time to load a model.", REQUEST_BUCKETS_S)
        self._arms = counter("ab_requests", "Requests by arm of an A/B split.", "arm", "model")
        self._arm_outcomes = counter("ab_sequences", "The arms' outcomes.", "arm", "outcome")
        self._arm_tokens = counter("ab_generation_tokens", "Tokens sampled by arms.", "arm")
        self._arm_ttft = histogram(
            "ab_time_to_first_token_seconds",
            "Submission to first token, by arm of an A/B split.",
            TTFT_BUCKETS_S,
            "arm",
        )
        self._arm_total = histogram(
            "ab_request_seconds", "Submission to last token, by arm.", REQUEST_BUCKETS_S, "arm"
        )
        self._arm_itl = BulkHistogram(
            "ab_inter_token_seconds", "Gap between tokens, by arm.", ITL_BUCKETS_S, "arm"
        )

    # --------------------------------------------------------------------------- observing

    def observe_finish(
        self,
        model: str,
        stats: GenerationStats,
        finish_reason: FinishReason,
        params: SamplingParams,
        reasoning_tokens: int = 0,
        *,
        is_asked: bool = True,
        arm: str | None = None,
    ) -> bool:
        """Count a sequence that ended, even if it was cancelled.

        Args:
            model: name under which the sequence's model is served.
            stats: figures of the sequence.
            finish_reason: ``cancelled`` counts as the outcome ``abort``.
            params: resolved sampling parameters: none is None.
            reasoning_tokens: how many of ``stats.completion_tokens`` are reasoning.
            is_asked: whether a client asked for it: not ``edge-llm watch``, and once for a request
                of several sequences, since those are not independent requests.
            arm: arm of an A/B split.

        Returns:
            Whether a window of requests ended with an alarm about drift.
        """
        model = self._label("model", model)
        outcome = "abort" if finish_reason == "cancelled" else finish_reason
        self._requests.labels(model, outcome).inc()
        if stats.has_started:
            self._count_prompt(model, stats)
        self._generated.labels(model, "reasoning").inc(reasoning_tokens)
        self._generated.labels(model, "answer").inc(stats.completion_tokens - reasoning_tokens)
        if stats.completion_tokens:
            self._observe_times(model, stats)
        if arm is not None:
            self._observe_arm(self._label("arm", arm), stats, outcome)
        if not is_asked:
            return False
        asked: dict[str, float | None] = {name: getattr(params, name) for name in KNOBS}
        for name, family in self._params.items():
            if asked[name] is not None:  # no max_tokens: an infinite one would spoil the sum
                family.labels(model).observe(asked[name])
        asked["prompt_tokens"] = stats.prompt_tokens
        asked["answer_tokens"] = stats.completion_tokens
        with self._lock:
            return self._drift.add(asked)

    def observe_pooled(self, model: str, stats: GenerationStats) -> None:
        """Count a text that was embedded, or a document that was ranked.

        Nothing was sampled, so it counts in no family about sampling and its times, and not for
        drift.

        Args:
            model: name under which the model is served.
            stats: figures of the text.
        """
        model = self._label("model", model)
        self._requests.labels(model, "stop").inc()
        self._count_prompt(model, stats)
        self._queue.labels(model).observe(stats.queue_s)
        self._total.labels(model).observe(stats.total_s)

    def _count_prompt(self, model: str, stats: GenerationStats) -> None:
        self._prompt.labels(model, "true").inc(stats.cached_tokens)
        self._prompt.labels(model, "false").inc(stats.prompt_tokens - stats.cached_tokens)
        self._asked.labels(model).inc(stats.prompt_tokens)
        self._hit.labels(model).inc(stats.cached_tokens)

    def _observe_times(self, model: str, stats: GenerationStats) -> None:
        self._ttft.labels(model).observe(stats.ttft_s)
        self._queue.labels(model).observe(stats.queue_s)
        self._total.labels(model).observe(stats.total_s)
        self._prefill.labels(model).observe(max(0.0, stats.ttft_s - stats.queue_s))
        self._decode.labels(model).observe(max(0.0, stats.total_s - stats.ttft_s))
        now = self._clock()
        with self._lock:
            self._itl.add(model, stats.itl_s)
            _add_times(self._windows.setdefault(model, {}), now, stats)

    def _observe_arm(self, arm: str, stats: GenerationStats, outcome: str) -> None:
        self._arm_outcomes.labels(arm, outcome).inc()
        self._arm_tokens.labels(arm).inc(stats.completion_tokens)
        if not stats.completion_tokens:
            return
        self._arm_ttft.labels(arm).observe(stats.ttft_s)
        self._arm_total.labels(arm).observe(stats.total_s)
        now = self._clock()
        with self._lock:
            self._arm_itl.add(arm, stats.itl_s)
            _add_times(self._arm_windows.setdefault(arm, {}), now, stats)

    def observe_error(
        self, model: str, outcome: Outcome = "error", *, arm: str | None = None
    ) -> None:
        """Count a sequence that ended without statistics, by an error or its deadline."""
        self._requests.labels(self._label("model", model), outcome).inc()
        if arm is not None:
            self._arm_outcomes.labels(self._label("arm", arm), outcome).inc()

    def observe_rejection(self, reason: str) -> None:
        """Count a request that was refused before it became a sequence.

        Args:
            reason: a code of the server, e.g. ``queue_full``; never text from a client.
        """
        self._rejections.labels(self._label("reason", reason)).inc()

    def observe_ignored_fields(self, count: int) -> None:
        """Count fields of a request that were ignored because of ``unknown_fields``."""
        self._ignored_fields.inc(count)

    def observe_ignored_client(self) -> None:
        """Count a header ``x-edge-client`` that did not come from a trusted proxy."""
        self._ignored_clients.inc()

    def observe_route(self, rule: str, model: str) -> None:
        """Count a decision of the model ``auto``."""
        self._routes.labels(self._label("rule", rule), self._label("model", model)).inc()

    def observe_adapter(self, model: str, adapter: str) -> None:
        """Count a request for an adapter."""
        self._adapters.labels(self._label("model", model), self._label("adapter", adapter)).inc()

    def observe_load(self, model: str, took_s: float | None) -> None:
        """Count a model that was loaded after the start; None if loading failed."""
        model = self._label("model", model)
        self._loads.labels(model, "error" if took_s is None else "loaded").inc()
        if took_s is not None:
            self._load_s.labels(model).observe(took_s)

    def observe_unload(self, model: str, reason: str) -> None:
        """Count a model that was unloaded, with the loader's reason."""
        self._unloads.labels(self._label("model", model), reason).inc()

    def observe_arm(self, arm: str, model: str) -> None:
        """Count a request of an A/B split; its outcome is counted when it ends."""
        self._arms.labels(self._label("arm", arm), self._label("model", model)).inc()

    def _label(self, kind: str, value: str) -> str:
        """Limit a label's values to `MAX_LABELS`; any further one is ``other``."""
        with self._lock:
            known = self._known.setdefault(kind, set())
            if value not in known and len(known) >= MAX_LABELS:
                return "other"
            known.add(value)
        return value

    # --------------------------------------------------------------------------- reading

    def render(self) -> bytes:
        """Write all metrics in Prometheus' text format (`metric_families.CONTENT_TYPE`)."""
        from prometheus_client import generate_latest

        text: bytes = generate_latest(View(self.registry))
        if self._vllm_names:
            text += generate_latest(View(self.registry, VLLM_NAMES))
        return text

    def stats_json(self) -> dict[str, Any]:
        """Write them for people without Prometheus, with percentiles of the last requests."""
        schedulers = self._scheduler_stats()
        engines = {} if self._engines is None else self._engines()
        now = self._clock()
        with self._lock:
            names = dict.fromkeys([*schedulers, *engines, *self._windows])
            oldest = now - self._window_s
            latency = {name: _summaries(self._windows.get(name, {}), oldest) for name in names}
            arm_latency = {
                arm: _summaries(windows, oldest) for arm, windows in self._arm_windows.items()
            }
            drift = {name: msgspec.to_builtins(value) for name, value in self._drift.last.items()}
            asked = msgspec.to_builtins(self._drift.total)
            windows = self._drift.windows
        return {
            "version": __version__,
            "uptime_s": round(now - self._started, 3),
            "window_s": self._window_s,
            "models": {
                name: {
                    **scheduler_state(schedulers.get(name)),
                    **engine_state(engines.get(name)),
                    "latency": latency[name],
                }
                for name in names
            },
            "requests": self._sum(self._requests, "outcome"),
            "generation_tokens": self._sum(self._generated, "phase"),
            "rejections": self._sum(self._rejections, "reason"),
            "routes": self._sum(self._routes, "rule"),
            "arms": self._sum(self._arms, "arm"),
            "arm_latency": arm_latency,
            "device": msgspec.to_builtins(self._device()),
            "drift": {"windows": windows, "params": drift},
            "asked": asked,
        }

    @staticmethod
    def _sum(counter: Any, label: str) -> dict[str, int]:
        """Sum a counter by one label, over all others."""
        totals: dict[str, int] = {}
        for family in counter.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    key = sample.labels[label]
                    totals[key] = totals.get(key, 0) + int(sample.value)
        return totals

    def _device(self) -> Snapshot | None:
        if self._telemetry is None:
            return None
        now = self._clock()
        # A reading may hang, and its thread with it: until it ends, the last one counts.
        if now - self._snapshot[0] > _TELEMETRY_AGE_S and self._looking.acquire(blocking=False):
            try:
                self._snapshot = (now, self._telemetry())
            finally:
                self._looking.release()
        return self._snapshot[1]

    def _collect(self) -> Iterator[Metric]:
        schedulers = self._scheduler_stats()
        yield from scheduler_families(schedulers)
        if self._engines is not None:
            engines = self._engines()
            loaded_now = {name: engines[name] for name in schedulers if name in engines}
            yield from engine_families(loaded_now)
            loaded: dict[tuple[str, ...], float | None] = {
                (name,): float(name in schedulers) for name in engines
            }
            yield gauge("model_loaded", "1 while the model is loaded.", ("model",), loaded)
        snapshot = self._device()
        if snapshot is not None:
            yield from device_families(snapshot)
        with self._lock:
            drift = dict(self._drift.last)
            gaps, arm_gaps = self._itl.family(), self._arm_itl.family()
        yield gaps
        yield arm_gaps
        yield gauge(
            "sampling_drift_psi",
            "Population stability index of the last full window against the baseline.",
            ("param",),
            {(name,): value.psi for name, value in drift.items()},
        )
        yield gauge(
            "sampling_drift_alarm",
            "1 while the last full window differs from the baseline by more than chance.",
            ("param",),
            {(name,): float(value.alarm) for name, value in drift.items()},
        )


# ------------------------------------------------------------------------------- percentiles


class _Window:
    """The latest values with their times, a bounded number of them."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=WINDOW_VALUES)

    def add(self, now: float, values: Iterable[float]) -> None:
        self._values.extend((now, value) for value in values)

    def summary(self, oldest: float) -> dict[str, float | int | None]:
        """Count the values not older than ``oldest``, with percentiles (nearest rank)."""
        while self._values and self._values[0][0] < oldest:
            self._values.popleft()
        ordered = sorted(value for _, value in self._values)
        result: dict[str, float | int | None] = {"count": len(ordered)}
        for name, share in _PERCENTILES.items():
            at = max(0, ceil(share * len(ordered)) - 1)
            result[name] = round(ordered[at], 6) if ordered else None
        return result


def _add_times(windows: dict[str, _Window], now: float, stats: GenerationStats) -> None:
    for name, values in (
        ("ttft_s", [stats.ttft_s]),
        ("itl_s", stats.itl_s),
        ("queue_s", [stats.queue_s]),
        ("total_s", [stats.total_s]),
    ):
        windows.setdefault(name, _Window()).add(now, values)


def _summaries(
    windows: Mapping[str, _Window], oldest: float
) -> dict[str, dict[str, float | int | None]]:
    return {kind: window.summary(oldest) for kind, window in windows.items()}

"""Makes the metric families that are computed on each scrape: scheduler, engine, device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.runtime.scheduler.request import SchedulerStats
from edge_lab.telemetry import Snapshot

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of Prometheus' text format."""
# vLLM's names (its page "Production Metrics") for those of ours that mean the same.
VLLM_NAMES = {
    "edgellm_requests_running": "vllm:num_requests_running",
    "edgellm_requests_waiting": "vllm:num_requests_waiting",
    "edgellm_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "edgellm_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "edgellm_inter_token_seconds": "vllm:inter_token_latency_seconds",
    "edgellm_request_seconds": "vllm:e2e_request_latency_seconds",
    "edgellm_request_queue_seconds": "vllm:request_queue_time_seconds",
    "edgellm_request_prefill_seconds": "vllm:request_prefill_time_seconds",
    "edgellm_request_decode_seconds": "vllm:request_decode_time_seconds",
    "edgellm_prefix_cache_queries": "vllm:prefix_cache_queries",
    "edgellm_prefix_cache_hit_tokens": "vllm:prefix_cache_hits",
    "edgellm_prompt_tokens": "vllm:prompt_tokens",
    "edgellm_generation_tokens": "vllm:generation_tokens",
}
_VLLM_LABELS = {"model": "model_name"}


class Pulled:
    """A collector whose values are computed on each scrape."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        """Make the families."""
        return self._collect()

    def describe(self) -> list[Metric]:
        """Name no families in advance."""
        # Otherwise the registry would collect once before anything is loaded.
        return []


class BulkHistogram:
    """A histogram with one label that takes thousands of values at once: the gaps of a long answer.

    prometheus-client's own takes 2 us for each value, in the thread that serves everybody. This one
    is not thread-safe.

    Args:
        name: name of the metric without the prefix.
        text: description of the metric.
        edges: upper edges of the buckets, ascending, without infinity.
        label: name of the label.
    """

    def __init__(
        self, name: str, text: str, edges: tuple[float, ...], label: str = "model"
    ) -> None:
        self._label = label
        self._name = f"edgellm_{name}"
        self._text = text
        self._edges = np.asarray(edges)
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}

    def add(self, key: str, values: Sequence[float]) -> None:
        """Count values; an edge belongs to its own bucket."""
        places = np.searchsorted(self._edges, np.asarray(values, dtype=np.float64))
        found = np.bincount(places, minlength=len(self._edges) + 1)
        self._counts[key] = self._counts.get(key, 0) + found
        self._sums[key] = self._sums.get(key, 0.0) + float(sum(values))

    def family(self) -> Metric:
        """Make the family of the histogram as it is now."""
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        names = [*(repr(edge) for edge in self._edges.tolist()), "+Inf"]
        for key, counts in self._counts.items():
            buckets = list(zip(names, np.cumsum(counts).tolist(), strict=True))
            family.add_metric([key], buckets, self._sums[key])
        return family


class View:
    """A view of a registry without creation times, which would double the number of series.

    With ``names`` it shows only those families, under these names and with vLLM's labels.
    """

    def __init__(self, registry: Any, names: Mapping[str, str] | None = None) -> None:
        self._registry = registry
        self._names = names

    def collect(self) -> Iterator[Metric]:
        """Yield the families that are shown."""
        for family in self._registry.collect():
            kept = [sample for sample in family.samples if not sample.name.endswith("_created")]
            if self._names is not None:
                name = self._names.get(family.name)
                if name is None:
                    continue
                kept = [
                    sample._replace(
                        name=name + sample.name[len(family.name) :],
                        labels={_VLLM_LABELS.get(k, k): v for k, v in sample.labels.items()},
                    )
                    for sample in kept
                ]
                family.name = name
            family.samples = kept
            yield family


def gauge(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float | None]
) -> Metric:
    """Make a gauge; a value of None could not be read and is left out."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"edgellm_{name}", text, labels=labels)
    for key, value in values.items():
        if value is not None:
            family.add_metric(list(key), value)
    return family


_STATE = {
    "requests_running": ("running", "Sequences that hold a slot."),
    "requests_waiting": ("waiting", "Requests in the queue."),
    "queue_capacity": ("queue_capacity", "Requests that the queue takes."),
    "slots": ("num_slots", "Slots of the KV cache."),
    "kv_cache_used_tokens": ("kv_used_tokens", "Cache rows of running sequences."),
    "kv_cache_kept_tokens": ("kv_cached_tokens", "Cache rows kept for reuse."),
    "kv_cache_capacity_tokens": ("kv_capacity_tokens", "Cache rows in all."),
    "draft_saved_seconds": (
        "draft_saved_s",
        "Seconds that drafts have saved against plain decode; negative where they cost more.",
    ),
}
_COUNTED = {
    "sequences_preempted": (
        "preempted",
        "Times that a running sequence had to wait for another client's.",
    ),
    "sequences_put_aside": ("preempted", "The same by its old name, for this release."),
    "drafted_tokens": ("drafted_tokens", "Tokens guessed by speculative decoding."),
    "accepted_tokens": ("accepted_tokens", "Guessed tokens that were right."),
    "draft_steps": ("draft_steps", "Decode steps for which tokens were guessed."),
    "engine_steps": ("steps", "Calls of the engine."),
}


def scheduler_families(schedulers: Mapping[str, SchedulerStats]) -> Iterator[Metric]:
    """Make the families of every model's queue, slots, cache and counters."""
    from prometheus_client.core import CounterMetricFamily

    for name, (attribute, text) in _STATE.items():
        values: dict[tuple[str, ...], float | None] = {
            (model,): float(getattr(stats, attribute)) for model, stats in schedulers.items()
        }
        yield gauge(name, text, ("model",), values)
    yield gauge(
        "kv_cache_usage_ratio",
        "Share of the cache's rows that running sequences use.",
        ("model",),
        {(model,): _usage(s) for model, s in schedulers.items()},
    )
    yield gauge(
        "engine_failed",
        "1 if the engine can serve no more.",
        ("model",),
        {(model,): float(s.failed is not None) for model, s in schedulers.items()},
    )
    yield gauge(
        "drafts_failed",
        "1 if nothing is drafted any more since the draft model failed.",
        ("model",),
        {(model,): float(s.drafts_failed is not None) for model, s in schedulers.items()},
    )
    for name, (attribute, text) in _COUNTED.items():
        family = CounterMetricFamily(f"edgellm_{name}", text, labels=["model"])
        for model, stats in schedulers.items():
            family.add_metric([model], getattr(stats, attribute))
        yield family


class EngineInfo(NamedTuple):
    """A description of the engine that serves a model.

    Attributes:
        labels: labels of ``edgellm_engine_info``: backend, quantization and the like.
        warning: why the CPU computes on a machine with a GPU although nobody chose that, why
            sequences take turns, and what makes the engine slow; None if nothing does.
        stop_counts: counts of early stops (`edge.LLM`); empty if the model is not loaded.
    """

    labels: dict[str, str]
    warning: str | None
    stop_counts: Mapping[str, int] = {}


def engine_families(engines: Mapping[str, EngineInfo]) -> Iterator[Metric]:
    """Make the families about each model's engine, and about its trials of thoughts."""
    from prometheus_client.core import CounterMetricFamily, InfoMetricFamily

    family = InfoMetricFamily("edgellm_engine", "What serves a model.", labels=["model"])
    text, labels = "Trials of thoughts, and thoughts that one has ended.", ["model", "outcome"]
    stops = CounterMetricFamily("edgellm_stop_when_sure", text, labels=labels)
    for model, engine in engines.items():
        family.add_metric([model], engine.labels)
        for outcome, count in engine.stop_counts.items():
            stops.add_metric([model, outcome], count)
    yield from (family, stops)


def _usage(stats: SchedulerStats) -> float:
    return stats.kv_used_tokens / stats.kv_capacity_tokens if stats.kv_capacity_tokens else 0.0


def engine_state(engine: EngineInfo | None) -> dict[str, Any]:
    """Describe an engine for JSON; nothing is known about one that is not loaded."""
    if engine is None:
        return {}
    shown = ("backend", "engine", "bundle", "quantization", "fingerprint")
    labels = {name: engine.labels[name] for name in shown if name in engine.labels}
    return {**labels, "warning": engine.warning, "stop_counts": engine.stop_counts}


def scheduler_state(stats: SchedulerStats | None) -> dict[str, Any]:
    """Write a scheduler's state for JSON.

    Why an engine failed stays in the log, since the reason may contain paths.
    """
    if stats is None:
        return {"loaded": False}
    names = [attribute for attribute, _ in (*_STATE.values(), *_COUNTED.values())]
    names += ["prompt_tokens", "cached_tokens", "completion_tokens"]
    return {
        "loaded": True,
        "failed": stats.failed is not None,
        "drafts_failed": stats.drafts_failed is not None,
        "kv_cache_usage_ratio": round(_usage(stats), 6),
        "slots": [slot._asdict() for slot in stats.slots],
        **{name: getattr(stats, name) for name in names},
        "put_aside": stats.preempted,  # its old name, for this release
    }


def device_families(seen: Snapshot) -> Iterator[Metric]:
    """Make the families of the device's figures; unreadable ones are left out."""
    for name, text, value in (
        ("gpu_load_ratio", "Load of the GPU.", seen.gpu_load_ratio),
        ("gpu_freq_hz", "Clock of the GPU.", seen.gpu_clock_hz),
        ("memory_available_bytes", "Memory that is left.", seen.memory_available_bytes),
        ("throttled", "1 while heat holds clocks down.", seen.throttled),
        ("over_current_events", "Over-current events since boot.", seen.over_current_events),
        ("module_power_watts", "Power of the module.", seen.module_power_watts),
    ):
        yield gauge(name, text, (), {(): None if value is None else float(value)})
    used = None
    if seen.memory_total_bytes is not None and seen.memory_available_bytes is not None:
        used = float(seen.memory_total_bytes - seen.memory_available_bytes)
    rss = seen.process_rss_bytes
    yield gauge(
        "memory_used_bytes",
        "Memory in use; on Orin the system's is the GPU's too.",
        ("pool",),
        {("system",): used, ("process",): None if rss is None else float(rss)},
    )
    for name, text, label, values in (
        ("temperature_celsius", "Temperature by thermal zone.", "zone", seen.temperatures_celsius),
        ("power_watts", "Power by rail.", "rail", seen.power_watts),
    ):
        named: dict[tuple[str, ...], float | None] = {(k,): v for k, v in values.items()}
        yield gauge(name, text, (label,), named)

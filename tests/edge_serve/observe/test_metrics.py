"""Exact counts, text that Prometheus reads, and memory that does not grow."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from edge import __version__
from edge.bundle.manifest import SamplingDefaults
from edge.runtime.generation import GenerationStats
from edge.runtime.sampling_params import DEFAULTED, KNOBS, SamplingParams
from edge.runtime.scheduler.request import SchedulerStats, SlotState
from edge_lab.measure.drift import Counts, DriftMonitor
from edge_lab.telemetry import Snapshot
from edge_serve.observe.metric_families import BulkHistogram, EngineInfo
from edge_serve.observe.metrics import (
    ITL_BUCKETS_S,
    MAX_LABELS,
    PARAM_BUCKETS,
    REQUEST_BUCKETS_S,
    TTFT_BUCKETS_S,
    WINDOW_VALUES,
    Metrics,
)

PARAMS = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=100).resolve(SamplingDefaults())
STATS = GenerationStats(
    prompt_tokens=10,
    cached_tokens=4,
    completion_tokens=3,
    has_started=True,
    queue_s=0.25,
    ttft_s=0.75,
    total_s=1.25,
    itl_s=[0.2, 0.3],
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def idle() -> dict[str, SchedulerStats]:
    return {"r1": SchedulerStats()}


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the text, read back by Prometheus' own parser."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} stands there twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[(f"edgellm_{name}", frozenset(labels.items()))]


def test_counts_are_exact():
    metrics = Metrics(idle)
    for _ in range(10):
        metrics.observe_finish("r1", STATS, "stop", PARAMS, reasoning_tokens=1)
    metrics.observe_finish("r1", STATS, "length", PARAMS)
    metrics.observe_finish("r1", STATS, "cancelled", PARAMS, reasoning_tokens=3)
    metrics.observe_error("r1")
    metrics.observe_error("r1", "deadline")
    for _ in range(3):
        metrics.observe_rejection("queue_full")
    for outcome, number in {"stop": 10, "length": 1, "abort": 1, "error": 1, "deadline": 1}.items():
        assert value(metrics, "requests_total", model="r1", outcome=outcome) == number
    assert value(metrics, "rejections_total", reason="queue_full") == 3
    assert value(metrics, "prompt_tokens_total", model="r1", cached="true") == 12 * 4
    assert value(metrics, "prompt_tokens_total", model="r1", cached="false") == 12 * 6
    assert value(metrics, "generation_tokens_total", model="r1", phase="reasoning") == 13
    assert value(metrics, "generation_tokens_total", model="r1", phase="answer") == 12 * 3 - 13
    assert value(metrics, "prefix_cache_queries_total", model="r1") == 120
    assert value(metrics, "prefix_cache_hit_tokens_total", model="r1") == 48
    for name, total in {
        "time_to_first_token_seconds": 0.75,
        "request_seconds": 1.25,
        "request_queue_seconds": 0.25,
        "request_prefill_seconds": 0.5,
        "request_decode_seconds": 0.5,
        "request_temperature": 0.6,
        "request_top_p": 0.95,
        "request_max_tokens": 100,
    }.items():
        assert value(metrics, f"{name}_count", model="r1") == 12
        assert value(metrics, f"{name}_sum", model="r1") == pytest.approx(12 * total)
    assert value(metrics, "inter_token_seconds_count", model="r1") == 24
    assert value(metrics, "time_to_first_token_seconds_bucket", model="r1", le="0.75") == 12
    assert value(metrics, "time_to_first_token_seconds_bucket", model="r1", le="0.5") == 0


def test_a_sequence_without_a_token_has_no_times():
    metrics = Metrics(idle)
    metrics.observe_finish("r1", GenerationStats(prompt_tokens=5), "cancelled", PARAMS)
    names = {name for name, _ in samples(metrics)}
    assert "edgellm_time_to_first_token_seconds_count" not in names
    assert value(metrics, "requests_total", model="r1", outcome="abort") == 1


def test_no_limit_does_not_spoil_the_sum():
    metrics = Metrics(idle)
    metrics.observe_finish("r1", STATS, "stop", replace(PARAMS, max_tokens=None))
    metrics.observe_finish("r1", STATS, "stop", PARAMS)
    assert value(metrics, "request_max_tokens_sum", model="r1") == 100


def test_state_is_read_on_each_scrape():
    state = {"r1": SchedulerStats(running=2, waiting=5, queue_capacity=64, num_slots=4)}
    state["r1"] = replace(
        state["r1"], kv_used_tokens=25, kv_capacity_tokens=100, steps=7, preempted=3
    )
    metrics = Metrics(lambda: state)
    assert value(metrics, "requests_running", model="r1") == 2
    assert value(metrics, "requests_waiting", model="r1") == 5
    assert value(metrics, "queue_capacity", model="r1") == 64
    assert value(metrics, "kv_cache_usage_ratio", model="r1") == 0.25
    assert value(metrics, "engine_steps_total", model="r1") == 7
    for name in ("preempted", "put_aside"):  # the latter is its old name, for this release
        assert value(metrics, f"sequences_{name}_total", model="r1") == 3
        assert metrics.stats_json()["models"]["r1"][name] == 3
    state["r1"] = replace(state["r1"], slots=(SlotState(True, 20, 5), SlotState(False, 7, 7)))
    assert metrics.stats_json()["models"]["r1"]["slots"] == [
        {"in_use": True, "rows": 20, "cached_rows": 5},
        {"in_use": False, "rows": 7, "cached_rows": 7},
    ]
    state["r1"] = SchedulerStats(failed="/secret/path broke")
    assert value(metrics, "requests_waiting", model="r1") == 0
    assert value(metrics, "engine_failed", model="r1") == 1
    assert "secret" not in str(metrics.stats_json())
    del state["r1"]
    assert "edgellm_requests_waiting" not in {name for name, _ in samples(metrics)}


def test_the_device_is_read_at_most_once_a_second():
    looks = []

    def look() -> Snapshot:
        looks.append(1)
        return Snapshot(
            gpu_load_ratio=0.5,
            gpu_clock_hz=1_300_500_000,
            temperatures_celsius={"gpu": 55.5},
            power_watts={"VIN": 20.0},
            throttled=False,
            memory_total_bytes=64,
            memory_available_bytes=24,
            process_rss_bytes=8,
        )

    clock = Clock()
    metrics = Metrics(idle, telemetry=look, clock=clock)
    assert value(metrics, "gpu_load_ratio") == 0.5
    assert value(metrics, "gpu_freq_hz") == 1_300_500_000
    assert value(metrics, "memory_used_bytes", pool="system") == 40
    assert value(metrics, "memory_used_bytes", pool="process") == 8
    assert value(metrics, "memory_available_bytes") == 24
    assert value(metrics, "temperature_celsius", zone="gpu") == 55.5
    assert value(metrics, "power_watts", rail="VIN") == 20.0
    assert value(metrics, "throttled") == 0
    assert metrics.stats_json()["device"]["gpu_load_ratio"] == 0.5
    assert len(looks) == 1
    clock.now += 1.5
    metrics.render()
    assert len(looks) == 2


@given(st.lists(st.one_of(st.sampled_from(ITL_BUCKETS_S), st.floats(0, 1000)), min_size=1))
def test_many_values_at_once_are_counted_like_one_by_one(values: list[float]):
    registry = prometheus_client.CollectorRegistry()
    one = prometheus_client.Histogram(
        "edgellm_x", "x", ["model"], buckets=ITL_BUCKETS_S, registry=registry
    )
    bulk = BulkHistogram("x", "x", ITL_BUCKETS_S)
    for at in range(0, len(values), 3):
        bulk.add("r1", values[at : at + 3])
    for value in values:
        one.labels("r1").observe(value)
    (expected,) = one.collect()
    wanted = {
        (sample.name, *sample.labels.items()): sample.value
        for sample in expected.samples
        if not sample.name.endswith("_created")
    }
    found = {(s.name, *s.labels.items()): s.value for s in bulk.family().samples}
    assert found == pytest.approx(wanted)


def test_unreadable_device_values_are_left_out():
    metrics = Metrics(idle, telemetry=Snapshot)
    names = {name for name, _ in samples(metrics)}
    assert not any("gpu" in name or "memory" in name or "throttled" in name for name in names)
    assert metrics.stats_json()["device"]["gpu_load_ratio"] is None
    assert Metrics(idle).stats_json()["device"] is None


def test_percentiles_are_exact_and_forget():
    clock = Clock()
    metrics = Metrics(idle, window_s=60, clock=clock)
    for milliseconds in range(1, 101):
        stats = replace(STATS, ttft_s=milliseconds / 1000, itl_s=[])
        metrics.observe_finish("r1", stats, "stop", PARAMS)
    latency = metrics.stats_json()["models"]["r1"]["latency"]
    assert latency["ttft_s"] == {"count": 100, "p50": 0.05, "p95": 0.095, "p99": 0.099}
    assert latency["itl_s"] == {"count": 0, "p50": None, "p95": None, "p99": None}
    clock.now += 61
    assert metrics.stats_json()["models"]["r1"]["latency"]["ttft_s"]["count"] == 0


def test_stats_are_plain_json():
    import json

    metrics = Metrics(idle, telemetry=Snapshot)
    metrics.observe_finish("r1", STATS, "stop", PARAMS, reasoning_tokens=2)
    metrics.observe_route("long_prompt", "r1")
    metrics.observe_arm("b", "r1")
    metrics.observe_rejection("draining")
    stats: dict[str, Any] = json.loads(json.dumps(metrics.stats_json(), allow_nan=False))
    assert stats["requests"] == {"stop": 1}
    assert stats["generation_tokens"] == {"reasoning": 2, "answer": 1}
    assert stats["rejections"] == {"draining": 1}
    assert stats["routes"] == {"long_prompt": 1}
    assert stats["arms"] == {"b": 1}
    assert stats["asked"]["requests"] == 1
    assert stats["models"]["r1"]["loaded"] is True


def test_arms_and_routes_and_info():
    labels = {"quantization": "int4", "backend": "ort-cpu"}
    engines = {"r1": EngineInfo(labels, "a GPU idles", {"tried": 2, "stopped": 1})}
    metrics = Metrics(idle, engines=lambda: engines)
    metrics.observe_arm("b", "r1")
    metrics.observe_route("long_prompt", "r1")
    assert value(metrics, "ab_requests_total", arm="b", model="r1") == 1
    assert value(metrics, "route_decisions_total", rule="long_prompt", model="r1") == 1
    labels = {"quantization": "int4", "backend": "ort-cpu", "model": "r1"}
    assert value(metrics, "engine_info", **labels) == 1
    assert value(metrics, "stop_when_sure_total", model="r1", outcome="tried") == 2
    row = metrics.stats_json()["models"]["r1"]
    assert row["stop_counts"] == {"tried": 2, "stopped": 1}
    assert (row["backend"], row["quantization"], row["warning"]) == (
        "ort-cpu",
        "int4",
        "a GPU idles",
    )
    assert any(
        name == "edgellm_build_info" and ("version", __version__) in keys
        for name, keys in samples(metrics)
    )


def test_arms_have_figures_of_their_own():
    metrics = Metrics(idle)
    for arm, seconds in (("s:a", 1.0), ("s:b", 2.0), ("s:b", 2.0)):
        stats = replace(STATS, total_s=seconds)
        metrics.observe_finish("r1", stats, "stop", PARAMS, arm=arm)
    metrics.observe_finish("r1", STATS, "stop", PARAMS)
    metrics.observe_error("r1", "deadline", arm="s:b")
    for arm, count, total in (("s:a", 1, 1.0), ("s:b", 2, 4.0)):
        assert value(metrics, "ab_request_seconds_sum", arm=arm) == total
        assert value(metrics, "ab_time_to_first_token_seconds_count", arm=arm) == count
        assert value(metrics, "ab_inter_token_seconds_count", arm=arm) == count * len(STATS.itl_s)
        tokens = value(metrics, "ab_generation_tokens_total", arm=arm)
        assert tokens == count * STATS.completion_tokens
        assert value(metrics, "ab_sequences_total", arm=arm, outcome="stop") == count
        found = metrics.stats_json()["arm_latency"][arm]["total_s"]
        assert (found["count"], found["p99"]) == (count, total / count)
    assert value(metrics, "ab_sequences_total", arm="s:b", outcome="deadline") == 1
    assert value(metrics, "request_seconds_count", model="r1") == 4
    for number in range(2 * MAX_LABELS):  # a configuration may have many splits
        metrics.observe_finish("r1", STATS, "stop", PARAMS, arm=f"s{number}")
    arms = {dict(keys)["arm"] for name, keys in samples(metrics) if name.startswith("edgellm_ab_")}
    assert len(arms) == MAX_LABELS + 1


def test_drift_of_a_window_is_shown():
    baseline = Counts()
    usual = {name: getattr(PARAMS, name) for name in KNOBS}
    for _ in range(500):
        baseline.add({**usual, "prompt_tokens": 10, "answer_tokens": 3})
    metrics = Metrics(idle, drift=DriftMonitor(baseline, window=100))
    alarms = [metrics.observe_finish("r1", STATS, "stop", PARAMS) for _ in range(100)]
    assert not any(alarms)
    assert value(metrics, "sampling_drift_psi", param="temperature") < 0.05
    hot = replace(PARAMS, temperature=1.2)
    alarms = [metrics.observe_finish("r1", STATS, "stop", hot) for _ in range(100)]
    assert alarms == [False] * 99 + [True]
    assert value(metrics, "sampling_drift_psi", param="temperature") > 1
    assert value(metrics, "sampling_drift_alarm", param="temperature") == 1
    assert value(metrics, "sampling_drift_alarm", param="top_p") == 0
    assert metrics.stats_json()["drift"]["params"]["temperature"]["alarm"] is True


def test_a_watch_is_counted_but_is_no_client():
    metrics = Metrics(idle)
    metrics.observe_finish("r1", STATS, "stop", PARAMS, is_asked=False)
    assert value(metrics, "requests_total", model="r1", outcome="stop") == 1
    assert not any(name == "edgellm_request_temperature_count" for name, _ in samples(metrics))
    assert metrics.stats_json()["asked"]["requests"] == 0


def test_names_of_vllm_are_there_if_asked_for():
    plain, both = Metrics(idle), Metrics(idle, vllm_names=True)
    for metrics in (plain, both):
        metrics.observe_finish("r1", STATS, "stop", PARAMS)
    assert not any(name.startswith("vllm:") for name, _ in samples(plain))
    found = samples(both)
    model = ("model_name", "r1")
    assert found["vllm:num_requests_waiting", frozenset([model])] == 0
    assert found["vllm:time_to_first_token_seconds_count", frozenset([model])] == 1
    assert found["vllm:e2e_request_latency_seconds_sum", frozenset([model])] == 1.25
    assert found["vllm:prompt_tokens_total", frozenset([model, ("cached", "true")])] == 4
    assert value(both, "requests_total", model="r1", outcome="stop") == 1


def test_edges_ascend_and_creation_times_are_left_out():
    for edges in (TTFT_BUCKETS_S, ITL_BUCKETS_S, REQUEST_BUCKETS_S):
        assert list(edges) == sorted(set(edges))
    metrics = Metrics(idle)
    metrics.observe_finish("r1", STATS, "stop", PARAMS)
    assert not any(name.endswith("_created") for name, _ in samples(metrics))


def test_memory_is_bounded():
    metrics = Metrics(idle)
    stats = replace(STATS, itl_s=[0.01] * 100)

    def run(count: int) -> None:
        for number in range(count):
            metrics.observe_finish("r1", stats, "stop", PARAMS)
            metrics.observe_rejection(f"reason {number}")
            metrics.observe_error(f"model {number}")

    run(2 * WINDOW_VALUES // 100 + WINDOW_VALUES)  # fills every window
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        run(2000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What is new in full windows replaced what was there before the tracing began.
    assert after - before < 4 * WINDOW_VALUES * 150
    run(2000)
    reasons = {dict(keys)["reason"] for name, keys in samples(metrics) if "rejections" in name}
    assert len(reasons) == MAX_LABELS + 1
    assert "other" in reasons


def test_counts_from_many_threads_add_up():
    metrics = Metrics(idle)

    def work() -> None:
        for _ in range(200):
            metrics.observe_finish("r1", STATS, "stop", PARAMS)
            metrics.stats_json()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "requests_total", model="r1", outcome="stop") == 800
    assert metrics.stats_json()["asked"]["requests"] == 800


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    from edge.errors import DependencyError

    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(DependencyError, match=r"install .*-e .*\[serve\]"):
        Metrics(idle)


def test_the_page_reads_what_stats_has():
    """Every key that the page takes from ``/stats`` is one that is there."""
    import re

    page = Path(__file__).parents[3] / "edge_serve" / "http" / "page"
    text = (page / "script" / "dashboard.js").read_text("utf-8")
    metrics = Metrics(idle, telemetry=Snapshot)
    metrics.observe_finish("r1", STATS, "stop", PARAMS)
    stats = metrics.stats_json()
    device = set(re.findall(r"device\.(\w+)", text)) - {"device"}
    assert device
    assert device <= set(stats["device"])
    rows = set(re.findall(r'sum\(rows, "(\w+)"\)', text))
    assert rows
    assert rows <= set(stats["models"]["r1"])
    kinds = set(re.findall(r'latency\(now, "(\w+)"\)', text))
    assert kinds <= set(stats["models"]["r1"]["latency"])


def test_every_parameter_with_a_default_has_a_histogram():
    assert {*PARAM_BUCKETS} == {*DEFAULTED, "max_tokens"}

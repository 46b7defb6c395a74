"""Turns a benchmark's samples into figures: medians, spread, energy, roofline, change, memory."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.tensorrt.device_memory import EngineMemory
from edge.bundle.engine_file import EngineInfo
from edge.bundle.manifest import Manifest
from edge.bundle.weights import manifest_linears
from edge.errors import BundleError, ConfigError
from edge_lab.planner.calibration import BENCH_SCHEMA
from edge_lab.planner.devices import identify
from edge_lab.planner.engine import engine_work
from edge_lab.planner.memory import BackendKind, Deployment, plan_bundle_memory
from edge_lab.planner.plan import CPU, PlanDevice, find_device
from edge_lab.planner.speed import FITTED, EngineWork, Work, ceiling, decode_s, work_of
from edge_lab.telemetry import Snapshot
from edge_make.engine_layers import read_layers
from edge_make.manifest_text import describe_kv_cache

from .bench import BenchConfig, Samples

_log = logging.getLogger(__name__)

LEAST_REPEATS = 5
"""Least repeats of runs that are compared: with fewer the bootstrap's interval is too narrow."""
_RESAMPLES = 2000
_BANDWIDTH_BYTES = 256 << 20


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Compute median, median absolute deviation and extremes; the values themselves are kept."""
    array = np.asarray(values, dtype=np.float64)
    median = float(np.median(array))
    return {
        "median": median,
        "mad": float(np.median(np.abs(array - median))),
        "min": float(array.min()),
        "max": float(array.max()),
        "values": [float(value) for value in array],
    }


def summarize(samples: Samples, config: BenchConfig) -> dict[str, Any]:
    """Compute every figure of a run, in seconds, tokens/s, watts and joules; None is unknown."""
    tpot = [float(np.mean(steps)) for steps in samples.itl_s]
    every_step = np.concatenate([np.asarray(steps) for steps in samples.itl_s])
    decoded = config.batch * (config.output_tokens - 1)
    prompted = config.batch * config.prompt_tokens
    own = [
        (sum(steps) - model) / len(steps)
        for steps, model in zip(samples.itl_s, samples.decode_model_s, strict=True)
    ]
    cpu = [
        cpu_s / len(steps) for steps, cpu_s in zip(samples.itl_s, samples.decode_cpu_s, strict=True)
    ]

    def energy(joules: Sequence[float], tokens: int) -> float | None:
        return float(np.median(joules)) / tokens if joules else None

    return {
        "prefill_s": spread(samples.prefill_s),
        "ttft_s": spread(samples.ttft_s),
        "tpot_s": spread(tpot),
        "itl_s": {f"p{q}": float(np.percentile(every_step, q)) for q in (50, 90, 95, 99)},
        "own_s_per_step": float(np.median(own)),
        "cpu_s_per_step": float(np.median(cpu)),
        "prefill_tps": config.prompt_tokens / float(np.median(samples.prefill_s)),
        "decode_tps": config.batch / float(np.median(tpot)),
        "decode_watts": float(np.median(samples.decode_watts)) if samples.decode_watts else None,
        "decode_joules_per_token": energy(samples.decode_joules, decoded),
        "prefill_joules_per_token": energy(samples.prefill_joules, prompted),
    }


@dataclass(frozen=True)
class Change:
    """A figure compared with that of a saved run.

    Attributes:
        name: the figure's name.
        ratio: new time over old: above 1 is slower.
        low, high: 95 % interval of the ratio (bootstrap of both medians); it knows the noise within
            a process, not that from one process to the next.
    """

    name: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` if beyond the noise of the repeats, else ``same``."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"


def check_alike(old: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse an earlier run that differs in what is known before this one is made.

    Args:
        old: result of `report`.
        known: values that the new result will have, by key.

    Raises:
        ConfigError: they differ.
    """
    _refuse(_unlike(old, known, *known))


def refuse_few_repeats(*repeats: int) -> None:
    """Refuse to compare runs if one has too few repeats to know its own noise.

    Raises:
        ConfigError: one of them has fewer than `LEAST_REPEATS`.
    """
    if min(repeats) < LEAST_REPEATS:
        raise ConfigError(
            "--against needs the noise of both runs, and one of them has --repeats "
            f"{min(repeats)}; give both {LEAST_REPEATS} or more"
        )


def _unlike(old: dict[str, Any], new: dict[str, Any], *keys: str) -> list[str]:
    """List the keys whose values differ; older runs do not have all of them."""
    return [key for key in keys if key in old and key in new and old[key] != new[key]]


def _refuse(differing: list[str]) -> None:
    if differing:
        raise ConfigError(
            f"--against: that run differs in {', '.join(differing)}; only like runs compare"
        )


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Compare prefill, TTFT and TPOT of two results of `report`.

    Raises:
        ConfigError: they did not measure the same thing, or one is not such a result.
    """
    try:
        same = ("batch", "prompt_tokens", "output_tokens", "backend", "work")
        differing = [key for key in same if old[key] != new[key]]
        if old.get("prefill", "plain") != new.get("prefill", "plain"):  # older runs do not say
            differing.append("prefill")
        if old["device"]["name"] != new["device"]["name"]:
            differing.append("device")
        differing += _unlike(old["device"], new["device"], "power_mode", "nvpmodel")
        differing += _unlike(old, new, "num_threads")
        pairs = [
            (name, _times(old[name]["values"]), _times(new[name]["values"]))
            for name in ("prefill_s", "ttft_s", "tpot_s")
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--against: that is not what edge-llm bench --json prints ({error!r} is missing or "
            "wrong); run it again"
        ) from error
    _refuse(differing)
    refuse_few_repeats(*(len(times) for _, *both in pairs for times in both))
    return [_change(name, before, now) for name, before, now in pairs]


def _times(values: Sequence[float]) -> list[float]:
    times = [float(value) for value in values]
    if not times or not all(0 < value < float("inf") for value in times):
        raise ValueError(f"times {times}")
    return times


def _change(name: str, old: list[float], new: list[float]) -> Change:
    random = np.random.default_rng(0)

    def medians(values: list[float]) -> NDArray[np.float64]:
        chosen = random.integers(0, len(values), (_RESAMPLES, len(values)))
        result: NDArray[np.float64] = np.median(np.asarray(values)[chosen], axis=1)
        return result

    ratios = medians(new) / medians(old)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Change(name, float(np.median(new) / np.median(old)), float(low), float(high))


def measure_bandwidth(num_threads: int | None = None, repeats: int = 5) -> float:
    """Measure the bytes per second that this CPU reads: the best of some passes over 256 MB."""
    threads = num_threads or os.cpu_count() or 1
    # A dot product with itself reads each number once and does next to nothing with it.
    parts = np.array_split(np.ones(_BANDWIDTH_BYTES // 4, dtype=np.float32), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            best = max(best, _BANDWIDTH_BYTES / (time.perf_counter() - started))
    return best


def find_bench_device(
    backend_name: str, snapshot: Snapshot, num_threads: int | None
) -> tuple[PlanDevice | None, str | None]:
    """Find the device whose roofline applies, and a remark about it.

    A CPU backend runs on the CPU, also on a Jetson; its bandwidth is measured. A GPU that is not an
    Orin has no roofline here.
    """
    if backend_name == "ort-cpu":
        return find_device(CPU, cpu_bytes_per_s=measure_bandwidth(num_threads)), None
    if snapshot.module is None and snapshot.l4t is not None:
        return None, (
            "the roofline of this GPU is not known: nothing names an Orin module here; a container "
            "hides it, unless it is started with --security-opt systempaths=unconfined"
        )
    name = snapshot.module
    module = None if name is None else identify(name, snapshot.memory_total_bytes)
    if module is None:
        return None, "the roofline of this GPU is not known: it is not an Orin module"
    if snapshot.power_mode is None:
        remark = "the power mode is not known here: compared with the fastest"
        return find_device(module.name), remark
    try:
        return find_device(module.name, snapshot.power_mode), None
    except ConfigError:
        remark = f"power mode {snapshot.power_mode} is not in the table: compared with the fastest"
        return find_device(module.name), remark


def work_of_bundle(manifest: Manifest, backend: Backend, config: BenchConfig) -> Work:
    """Count the bytes and operations of a step as the planner does."""
    kind: BackendKind = "ort-cpu" if backend.name == "ort-cpu" else "tensorrt"
    deployment = Deployment(
        kind,
        config.batch,
        backend.capacity,
        backend.max_step_tokens,
        manifest.dialect,
        manifest.int8_layers,
    )
    linears = manifest_linears(manifest)
    memory = plan_bundle_memory(manifest, deployment)
    work = work_of(manifest.model, linears, memory.weights, deployment)
    return dataclasses.replace(work, engine=_engine_work(manifest, backend))


def _engine_work(manifest: Manifest, backend: Backend) -> EngineWork | None:
    """Read what the backend's engine says of its steps; None without one or without its table."""
    info, directory = getattr(backend, "info", None), getattr(backend, "engine_dir", None)
    if not isinstance(info, EngineInfo) or not isinstance(directory, Path):
        return None
    try:
        table = read_layers(directory / info.plan)
        return None if table is None else engine_work(info, table, manifest)
    except BundleError as error:  # the measurement matters more than its comparison
        _log.warning("launches are counted by rule: %s", error)
        return None


def roofline(
    work: Work, device: PlanDevice | None, config: BenchConfig, decode_tps: float
) -> dict[str, Any] | None:
    """Compute the ceiling at the mean context of the decode, and the share of it reached."""
    if device is None or device.mode is None:
        return None
    context = mean_context(config)
    most = ceiling(work, device.mode, config.batch, 1, context)
    predicted = None
    if device.name != CPU:
        predicted = config.batch / decode_s(work, device.mode, FITTED, config.batch, context)
    return {
        "bytes_per_step": most.read_bytes,
        "decode_tps": most.tokens_per_s,
        "reached": decode_tps / most.tokens_per_s,
        "predicted_decode_tps": predicted,
    }


def mean_context(config: BenchConfig) -> float:
    """Compute the cached tokens that a decode step reads on average."""
    return config.prompt_tokens + config.output_tokens / 2


def device_memory(backend: Backend) -> dict[str, int | bool] | None:
    """Return the GPU's memory by part, from a backend that planned it; None from others."""
    plan = getattr(backend, "memory", None)
    return plan.to_dict() if isinstance(plan, EngineMemory) else None


def report(
    manifest: Manifest,
    backend: Backend,
    config: BenchConfig,
    samples: Samples,
    device: PlanDevice | None,
    snapshot: Snapshot,
) -> dict[str, Any]:
    """Make the JSON of a run; `edge_lab.planner.calibration.BenchFile` reads a part of it again."""
    figures = summarize(samples, config)
    work = work_of_bundle(manifest, backend, config)
    mode = None if device is None else device.mode
    nvpmodel = snapshot.power_mode
    return {
        "schema": BENCH_SCHEMA,
        "model": manifest.name,
        "quantization": manifest.quantization.name,
        "backend": backend.name,
        "gpu_wait": getattr(backend, "gpu_wait", None),
        "device": {
            "name": None if device is None else device.name,
            # None if the table lacks the mode: another mode was used for the comparison then.
            "power_mode": mode.name if mode and nvpmodel and mode.is_called(nvpmodel) else None,
            "nvpmodel": nvpmodel,
            "bytes_per_s": None if mode is None else mode.bytes_per_s,
            "module": snapshot.module,
            "l4t": snapshot.l4t,
            "jetpack": snapshot.jetpack,
            "throttled": snapshot.throttled,
            "cpu_cores": os.cpu_count(),
        },
        "batch": config.batch,
        "prompt_tokens": config.prompt_tokens,
        "output_tokens": config.output_tokens,
        "repeats": config.repeats,
        "warmup": config.warmup,
        "kv_capacity": backend.capacity,
        "max_prefill": backend.max_step_tokens,
        "context": mean_context(config),
        "work": dataclasses.asdict(work),
        "cache_bytes": backend.cache_bytes,
        "kv_cache": describe_kv_cache(manifest),
        "device_memory": device_memory(backend),
        **figures,
        "roofline": roofline(work, device, config, figures["decode_tps"]),
    }

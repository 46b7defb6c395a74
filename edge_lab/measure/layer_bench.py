"""Times the layers of an engine: TensorRT's profiler beside the table of its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

from edge.backends import Backend
from edge.backends.tensorrt.layer_times import LayerTimes
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import Manifest
from edge.errors import ConfigError
from edge_make.engine_layers import LayerTable, read_layers
from edge_make.progress import Progress, silent

from .bench import BenchConfig, run_bench

_REPEATS = 3  # prefills; the median leaves out the first, which loads kernels
_MAX_DECODE_STEPS = 16


@dataclass(frozen=True)
class LayerTime:
    """One layer and the time it took.

    Attributes:
        name: name of the layer, as TensorRT's profiler reports it.
        ms: median of the runs.
        share: its share of the sum over all layers of the profile.
        kind, dtype, tactic: from the table of layers; None if the engine has none.
    """

    name: str
    ms: float
    share: float
    kind: str | None
    dtype: str | None
    tactic: str | None


@dataclass(frozen=True)
class ProfileTimes:
    """Layers of one profile, the slowest first.

    Attributes:
        runs: how often the profile ran.
        total_ms: sum over the layers; in ordinary use some of them overlap.
    """

    runs: int
    total_ms: float
    layers: tuple[LayerTime, ...]


def require_layer_times(backend: Backend) -> TensorRTBackend:
    """Return the backend if it can time its layers.

    Raises:
        ConfigError: it is not TensorRT.
    """
    if not isinstance(backend, TensorRTBackend):
        raise no_layer_times(backend.name)
    return backend


def no_layer_times(backend: str) -> ConfigError:
    """Make the error for a backend that has no times of layers."""
    return ConfigError(
        f"--layers times the layers of a TensorRT engine, but {backend} runs the bundle here; "
        "build an engine with: edge-llm build BUNDLE, or leave --layers out"
    )


def time_layers(
    backend: TensorRTBackend,
    embeddings: EmbeddingTable,
    manifest: Manifest,
    config: BenchConfig,
    *,
    progress: Progress = silent,
) -> dict[str, ProfileTimes]:
    """Run the benchmark's prefill and some decode steps under the profiler.

    The backend runs without CUDA graphs and slower afterwards: measure everything else before.

    Returns:
        Times by profile of the engine; a profile that no step needed has no layers.

    Raises:
        ConfigError, BackendError: `run_bench` would raise the same.
    """
    steps = min(config.output_tokens, _MAX_DECODE_STEPS + 1)
    short = replace(config, repeats=_REPEATS, warmup=0, output_tokens=steps)
    times = backend.time_layers()
    run_bench(backend, embeddings, manifest, short, progress=progress)
    table = read_layers(backend.engine_dir / backend.info.plan)
    return {profile: _join(found, profile, table) for profile, found in times.items()}


def _join(times: LayerTimes, profile: str, table: LayerTable | None) -> ProfileTimes:
    known = {layer.name: layer for layer in table.of(profile)} if table is not None else {}
    medians = {name: median(runs) for name, runs in times.runs_ms.items()}
    total = sum(medians.values())
    layers = []
    for name, ms in sorted(medians.items(), key=lambda item: -item[1]):
        layer = known.get(name)
        facts = (layer.kind, layer.dtype, layer.tactic) if layer else (None, None, None)
        layers.append(LayerTime(name, ms, ms / total if total else 0.0, *facts))
    runs = max(map(len, times.runs_ms.values()), default=0)
    return ProfileTimes(runs, total, tuple(layers))

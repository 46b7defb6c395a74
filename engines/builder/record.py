"""Describes an engine: its name, its key, its ``engine.json`` and what its layers are."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from edge._version import __version__
from edge.backends.tensorrt.plugins import register_kernels
from edge.bundle.engine_file import (
    ENGINE_SCHEMA_VERSION,
    EngineInfo,
    ProfileInfo,
    ShapeInfo,
    open_plan,
)
from edge.errors import BuildError, BundleError, DependencyError
from edge_lab import telemetry
from edge_make.engine_layers import LayerTable, parse_inspector
from engines.build_plan import BuildPlan
from engines.compiler import compat
from engines.graph.external_weights import PRODUCER
from engines.profiles import Profile

from .encoder import source_files
from .fallbacks import Climbed
from .target import Target
from .variant import Compiled

Via = Literal["api", "trtexec"]
_log = logging.getLogger(__name__)


def make_recorder(
    climbed: Climbed, target: Target, via: Via, key: str, compiled: Compiled
) -> Callable[[str, int, str], EngineInfo]:
    """Make the ``engine.json`` of a build; its file's name, size and SHA-256 come last."""
    build = climbed.build
    shapes, files = build.shapes, build.manifest.files
    board = telemetry.read_snapshot()
    low, high = board.gpu_clock_min_hz, board.gpu_clock_max_hz

    def record(name: str, num_bytes: int, sha256: str) -> EngineInfo:
        return EngineInfo(
            schema_version=ENGINE_SCHEMA_VERSION,
            producer=PRODUCER,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            key=key,
            plan=name,
            plan_bytes=num_bytes,
            plan_sha256=sha256,
            flavour=target.rt.flavour,
            tensorrt_version=compiled.tensorrt_version,
            compute_capability=target.compute_capability,
            device=target.gpu.name if target.gpu else None,
            num_sms=target.gpu.num_sms if target.gpu else None,
            jetpack=board.jetpack,
            l4t=board.l4t,
            power_mode=board.power_mode,
            gpu_clocks_hz=None if low is None or high is None else (low, high),
            sources={file: files[file].sha256 for file in source_files(build.manifest)},
            max_batch=shapes.max_batch,
            max_prefill=shapes.max_prefill,
            kv_capacity=shapes.capacity,
            kv_buckets=shapes.kv_buckets,
            kv_read=build.kv_read,
            options=climbed.options,
            profiles=tuple(_profile_info(profile) for profile in build.profiles),
            builder=via,
            build_s=round(compiled.build_s, 3),
            peak_memory_bytes=compiled.peak_memory_bytes,
            weights=compiled.audit.weights,
            layers=compiled.audit.layers,
            attention=build.attention if via == "api" else None,
            refused=climbed.refused,
            tuned=climbed.tuned,
            scales=build.scales,
            best_logits=shapes.best_logits,
            kernels=build.kernels,
            own_linears=compiled.own_linears,
            left_linears=compiled.left_linears,
            plugins=compiled.plugins,
            python_kernels=compiled.python_kernels,
            own_attentions=compiled.own_attentions,
            own_top_k=compiled.own_top_k,
            skipped_tactics=compiled.skipped_tactics,
            compiled_unknown="the build was ended before it read them",
        )

    return record


def read_compiled_layers(
    target: Target, directory: Path, info: EngineInfo
) -> tuple[LayerTable | None, str | None]:
    """Ask TensorRT's engine inspector what a plan consists of.

    Args:
        target: TensorRT and GPU that the plan was built with.
        directory: the engine's directory.
        info: its ``engine.json``.

    Returns:
        The table of layers; or None and the reason why it is unknown.
    """
    if target.gpu is None:
        return None, "it was compiled without a GPU, and TensorRT opens a plan on its GPU only"
    try:
        with open_plan(directory, info) as plan:
            register_kernels(target.rt.module, info)
            texts = compat.inspect_plan(target.rt, plan, len(info.profiles))
        return parse_inspector(texts, [profile.name for profile in info.profiles]), None
    except (BuildError, BundleError, DependencyError) as error:
        reason = str(error)  # keep no error: its frames hold the loaded engine
        _log.warning("the engine's layers are not known: %s", reason)
        return None, reason


def read_exported_layers(
    text: str | None, build: BuildPlan
) -> tuple[LayerTable | None, str | None]:
    """Read the layers that ``trtexec`` wrote.

    ``trtexec`` asks the same inspector, but without an execution context. A TensorRT that shows
    later profiles only in a context therefore shows just the first one here.

    Returns:
        The table of layers; or None and the reason why it is unknown.
    """
    if text is None:
        return None, "trtexec wrote no table of layers"
    try:
        return parse_inspector([text], [profile.name for profile in build.profiles]), None
    except BundleError as error:
        _log.warning("the engine's layers are not known: %s", error)
        return None, str(error)


def engine_name(build: BuildPlan, target: Target) -> str:
    """Name the directory of an engine, e.g. ``sm87-trt10.16-int4-b1-kv4096``."""
    parts = [
        f"sm{target.compute_capability.replace('.', '')}",
        target.rt.label,
        build.manifest.quantization.name,
        f"b{build.shapes.max_batch}",
        f"kv{build.shapes.capacity}",
    ]
    if build.config.kv_read != "slice":
        parts.append(build.config.kv_read)
    if build.config.attention != "auto":
        parts.append(build.config.attention)
    if build.config.kernels != "tensorrt":
        parts.append(f"{build.config.kernels}-kernels")
    if build.config.plugins != "auto":
        parts.append(f"{build.config.plugins}-plugins")
    if build.shapes.best_logits:
        parts.append(f"best{build.shapes.best_logits}")
    return "-".join(parts)


def key_parts(build: BuildPlan, target: Target) -> dict[str, Any]:
    """Return what an engine depends on, for `store.engine_key`."""
    files = build.manifest.files
    return {
        "producer": __version__,  # how the graph is edited may change with it
        "sources": {name: files[name].sha256 for name in source_files(build.manifest)},
        "flavour": target.rt.flavour,
        "tensorrt": target.rt.version,
        "compute_capability": target.compute_capability,
        "device": target.gpu.name if target.gpu else None,
        "num_sms": target.gpu.num_sms if target.gpu else None,  # kernels are timed for them
        "capacity": build.shapes.capacity,
        "buckets": build.shapes.kv_buckets,
        "options": build.rebuild_options(),
    }


def _profile_info(profile: Profile) -> ProfileInfo:
    return ProfileInfo(
        profile.name,
        {
            name: ShapeInfo(shape.min, shape.opt, shape.max)
            for name, shape in profile.inputs.items()
        },
    )

"""Finds the engine that a bundle has for an Orin, and reads its steps from the table of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edge.bundle.engine_file import (
    EngineInfo,
    KvRead,
    check_engine,
    engine_rank,
    find_engines,
    read_engine_info,
)
from edge.bundle.manifest import Manifest
from edge.errors import BundleError, ConfigError
from edge_make.engine_layers import LayerTable, read_layers
from edge_make.unpacked_weights import unpacked_bytes

from .devices import ORIN_COMPUTE_CAPABILITY
from .speed import EngineStep, EngineWork, StepKind

_KINDS: tuple[StepKind, StepKind] = ("decode", "prefill")


@dataclass(frozen=True)
class PlannedEngine:
    """A built engine that a plan is based on.

    Attributes:
        name: name of its directory.
        plan: the plan's file name.
        plan_bytes: bytes of that file and of the weights beside it.
        max_batch: sequences per step.
        max_prefill: tokens per prefill step.
        kv_capacity: tokens per slot.
        kv_read: how attention reads the cache.
        work: launches and unpacked weights of its steps.
    """

    name: str
    plan: str
    plan_bytes: int
    max_batch: int
    max_prefill: int
    kv_capacity: int
    kv_read: KvRead
    work: EngineWork

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; its steps are in the `Work` that is based on it."""
        return {name: value for name, value in asdict(self).items() if name != "work"}


class Asked(NamedTuple):
    """Wishes for an engine; None takes the engine's own value."""

    batch: int = 1
    kv_capacity: int | None = None
    max_prefill: int | None = None


def find_engine(bundle: Path, manifest: Manifest, asked: Asked) -> PlannedEngine | str:
    """Find the engine of a bundle that an Orin would run.

    It is the engine that the runtime would choose, except that the device's version of TensorRT is
    not known here.

    Args:
        bundle: its directory.
        manifest: its manifest.
        asked: wishes of the plan.

    Returns:
        The engine, or why there is none whose layers are known.

    Raises:
        BundleError: its table of layers is damaged, or belongs to another bundle.
        ConfigError: its layers are known, but it is too small for the wishes.
    """
    fitting: dict[Path, EngineInfo] = {}
    problems: list[str] = []
    for directory in find_engines(bundle):
        try:
            info = read_engine_info(directory)
            check_engine(
                directory,
                info,
                manifest,
                flavour=info.flavour,
                tensorrt_version=info.tensorrt_version,
                compute_capability=ORIN_COMPUTE_CAPABILITY,
            )
        except BundleError as error:
            problems.append(str(error))
        else:
            fitting[directory] = info
    if not fitting:
        return problems[0] if problems else "the bundle has no engine"
    exact = [each for each in fitting if fitting[each].kv_capacity == asked.kv_capacity]
    directory = max(exact or fitting, key=lambda each: engine_rank(fitting[each], asked.batch))
    info = fitting[directory]
    table = read_layers(directory / info.plan)
    work = None if table is None else engine_work(info, table, manifest)
    if work is None:
        why = info.compiled_unknown or "an older edge-llm built it, or the file is gone"
        return f"the engine {directory.name} has no table of its layers: {why}"
    _check_room(bundle, directory.name, info, asked)
    return PlannedEngine(
        directory.name,
        info.plan,
        info.weights_bytes,
        info.max_batch,
        info.max_prefill,
        info.kv_capacity,
        info.kv_read,
        work,
    )


def engine_work(info: EngineInfo, table: LayerTable, manifest: Manifest) -> EngineWork | None:
    """Count launches and unpacked weights of an engine's decode and prefill.

    Returns:
        The counts; None if the table has layers of neither.

    Raises:
        BundleError: a layer unpacks a weight that the bundle does not have.
    """
    sizes = {
        name: math.prod(linear.shape) for name, linear in manifest.quantization.linears.items()
    }
    decode, prefill = (_step(table, kind, sizes) for kind in _KINDS)
    if decode is None and prefill is None:
        return None
    return EngineWork(decode, prefill, info.buckets_read)


def _step(table: LayerTable, kind: StepKind, sizes: Mapping[str, int]) -> EngineStep | None:
    found = next((each for each in table.summary() if each.profile == kind), None)
    if found is None:
        return None
    unpacked = table.unpacked(kind)
    unknown = sorted(set(unpacked) - set(sizes))
    if unknown:
        raise BundleError(
            f"the engine's table of layers names a weight of {unknown[0]}, which the bundle does "
            "not have; build the engine again"
        )
    moved = sum(unpacked_bytes(sizes[name]) for name in unpacked)
    return EngineStep(found.layers, len(unpacked), moved, found.reformats, found.attention)


def _check_room(bundle: Path, name: str, info: EngineInfo, asked: Asked) -> None:
    capacity = asked.kv_capacity or info.kv_capacity
    prefill = asked.max_prefill or info.max_prefill
    for option, wanted, has, fits in (
        ("--batch", asked.batch, info.max_batch, asked.batch <= info.max_batch),
        ("--kv-capacity", capacity, info.kv_capacity, capacity == info.kv_capacity),
        ("--max-prefill", prefill, info.max_prefill, prefill <= info.max_prefill),
    ):
        if not fits:
            raise ConfigError(
                f"{option} {wanted}: the bundle's engine {name} has {has}; plan without it: "
                f"--no-engine, or build one: edge-llm build {bundle} --max-batch "
                f"{max(asked.batch, info.max_batch)} --kv-capacity {capacity} --max-prefill "
                f"{max(prefill, info.max_prefill)}"
            )

"""Plans how much memory and how many threads a service may need: limits for its systemd unit."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from edge.backends.host_memory import LEAST_CAPACITY
from edge.backends.ort.int8_prompts import int8_bytes
from edge.bundle.engine_file import find_engines
from edge.bundle.manifest import Manifest, read_manifest
from edge.device.nodes import find_gpu_node
from edge.errors import ResourceError
from edge.runtime.structured_output import CHECK_MEMORY_BYTES
from edge.text.template_child import TEMPLATE_LIMITS
from edge_lab.planner.memory import (
    BackendKind,
    Deployment,
    ProcessMemory,
    plan_bundle_memory,
    plan_process_pair,
)
from edge_serve.settings import ServerSettings

_log = logging.getLogger("edge_serve")
# The plan is the engine's at its peak. It includes neither a prompt's text, nor the logits of
# scores, nor memory that malloc keeps of them, nor the error of the plan (docs/planner.md).
_PLAN_MARGIN = 1.25
_PLAN_ERROR = 0.05  # most by which a plan exceeds the real use
_BODY_FACTOR = 4  # a body, its JSON, its texts, its tokens
_MAX_FACTOR = 1.25  # ratio of the limit that ends processes to the one that slows them
_TASKS = 128  # the loop, its workers, children, and libraries that start threads of their own
_TASKS_PER_CORE = 4  # two sessions of a bundle, and of a draft


@dataclass(frozen=True)
class UnitLimits:
    """Limits that systemd should set for a service.

    Attributes:
        memory_high_bytes: more than all planned memory; beyond it the kernel reclaims and waits.
        memory_max_bytes: memory beyond which the service is ended.
        tasks_max: the most threads and processes.
    """

    memory_high_bytes: int
    memory_max_bytes: int
    tasks_max: int


def unit_limits(settings: ServerSettings, num_cores: int | None = None) -> UnitLimits:
    """Plan the limits of a service that has these settings.

    Args:
        settings: settings of the service, with the bundles that it serves.
        num_cores: cores that it computes on; None asks the system.

    Raises:
        BundleError: the manifest of a bundle cannot be read.
        ConfigError: a bundle has no weights for ``prefill``.
    """
    plans = [plan for plan, _ in _plans(settings)]
    children = TEMPLATE_LIMITS.memory_bytes + CHECK_MEMORY_BYTES
    if any("vision" in read_manifest(bundle).extras for bundle in settings.model.values()):
        from edge.vision.decode import LARGE_LIMITS, USUAL_LIMITS

        children += USUAL_LIMITS.memory_bytes + LARGE_LIMITS.memory_bytes
    bodies = _BODY_FACTOR * settings.max_inflight_body_bytes
    high = int(_PLAN_MARGIN * _together(plans)) + children + bodies
    cores = num_cores or os.cpu_count() or 1
    return UnitLimits(
        memory_high_bytes=high,
        memory_max_bytes=int(_MAX_FACTOR * high),
        tasks_max=_TASKS + _TASKS_PER_CORE * cores * max(1, len(plans)),
    )


def opening_bytes(settings: ServerSettings, bundle: Path) -> int:
    """Plan the most memory that this process takes in addition while it opens a bundle on the CPU.

    Args:
        settings: settings of the service.
        bundle: the bundle. GPU memory is not counted.

    Raises:
        BundleError, ConfigError: `unit_limits` raises them, too.
    """
    given = replace(settings, model={"one": bundle}, default_model=None, auto={}, split={})
    plans = [plan for plan, on_cpu in _plans(given, LEAST_CAPACITY) if on_cpu]
    return int((1 - _PLAN_ERROR) * sum(plan.load_peak - plan.python for plan in plans))


def check_room(
    settings: ServerSettings,
    room_bytes: int,
    taken_bytes: int,
    hard_room_bytes: int | None = None,
) -> None:
    """Refuse, before the bundles are opened, a limit of memory that is too small to open them.

    The kernel kills a process that reaches the limit of its control group without a word. This
    compares the least that a service on a CPU takes, with caches of `LEAST_CAPACITY` tokens unless
    the settings say more; GPU memory is not in the group. If that does not fit but opening does,
    the log says so, since a cache takes memory only as it fills.

    Args:
        settings: settings of the service.
        room_bytes: memory that the groups leave this process, swap included.
        taken_bytes: memory that it has by now.
        hard_room_bytes: memory left by those groups whose limit kills processes; None if no group
            has such a limit.

    Raises:
        BundleError, ConfigError: `unit_limits` raises them, too.
        ResourceError: the weights do not fit, or opening the bundles exceeds a hard limit.
    """
    plans = [plan for plan, on_cpu in _plans(settings, LEAST_CAPACITY) if on_cpu]
    if not plans:
        return
    weights = sum(plan.weights_bytes for plan in plans)
    raise_it = (
        "raise it (MemoryHigh= and MemoryMax= of a unit, --memory of a container; edge-llm config "
        "unit plans them), or serve a smaller bundle"
    )
    if weights > room_bytes:
        raise ResourceError(
            f"the weights take {weights / 1e6:.0f} MB, and the memory limit of this process's "
            f"control group leaves {room_bytes / 1e6:.0f} MB; {raise_it}"
        )
    bare = [plan for plan, on_cpu in _plans(replace(settings, kv_capacity=1)) if on_cpu]
    to_open = int((1 - _PLAN_ERROR) * _together(bare)) - taken_bytes
    if hard_room_bytes is not None and to_open > hard_room_bytes:
        raise ResourceError(
            f"opening the bundles takes {to_open / 1e6:.0f} MB, and the memory limit of this "
            f"process's control group leaves {hard_room_bytes / 1e6:.0f} MB, so the kernel would "
            f"end it; {raise_it}"
        )
    least = max(_together(plans) - taken_bytes, weights)
    bodies = _BODY_FACTOR * settings.max_inflight_body_bytes
    if least + bodies > room_bytes:
        _log.warning(
            "the memory limit of this process's control group leaves %.0f MB; the bundles take "
            "%.0f MB at least, and bodies of requests up to %.0f MB more; the kernel may end this "
            "process, and nothing can be logged then; %s",
            room_bytes / 1e6,
            least / 1e6,
            bodies / 1e6,
            raise_it,
        )


def _plans(
    settings: ServerSettings, most_tokens: int | None = None
) -> list[tuple[ProcessMemory, bool]]:
    """Plan each bundle, and tell whether it is computed on the CPU.

    Args:
        settings: settings of the service.
        most_tokens: tokens of a slot if the settings do not say.
    """
    draft = None if settings.draft is None else read_manifest(settings.draft)
    plans = []
    for bundle in settings.model.values():
        manifest = read_manifest(bundle)
        on_cpu = _computes_on_cpu(settings, has_engine=bool(find_engines(bundle)))
        own = min(manifest.kv_capacity, most_tokens or manifest.kv_capacity)
        capacity = settings.kv_capacity or own
        plans.append((_plan(settings, manifest, draft, capacity, on_cpu=on_cpu), on_cpu))
    return plans


def _computes_on_cpu(settings: ServerSettings, *, has_engine: bool) -> bool:
    if settings.backend != "auto":
        return settings.backend == "ort-cpu"
    if settings.engine.cpu_option is not None:
        return True
    return find_gpu_node() is None and not has_engine


def _plan(
    settings: ServerSettings,
    manifest: Manifest,
    draft: Manifest | None,
    capacity: int,
    *,
    on_cpu: bool,
) -> ProcessMemory:
    backend: BackendKind = "ort-cpu" if on_cpu else "tensorrt"

    def plan(each: Manifest, capacity: int) -> ProcessMemory:
        step = min(settings.prefill_chunk, capacity)
        deployment = Deployment(backend, settings.num_slots, capacity, step, each.dialect)
        return plan_bundle_memory(each, deployment, draft)

    beside = None if draft is None else plan(draft, min(capacity, draft.rope_positions))
    planned = plan_process_pair(plan(manifest, capacity), beside)
    # While the session packs the weights, they are in memory twice.
    extra = 2 * int8_bytes(manifest) if settings.prefill == "int8" else 0
    return replace(planned, load_peak=planned.load_peak + extra)


def _together(plans: Iterable[ProcessMemory]) -> int:
    """Return the bytes of several bundles in one process, opened one after the other."""
    before = most = 0
    for plan in plans:
        most = max(most, before + plan.load_peak)
        before += plan.process_bytes - (plan.python if before else 0)
    return max(most, before)

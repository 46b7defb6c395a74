"""Chooses the KV cache's capacity: the requested one if it fits, else what memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from edge.bundle.memory_facts import read_memory_facts
from edge.device.memory import read_available_memory_bytes
from edge.errors import DeviceMemoryError, ResourceError

from . import Backend
from .host_memory import LEAST_CAPACITY, HostMemory, plan_host_memory

_log = logging.getLogger(__name__)
_STEP = 256


def host_capacity(
    manifest: Manifest,
    num_slots: int,
    max_step_tokens: int,
    extra_bytes: int = 0,
    beside: Manifest | None = None,
    asked: int | None = None,
) -> int:
    """Return the cache rows per slot on the CPU such that a full cache still fits free memory.

    The cache takes memory as it fills. Without this limit, a long answer would end with the process
    killed. A capacity below the bundle's is logged.

    Args:
        manifest: manifest of the bundle.
        num_slots: sequences that the cache holds.
        max_step_tokens: the most tokens per sequence and step.
        extra_bytes: bytes of weights in another form, in addition to the bundle's.
        beside: manifest of a bundle that will be opened beside this one, with the same slots.
        asked: requested rows; they are granted or refused. None requests none.

    Raises:
        ResourceError: the requested cache is larger than all free memory.
    """
    wanted, free = asked or manifest.kv_capacity, read_available_memory_bytes()

    def plan(each: Manifest, capacity: int) -> HostMemory:
        return plan_host_memory(
            each.model,
            read_memory_facts(each, beside),
            each.dialect,
            io_spec.kv_bytes_per_token(each.model, "fp32", each.int8_layers),
            num_slots=num_slots,
            kv_capacity=capacity,
            max_step_tokens=min(max_step_tokens, capacity),
        )

    def need(capacity: int) -> int:
        own = plan(manifest, capacity)
        peak = own.load_peak
        if beside is not None:  # it is loaded after this bundle
            other = plan(beside, min(capacity, beside.rope_positions))
            loading = other.load_peak - other.process_bytes
            peak = max(peak, own.process_bytes + other.model_bytes + loading)
        return peak + extra_bytes

    if free is None or need(wanted) <= free:  # None: the system does not say
        return wanted
    if asked is not None:
        _judge_asked(asked, num_slots, plan(manifest, asked).cache, need(asked), free)
        return asked
    least = min(LEAST_CAPACITY, wanted)
    fitting = (c for c in range(wanted - 1, least, -1) if c % _STEP == 0 and need(c) <= free)
    capacity = next(fitting, least)
    if capacity < wanted:
        _report(
            capacity,
            wanted,
            num_slots,
            f"that needs {need(wanted) / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free",
        )
    return capacity


def _judge_asked(asked: int, num_slots: int, cache: int, whole: int, free: int) -> None:
    """Refuse a capacity that is impossible, and warn of one that exceeds the plan."""
    if cache > free:
        raise ResourceError(
            f"--kv-capacity {asked}: a full KV cache of {num_slots} slots takes {cache / 1e9:.1f} "
            f"GB of memory, and {free / 1e9:.1f} GB are free; a smaller one, or fewer slots"
        )
    _log.warning(
        "with a full KV cache of %d slots of %d tokens about %.1f GB of memory will be taken, and "
        "%.1f GB are free: the system may then kill this process; a smaller --kv-capacity, or "
        "fewer slots, is safe",
        num_slots,
        asked,
        whole / 1e9,
        free / 1e9,
    )


def device_backend(
    open_with: Callable[[int], Backend], manifest: Manifest, num_slots: int
) -> Backend:
    """Open a backend that notices a lack of memory only by running out of it.

    The capacity is halved until it fits.

    Args:
        open_with: opens the backend with this many rows per slot.
        manifest: manifest of the bundle.
        num_slots: sequences that the cache holds, for the log.

    Raises:
        DeviceMemoryError: not even `LEAST_CAPACITY` fits.
        EdgeError: any other error of the backend.
    """
    wanted = capacity = manifest.kv_capacity
    while True:
        try:
            backend = open_with(capacity)
        except DeviceMemoryError:
            if capacity // 2 < LEAST_CAPACITY:
                raise
            capacity //= 2
            continue
        if capacity < wanted:
            _report(capacity, wanted, num_slots, "the device ran out of memory with that")
        return backend


def _report(capacity: int, wanted: int, num_slots: int, why: str) -> None:
    slots = f"{num_slots} slots of {wanted} tokens each" if num_slots > 1 else f"{wanted} tokens"
    fewer = ", or fewer slots" if num_slots > 1 else ""
    _log.warning(
        "the KV cache holds %d tokens per slot instead of %s: %s; free some memory%s, or set "
        "--kv-capacity yourself",
        capacity,
        slots,
        why,
        fewer,
    )

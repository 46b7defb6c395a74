"""Resident memory of this process, and the CPUs that it has: from ``/proc`` and the kernel."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from .telemetry import read_kib

_STATUS = Path("/proc/self/status")
_ARM_CORE = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")


def read_cpu_flags() -> frozenset[str]:
    """What x86 cores can do, as ``/proc/cpuinfo`` names it; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def read_cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """Name the CPU's model, as ``/proc/cpuinfo`` does; on Arm by the numbers of its cores."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return "unknown CPU"
    fields = [(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in lines)]
    for key, value in fields:
        if key == "model name" and value:
            return value
    parts = sorted({f"{key} {value}" for key, value in fields if key in _ARM_CORE})
    return ", ".join(parts) or "unknown CPU"


def count_usable_cpus() -> int:
    """Count the logical CPUs that this process may run on; a quota of time is not regarded."""
    return len(os.sched_getaffinity(0))


def read_rss_bytes() -> int | None:
    """Resident memory now; None where the system does not say."""
    return read_kib(_STATUS, "VmRSS")


def read_rss_peak_bytes() -> int:
    """The most resident memory since `reset_rss_peak`, else since the process started."""
    peak = read_kib(_STATUS, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def reset_rss_peak() -> bool:
    """Start the peak anew; False where the system, or a container, does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True

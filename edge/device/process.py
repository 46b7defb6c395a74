"""Resident memory of this process, and the CPUs that it has: from ``/proc`` and the kernel."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def read_cpu_flags() -> frozenset[str]:
    """What x86 cores can do, as ``/proc/cpuinfo`` names it; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def count_usable_cpus() -> int:
    """Count the logical CPUs that this process may run on; a quota of time is not regarded."""
    return len(os.sched_getaffinity(0))


def choose_num_threads(root: Path = Path("/")) -> int:
    """Choose how many threads compute: one per physical core that this process may use.

    ONNX Runtime counts the cores of the machine, pins a thread to each, and lets them spin: those
    that share a core hold each other up, and the kernel's limits do not bind them.

    Args:
        root: where ``proc`` and ``sys`` are.

    Returns:
        The threads; 0 leaves them to ONNX Runtime, where nothing restricts this process.
    """
    from .cgroup import read_cpu_quota

    system, cpus = root / "sys/devices/system/cpu", os.sched_getaffinity(0)
    siblings = "topology/thread_siblings_list"
    cores = len({_read(system / f"cpu{cpu}" / siblings) or str(cpu) for cpu in cpus})
    quota = read_cpu_quota(root)
    if quota is not None and quota < cores:
        return max(int(quota), 1)
    return cores if len(cpus) < _count_listed(_read(system / "present")) else 0


def _count_listed(text: str) -> int:
    """Count the numbers of a list such as ``0-3,8``."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def read_rss_bytes() -> int | None:
    """Resident memory now; None where the system does not say."""
    from .memory import read_kib

    return read_kib(_STATUS, "VmRSS")


def read_rss_peak_bytes() -> int:
    """The most resident memory since `reset_rss_peak`, else since the process started."""
    from .memory import read_kib

    peak = read_kib(_STATUS, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def reset_rss_peak() -> bool:
    """Start the peak anew; False where the system, or a container, does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True

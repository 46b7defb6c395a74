"""Reads which CPUs this process may use, and their abilities."""

from __future__ import annotations

import os
from pathlib import Path


def read_cpu_flags() -> frozenset[str]:
    """Return the abilities of x86 cores by their names in ``/proc/cpuinfo``; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def count_usable_cpus() -> int:
    """Count the logical CPUs that this process may run on, regardless of a quota of time."""
    return len(os.sched_getaffinity(0))


def choose_num_threads(root: Path = Path("/")) -> int:
    """Choose the number of computing threads: one per physical core that this process may use.

    ONNX Runtime by itself counts the machine's cores, pins a thread to each, and lets them spin.
    Threads that share a core then block each other, and it ignores the kernel's limits.

    Args:
        root: directory that contains ``proc`` and ``sys``.

    Returns:
        Number of threads; 0 lets ONNX Runtime choose, as nothing restricts this process.
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

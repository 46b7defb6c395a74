"""Reads this process's resident memory."""

from __future__ import annotations

import resource
from pathlib import Path

from edge.device import memory

_STATUS = Path("/proc/self/status")


def read_rss_bytes() -> int | None:
    """Return the resident memory now, in bytes; None if the system does not say."""
    return memory.read_kib(_STATUS, "VmRSS")


def read_rss_peak_bytes() -> int:
    """Return the peak of resident memory in bytes, since `reset_rss_peak` or the start."""
    peak = memory.read_kib(_STATUS, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def reset_rss_peak() -> bool:
    """Restart the peak; False if the system, or a container, does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True

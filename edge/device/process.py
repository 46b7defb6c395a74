"""Resident memory of this process, from ``/proc/self``."""

from __future__ import annotations

import resource
from pathlib import Path

from .telemetry import read_kib

_STATUS = Path("/proc/self/status")


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

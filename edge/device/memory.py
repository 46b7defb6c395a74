"""Memory of the system and of this process's control group, from ``/proc``.

On Orin the GPU's memory is the system's memory, so ``MemAvailable`` is what is left for both.
"""

from __future__ import annotations

import re
from pathlib import Path

from .cgroup import read_room_bytes


def read_available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can have without swapping.

    That is ``MemAvailable``, or less where a control group limits it.
    """
    system, group = read_mem_available_bytes(root), read_room_bytes(root)
    return min((size for size in (system, group) if size is not None), default=None)


def read_swap_bytes(root: Path = Path("/")) -> int:
    """Swap that is free; what a control group may use of it is not read."""
    return read_kib(root / "proc/meminfo", "SwapFree") or 0


def read_mem_available_bytes(root: Path = Path("/")) -> int | None:
    """``MemAvailable`` of the whole system."""
    return read_kib(root / "proc/meminfo", "MemAvailable")


def read_kib(path: Path, key: str) -> int | None:
    """Bytes of a line such as ``VmRSS:  1234 kB``; None if it is not there."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:  # missing or forbidden
        return None
    match = re.search(rf"^{key}:\s+([0-9]{{1,15}}) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None

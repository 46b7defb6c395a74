"""Reads the memory of the system and of this process's control group, from ``/proc``.

On Orin the GPU's memory is the system's memory, so ``MemAvailable`` is what both have left.
"""

from __future__ import annotations

import logging
import mmap
import re
from pathlib import Path

_log = logging.getLogger(__name__)
_STEP_BYTES = 128 << 20


def read_available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process can have without swapping.

    That is ``MemAvailable``, or less if a control group limits it.
    """
    from .cgroup import read_room_bytes

    system, group = read_mem_available_bytes(root), read_room_bytes(root)
    return min((size for size in (system, group) if size is not None), default=None)


def read_swap_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of free swap; a control group's limit on swap is not read."""
    return read_kib(root / "proc/meminfo", "SwapFree") or 0


def read_mem_available_bytes(root: Path = Path("/")) -> int | None:
    """Return ``MemAvailable`` of the whole system, in bytes."""
    return read_kib(root / "proc/meminfo", "MemAvailable")


def read_free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return how many bytes a driver can have at once, without dropping page cache.

    That is ``MemFree`` without ``CmaFree``: contiguous pages that are reserved for other devices.
    """
    meminfo = root / "proc/meminfo"
    free = read_kib(meminfo, "MemFree")
    return None if free is None else max(0, free - (read_kib(meminfo, "CmaFree") or 0))


def make_free(num_bytes: int, root: Path = Path("/")) -> None:
    """Make the kernel drop page cache until ``num_bytes`` are free; needs no rights.

    It allocates memory, for which the kernel drops page cache, and frees it at once. It never takes
    more than is available without swapping, so it stops early if that is less.

    Args:
        num_bytes: bytes that are about to be allocated for the GPU.
        root: directory that contains ``proc`` and ``sys``.
    """
    taken: list[mmap.mmap] = []
    try:
        while (free := read_free_memory_bytes(root)) is not None:
            available = read_available_memory_bytes(root) or 0
            if free + len(taken) * _STEP_BYTES >= num_bytes or available < 2 * _STEP_BYTES:
                break
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            taken.append(mmap.mmap(-1, _STEP_BYTES, kind))
    finally:
        for block in taken:
            block.close()
    if taken:
        _log.info("page cache was given up for %d MB", len(taken) * _STEP_BYTES // 10**6)


def read_kib(path: Path, key: str) -> int | None:
    """Return the bytes of a line such as ``VmRSS:  1234 kB``; None if there is no such line."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:  # missing or forbidden
        return None
    match = re.search(rf"^{key}:\s+([0-9]{{1,15}}) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None

"""Gives the memory of large requests back to the system, where glibc would keep it.

glibc makes an arena per thread that allocates, up to eight per core, and none of them shrinks by
itself once something small and lasting sits at its end. Few arenas and a trim after the large
requests keep the process at the size that its work needs; see mallopt(3) and malloc_trim(3).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os

from edge.device.process import read_rss_bytes

from .threads import LARGE_BYTES

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_ARENAS = 2
_TRIM_AFTER_S = 0.5
_LOOK_EVERY_S = 10.0
_GROWN_BYTES = 16 * 2**20  # by which small requests must have made the process larger
_libc = ctypes.CDLL(None)
_has_trim = hasattr(_libc, "malloc_trim")  # musl has neither


def limit_arenas() -> bool:
    """Let malloc make few arenas, unless the environment says how many; call it before threads.

    Returns:
        Whether this process has the limit now.
    """
    said = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if said or not _has_trim:
        return False
    return bool(_libc.mallopt(_ARENA_MAX, _ARENAS))


class Trimmer:
    """Gives free memory back to the system, now and then; for one event loop."""

    def __init__(self) -> None:
        self._waits = self._looks = False
        self._kept_bytes = 0  # what the process had after the last time

    def ended(self, num_bytes: int) -> None:
        """Note the end of a request; trim in a moment after a large one, and where others add up.

        Args:
            num_bytes: length of the request's body.
        """
        if num_bytes >= LARGE_BYTES:
            self.soon()
        elif not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def soon(self) -> None:
        """Trim in a moment, in a thread; calls until then are one."""
        if _has_trim and not self._waits:
            self._waits = True
            asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim)

    def _look(self) -> None:
        self._looks = False
        if (read_rss_bytes() or 0) > self._kept_bytes + _GROWN_BYTES:
            self.soon()

    def _trim(self) -> None:
        self._waits = False
        asyncio.get_running_loop().run_in_executor(None, self._give_back)

    def _give_back(self) -> None:
        give_back()
        self._kept_bytes = read_rss_bytes() or 0


def give_back() -> None:
    """Give free memory back to the system, at once; stops the process for tens of ms."""
    gc.collect()  # a traceback, say, holds what it saw in a cycle
    if _has_trim:
        _libc.malloc_trim(0)

"""Returns the memory of large requests to the system, which glibc would keep.

glibc makes an arena for each thread that allocates, up to eight per core. An arena cannot shrink
once something small and lasting is at its end. Few arenas and a trim after large requests keep the
process at the size that its work needs; see mallopt(3) and malloc_trim(3).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os

from edge_make.resident_memory import read_rss_bytes

from .threads import LARGE_BYTES

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_ARENAS = 2
_TRIM_AFTER_S = 0.5
_LOOK_EVERY_S = 10.0
_GROWN_BYTES = 16 * 2**20  # trim once small requests have made the process this much larger
_libc = ctypes.CDLL(None)
_has_trim = hasattr(_libc, "malloc_trim")  # musl has neither


def limit_arenas() -> bool:
    """Let malloc make few arenas, unless the environment sets a number; call it before threads.

    Returns:
        Whether this process has the limit now.
    """
    said = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if said or not _has_trim:
        return False
    return bool(_libc.mallopt(_ARENA_MAX, _ARENAS))


class Trimmer:
    """Returns free memory to the system now and then; for use in one event loop."""

    def __init__(self) -> None:
        self._waits = self._looks = False
        self._kept_bytes = 0  # size of the process after the last trim

    def ended(self, num_bytes: int) -> None:
        """Note the end of a request; trim soon after a large one, or when small ones add up.

        Args:
            num_bytes: length of the request's body.
        """
        if num_bytes >= LARGE_BYTES:
            self.soon()
        elif not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def soon(self) -> None:
        """Trim soon, in a thread; calls until then are merged."""
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
    """Return free memory to the system at once; this stops the process for tens of ms."""
    gc.collect()  # e.g. a traceback keeps what it saw in a cycle
    if _has_trim:
        _libc.malloc_trim(0)

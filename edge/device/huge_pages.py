"""Makes huge pages of memory that is already filled: the weights of a loaded model.

A decode step reads every weight once. With pages of 2 MB the processor looks up far fewer addresses
than with pages of 4 KB, so it reads faster. ONNX Runtime and malloc ask for no huge pages, so they
are made afterwards, in place. Linux 6.1 collapses small pages at once; an older kernel is only
advised, and does it some time later.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_log = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20  # of x86-64, and of aarch64 with pages of 4 KB
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25  # Linux 6.1

_PIECE_BYTES = 64 << 20
_SMAPS = Path("/proc/self/smaps")
# Collapsing fills holes, so only little memory may become resident that was not used.
_MIN_RESIDENT = 0.9


def collapse_filled(min_region_bytes: int) -> Iterator[int]:
    """Make huge pages of the resident parts of this process's large anonymous regions, bit by bit.

    Two kinds stay small: regions that are advised against huge pages (`HostCache`), and blocks of
    2 MB of which less than nine tenths are resident. A refusal by the kernel is no error: those
    pages stay small.

    Args:
        min_region_bytes: size of the smallest region that is considered.

    Yields:
        Bytes of the next piece that are in huge pages, through this call or before.
    """
    at, wanted, made, spent_s, refusal = 0, 0, 0, 0.0, ""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        started = time.perf_counter()
        while True:
            piece, done = 0, 0
            # Searched anew each time, since memory comes and goes between two pieces.
            for address, length in _resident_runs(libc, min_region_bytes, at):
                num_bytes = min(length, _PIECE_BYTES - piece)
                at, piece = address + num_bytes, piece + num_bytes
                try:
                    _advise(libc, address, num_bytes, MADV_COLLAPSE)
                    done += num_bytes
                except OSError as error:
                    refusal = f"; {error}"
                    _advise(libc, address, num_bytes, MADV_HUGEPAGE)
                if piece == _PIECE_BYTES:
                    break
            wanted, made = wanted + piece, made + done
            spent_s += time.perf_counter() - started
            if not piece:
                break
            yield done
            started = time.perf_counter()
    except (OSError, AttributeError) as error:  # no smaps, function, or advice of this kind
        refusal = f"; {error}"
    _log.debug(
        "%d of %d MB are in huge pages after %.1f s%s",
        made >> 20,
        wanted >> 20,
        spent_s,
        refusal,
    )


def _large_regions(min_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield first and last address of each private anonymous region that may have huge pages."""
    region: list[str] = []
    for line in _SMAPS.read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            region = fields  # addresses, permissions, offset, device, inode, perhaps a name
        elif fields[0] == "VmFlags:" and "nh" not in fields:
            start, end = (int(address, 16) for address in region[0].split("-"))
            anonymous = region[5:] == [] or region[5] == "[heap]" or region[5][:6] == "[anon:"
            if region[1] == "rw-p" and anonymous and end - start >= min_bytes:
                yield start, end


def _resident_runs(libc: ctypes.CDLL, min_bytes: int, after: int) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of runs of huge pages of which nearly all is resident already.

    Raises:
        OSError: a region no longer exists.
    """
    for begin, end in _large_regions(min_bytes):
        start = max(begin + -begin % HUGE_PAGE_BYTES, after)
        count = (end - start) // HUGE_PAGE_BYTES
        if count <= 0:
            continue
        pages = np.zeros((count, HUGE_PAGE_BYTES // mmap.PAGESIZE), np.uint8)
        _check(
            libc.mincore(
                ctypes.c_void_p(start),
                ctypes.c_size_t(count * HUGE_PAGE_BYTES),
                ctypes.c_void_p(pages.ctypes.data),
            )
        )
        filled = (pages & 1).mean(axis=1) >= _MIN_RESIDENT
        edges = np.flatnonzero(np.diff(filled, prepend=False, append=False)).tolist()
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            yield start + first * HUGE_PAGE_BYTES, (last - first) * HUGE_PAGE_BYTES


def _advise(libc: ctypes.CDLL, address: int, num_bytes: int, advice: int) -> None:
    _check(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

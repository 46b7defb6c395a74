"""Asks the kernel which pages of a file it has cached."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache (mincore), which asking does not change."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, *[ctypes.c_size_t] * 5)
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
        assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0
    return sum(each & 1 for each in found)


def require_page_cache(folder: Path) -> None:
    """Skip the test where a file's only copy is in memory."""
    path = folder / "probe"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = cached_pages(path)
    path.unlink()
    if left:
        pytest.skip("this file system is in memory")

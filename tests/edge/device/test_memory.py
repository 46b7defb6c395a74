"""Memory of the system: what is free at once, and page cache that is given up for it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.device import memory
from edge.device.memory import make_free, read_free_memory_bytes
from edge_make.resident_memory import read_rss_peak_bytes, reset_rss_peak

STEP = memory._STEP_BYTES


class Kernel:
    """Memory of a machine: what is taken comes out of what is free, then out of the page cache."""

    def __init__(self, free: int, cache: int) -> None:
        self.free, self.cache, self.held, self.least = free, cache, 0, free + cache

    def take(self, fileno: int, length: int, flags: int) -> Kernel:
        assert (fileno, flags & mmap.MAP_POPULATE) == (-1, mmap.MAP_POPULATE)
        dropped = max(0, length - self.free)
        self.cache -= dropped
        self.free += dropped - length
        self.held += length
        assert self.cache >= 0, "the kernel ends the process"
        self.least = min(self.least, self.free + self.cache)
        return self

    def close(self) -> None:
        self.free += STEP
        self.held -= STEP


sizes = st.integers(0, 16 * STEP)


@given(free=sizes, cache=sizes, needed=sizes)
@example(free=STEP, cache=9 * STEP, needed=8 * STEP)
@example(free=0, cache=STEP, needed=8 * STEP)
def test_as_much_is_free_as_can_be_and_all_is_given_back(free: int, cache: int, needed: int):
    kernel = Kernel(free, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "read_free_memory_bytes", lambda _: kernel.free)
        patch.setattr(memory, "read_available_memory_bytes", lambda _: kernel.free + kernel.cache)
        patch.setattr(mmap, "mmap", kernel.take)
        make_free(needed)
    assert kernel.held == 0
    # What makes up for less than two steps stays with the kernel.
    assert kernel.free >= min(needed, free + cache - 2 * STEP)
    assert kernel.least >= min(STEP, free + cache)
    if free >= needed:
        assert (kernel.free, kernel.cache) == (free, cache)


def test_memory_is_really_taken_and_given_back(tmp_path: Path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemFree: 1000 kB\nMemAvailable: 8000000 kB\n")
    reset_rss_peak()
    before = read_rss_peak_bytes()
    make_free(STEP, tmp_path)
    after = read_rss_peak_bytes()
    reset_rss_peak()
    assert before is not None
    assert after is not None
    assert after - before > 0.9 * STEP
    assert (read_rss_peak_bytes() or 0) - before < 0.5 * STEP


def test_contiguous_pages_of_other_devices_are_not_free(tmp_path: Path):
    assert read_free_memory_bytes(tmp_path) is None
    make_free(1 << 40, tmp_path)  # nothing is known, so nothing is done
    (tmp_path / "proc").mkdir()
    meminfo = tmp_path / "proc/meminfo"
    meminfo.write_text("MemFree: 900000 kB\nCmaTotal: 262144 kB\nCmaFree: 200000 kB\n")
    assert read_free_memory_bytes(tmp_path) == 700_000 * 1024
    meminfo.write_text("MemFree: 900000 kB\n")
    assert read_free_memory_bytes(tmp_path) == 900_000 * 1024

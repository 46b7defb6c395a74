"""Which memory is put into huge pages, as the kernel counts it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.device import huge_pages
from edge.device.huge_pages import HUGE_PAGE_BYTES, MADV_COLLAPSE, MADV_HUGEPAGE, collapse_filled
from tests.conftest import require_huge_pages

COUNT = 16  # huge pages of a region
SIZE = COUNT * HUGE_PAGE_BYTES
LEAST = SIZE // 4


def region(shares: Sequence[float] = (1.0,) * COUNT, *, advice: int = -1) -> NDArray[np.uint8]:
    """Ones in small pages, from the border of a huge page on.

    Of each huge page the first part, its share, is resident. What is around them is left out of
    core dumps, so that the kernel joins no neighbour to them.
    """
    size = len(shares) * HUGE_PAGE_BYTES
    block = mmap.mmap(-1, size + 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -np.frombuffer(block, np.uint8, 1).ctypes.data % HUGE_PAGE_BYTES + HUGE_PAGE_BYTES
    block.madvise(mmap.MADV_DONTDUMP)
    block.madvise(mmap.MADV_DODUMP, first, size)
    if advice >= 0:
        block.madvise(advice, first, size)
    values = np.frombuffer(block, np.uint8, size, first)
    values[:] = 1
    for number, share in enumerate(shares):
        # A kernel that gave a huge page splits it when a part is dropped.
        start = number * HUGE_PAGE_BYTES
        block.madvise(mmap.MADV_DONTNEED, first + start, mmap.PAGESIZE)
        values[start : start + mmap.PAGESIZE] = 1
        kept = round(share * HUGE_PAGE_BYTES / mmap.PAGESIZE) * mmap.PAGESIZE
        if kept < HUGE_PAGE_BYTES:
            block.madvise(mmap.MADV_DONTNEED, first + start + kept, HUGE_PAGE_BYTES - kept)
    assert counted(values, "AnonHugePages") == 0
    return values


def counted(values: NDArray[np.uint8], name: str) -> int:
    """Bytes of a region, by a name of ``/proc/self/smaps``."""
    found, inside = [], False
    start, end = values.ctypes.data, values.ctypes.data + values.nbytes
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = start <= int(match[1], 16) and int(match[2], 16) <= end
        elif inside and line.startswith(f"{name}:"):
            found.append(int(line.split()[1]) << 10)
    if not found:
        pytest.skip("this kernel gives no huge pages")  # qemu tells no counts of its memory
    return sum(found)


def collapse(least: int) -> int:
    return sum(collapse_filled(least))


def test_filled_memory_becomes_huge_and_keeps_what_it_holds():
    require_huge_pages()
    values = region()
    expected = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    values[:] = expected
    for _ in range(2):  # once more does no harm
        assert collapse(LEAST) >= SIZE
        assert counted(values, "AnonHugePages") == counted(values, "Rss") == SIZE
        assert np.array_equal(values, expected)


def test_a_huge_page_with_many_holes_stays_small():
    """So what becomes resident is a ninth of what was filled at the most."""
    require_huge_pages()
    values = region((0.0, 0.5, 0.89, 0.91) * (COUNT // 4))
    before = counted(values, "Rss")
    collapse(LEAST)
    assert counted(values, "AnonHugePages") == SIZE // 4
    assert 0 < counted(values, "Rss") - before <= SIZE // 4 / 10
    assert (values.reshape(COUNT, -1).sum(axis=1) > 0).tolist() == [False, True, True, True] * (
        COUNT // 4
    )


def test_regions_advised_against_huge_pages_stay_small():
    require_huge_pages()
    values = region(advice=mmap.MADV_NOHUGEPAGE)
    collapse(LEAST)
    assert counted(values, "AnonHugePages") == 0


def test_small_regions_are_not_looked_at():
    require_huge_pages()
    values = region()
    collapse(SIZE + mmap.PAGESIZE)
    assert counted(values, "AnonHugePages") == 0
    collapse(SIZE)
    assert counted(values, "AnonHugePages") > 0  # all of it, where the kernel finds the room


def test_files_and_shared_memory_are_left_alone(tmp_path: Path):
    require_huge_pages()
    path = tmp_path / "data"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        copied = mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE)
    for block in (copied, mmap.mmap(-1, SIZE)):
        block[:] = b"x" * SIZE
        values = np.frombuffer(block, np.uint8)
        collapse(LEAST)
        assert counted(values, "AnonHugePages") + counted(values, "ShmemPmdMapped") == 0


def test_small_regions_share_a_piece(monkeypatch: pytest.MonkeyPatch):
    """Some versions of ONNX Runtime have a region for each tensor, and a step makes one piece."""
    require_huge_pages()
    monkeypatch.setattr(huge_pages, "_PIECE_BYTES", SIZE + HUGE_PAGE_BYTES)
    regions = [region() for _ in range(3)]
    *full, _ = collapse_filled(LEAST)
    assert full
    assert set(full) == {SIZE + HUGE_PAGE_BYTES}
    assert all(counted(values, "AnonHugePages") == SIZE for values in regions)


class Refusing:
    """A C library whose kernel knows no such advice as ``refused``."""

    def __init__(self, refused: set[int]) -> None:
        self.mincore = ctypes.CDLL(None, use_errno=True).mincore
        self._refused = refused
        self.accepted: set[int] = set()

    def madvise(self, _address: object, _num_bytes: object, advice: int) -> int:
        if advice in self._refused:
            ctypes.set_errno(22)
            return -1
        self.accepted.add(advice)
        return 0


@pytest.mark.parametrize(
    ("refused", "accepted"),
    [({MADV_COLLAPSE}, {MADV_HUGEPAGE}), ({MADV_COLLAPSE, MADV_HUGEPAGE}, set[int]())],
    ids=["Linux before 6.1", "a kernel without huge pages"],
)
def test_a_refusal_is_one_line_for_who_debugs(
    refused: set[int],
    accepted: set[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    libc = Refusing(refused)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    values = region()
    with caplog.at_level(logging.DEBUG):
        assert collapse(LEAST) == 0
    assert libc.accepted == accepted
    assert counted(values, "AnonHugePages") == 0
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert re.fullmatch(r"0 of \d+ MB are .*; \[Errno 22\] Invalid argument", record.getMessage())


def test_a_system_that_shows_no_regions_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(huge_pages, "_SMAPS", tmp_path / "smaps")
    with caplog.at_level(logging.DEBUG):
        assert collapse(LEAST) == 0
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "No such file" in record.getMessage()

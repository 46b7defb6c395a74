"""What the CPU's KV cache makes resident, as the kernel counts it."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from edge.backends.ort import cpu
from edge.backends.ort.host_cache import HostCache
from edge.device.huge_pages import HUGE_PAGE_BYTES
from edge.errors import ResourceError
from tests.conftest import TINY_KV_CAPACITY, Bundles
from tests.edge.backends.runner import Runner
from tests.standins.slot_rows import stacked

MB = 1 << 20
FP32 = np.dtype(np.float32)
NUM_TENSORS, HEADS, CAPACITY, HEAD_DIM = 8, 2, 4096, 64
ROW_BYTES = NUM_TENSORS * HEADS * HEAD_DIM * 4


def resident_bytes() -> int:
    """Of this process, without files; exact, unlike /proc/self/status."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("Anonymous:"))
    return int(found.split()[1]) << 10


def fill(cache: HostCache, slot: int, num_rows: int) -> None:
    for index, array in enumerate(cache.arrays):
        array[slot, :, :num_rows] = index + 1
    cache.wrote(slot, num_rows)


def test_short_sequences_in_many_slots_cost_their_rows():
    before = resident_bytes()
    cache = HostCache(NUM_TENSORS, (8, HEADS, CAPACITY, HEAD_DIM), FP32)
    for slot in range(8):
        fill(cache, slot, 40)
        cache.settle(64)
    used = 8 * 40 * ROW_BYTES
    # A head's 40 rows of 256 bytes end within a page of 4 KB: 1.2 times. Full it is 134 MB.
    assert used <= resident_bytes() - before < 2 * used + MB


def test_a_growing_sequence_never_costs_more_than_twice_its_rows():
    before = resident_bytes()
    cache = HostCache(NUM_TENSORS, (8, HEADS, CAPACITY, HEAD_DIM), FP32)
    for num_rows in range(64, CAPACITY + 1, 64):
        fill(cache, 3, num_rows)
        cache.settle(64)
        assert resident_bytes() - before < 2 * num_rows * ROW_BYTES + MB
    for array in cache.arrays:
        assert not array[[0, 1, 2, 4, 5, 6, 7]].any()


def test_pages_that_become_huge_keep_what_they_hold():
    rng = np.random.default_rng(0)
    cache = HostCache(2, (2, HEADS, CAPACITY, HEAD_DIM), FP32)
    expected = [rng.standard_normal(array.shape, FP32) for array in cache.arrays]
    for rows in (2000, CAPACITY):
        for slot in (0, 1):
            for array, values in zip(cache.arrays, expected, strict=True):
                array[slot, :, :rows] = values[slot, :, :rows]
            cache.wrote(slot, rows)
        cache.settle(512)
        assert not cache._pending
    for array, values in zip(cache.arrays, expected, strict=True):
        assert_array_equal(array, values)


@settings(deadline=None)
@given(
    st.integers(100, 6000),
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_a_page_is_huge_once_half_of_it_was_written(capacity: int, writes: list[tuple[int, float]]):
    cache = HostCache(1, (3, HEADS, capacity, HEAD_DIM), FP32)
    written = np.zeros(cache.arrays[0].shape, np.bool_)
    seen = [0, 0, 0]
    for slot, share in writes:
        rows = max(int(share * capacity), 1)
        cache.wrote(slot, rows)
        # It looks again when a slot has grown by 256 rows, not at every row.
        if seen[slot] == 0 or rows >= seen[slot] + 256:
            seen[slot] = rows
    for slot, rows in enumerate(seen):
        written[slot, :, :rows] = True
    elements = HUGE_PAGE_BYTES // FP32.itemsize
    whole = written.size // elements * elements
    shares = written.reshape(-1)[:whole].reshape(-1, elements).mean(axis=1)
    assert_array_equal(cache._huge, shares >= 0.5)


def test_tensors_begin_at_a_huge_page():
    cache = HostCache(3, (1, HEADS, CAPACITY, HEAD_DIM), FP32)
    assert [array.ctypes.data % HUGE_PAGE_BYTES for array in cache.arrays] == [0, 0, 0]


def test_a_backend_with_many_slots_costs_the_rows_of_those_in_use(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """64 slots share a huge page here: 16 tokens in 16 slots, 2 MB apart in every tensor."""
    # Behind the steps other memory becomes huge pages, whose holes would count here.
    monkeypatch.setattr(cpu, "collapse_filled", lambda _: ())
    bundle = tiny_bundles("qwen2")
    with Runner(bundle, num_slots=1024 * 128 // TINY_KV_CAPACITY) as runner:
        runner.step([[1]], [0])
        before = resident_bytes()
        apart = HUGE_PAGE_BYTES // (2 * TINY_KV_CAPACITY * 16 * 4)
        slots = range(apart, runner.backend.num_slots, apart)
        assert len(slots) >= 7
        for slot in slots:
            runner.step([[1]], [slot])
        # Four tensors: with huge pages it is 2 MB of each per slot.
        assert resident_bytes() - before < 4 * MB
        runner.backend.copy_slot(apart, 1, 1)
        assert stacked(runner.backend.read_slot(1, 1)).any()


def test_a_cache_beyond_the_address_space_is_refused(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(ResourceError, match="does not fit into memory; fewer slots"):
        Runner(tiny_bundles("qwen2"))

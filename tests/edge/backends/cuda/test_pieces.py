"""A block that cannot be had in one piece is made of pieces behind one range of addresses."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from edge.backends import cuda
from edge.backends.cuda import pieces
from edge.errors import DeviceMemoryError
from tests.standins.cuda import DRIVERS, OUT_OF_MEMORY, FakeGpu
from tests.standins.cuda_bindings import UNIT_BYTES

SIZE = 9 * UNIT_BYTES + 512


@pytest.fixture(params=DRIVERS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Its memory lies in pieces of three units, and five units are worth pieces."""
    fake = FakeGpu(with_pycuda=request.param == "pycuda")
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    fake.largest_block_bytes = 3 * UNIT_BYTES
    monkeypatch.setattr(pieces, "PIECE_BYTES", 5 * UNIT_BYTES)
    yield fake
    assert fake.alive == {}
    assert fake.used_bytes == 0


def test_pieces_are_one_range_of_addresses(gpu: FakeGpu):
    device = cuda.Device()
    with device.active():
        stream = cuda.Stream(device)
        memory = cuda.DeviceMemory(device, SIZE, "the KV cache")
        created = gpu.calls.count("cuMemMap")
        assert (created, gpu.used_bytes) == (5, 10 * UNIT_BYTES)  # two units each: halves of five
        values = np.arange(SIZE, dtype=np.uint32).astype(np.uint8)
        stream.upload(memory.address, values)
        stream.synchronize()
        np.testing.assert_array_equal(gpu.memory(memory.address, SIZE), values)
        stream.clear(memory.address, SIZE)  # still to run when its memory is given back
        memory.close()
        memory.close()
        stream.close()


def test_a_small_block_is_not_made_of_pieces(gpu: FakeGpu):
    device = cuda.Device()
    with device.active(), pytest.raises(DeviceMemoryError, match="the step needs 8 MB"):
        cuda.DeviceMemory(device, 4 * UNIT_BYTES, "the step")
    assert "cuMemCreate" not in gpu.calls


def test_too_little_memory_is_said_as_of_a_block_and_all_is_given_back(gpu: FakeGpu):
    gpu.total_bytes = 8 * UNIT_BYTES
    device = cuda.Device()
    with device.active(), pytest.raises(DeviceMemoryError, match=r"the KV cache needs 19 MB of"):
        cuda.DeviceMemory(device, SIZE, "the KV cache")
    assert gpu.calls.count("cuMemMap") == gpu.calls.count("cuMemUnmap") > 2


def test_every_call_may_fail(gpu: FakeGpu):
    """The first error is that of the block, and nothing is left behind."""
    device = cuda.Device()
    with device.active():
        before = len(gpu.calls)
        cuda.DeviceMemory(device, SIZE, "the KV cache").close()
        names = gpu.calls[before:]
        gpu.fail_code = OUT_OF_MEMORY
        for index, name in enumerate(names[: names.index("cuMemSetAccess") + 1]):
            gpu.fail_at = len(gpu.calls) + index
            # In pieces, in smaller ones, or with a warning.
            if name in ("cuMemAlloc", "cuMemCreate", "cuMemRelease"):
                cuda.DeviceMemory(device, SIZE, "the KV cache").close()
                continue
            with pytest.raises(DeviceMemoryError, match="the KV cache needs 19 MB of GPU memory"):
                cuda.DeviceMemory(device, SIZE, "the KV cache")
            assert gpu.used_bytes == 0, name


@pytest.mark.parametrize("lacks", ["cuMemCreate", "libcuda"])
def test_without_these_calls_the_block_is_refused(lacks: str, gpu: FakeGpu):
    """Of an old driver, or where cuda-bindings find no driver beside PyCUDA."""
    device = cuda.Device()
    if lacks == "libcuda" and not gpu.with_pycuda:
        return
    gpu.missing.add(lacks)
    with device.active(), pytest.raises(DeviceMemoryError, match="the KV cache needs 19 MB"):
        cuda.DeviceMemory(device, SIZE, "the KV cache")
    gpu.missing.clear()

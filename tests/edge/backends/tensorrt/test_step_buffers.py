"""Staging: what the engine finds at the addresses, and what comes back as float32."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from edge.backends import cuda
from edge.backends.batching import Window
from edge.backends.step import step_after
from edge.backends.tensorrt.device_memory import StepSizes
from edge.backends.tensorrt.step_buffers import StepBuffers, round_to_bf16, widen_fp16
from tests.makers.manifests import make_manifest
from tests.standins.cuda import FakeGpu

MODEL = make_manifest().model


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126,
                          min_value=-(2.0**126)), min_size=1))  # fmt: skip
def test_bf16_is_the_nearest_one(values: list[float]):
    ml_dtypes = pytest.importorskip("ml_dtypes")

    array = np.array(values, np.float32)
    assert_array_equal(round_to_bf16(array), array.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_every_fp16_number_is_widened_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # which Arm says of a signalling NaN
        expected = bits.view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    found = np.empty(int(finite.sum()), np.float32)
    widen_fp16(bits[finite], found)
    assert_array_equal(found.view(np.uint32), expected[finite].view(np.uint32))
    for special in bits[~finite]:
        some = np.array([1, special, 2], np.uint16)
        found = np.empty(3, np.float32)
        with np.errstate(invalid="ignore"):
            widen_fp16(some, found)
        assert_array_equal(found, expected[some])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("integrated", [False, True])
def test_staging_of_a_window_with_idle_places(
    dtype: Any, integrated: bool, monkeypatch: pytest.MonkeyPatch
):
    """What the engine finds at the addresses; no CPU computes bf16, so bits are compared."""
    gpu = FakeGpu(integrated=integrated)
    for name, module in gpu.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    device = cuda.Device()
    with device.active(), ExitStack() as resources:
        stream = cuda.Stream(device)
        sizes = StepSizes(4, 4, 4)
        buffers = StepBuffers(device, resources, sizes, MODEL, dtype, "write_indices")
        embeds = np.arange(2 * MODEL.hidden_size).reshape(2, 1, -1).astype(np.float16)
        everyone = Window(0, 3, (0, 1, 2), (0, 1, 2))
        ones = np.ones((3, 1, MODEL.hidden_size), np.float16)
        step = step_after([0, 1, 2], [5, 5, 5], ones, np.zeros((3, 1), np.int64))
        buffers.fill(everyone, step, idle_cursor=99)
        window = Window(1, 3, (1, 0), (0, 2))
        step = step_after([3, 1], [7, 9], embeds, np.zeros((2, 1), np.int64))
        buffers.fill(window, step, idle_cursor=99)
        buffers.upload(stream, 3, 1, 1)
        stream.synchronize()

        def found(name: str, count: int, kind: Any) -> Any:
            size = count * np.dtype(kind).itemsize
            return gpu.memory(buffers.addresses[name], size).view(kind)

        assert found("write_indices", 3, np.int64).tolist() == [9, 99, 7]
        assert found("position_ids", 3, np.int64).tolist() == [9, 0, 7]
        assert found("logits_indices", 3, np.int64).tolist() == [0, 0, 0]
        rows = found("inputs_embeds", 3 * MODEL.hidden_size, np.uint16).reshape(3, -1)
        bits = round_to_bf16(embeds) if dtype == "bf16" else embeds.view(np.uint16)
        assert_array_equal(rows[[0, 2]], bits[[1, 0], 0])
        assert not rows[1].any(), "the token of the step before would run again"

        logits = np.linspace(-3, 3, 3 * MODEL.vocab_size, dtype=np.float32)
        as_bits = round_to_bf16(logits) if dtype == "bf16" else logits.astype(np.float16)
        found("logits", logits.size, np.uint16)[...] = as_bits.view(np.uint16)
        buffers.download(stream, 3)
        stream.synchronize()
        target = np.empty((3, MODEL.vocab_size), np.float32)
        buffers.read_logits(0, target[:1])
        buffers.read_logits(1, target[1:])
        assert np.abs(target.reshape(-1) - logits).max() < (0.01 if dtype == "bf16" else 0.002)
        buffers.close()
    assert gpu.alive == {"stream": 1}

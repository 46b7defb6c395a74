"""The KV cache in device memory: its bits are those that an engine of its type reads."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edge.backends import cuda
from edge.backends.tensorrt.device_cache import DeviceCache
from tests.edge.backends.tensorrt.gpu_runner import both_drivers
from tests.fake_cuda import FakeGpu
from tests.manifests import make_manifest

SLOTS, ROWS = 3, 64


@both_drivers
@pytest.mark.parametrize(
    ("dtype", "stored"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)], ids=["fp16", "bf16"]
)
def test_rows_have_the_bits_of_the_engines_type(dtype: Any, stored: Any, gpu: FakeGpu):
    """No CPU computes an engine in BF16, so its bits are looked at in the memory itself."""
    manifest = make_manifest(dtype=dtype)
    model = manifest.model
    heads, dim = model.num_kv_heads, model.head_dim
    rows = np.random.default_rng(0).normal(0, 9, (2 * model.num_layers, heads, 5, dim))
    expected = rows.astype(np.float32).astype(stored)
    device = cuda.Device()
    with device.active(), ExitStack() as resources:
        stream = cuda.Stream(device)
        cache = DeviceCache(device, stream, resources, manifest, {}, SLOTS, ROWS)
        cache.write(1, rows.astype(np.float32))
        cache.copy(1, 2, 5)
        for slot in (1, 2):
            found = cache.read(slot, 5)
            assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
            for entry, each in enumerate(expected):
                memory = gpu.memory(cache.address(entry, slot), heads * ROWS * dim * 2)
                bits = memory.view(np.uint16).reshape(heads, ROWS, dim)
                assert_array_equal(bits[:, :5], each.view(np.uint16))
                assert not bits[:, 5:].any()

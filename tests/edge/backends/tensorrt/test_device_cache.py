"""The KV cache in device memory: its bits are those that an engine of its type reads."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edge.backends import cuda
from edge.backends.cuda import pieces
from edge.backends.tensorrt.device_cache import DeviceCache
from edge.model.dense import Dense
from tests.edge.backends.runner import history
from tests.edge.backends.tensorrt.gpu_runner import EngineBundles, GpuRunner, both_drivers
from tests.makers.manifests import make_manifest
from tests.standins import cuda_bindings as fake_cuda_bindings
from tests.standins.cuda import FakeGpu
from tests.standins.slot_rows import by_name, stacked, tensor_name

SLOTS, ROWS = 3, 64


@both_drivers
@pytest.mark.parametrize(
    ("dtype", "stored"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)], ids=["fp16", "bf16"]
)
def test_rows_have_the_bits_of_the_engines_type(dtype: Any, stored: Any, gpu: FakeGpu):
    """No CPU computes an engine in BF16, so its bits are looked at in the memory itself."""
    manifest = make_manifest(dtype=dtype)
    model = manifest.model
    heads, dim = Dense.of(model).num_kv_heads, Dense.of(model).head_dim
    rows = np.random.default_rng(0).normal(0, 9, (2 * model.num_layers, heads, 5, dim))
    expected = rows.astype(np.float32).astype(stored)
    device = cuda.Device()
    with device.active(), ExitStack() as resources:
        stream = cuda.Stream(device)
        cache = DeviceCache(device, stream, resources, manifest, {}, SLOTS, ROWS)
        cache.write(1, by_name(rows.astype(np.float32)))
        cache.copy(1, 2, 5)
        for slot in (1, 2):
            found = stacked(cache.read(slot, 5))
            assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
            for entry, each in enumerate(expected):
                memory = gpu.memory(cache.address(tensor_name(entry), slot), heads * ROWS * dim * 2)
                bits = memory.view(np.uint16).reshape(heads, ROWS, dim)
                assert_array_equal(bits[:, :5], each.view(np.uint16))
                assert not bits[:, 5:].any()


@both_drivers
@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize("kind", ["pieces", "layers"])
def test_a_cache_without_a_block_of_its_size_is_the_same_in_every_row(
    kind: str,
    kv_cache: str,
    gpu: FakeGpu,
    engine_bundles: EngineBundles,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """In pieces, and where the driver makes none, in a block for each layer."""
    bundle = engine_bundles("qwen2", "portable", kv_cache)
    options = {"num_slots": 64}  # nothing else is as large
    with GpuRunner(bundle, gpu, **options) as runner:
        expected = history(runner)
        whole = [block.num_bytes for block in runner.engine._cache._blocks]
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2 * 4096)
    monkeypatch.setattr(fake_cuda_bindings, "UNIT_BYTES", 4096)
    gpu.largest_block_bytes = min(whole) - 1
    if kind == "layers":
        gpu.missing.add("cuMemMap")
    with GpuRunner(bundle, gpu, **options) as runner:
        found, blocks = history(runner), runner.engine._cache.planes
        assert runner.engine._cache.num_bytes == sum(whole)
    for ours, theirs in zip(found, expected, strict=True):
        assert_array_equal(ours, theirs)
    layers = runner.manifest.model.num_layers
    assert len(blocks) == (layers if kind == "layers" else len(whole))
    said = f"rows are copied {layers // len(whole)} times where once was enough"
    assert (said in caplog.text) is (kind == "layers")
    assert ("cuMemUnmap" in gpu.calls) is (kind == "pieces")

"""The KV cache in device memory: its bits are those that an engine of its type reads."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edge.backends import cuda
from edge.backends.cuda import pieces
from edge.backends.tensorrt.device_cache import DeviceCache
from edge.model.cache import cache_tensors
from edge.model.slot_rows import SlotRows
from edge.model.spec import LayerRun
from tests.edge.backends.runner import history
from tests.edge.backends.tensorrt.gpu_runner import EngineBundles, GpuRunner, both_drivers
from tests.makers.manifests import make_manifest, make_model
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
    heads, dim = model.attentions()[0].kv_heads, model.attentions()[0].dim
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
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tensors_of_other_shapes_have_a_block_of_their_own(dtype: Any, gpu: FakeGpu):
    """What is read is what was written, to each tensor in its own memory."""
    wide, narrow = (
        make_model(num_kv_heads=heads, head_dim=dim) for heads, dim in ((2, 64), (1, 32))
    )
    runs = tuple(LayerRun(1, each.layer(0)) for each in (wide, narrow, wide))
    model = msgspec.structs.replace(wide, layers=runs)
    tensors = cache_tensors(model, dtype)
    random, device = np.random.default_rng(0), cuda.Device()
    rows = SlotRows(
        (name, random.integers(-9, 9, spec.shape(1, 5)[1:]).astype(np.float32))
        for name, spec in tensors.items()
    )
    with device.active(), ExitStack() as resources:
        manifest = make_manifest(dtype=dtype, model=model)
        cache = DeviceCache(device, cuda.Stream(device), resources, manifest, {}, SLOTS, ROWS)
        assert [planes.names for planes in cache.planes] == [
            ["0.key", "0.value", "2.key", "2.value"], ["1.key", "1.value"],
        ]  # fmt: skip
        assert cache.num_bytes == SLOTS * ROWS * sum(spec.row_bytes for spec in tensors.values())
        cache.write(0, rows)
        cache.copy(0, 2, 4)
        found = cache.read(0, 5), cache.read(2, 5)
        assert list(found[0]) == list(found[1]) == list(tensors)
        for name, array in rows.items():
            assert_array_equal(found[0][name].astype(np.float32), array)
            assert_array_equal(found[1][name][:, :4].astype(np.float32), array[:, :4])
            assert not found[1][name][:, 4:].any()
        assert not any(array.any() for array in cache.read(1, ROWS).values())


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

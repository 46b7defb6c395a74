"""Caches of ONNX Runtime whose tensors have unlike shapes, and a state, which they do not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.testing import assert_array_equal

from edge.backends.ort import session
from edge.backends.ort.cpu import OrtBackend
from edge.backends.ort.device import OrtDevice
from edge.backends.ort.device_cache import OrtDeviceCache
from edge.backends.ort.gpu import OrtCudaBackend
from edge.backends.ort.host_cache import HostCaches
from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError
from edge.model.cache import CacheSpec, Rows, State
from edge.model.slot_rows import SlotRows
from tests.conftest import Bundles

SLOTS, CAPACITY = 3, 16
HOST = OrtDevice("cpu", 0, "CPUExecutionProvider", {})
TENSORS: dict[str, CacheSpec] = {
    "0.key": Rows(2, 8, "fp32"),
    "0.value": Rows(2, 4, "fp32"),
    "3.key": Rows(1, 8, "fp32"),
    "7.value": Rows(2, 8, "fp32"),
}


def on_device() -> OrtDeviceCache:
    return OrtDeviceCache(onnxruntime, HOST, TENSORS, SLOTS, CAPACITY, np.dtype(np.float32))


@pytest.mark.parametrize("make", [lambda: HostCaches(TENSORS, SLOTS, CAPACITY, {}), on_device])
def test_each_tensor_is_read_as_it_was_written(make: Callable[[], Any]) -> None:
    cache = make()
    random = np.random.default_rng(0)
    rows = SlotRows(
        (name, random.random(spec.shape(1, 6)[1:], np.float32)) for name, spec in TENSORS.items()
    )
    cache.write(0, rows)
    cache.copy(0, 2, 4)
    whole, copied = cache.read(0, CAPACITY), cache.read(2, CAPACITY)
    assert list(whole) == list(copied) == list(TENSORS)
    for name, array in rows.items():
        assert_array_equal(whole[name][:, :6], array)
        assert_array_equal(copied[name][:, :4], array[:, :4])
        assert not whole[name][:, 6:].any()
        assert not copied[name][:, 4:].any()
    assert not any(array.any() for array in cache.read(1, CAPACITY).values())
    cache.close()


@pytest.mark.parametrize("backend", [OrtBackend, OrtCudaBackend])
def test_a_state_is_refused_by_name(
    backend: Any, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundles("qwen2")
    mixed = {**TENSORS, "1.state": State((4, 8, 8), "fp32")}
    monkeypatch.setattr(session, "cache_tensors", lambda *_: mixed)
    with pytest.raises(ConfigError, match=r"the cache 1\.state is a state, not rows"):
        backend(bundle, read_manifest(bundle))

"""Nobody said how long the cache is: as long as the bundle says, or as memory allows, and told."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge.backends import choose, default_capacity
from edge.backends.default_capacity import device_backend, host_capacity
from edge.backends.host_memory import LEAST_CAPACITY
from edge.bundle.manifest import Manifest, read_manifest
from edge.bundle.weights import manifest_linears
from edge.engine_config import EngineConfig
from edge.errors import DeviceMemoryError, ResourceError
from edge_lab.planner.memory import Deployment, plan_process_memory
from tests.conftest import Bundles, require_kernels
from tests.makers.manifests import make_manifest

MANIFEST = make_manifest(kv_capacity=8192, rope_positions=8192)
SLOTS, STEP = 4, 512


def peak(manifest: Manifest, capacity: int) -> int:
    deployment = Deployment("ort-cpu", SLOTS, capacity, STEP, manifest.dialect)
    linears = manifest_linears(manifest)
    return plan_process_memory(
        manifest.model, linears, manifest.rope_positions, deployment
    ).load_peak


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int | None) -> None:
    monkeypatch.setattr(default_capacity, "read_available_memory_bytes", lambda: num_bytes)


def test_a_capacity_that_fits_is_taken_without_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    free(monkeypatch, peak(MANIFEST, 8192))
    assert host_capacity(MANIFEST, SLOTS, STEP) == 8192
    assert not caplog.records


@pytest.mark.parametrize("fits", [7936, 5120, 1280])
def test_less_memory_gives_fewer_rows_and_one_line(
    fits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    free(monkeypatch, peak(MANIFEST, fits + 255))  # rows come in steps of 256
    assert host_capacity(MANIFEST, SLOTS, STEP) == fits
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"holds {fits} tokens per slot instead of 4 slots of 8192" in record.getMessage()
    assert "--kv-capacity" in record.getMessage()


def test_room_is_left_for_a_bundle_that_drafts(monkeypatch: pytest.MonkeyPatch):
    draft = make_manifest(kv_capacity=4096, rope_positions=4096)
    free(monkeypatch, peak(MANIFEST, 8192))
    alone, both = (
        host_capacity(MANIFEST, SLOTS, STEP),
        host_capacity(MANIFEST, SLOTS, STEP, 0, draft),
    )
    assert alone == 8192
    assert both < 8192
    # Beyond its positions the draft's cache grows no more.
    own = plan_process_memory(
        draft.model, manifest_linears(draft), 4096, Deployment("ort-cpu", SLOTS, 4096, STEP)
    )
    free(monkeypatch, peak(MANIFEST, 8192) + own.load_peak)
    assert host_capacity(MANIFEST, SLOTS, STEP, 0, draft) == 8192


def test_there_is_a_least_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    free(monkeypatch, 1)
    assert host_capacity(MANIFEST, SLOTS, STEP) == LEAST_CAPACITY
    assert len(caplog.records) == 1
    assert host_capacity(make_manifest(kv_capacity=300), SLOTS, STEP) == 300


def test_a_capacity_that_was_asked_for_is_given_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cache = Deployment("ort-cpu", SLOTS).cache_token_bytes(MANIFEST.model) * SLOTS * 5000
    for room in (None, peak(MANIFEST, 5000)):
        free(monkeypatch, room)
        assert host_capacity(MANIFEST, SLOTS, STEP, asked=5000) == 5000
    assert not caplog.records
    free(monkeypatch, cache)  # and no byte for the weights
    assert host_capacity(MANIFEST, SLOTS, STEP, asked=5000) == 5000
    (record,) = caplog.records
    assert "4 slots of 5000 tokens" in record.getMessage()
    assert "may then kill this process" in record.getMessage()
    free(monkeypatch, cache - 1)
    with pytest.raises(ResourceError, match=r"--kv-capacity 5000: .* 4 slots takes .* fewer slots"):
        host_capacity(MANIFEST, SLOTS, STEP, asked=5000)


def test_a_system_that_does_not_tell_gets_the_bundles_own(monkeypatch: pytest.MonkeyPatch):
    free(monkeypatch, None)
    assert host_capacity(MANIFEST, SLOTS, STEP) == 8192


def test_a_device_that_runs_out_gets_half_until_it_fits(caplog: pytest.LogCaptureFixture):
    tried: list[int] = []

    def open_with(capacity: int) -> Any:
        tried.append(capacity)
        if capacity > 2500:
            raise DeviceMemoryError("full")
        return opened

    opened: Any = object()
    assert device_backend(open_with, MANIFEST, SLOTS) is opened
    assert tried == [8192, 4096, 2048]
    (record,) = caplog.records
    assert "holds 2048 tokens per slot instead of 4 slots of 8192" in record.getMessage()


def test_a_device_without_room_for_a_conversation_is_an_error():
    def open_with(capacity: int) -> Any:
        raise DeviceMemoryError(f"no room for {capacity}")

    with pytest.raises(DeviceMemoryError, match="no room for 1024"):
        device_backend(open_with, MANIFEST, 1)


def test_only_the_default_shrinks(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    require_kernels("native")
    bundle: Path = tiny_bundles("qwen2")
    manifest = read_manifest(bundle)
    free(monkeypatch, 50 * Deployment("ort-cpu").cache_token_bytes(manifest.model))
    monkeypatch.setattr(default_capacity, "LEAST_CAPACITY", 20)
    monkeypatch.setattr(choose, "_has_cuda_provider", lambda: False)
    for asked, found in ((None, 20), (50, 50)):
        backend = choose.open_backend(
            bundle, manifest, EngineConfig(num_slots=1, kv_capacity=asked)
        )
        with closing(backend):
            assert backend.capacity == found

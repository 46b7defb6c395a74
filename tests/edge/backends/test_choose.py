"""Which engine runs a bundle."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import pytest

from edge.backends import choose
from edge.bundle.manifest import read_manifest
from edge.engine_config import EngineConfig
from tests.conftest import Bundles


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2")


def test_threads_are_the_cpus_even_where_an_engine_is(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(choose, "find_engines", lambda path: [path / "engines" / "sm87"])
    monkeypatch.setattr(choose, "_has_cuda_provider", lambda: True)
    with caplog.at_level(logging.WARNING):
        backend = choose.open_backend(
            bundle, read_manifest(bundle), EngineConfig(num_slots=1, num_threads=1)
        )
    with closing(backend):
        assert backend.name == "ort-cpu"
    assert "num_threads asks for the CPU" in caplog.text


def test_rounded_activations_are_the_cpus_even_where_an_engine_is(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    bundle = tiny_bundles("qwen2", quant="int4")
    manifest = read_manifest(bundle)
    monkeypatch.setattr(choose, "find_engines", lambda path: [path / "engines" / "sm87"])
    config = EngineConfig(num_slots=1, int8_activations=True)
    with closing(choose.open_backend(bundle, manifest, config)) as backend:
        assert backend.name == "ort-cpu"
    assert "int8_activations asks for the CPU" in caplog.text


def test_without_a_gpu_auto_is_the_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "_has_cuda_provider", lambda: False)
    config = EngineConfig(num_slots=1)
    with closing(choose.open_backend(bundle, read_manifest(bundle), config)) as backend:
        assert backend.name == "ort-cpu"

"""Which engine runs a bundle."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import pytest

from edge.backends import choose
from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError
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
            "auto", bundle, read_manifest(bundle), num_slots=1, num_threads=1
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
    with closing(
        choose.open_backend("auto", bundle, manifest, num_slots=1, int8_activations=True)
    ) as backend:
        assert backend.name == "ort-cpu"
    assert "int8_activations asks for the CPU" in caplog.text
    for name in ("tensorrt", "ort-cuda"):
        with pytest.raises(ConfigError, match=f"{name} rounds none"):
            choose.open_backend(name, bundle, manifest, num_slots=1, int8_activations=True)


@pytest.mark.parametrize("name", ["tensorrt", "ort-cuda"])
def test_threads_are_refused_for_an_engine_that_has_none(bundle: Path, name: choose.BackendName):
    with pytest.raises(ConfigError, match="leave it out"):
        choose.open_backend(name, bundle, read_manifest(bundle), num_slots=1, num_threads=1)


def test_without_a_gpu_auto_is_the_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "_has_cuda_provider", lambda: False)
    with closing(
        choose.open_backend("auto", bundle, read_manifest(bundle), num_slots=1)
    ) as backend:
        assert backend.name == "ort-cpu"

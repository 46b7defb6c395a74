"""Graphs and versions that ONNX Runtime must not be given."""

from __future__ import annotations

import sys

import msgspec
import pytest

from edge.backends.ort.cpu import OrtBackend
from edge.bundle.manifest import read_manifest
from edge.errors import BundleError, DependencyError
from tests.conftest import Bundles


def test_a_graph_that_breaks_the_contract_is_refused(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2")
    manifest = read_manifest(bundle)
    model = msgspec.structs.replace(manifest.model, num_kv_heads=4)
    with pytest.raises(BundleError, match=r"found \('past_key_values.0.key'.*export the bundle"):
        OrtBackend(bundle, msgspec.structs.replace(manifest, model=model))
    model = msgspec.structs.replace(manifest.model, num_layers=1)
    with pytest.raises(BundleError, match="found 9 tensors, expected 7 tensors"):
        OrtBackend(bundle, msgspec.structs.replace(manifest, model=model))


def test_an_old_engine_is_refused(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    import onnxruntime

    bundle = tiny_bundles("qwen2", "native")
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(DependencyError, match=r"needs onnxruntime >= 1.26, found 1.23.2"):
        OrtBackend(bundle, read_manifest(bundle))


def test_a_missing_engine_names_the_extra(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    bundle = tiny_bundles("qwen2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"install .*-e .*\[cpu\]"):
        OrtBackend(bundle, read_manifest(bundle))

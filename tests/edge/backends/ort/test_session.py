"""Graphs and versions that ONNX Runtime must not be given."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import msgspec
import pytest

from edge.backends.ort.cpu import OrtBackend
from edge.bundle.manifest import read_manifest
from edge.errors import BundleError, DependencyError
from tests.conftest import Bundles
from tests.makers.manifests import change_model


def test_a_graph_that_breaks_the_contract_is_refused(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2")
    manifest = read_manifest(bundle)
    model = change_model(manifest.model, num_kv_heads=4)
    with pytest.raises(BundleError, match=r"found \('past_key_values.0.key'.*export the bundle"):
        OrtBackend(bundle, msgspec.structs.replace(manifest, model=model))
    model = change_model(manifest.model, num_layers=1)
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


CHILD = """
import json, os, pathlib, sys
import numpy, onnxruntime
from edge.backends.ort.cpu import OrtBackend
from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError

tasks = pathlib.Path("/proc/self/task")
for task in tasks.iterdir():  # libraries have theirs already
    os.sched_setaffinity(int(task.name), {int(sys.argv[2])})
before, bundle = len(list(tasks.iterdir())), pathlib.Path(sys.argv[1])
manifest = read_manifest(bundle)
try:
    OrtBackend(bundle, manifest, num_threads=2)
except ConfigError as error:
    refused = str(error)
backend = OrtBackend(bundle, manifest)
lines = [line for task in tasks.iterdir() for line in (task / "status").read_text().splitlines()]
allowed = {line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")}
print(json.dumps([refused, len(list(tasks.iterdir())) - before, sorted(allowed)]))
"""


def test_no_thread_runs_where_the_process_may_not(tiny_bundles: Bundles):
    """ONNX Runtime would pin one to each core of the machine."""
    cpu = str(min(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", CHILD, str(tiny_bundles("qwen2")), cpu]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    refused, more, allowed = json.loads(done.stdout)
    assert "num_threads (2) is more than the 1 CPUs that this process may use" in refused
    assert (more, allowed) == (0, [cpu])

"""What doctor asks about own kernels: an engine of one plugin for each kind, on the stand-ins."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterator

import pytest

from edge.backends.tensorrt import plugins
from edge_lab.doctor import machine
from engines.builder.target import Target
from engines.check import plugin_probe
from engines.check.plugin_probe import probe_plugins
from engines.compiler.compat import TensorRT
from tests.engines.own_builds import target_of
from tests.standins.cuda import FakeGpu
from tests.standins.plugin import PLUGINS
from tests.standins.plugin_v3 import REGISTRY
from tests.standins.tensorrt import emptied, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu()
    monkeypatch.setattr(REGISTRY, "creators", weakref.WeakValueDictionary())
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(PLUGINS, "known", {})
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", PLUGINS.module())
    device.push()
    with emptied(device):
        yield device
        device.live.pop("module", None)  # own kernels stay until the process ends
        device.pop()


def target(gpu: FakeGpu, patch: pytest.MonkeyPatch, version: str) -> Target:
    install(patch, gpu, version=version)
    rt = TensorRT(sys.modules["tensorrt"], "tensorrt", version)
    return dataclasses.replace(target_of(gpu, version), rt=rt)


@pytest.mark.parametrize(
    ("version", "kinds"),
    [("10.3.0.30", ["python"]), ("10.16.2.10", ["compiled", "python"])],
)
def test_each_kind_is_parsed_built_and_listed(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, version: str, kinds: list[str]
) -> None:
    verdicts = list(probe_plugins(target(gpu, monkeypatch, version), (100, 64)))
    assert [each.scheme for each in verdicts] == kinds
    for verdict in verdicts:
        assert verdict.built, verdict.detail
        assert verdict.detail == "built"  # the stand-in's inspector lists layers of bundles only


def test_a_kind_that_fails_leaves_the_other(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    found = target(gpu, monkeypatch, "10.16.2.10")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    compiled, python = probe_plugins(found, (64, 64))
    assert compiled.built
    assert not python.built
    assert "cuda-bindings" in python.detail


def test_a_gpu_that_is_too_old_is_the_reason(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    found = target(gpu, monkeypatch, "10.3.0.30")
    (verdict,) = probe_plugins(dataclasses.replace(found, compute_capability="7.5"), (64, 64))
    assert not verdict.built
    assert "compute capability 8.0" in verdict.detail


def test_the_doctor_calls_it_by_its_name() -> None:
    assert plugin_probe.__name__ == machine._PLUGIN_PROBE

"""Asking a plan what it consists of, on the stand-in of TensorRT."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge.bundle.engine_file import find_engines, read_engine_info
from edge.device.gpu import Gpu
from edge.errors import BuildError
from edge_make.engine_layers import parse_inspector, read_layers
from engines.builder import build as build_module
from engines.builder.build import build_engine
from engines.builder.record import read_compiled_layers
from engines.builder.target import Target
from engines.compiler import compat
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from tests.conftest import RUNNABLE, Bundles
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import FakeEngine, make_module, write_engine

PROFILES = ["prefill", "decode"]


@pytest.fixture
def plan(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2", RUNNABLE, "int4"), bundle)
    directory = write_engine(bundle, max_prefill=32)
    return directory / read_engine_info(directory).plan


def on(gpu: FakeGpu) -> TensorRT:
    return TensorRT(make_module(gpu), "tensorrt", "10.16.2.10")


@pytest.mark.parametrize("per_context", [False, True])
def test_all_profiles_are_listed(
    per_context: bool, gpu: FakeGpu, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "_per_context", per_context)
    texts = compat.inspect_plan(on(gpu), plan.read_bytes(), 2)
    assert len(texts) == (2 if per_context else 1)
    assert parse_inspector(texts, PROFILES) == read_layers(plan)


def test_a_plan_that_does_not_load_has_tensorrts_reason(gpu: FakeGpu, plan: Path) -> None:
    gpu.fail_at = len(gpu.calls)
    with pytest.raises(BuildError, match=r"deserializeCudaEngine: .* \(out of memory\)"):
        compat.inspect_plan(on(gpu), plan.read_bytes(), 2)


def test_unknown_layers_have_a_reason(gpu: FakeGpu, plan: Path) -> None:
    engine = plan.parent, read_engine_info(plan.parent)
    here = Target(on(gpu), Gpu("a GPU", "8.7"), "8.7")
    table, unknown = read_compiled_layers(here, *engine)
    assert unknown is None
    assert table == read_layers(plan)
    elsewhere = Target(on(gpu), None, "8.7")
    assert "without a GPU" in str(read_compiled_layers(elsewhere, *engine)[1])
    gpu.fail_at = len(gpu.calls)
    assert read_compiled_layers(here, *engine) == (
        None,
        "deserializeCudaEngine: Error Code 1: Cuda Runtime (out of memory)",
    )


def test_a_repeated_build_reads_layers_that_a_killed_one_did_not(
    gpu: FakeGpu, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny_bundles("qwen2", RUNNABLE, "int4"), tmp_path / "bundle"))
    config = BuildConfig(bundle, max_prefill=32)
    here = Target(on(gpu), Gpu("a GPU", "8.7"), "8.7")

    def end(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "read_compiled_layers", end)
        with pytest.raises(KeyboardInterrupt):
            build_engine(config, target=here)
    (directory,) = find_engines(bundle)
    ended = read_engine_info(directory)
    assert "was ended" in str(ended.compiled_unknown)
    again = build_engine(config, target=here)
    assert not again.built
    assert [each.profile for each in again.info.compiled] == PROFILES
    assert read_engine_info(directory) == again.info
    assert again.info.plan == ended.plan
    assert read_layers(directory / ended.plan) is not None
    before = len(gpu.calls)
    build_engine(config, target=here)
    assert len(gpu.calls) == before  # the plan is not opened for what is known


@pytest.mark.parametrize("call", ["create_execution_context", "set_optimization_profile_async"])
def test_a_context_that_fails_is_a_reason_too(
    call: str, gpu: FakeGpu, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is in its place by then, which an error would not say."""
    monkeypatch.setattr(FakeEngine, "_per_context", True)
    engine = plan.parent, read_engine_info(plan.parent)
    here = Target(on(gpu), Gpu("a GPU", "8.7"), "8.7")
    before = len(gpu.calls)
    assert read_compiled_layers(here, *engine) == (read_layers(plan), None)
    gpu.fail_at = len(gpu.calls) + gpu.calls[before:].index(call)
    table, unknown = read_compiled_layers(here, *engine)
    assert table is None
    assert unknown in ("createExecutionContext: out of memory", f"{call}: internal error")

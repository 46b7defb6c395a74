"""Limits of the unit: what is planned fits, and more settings take more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.bundle.manifest import read_manifest
from edge.bundle.weights import manifest_linears
from edge.errors import BundleError, ConfigError
from edge_lab.planner.memory import Deployment, plan_process_memory
from edge_serve.cli.config import config
from edge_serve.models.limits import UnitLimits, unit_limits
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2")


@pytest.fixture
def settings(bundle: Path) -> ServerSettings:
    return ServerSettings(model={"tiny": bundle}, backend="ort-cpu")


def test_limits_are_above_the_plan(settings: ServerSettings, bundle: Path):
    manifest = read_manifest(bundle)
    step = min(settings.prefill_chunk, manifest.kv_capacity)
    deployment = Deployment(
        "ort-cpu", settings.num_slots, manifest.kv_capacity, step, manifest.dialect
    )
    linears = manifest_linears(manifest)
    plan = plan_process_memory(manifest.model, linears, manifest.rope_positions, deployment)
    limits = unit_limits(settings, 12)
    children = (512 << 20) + (1 << 30)
    bodies = 4 * settings.max_inflight_body_bytes
    assert limits.memory_high_bytes == int(1.25 * plan.load_peak) + children + bodies
    assert limits.memory_max_bytes == int(1.25 * limits.memory_high_bytes)
    assert limits.tasks_max == 128 + 4 * 12


def test_larger_services_get_larger_limits(
    settings: ServerSettings, bundle: Path, tiny_bundles: Bundles
):
    least = unit_limits(settings, 4)
    for change in (
        {"num_slots": 16},
        {"kv_capacity": 256},
        {"max_inflight_body_bytes": 128 << 20},
        {"model": {"tiny": bundle, "again": bundle}},
        {"draft": bundle},
        {"backend": "tensorrt"},  # CUDA
    ):
        more = unit_limits(replace(settings, **change), 4)
        assert more.memory_high_bytes > least.memory_high_bytes, change
    integers = replace(settings, model={"tiny": tiny_bundles("qwen2", quant="int4")})
    plain, widened = unit_limits(integers, 4), unit_limits(replace(integers, prefill="int8"), 4)
    assert widened.memory_high_bytes > plain.memory_high_bytes


def test_pictures_have_children_of_their_own(settings: ServerSettings, sees_bundle: Path):
    sees = replace(settings, model={"sees": sees_bundle})
    blind = unit_limits(settings, 4).memory_high_bytes
    assert unit_limits(sees, 4).memory_high_bytes > blind + (2 << 30)


def test_the_verb_prints_a_drop_in(bundle: Path):
    done = CliRunner().invoke(config, ["unit", "--model", f"tiny={bundle}", "--num-slots", "2"])
    assert done.exit_code == 0, done.output
    comment, section, *lines = done.stdout.splitlines()
    assert comment.startswith("# ")
    assert section == "[Service]"
    found = {name: int(value) for name, value in (line.split("=") for line in lines)}
    assert list(found) == ["MemoryHigh", "MemoryMax", "TasksMax"]
    wanted = unit_limits(ServerSettings(model={"tiny": bundle}, num_slots=2))
    assert UnitLimits(*found.values()) == wanted


def test_without_a_bundle_there_is_nothing_to_plan(tmp_path: Path):
    done = CliRunner().invoke(config, ["unit"])
    assert isinstance(done.exception, ConfigError)
    assert "--model BUNDLE" in str(done.exception)
    with pytest.raises(BundleError):
        unit_limits(ServerSettings(model={"a": tmp_path / "none"}))

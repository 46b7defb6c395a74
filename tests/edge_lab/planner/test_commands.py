"""The command lines that a plan ends with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from edge_lab.planner import commands
from edge_lab.planner.commands import export_commands, targets_of
from edge_lab.planner.memory import Deployment
from edge_lab.planner.models import BUILT_IN, find_model
from edge_lab.planner.plan import find_device, make_plan
from edge_lab.planner.speed import FITTED
from export.cli import export
from export.config import ExportConfig
from tests.conftest import Checkpoints


@pytest.mark.parametrize(
    ("device", "release", "targets"),
    [
        ("orin-nano-8", None, ("jetpack6", "jetpack7")),
        ("orin-nano-8", "36.4.3", ("jetpack6",)),
        ("orin-nano-8", "39.0", ("jetpack7",)),
        ("orin-nano-8", "35.1", ("jetpack6", "jetpack7")),
        # The machine that asks says nothing about another module.
        ("agx-orin-64", "36.4.3", ("jetpack6", "jetpack7")),
        ("cpu", "36.4.3", ("cpu",)),
    ],
)
def test_a_device_may_have_either_jetpack_but_this_one_has_its_own(
    device: str, release: str | None, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: release)
    monkeypatch.setattr(commands, "read_module", lambda: "NVIDIA Jetson Orin Nano Developer Kit")
    monkeypatch.setattr(commands, "read_kib", lambda *_: 7_990_000_000)
    assert targets_of(find_device(device)) == targets


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize("device", ["agx-orin-64", "cpu"])
def test_every_line_is_an_export_of_what_was_planned(device: str, kv_cache: str):
    deployment = Deployment(kv_capacity=2048, int8_layers="all" if kv_cache == "int8" else ())
    place = find_device(device)
    for model in BUILT_IN.values():
        for option in make_plan(model, place, deployment, FITTED).options:
            lines = export_commands(model, option, place, deployment)
            assert len({line.rpartition(" --target ")[0] for line in lines.values()}) == 1
            for target, line in lines.items():
                _, verb, *arguments = shlex.split(line)
                config = ExportConfig(**_options(verb, arguments))
                assert (config.target, config.linears) == (target, option.recipe)
                assert (config.kv_capacity, config.kv_cache) == (2048, kv_cache)


def _options(verb: str, arguments: list[str]) -> dict[str, Any]:
    ignored = {"as_json", "verify", "help_all", "dry_run", "best", "fast"}
    parsed = export.make_context(verb, arguments).params
    assert not parsed["best"]
    assert not parsed["fast"]
    return {name: value for name, value in parsed.items() if name not in ignored}


def test_a_directory_with_a_space_is_quoted(tiny_checkpoints: Checkpoints, tmp_path: Path):
    (directory := tmp_path / "My Model").symlink_to(tiny_checkpoints("qwen2"))
    model, place = find_model(str(directory)), find_device(None)
    plan = make_plan(model, place, Deployment(kv_capacity=64), FITTED)
    for line in export_commands(model, plan.options[0], place, plan.deployment).values():
        assert shlex.split(line)[2:5] == [str(directory), "-o", "bundles/my model-fp16"]

"""Writes the command lines that make a planned bundle and its engine."""

from __future__ import annotations

import shlex
from pathlib import Path

from edge.bundle.library import roots
from edge.bundle.model_names import bundle_name
from edge.device.memory import read_kib
from edge_lab.telemetry import read_module, read_target

from .devices import identify
from .memory import Deployment
from .models import PlannedModel
from .plan import CPU, Option, PlanDevice


def targets_of(device: PlanDevice) -> tuple[str, ...]:
    """Return the values of ``--target`` that a device may have; an Orin may have either JetPack.

    If the device is the module that this machine is, only its own is returned.
    """
    if device.name == CPU:
        return (CPU,)
    here = identify(read_module(), read_kib(Path("/proc/meminfo"), "MemTotal"))
    target = None if here is None or here.name != device.name else read_target()
    return ("jetpack6", "jetpack7") if target is None else (target,)


def bundle_path(model: PlannedModel, option: Option) -> Path:
    """Return the path of a model's bundle under the name that ``edge-llm pull`` gives it."""
    return roots()[0] / bundle_name(str(model.source), option.name)


def export_commands(
    model: PlannedModel, option: Option, device: PlanDevice, deployment: Deployment
) -> dict[str, str]:
    """Return the command that exports a planned model, by its ``--target``.

    Args:
        model: the model to export; not a bundle.
        option: the quantization.
        device: where it will run.
        deployment: capacity and type of the KV cache.
    """
    assert option.recipe is not None, model.name
    arguments = ["edge-llm", "export", str(model.source), "-o", str(bundle_path(model, option))]
    arguments += [*option.recipe.export_options(), "--kv-capacity", str(deployment.kv_capacity)]
    if deployment.int8_layers:
        arguments += ["--kv-cache", "int8"]
    return {each: shlex.join([*arguments, "--target", each]) for each in targets_of(device)}

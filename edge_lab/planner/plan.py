"""Makes a plan: one model, one device, every quantization side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edge.bundle import io_spec
from edge.bundle.quant_rules import fold_quant
from edge.bundle.weights import Linear, manifest_linears
from edge.errors import ConfigError
from edge_make.recipe import VARIANTS, Recipe, find_variant, recipe_linears

from .devices import DEFAULT_DEVICE, PowerMode, find_module
from .drafting import ACCEPTANCES, DraftPlan, DraftSpeed, draft_speed, least_acceptance, plan_draft
from .engine import PlannedEngine
from .memory import (
    Deployment,
    ProcessMemory,
    memory_of_plan,
    plan_bundle_memory,
    plan_process_memory,
    plan_process_pair,
    usable_bytes,
)
from .models import PlannedModel
from .published import Kind, Precision, has_fitted
from .speed import FITTED, Efficiency, Speed, Work, predict, work_of

CPU = "cpu"
DRAFT_QUANT = "int4"
"""Precision to plan a draft in that is no bundle: its errors cost time, not quality."""
Basis = Literal["fitted", "carried over", "measured"]
"""Basis of a prediction: published figures of this very case (module, precision, batch), figures of
other cases, or the benchmark of ``--calibrate``. A ceiling is based on none of them."""
_PRECISIONS: dict[str, Precision] = {"float": "fp16", "int8": "int8", "int4": "int4"}
# No table tells how fast a CPU multiplies: this is a round number that `calibrate` scales.
_CPU_NOMINAL_OPS = 100e12


@dataclass(frozen=True)
class PlanDevice:
    """The device of a plan.

    Attributes:
        name: name of a module, or ``cpu``.
        mode: its clocks; None for a CPU whose bandwidth nobody measured.
        usable_bytes: memory that programs can have; None where it is not known.
    """

    name: str
    mode: PowerMode | None
    usable_bytes: int | None


@dataclass(frozen=True)
class Option:
    """One quantization in a plan.

    Attributes:
        name: name of the variant, or the bundle's own quantization.
        recipe: recipe for ``edge-llm export``; None for a bundle.
        memory: memory by part, that of a draft model included.
        work: bytes and operations.
        speeds: at each context of the plan; empty where the device's bandwidth is unknown.
        basis: basis of each kind of prediction in ``speeds``.
        fits: whether the device has the memory; None where that is unknown.
        drafts: speed with the draft model by context and acceptance; empty without one.
        least_acceptance: acceptance from which on drafts pay at the first context; None without a
            draft, or if they never pay.
    """

    name: str
    recipe: Recipe | None
    memory: ProcessMemory
    work: Work
    speeds: tuple[Speed, ...]
    basis: dict[Kind, Basis]
    fits: bool | None
    drafts: tuple[DraftSpeed, ...] = ()
    least_acceptance: float | None = None


def largest_block(memory: ProcessMemory) -> tuple[str, int]:
    """Return the engine's largest contiguous allocation, at most: its name and its bytes.

    A Jetson may refuse it where all together would fit (`edge.backends.cuda.pieces`). TensorRT does
    not tell how it allocates weights; the largest of them is the lm_head.
    """
    blocks = {
        "the KV cache": memory.cache,
        "the activations": memory.activations,
        "the lm_head": memory.weights["lm_head"],
    }
    return max(blocks.items(), key=lambda each: each[1])


@dataclass(frozen=True)
class ModelPlan:
    """A model on a device.

    Attributes:
        options: the quantizations.
        draft: a draft model beside each of them.
        engine: the bundle's own engine, whose steps are predicted.
        engine_unknown: why a bundle is planned by rule, without an engine; None without a bundle.
    """

    model: PlannedModel
    device: PlanDevice
    deployment: Deployment
    efficiency: Efficiency
    options: tuple[Option, ...]
    draft: DraftPlan | None = None
    engine: PlannedEngine | None = None
    engine_unknown: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        mode = self.device.mode
        return {
            "model": self.model.name,
            "device": self.device.name,
            "power_mode": None if mode is None else mode.name,
            "bytes_per_s": None if mode is None else mode.bytes_per_s,
            "usable_bytes": self.device.usable_bytes,
            "backend": self.deployment.backend,
            "batch": self.deployment.batch,
            "kv_capacity": self.deployment.kv_capacity,
            "kv_cache": "int8" if self.deployment.int8_layers else "float",
            "max_prefill": self.deployment.max_prefill,
            "efficiency": asdict(self.efficiency),
            "engine": None if self.engine is None else self.engine.as_dict(),
            "engine_unknown": self.engine_unknown,
            "draft": None
            if self.draft is None
            else {
                "model": self.draft.name,
                "quant": self.draft.quant,
                "work": asdict(self.draft.work),
                "device_bytes": self.draft.memory.device_bytes,
            },
            "options": [
                {
                    "quant": option.name,
                    "memory": option.memory.as_dict(),
                    "largest_block": dict(
                        zip(("what", "bytes"), largest_block(option.memory), strict=True)
                    ),
                    "work": asdict(option.work),
                    "fits": option.fits,
                    "basis": option.basis,
                    "speeds": [asdict(speed) for speed in option.speeds],
                    "drafts": [asdict(speed) for speed in option.drafts],
                    "least_acceptance": option.least_acceptance,
                }
                for option in self.options
            ],
        }


def find_device(
    name: str | None, power_mode: str | None = None, cpu_bytes_per_s: float | None = None
) -> PlanDevice:
    """Find a module of the table, or this kind of CPU.

    Args:
        name: name of a module (`find_module`), or ``cpu``; None is the AGX Orin 64 GB.
        power_mode: power mode of the module; None is the fastest.
        cpu_bytes_per_s: bandwidth that a benchmark measured on the CPU.

    Raises:
        ConfigError: an unknown module or mode.
    """
    name = name or DEFAULT_DEVICE
    if name.lower() == CPU:
        if power_mode is not None:
            raise ConfigError(f"--power-mode {power_mode} is for Orin modules, not for {CPU}")
        if cpu_bytes_per_s is None:
            return PlanDevice(CPU, None, None)
        return PlanDevice(CPU, cpu_mode(cpu_bytes_per_s), None)
    module = find_module(name)
    return PlanDevice(module.name, module.mode(power_mode), usable_bytes(module.memory_bytes))


def cpu_mode(bytes_per_s: float) -> PowerMode:
    """Make a power mode for a CPU of measured bandwidth."""
    per_sm_clock = PowerMode("unit", 1, 1.0, 1.0).int8_ops
    clock_hz = _CPU_NOMINAL_OPS / per_sm_clock
    return PowerMode(CPU, 1, clock_hz, bytes_per_s, knows_arithmetic=False)


def make_plan(
    model: PlannedModel,
    device: PlanDevice,
    deployment: Deployment,
    efficiency: Efficiency,
    *,
    quants: Sequence[str] = (),
    contexts: Sequence[int] = (),
    draft: PlannedModel | None = None,
    engine: PlannedEngine | str | None = None,
) -> ModelPlan:
    """Compute memory and speed of a model.

    Args:
        model: the model to plan.
        device: the device to plan for.
        deployment: backend, batch, capacity.
        efficiency: the share of the device's figures that is reached.
        quants: names of variants; empty is all, or the bundle's own.
        contexts: tokens to predict speed at; empty is 512 and the capacity.
        draft: a model that drafts: a bundle, or a model in `DRAFT_QUANT`.
        engine: the bundle's own (`edge_lab.planner.engine.find_engine`), or why there is none.

    Raises:
        ConfigError: a capacity or context out of range, an unknown quantization, or one that is not
            the bundle's.
    """
    positions = (
        io_spec.rope_positions(model.spec)
        if model.manifest is None
        else model.manifest.rope_positions
    )
    capacity = deployment.kv_capacity
    io_spec.check_capacity(capacity, positions)
    contexts = contexts or sorted({min(512, capacity), capacity})
    if not all(1 <= context <= capacity for context in contexts):
        raise ConfigError(
            f"--context {', '.join(map(str, contexts))} must lie in 1 to the KV capacity {capacity}"
        )
    options = []
    drafter = None
    if draft is not None:
        ((quant, _, own),) = _linears(draft, () if draft.manifest is not None else (DRAFT_QUANT,))
        drafter = plan_draft(draft, quant, own, deployment)
    for name, recipe, linears in _linears(model, quants, draft):
        if model.manifest is None:
            memory = plan_process_memory(model.spec, linears, positions, deployment)
        else:
            beside = None if draft is None else draft.manifest
            memory = plan_bundle_memory(model.manifest, deployment, beside)
        work = work_of(model.spec, linears, memory.weights, deployment)
        if isinstance(engine, PlannedEngine):
            work = replace(work, engine=engine.work)
            memory = memory_of_plan(memory, engine.plan_bytes)
        speeds = (
            tuple(
                predict(work, device.mode, efficiency, deployment.batch, c, deployment.max_prefill)
                for c in contexts
            )
            if device.mode is not None
            else ()
        )
        if drafter is not None:
            memory = plan_process_pair(memory, drafter.memory)
        fits = None if device.usable_bytes is None else memory.load_peak <= device.usable_bytes
        basis = _basis(device, linears, deployment.batch, efficiency)
        option = Option(name, recipe, memory, work, speeds, basis, fits)
        if drafter is not None and device.mode is not None:
            option = _with_drafts(option, drafter.work, device.mode, efficiency, deployment.batch)
        options.append(option)
    built, unknown = (None, engine) if isinstance(engine, str) else (engine, None)
    return ModelPlan(model, device, deployment, efficiency, tuple(options), drafter, built, unknown)


def _with_drafts(
    option: Option, draft: Work, mode: PowerMode, efficiency: Efficiency, batch: int
) -> Option:
    def at(context: int, acceptance: float) -> DraftSpeed:
        return draft_speed(option.work, draft, mode, efficiency, batch, context, acceptance)

    contexts = [speed.context for speed in option.speeds]
    return replace(
        option,
        drafts=tuple(at(context, a) for context in contexts for a in ACCEPTANCES),
        least_acceptance=least_acceptance(lambda acceptance: at(contexts[0], acceptance)),
    )


def _basis(
    device: PlanDevice, linears: Sequence[Linear], batch: int, efficiency: Efficiency
) -> dict[Kind, Basis]:
    kinds: tuple[Kind, ...] = ("decode", "prefill")
    if efficiency != FITTED:
        return dict.fromkeys(kinds, "measured")
    schemes = {linear.scheme.kind for linear in linears if linear.part != "lm_head"}
    precision = _PRECISIONS.get(schemes.pop()) if len(schemes) == 1 else None
    found: dict[Kind, Basis] = {}
    for kind in kinds:
        known = device.mode is not None and has_fitted(
            kind, device.name, device.mode.name, precision, batch
        )
        found[kind] = "fitted" if known else "carried over"
    return found


def _linears(
    model: PlannedModel, quants: Sequence[str], draft: PlannedModel | None = None
) -> list[tuple[str, Recipe | None, list[Linear]]]:
    if model.manifest is not None:
        if quants:
            raise ConfigError(
                f"--quant {quants[0]}: {model.name} is a bundle, whose quantization is made; leave "
                "it out, or plan the model that it was made from"
            )
        beside = None if draft is None else draft.manifest
        linears = manifest_linears(model.manifest, beside)
        return [(model.manifest.quantization.name, None, linears)]
    if quants:
        return [(name, *_variant(model, name)) for name in dict.fromkeys(map(fold_quant, quants))]
    found: list[tuple[str, Recipe | None, list[Linear]]] = []
    for name in VARIANTS:
        try:
            recipe, linears = _variant(model, name)
        except ConfigError:  # no group size divides a width: the other variants still fit
            continue
        if all(linears != other for _, _, other in found):  # g32 may be the largest that fits
            found.append((name, recipe, linears))
    return found


def _variant(model: PlannedModel, name: str) -> tuple[Recipe, list[Linear]]:
    recipe = find_variant(name)
    try:
        return recipe, recipe_linears(model.spec, recipe)
    except ConfigError as error:
        raise ConfigError(f"--quant {name}: {error}") from error

"""``edge-llm plan``: what a model takes and how fast it will be, before anything is exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edge.cli import echo_json
from edge.cli.sections import SectionCommand, option
from edge.engine_config import EAGLE3
from edge.errors import ConfigError
from edge_make.default_kv_capacity import default_kv_capacity

from .planned_strategies import planned_ways, print_planned_ways
from .tables import FigureTable, make_table

if TYPE_CHECKING:
    from edge.bundle.manifest import Dialect
    from edge_lab.planner.engine import Asked, PlannedEngine
    from edge_lab.planner.models import PlannedModel
    from edge_lab.planner.plan import ModelPlan, PlanDevice
    from edge_lab.planner.speed import Efficiency, StepKind

DEFAULT_MAX_PREFILL = 512

device_option = option(
    "Device",
    "--device",
    metavar="MODULE",
    help="agx-orin-64 (default), agx-orin-32, orin-nx-16, orin-nx-8, orin-nano-8, orin-nano-4 or "
    "cpu; agx, orin-nx and orin-nano mean the largest of their kind.",
)
power_mode_option = option(
    "Device", "--power-mode", help="Power mode of the module, e.g. 30W; default: its fastest."
)
calibrate_option = option(
    "Device",
    "--calibrate",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Take the efficiency from this JSON of edge-llm bench, or from the report.json of "
    "scripts/gpu-check, instead of published figures.",
)


ways_option = option(
    "Wishes",
    "--ways",
    "ways_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Predict what each way to answer costs here, from this JSON of edge-llm eval --ways.",
)


@click.command(cls=SectionCommand)
@click.argument("model")
@device_option
@power_mode_option
@option(
    "Shapes", "--batch", type=click.IntRange(1, 64), default=1, show_default=True, help="Slots."
)
@option(
    "Shapes",
    "--kv-capacity",
    type=int,
    help="Tokens per slot; default: the engine's or the bundle's own, 8192 for the named models, "
    "else 4096.",
)
@option(
    "Shapes",
    "--max-prefill",
    type=click.IntRange(1),
    help="Tokens per prefill step; default: 512, or what the engine takes if that is less.",
)
@option(
    "Models", "--quant", "quants", multiple=True, help="Only this quantization; may be repeated."
)
@option(
    "Models",
    "--draft",
    help="Model that drafts, given like MODEL and with the same tokenizer. It is planned in int4 "
    "unless it is a bundle. eagle3 is the head of MODEL's own bundle, on a CPU.",
)
@option(
    "Shapes",
    "--kv-cache",
    type=click.Choice(["float", "int8"]),
    help="Rows of the KV cache; default: the bundle's, else float.",
)
@option(
    "Shapes",
    "--context",
    "contexts",
    type=int,
    multiple=True,
    help="Predict speed with this many tokens of context; may be repeated.",
)
@ways_option
@calibrate_option
@option(
    "Expert",
    "--no-engine",
    is_flag=True,
    help="Predict by rule alone, as if the bundle's engine were not built.",
)
@option(
    "Output",
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw speed and memory into this file; needs the extra report.",
)
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON line.")
def plan(
    model: str,
    device: str | None,
    power_mode: str | None,
    batch: int,
    kv_capacity: int | None,
    max_prefill: int | None,
    kv_cache: str | None,
    quants: tuple[str, ...],
    draft: str | None,
    contexts: tuple[int, ...],
    ways_file: Path | None,
    calibrate: Path | None,
    no_engine: bool,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Predict memory and speed of MODEL for every quantization.

    MODEL is a bundle by directory or name, a directory with a config.json, a config.json, or a
    name that pull takes, such as deepseek-r1:1.5b, 1.5b or r1-qwen-7b.
    Of a bundle with an engine for an Orin the speed is that of this engine's layers.
    """
    from edge_lab.planner.engine import Asked, PlannedEngine
    from edge_lab.planner.memory import Deployment
    from edge_lab.planner.models import BUILT_IN, find_model
    from edge_lab.planner.picture import draw_plan
    from edge_lab.planner.plan import CPU, make_plan
    from edge_lab.planner.vision import plan_pictures

    planned = find_model(model)
    target, efficiency = take_device(device, power_mode, calibrate)
    engine = _find_engine(planned, target, Asked(batch, kv_capacity, max_prefill), no_engine)
    if isinstance(engine, PlannedEngine):
        kv_capacity = engine.kv_capacity
        max_prefill = max_prefill or min(DEFAULT_MAX_PREFILL, engine.max_prefill)
    if kv_capacity is None:
        # Use the export's default; a config.json does not say whether the model reasons.
        kv_capacity = (
            default_kv_capacity(
                reasons=planned in BUILT_IN.values(),
                positions=planned.spec.max_position_embeddings,
            )
            if planned.manifest is None
            else planned.manifest.kv_capacity
        )
    backend: Any = "ort-cpu" if target.name == CPU else "tensorrt"
    dialect: Dialect = int8_dialect(backend, kv_cache)
    int8_layers: tuple[int, ...] | Literal["all"] = "all" if kv_cache == "int8" else ()
    if planned.manifest is not None:
        dialect, int8_layers = planned.manifest.dialect, planned.manifest.int8_layers
        found = "int8" if int8_layers else "float"
        if kv_cache not in (None, found):
            raise ConfigError(
                f"--kv-cache {kv_cache} is not what {model} has ({found}); leave it out, or give "
                "the model's config.json"
            )
    chunk = min(max_prefill or DEFAULT_MAX_PREFILL, kv_capacity)
    deployment = Deployment(backend, batch, kv_capacity, chunk, dialect, int8_layers)
    result = make_plan(
        planned,
        target,
        deployment,
        efficiency,
        quants=quants,
        contexts=sorted(set(contexts)),
        draft=None if draft is None else _find_draft(draft, planned, backend),
        engine=engine,
    )
    if svg is not None:
        try:
            svg.write_text(draw_plan(result), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--svg {svg} cannot be written: {error.strerror}") from error
    pictures = plan_pictures(planned.manifest, on_cpu=target.name == CPU)
    ways = [] if ways_file is None else planned_ways(ways_file, result)
    if as_json:
        more: dict[str, Any] = {}
        if pictures is not None:
            more["pictures"] = dataclasses.asdict(pictures)
        if ways:
            more["ways"] = [dataclasses.asdict(way) for way in ways]
        echo_json({**result.as_dict(), **more})
        return
    _print(result)
    if ways:
        print_planned_ways(ways, result.options[0].speeds[0].context)
    if pictures is not None:
        speeds = result.options[0].speeds
        click.echo(pictures.describe(speeds[0].prefill_tps if speeds else None))
    _print_export(result)
    if svg is not None:
        click.echo(f"drawn: {svg}", err=True)


def take_device(
    device: str | None, power_mode: str | None, calibrate: Path | None
) -> tuple[PlanDevice, Efficiency]:
    """Find the device of the options; the memory of ``cpu`` is what this machine has left now.

    Raises:
        ConfigError: `find_device` or `calibrated` refuses the options.
    """
    from edge.device.memory import read_available_memory_bytes
    from edge_lab.planner.calibration import calibrated
    from edge_lab.planner.plan import CPU, find_device
    from edge_lab.planner.speed import FITTED

    if calibrate is None:
        target, efficiency = find_device(device, power_mode), FITTED
    else:
        target, efficiency = calibrated(calibrate, device, power_mode)
    if target.name == CPU:
        target = dataclasses.replace(target, usable_bytes=read_available_memory_bytes())
    return target, efficiency


def _find_engine(
    planned: PlannedModel, target: PlanDevice, asked: Asked, no_engine: bool
) -> PlannedEngine | str | None:
    """Return the bundle's engine, or why there is none to go by; None where there can be none."""
    from edge_lab.planner.engine import find_engine
    from edge_lab.planner.plan import CPU

    if planned.bundle is None or planned.manifest is None or target.name == CPU:
        if no_engine:
            raise ConfigError("--no-engine is for a bundle on an Orin; leave it out")
        return None
    if no_engine:
        return "--no-engine was given"
    return find_engine(planned.bundle, planned.manifest, asked)


def _find_draft(draft: str, planned: PlannedModel, backend: str) -> PlannedModel:
    """Return the model or the head that ``--draft`` names."""
    from edge_lab.planner.models import check_tokenizers, find_head, find_model

    if draft == str(EAGLE3):
        if backend != "ort-cpu":
            raise ConfigError(
                "--draft eagle3 is for ONNX Runtime: TensorRT engines put out no hidden states; "
                "plan it with --device cpu, or a draft model"
            )
        return find_head(planned)
    drafting = find_model(draft)
    check_tokenizers(planned, drafting)
    return drafting


def int8_dialect(backend: str, kv_cache: str | None) -> Dialect:
    """Return the dialect to plan for without a bundle; TensorRT has an 8-bit cache in only one."""
    return "portable" if backend == "tensorrt" and kv_cache == "int8" else "native"


def _print(result: ModelPlan) -> None:
    from rich.console import Console

    from edge.bundle.memory_facts import PARTS
    from edge_lab.planner.memory import adapter_bytes
    from edge_lab.planner.plan import largest_block

    console = Console(markup=False, highlight=False)
    device, deployment = result.device, result.deployment
    place = device.name if device.mode is None else f"{device.name} ({device.mode.name})"
    weights = make_table(f"{result.model.name}: weights, MB", "quantization", *PARTS, "all")
    memory = make_table(
        f"Memory, MB: batch {deployment.batch}, KV capacity {deployment.kv_capacity}, "
        f"{deployment.backend}",
        *("quantization", "weights", "cache", "activations", "I/O", "graphs max", "runtime"),
        *("process", "load peak", "build peak", "fits"),
    )
    for planned in result.options:
        plan = planned.memory
        weights.add_row(
            planned.name, *(_mb(plan.weights[part]) for part in PARTS), _mb(plan.weights_bytes)
        )
        around = plan.embeddings + plan.runtime + plan.python + plan.tokenizer
        steps = (plan.activations, plan.io + plan.pinned, plan.graphs)
        figures = (plan.weights_bytes + plan.plan_extra, plan.cache, *steps, around)
        fits = "?" if planned.fits is None else "yes" if planned.fits else "NO"
        peaks = (plan.load_peak, plan.build_peak)
        memory.add_row(planned.name, *map(_mb, (*figures, plan.process_bytes, *peaks)), fits)
    console.print(weights, "")
    console.print(memory)
    manifest = result.model.manifest
    if manifest is not None and (adapters := adapter_bytes(manifest, deployment.backend)):
        console.print(
            f"In I/O: {_mb(adapters)} MB for the adapter of each slot, whatever its rank."
        )
    if device.usable_bytes is not None:
        console.print(f"{device.name} leaves about {_mb(device.usable_bytes)} MB to programs.")
    if deployment.backend == "tensorrt":
        blocks = [largest_block(planned.memory) for planned in result.options]
        what, size = max(blocks, key=lambda block: block[1])
        console.print(f"The largest block that lies in one piece: {what}, {_mb(size)} MB.")
    console.print("")
    if device.mode is None:
        console.print(
            "No speed: the bandwidth of this CPU is not known; measure it with edge-llm bench "
            "BUNDLE --json and give the file to --calibrate."
        )
        return
    speed = make_table(
        f"Speed on {place}, {device.mode.bytes_per_s / 1e9:.1f} GB/s: tokens per second",
        *("quantization", "context", "decode max", "decode", "TPOT ms"),
        *("prefill max", "prefill", "TTFT ms"),
        keys=2,
    )
    marks = {"fitted": "", "measured": "", "carried over": "*"}
    for planned in result.options:
        decode, prefill = (marks[planned.basis[kind]] for kind in ("decode", "prefill"))
        for at in planned.speeds:
            most = at.prefill_ceiling_tps
            speed.add_row(
                planned.name,
                str(at.context),
                f"{at.decode_ceiling_tps:.1f}",
                f"{at.decode_tps:.1f}{decode}",
                f"{at.tpot_s * 1e3:.1f}{decode}",
                "-" if most is None else f"{most:,.0f}",
                f"{at.prefill_tps:,.0f}{prefill}",
                f"{at.ttft_s * 1e3:,.0f}{prefill}",
            )
    console.print(speed)
    console.print(
        "max: the ceiling, computed: all bytes of a step at the whole bandwidth, or its operations "
        "at the tensor cores' peak. The other figures are predicted."
    )
    if any("carried over" in planned.basis.values() for planned in result.options):
        console.print(
            "* nobody published this case (module, power mode, precision, batch): the factors were "
            "fitted to others."
        )
    if (basis := _engine_basis(result)) is not None:
        console.print(basis)
    if result.draft is not None:
        console.print("", _draft_table(result))
        console.print(
            "Acceptance: how often a guess is right, those before it being right; measure it with "
            "edge-llm bench BUNDLE --draft BUNDLE. Where drafts lose, the policy does not draft."
        )
    factors = result.efficiency
    # No table has a CPU's peak arithmetic, so a share of it would mean nothing.
    arithmetic = "" if device.name == "cpu" else f", arithmetic at {factors.compute:.0%}"
    per_launch = "" if result.engine is None else f" ({factors.launch_s * 1e6:.1f} us per launch)"
    console.print(
        f"Efficiency: weights at {factors.weights:.0%} and cache at {factors.cache:.0%} of the "
        f"bandwidth, {factors.layer_s * 1e6:.0f} us per layer{per_launch}{arithmetic}; "
        f"{factors.source}."
    )


def _print_export(result: ModelPlan) -> None:
    """Print the commands that make the planned model, in INT4 if that was planned and fits."""
    options = [option for option in result.options if option.recipe is not None]
    if not options or result.model.source is None:
        return
    from edge_lab.planner.commands import export_commands

    fitting = [option for option in options if option.fits is not False]
    if not fitting:
        return
    option = next((each for each in fitting if each.name == "int4"), fitting[0])
    for target, line in export_commands(
        result.model, option, result.device, result.deployment
    ).items():
        click.echo(f"{making(option.name, target)}\n  {line}")


def making(name: str, target: str) -> str:
    """Return the heading of the commands that make a bundle for a ``--target``."""
    where = f"JetPack {target[-1]}" if target.startswith("jetpack") else "this CPU"
    return f"To make {name} for {where}:"


def _engine_basis(result: ModelPlan) -> str | None:
    """Say how the bundle's engine is known, or why it is not; None without a bundle."""
    engine = result.engine
    if engine is None:
        unknown = result.engine_unknown
        return unknown and f"Launches and unpacked weights are predicted by rule ({unknown})."
    work = result.options[0].work
    kinds: tuple[StepKind, ...] = ("decode", "prefill")
    parts = []
    for kind in kinds:
        step = work.engine_step(kind)
        if step is None:
            parts.append(f"{kind} by rule, since its table has no layers of that profile")
            continue
        text = (
            f"{step.launches} launches in a {kind} step, {step.unpacked_weights} weights unpacked"
        )
        if step.unpacked_weights:
            text += f" (+{_mb(step.unpacked_bytes)} MB per step)"
        if step.reformats:
            text += f", {step.reformats} of the launches reformats"
        if step.attention in ("decomposed", "mixed"):
            text += f", attention {step.attention}"
        parts.append(text)
    if engine.work.kv_buckets:
        rows = ", ".join(map(str, engine.work.kv_buckets))
        parts.append(f"a decode step reads one of {rows} rows of the cache")
    return f"From the engine {engine.name} ({engine.plan}): {'; '.join(parts)}."


def _draft_table(result: ModelPlan) -> FigureTable:
    """Make the table of speeds with the draft model, by quantization and context."""
    assert result.draft is not None
    acceptances = sorted({speed.acceptance for speed in result.options[0].drafts})
    table = make_table(
        f"Drafts by {result.draft.name} ({result.draft.quant}): gain and guesses per step, by "
        "acceptance",
        *("quantization", "context", "decode"),
        *(f"{acceptance:.0%}" for acceptance in acceptances),
        "pays from",
        keys=2,
    )
    for planned in result.options:
        least = planned.least_acceptance
        for at in planned.speeds:
            cells = [
                f"{speed.gain:.2f} ({speed.guesses})"
                for speed in planned.drafts
                if speed.context == at.context
            ]
            first = at is planned.speeds[0]
            pays = "" if not first else "never" if least is None else f"{least:.0%}"
            table.add_row(planned.name, str(at.context), f"{at.decode_tps:.1f}", *cells, pays)
    return table


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f}"

"""``edge-llm recommend``: which model in which precision, and why."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.cli import echo_json
from edge.cli.options import json_option
from edge.cli.sections import SectionCommand, option
from edge.errors import EXIT_GATE_MISSED, ConfigError
from edge_make.default_kv_capacity import REASONING_KV_CAPACITY

from .options import Finite
from .plan import (
    calibrate_option,
    device_option,
    int8_dialect,
    making,
    power_mode_option,
    take_device,
    ways_option,
)
from .planned_strategies import chosen_way, describe_way
from .tables import make_table

if TYPE_CHECKING:
    from edge_lab.planner.recommend import Candidate, Recommendation

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kmg])(i?)b?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Read bytes from ``1GB`` (10^9), ``1GiB`` (2^30) or ``800M``; a number needs its unit.

    Raises:
        ConfigError: no such size, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    power = 0 if match is None else {"k": 1, "m": 2, "g": 3}[match[2].lower()]
    size = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise ConfigError(f"--memory {text!r} is not a size such as 1GB, 1.5GiB or 800MB")
    return size


def _memory(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


@click.command(cls=SectionCommand)
@option(
    "Wishes",
    "--memory",
    "memory_bytes",
    callback=_memory,
    metavar="SIZE",
    help="Most memory, e.g. 1GB (10^9 bytes) or 1GiB; default: what the device leaves.",
)
@option(
    "Wishes",
    "--memory-of",
    type=click.Choice(["process", "weights"]),
    default="process",
    show_default=True,
    help="What --memory limits: the whole process with a full KV cache, or the weights alone.",
)
@option(
    "Wishes",
    "--latency-ms",
    type=Finite(min=0, min_open=True),
    help="Longest time per output token (TPOT), with a full KV cache.",
)
@option(
    "Wishes",
    "--ttft-ms",
    type=Finite(min=0, min_open=True),
    help="Longest time to the first token, for a prompt of --prompt-tokens.",
)
@option(
    "Wishes",
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Tokens of the prompt for --ttft-ms.",
)
@option(
    "Wishes",
    "--joules",
    type=Finite(min=0, min_open=True),
    help="Most energy per question: choose from --ways the one with the most right answers.",
)
@ways_option
@option("Wishes", "--quality", type=Finite(0, 100), help="Least score on --benchmark, in percent.")
@option(
    "Wishes",
    "--benchmark",
    type=click.Choice(["aime-2024", "math-500", "gpqa-diamond", "livecodebench"]),
    default="aime-2024",
    show_default=True,
    help="Published benchmark (pass@1) that ranks the models.",
)
@option("Models", "--model", "models", multiple=True, help="Only this model; may be repeated.")
@device_option
@power_mode_option
@option(
    "Shapes", "--batch", type=click.IntRange(1, 64), default=1, show_default=True, help="Slots."
)
@option(
    "Shapes",
    "--kv-capacity",
    type=int,
    default=REASONING_KV_CAPACITY,
    show_default=True,
    help="Tokens per slot.",
)
@option(
    "Shapes",
    "--kv-cache",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="Rows of the KV cache.",
)
@calibrate_option
@option("Output", "-v", "--verbose", is_flag=True, help="Say why each candidate was dropped.")
@json_option
@click.pass_context
def recommend(
    ctx: click.Context,
    /,
    latency_ms: float | None,
    ttft_ms: float | None,
    joules: float | None,
    ways_file: Path | None,
    models: tuple[str, ...],
    device: str | None,
    power_mode: str | None,
    batch: int,
    kv_capacity: int,
    kv_cache: str,
    calibrate: Path | None,
    verbose: bool,
    as_json: bool,
    **wishes: Any,
) -> None:
    """Choose a model and a precision for a device, and say why each was taken or dropped.

    Exit code 3 if nothing meets every wish.
    """
    from edge_lab.planner.memory import Deployment
    from edge_lab.planner.models import BUILT_IN
    from edge_lab.planner.plan import CPU
    from edge_lab.planner.recommend import Wish
    from edge_lab.planner.recommend import recommend as choose

    target, efficiency = take_device(device, power_mode, calibrate)
    wish = Wish(
        tpot_s=None if latency_ms is None else latency_ms / 1e3,
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        **wishes,
    )
    backend: Any = "ort-cpu" if target.name == CPU else "tensorrt"
    deployment = Deployment(
        backend,
        batch,
        kv_capacity,
        min(512, kv_capacity),
        int8_dialect(backend, kv_cache),
        "all" if kv_cache == "int8" else (),
    )
    found = choose(wish, target, deployment, efficiency, models or tuple(BUILT_IN))
    way = chosen_way(ways_file, joules, target, found.taken)
    if as_json:
        answer = {} if joules is None else {"way": None if way is None else asdict(way)}
        echo_json({**_as_dict(found), **answer})
    else:
        _print(found, target.name, wish.benchmark, efficiency.source, verbose=verbose)
        if joules is not None and found.taken is not None:
            click.echo(describe_way(way, joules))
    if found.taken is None or (joules is not None and way is None):
        ctx.exit(EXIT_GATE_MISSED)


def _as_dict(found: Recommendation) -> dict[str, Any]:
    def row(candidate: Candidate) -> dict[str, Any]:
        return {
            "model": candidate.model.name,
            "quant": candidate.option.name,
            "memory_bytes": candidate.memory_bytes,
            "tpot_s": candidate.tpot_s,
            "ttft_s": candidate.ttft_s,
            "score": candidate.score,
            "dropped": list(candidate.reasons),
        }

    return {
        "taken": None if found.taken is None else row(found.taken),
        "candidates": [row(candidate) for candidate in found.candidates],
        "tutorial": {"leaf": found.leaf, "verdict": found.verdict},
        "commands": found.commands,
        "remark": found.remark,
    }


def _print(
    found: Recommendation, device: str, benchmark: str, source: str, *, verbose: bool
) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if found.taken is None:
        console.print(f"Nothing meets every wish on {device}; the candidates below come closest.")
    else:
        console.print(f"Taken: {found.taken.name}.")
        for target, commands in found.commands.items():
            click.echo(making("it", target))
            for command in commands:
                click.echo(f"  {command}")
        if found.remark is not None:
            console.print(f"Mind: {found.remark}.")
    console.print()
    table = make_table(
        f"Candidates on {device}",
        *("candidate", "memory GB", "TPOT ms", "TTFT ms", benchmark, "verdict"),
        left=["verdict"],
    )
    for candidate in found.candidates:
        table.add_row(
            candidate.name,
            f"{candidate.memory_bytes / 1e9:.2f}",
            f"{candidate.tpot_s * 1e3:.1f}",
            f"{candidate.ttft_s * 1e3:,.0f}",
            "–" if candidate.score is None else f"{candidate.score:.1f}",
            _verdict(candidate, found.taken),
        )
    console.print(table)
    console.print()
    if verbose:
        for candidate in found.candidates:
            if candidate is not found.taken:
                console.print(f"{candidate.name}: {_reason(candidate, found.taken)}.")
        console.print()
    elif len(found.candidates) > 1:
        console.print("Why the others were not taken: -v.")
    console.print(f"Tutorials' tree: {found.leaf}. It {found.verdict}.")
    console.print(f"Speed is predicted: {source}.")


def _verdict(candidate: Candidate, taken: Candidate | None) -> str:
    if candidate is taken:
        return "taken"
    return "dropped" if candidate.reasons else "fits"


def _reason(candidate: Candidate, taken: Candidate | None) -> str:
    if candidate.reasons or taken is None:
        return "dropped: " + "; ".join(candidate.reasons)
    if candidate.score == taken.score:
        return f"fits, but {taken.name} is as good and no slower"
    faster = "" if candidate.tpot_s < taken.tpot_s else " and no slower"
    return f"fits, but {taken.name} is better{faster}"

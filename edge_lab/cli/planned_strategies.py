"""Ways to answer as ``plan --ways`` predicts them and ``recommend --joules`` chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge.errors import ConfigError

from .tables import make_table

if TYPE_CHECKING:
    from edge_lab.planner.plan import ModelPlan, PlanDevice
    from edge_lab.planner.recommend import Candidate
    from edge_lab.planner.strategies import PlannedWay


def planned_ways(file: Path, plan: ModelPlan) -> list[PlannedWay]:
    """Predict the ways of ``plan --ways``.

    Raises:
        ConfigError: another file, or a plan of more than one quantization or without a speed.
    """
    from edge_lab.planner.strategies import plan_ways, read_ways

    results = read_ways(file)
    if len(plan.options) > 1:
        raise ConfigError("--ways were measured with one bundle; plan it, or give one --quant")
    if not plan.options[0].speeds:
        raise ConfigError("--ways need the speed of this CPU; give --calibrate")
    return plan_ways(results, plan.device, plan.options[0].speeds[0].tpot_s)


def print_planned_ways(ways: Sequence[PlannedWay], context: int) -> None:
    """Print the ways that `planned_ways` predicted."""
    from rich.console import Console

    table = make_table(
        f"Ways to answer, with {context} tokens of context: predicted from measured steps",
        *("bundle", "way", "right", "s a question", "right per minute"),
        *("J a question, at most", "right per kJ, at least"),
        keys=2,
    )
    for way in ways:
        joules = "-" if way.joules is None else f"{way.joules:.1f}"
        if way.joules_are == "measured":
            joules += " (measured)"
        table.add_row(
            *(way.bundle, way.way, f"{way.correct} of {way.questions}", f"{way.seconds:.1f}"),
            *(f"{way.right_per_minute:.2f}", joules),
            "-" if way.right_per_kj is None else f"{way.right_per_kj:.2f}",
        )
    Console(markup=False).print(table)


def chosen_way(
    file: Path | None, joules: float | None, device: PlanDevice, taken: Candidate | None
) -> PlannedWay | None:
    """Choose the way of ``recommend --joules``; None without it, or if no way takes so little.

    Raises:
        ConfigError: one option without the other, another file, or a device of unknown power.
    """
    if (file is None) != (joules is None):
        raise ConfigError("--joules chooses among the ways of --ways; give both, or neither")
    if file is None or joules is None or taken is None:
        return None
    from edge_lab.planner.strategies import best_within, plan_ways, read_ways

    ways = plan_ways(read_ways(file), device, taken.tpot_s)
    if all(way.joules is None for way in ways):
        raise ConfigError(
            f"--joules: nothing says what {device.name} draws; give --power-mode, or measure "
            "--ways on that module"
        )
    return best_within(ways, joules)


def describe_way(way: PlannedWay | None, joules: float) -> str:
    """Describe the way that `chosen_way` found in a line."""
    if way is None:
        return f"No way of --ways answers a question with {joules:g} J."
    options = " ".join(way.options) or "no further option"
    return (
        f"Answer with {options} ({way.way}): {way.correct} of {way.questions} right, "
        f"{way.joules:.1f} J a question at most, {way.joules_are}."
    )

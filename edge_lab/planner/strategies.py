"""Predicts on an Orin the cost of ways to answer that `edge_lab.measure.strategies` measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge.errors import ConfigError

from .devices import MODULES
from .plan import PlanDevice

# The most watts that a module draws in its fastest mode: the data sheets that `devices` names, and
# those of the "Super" modes. A mode that is called 30W has 30 W as its budget.
_MOST_WATTS = {
    "agx-orin-64": {"MAXN": 60.0},
    "agx-orin-32": {"MAXN": 40.0},
    "orin-nx-16": {"MAXN_SUPER": 40.0, "MAXN": 25.0},
    "orin-nx-8": {"MAXN_SUPER": 40.0, "MAXN": 20.0},
    "orin-nano-8": {"MAXN_SUPER": 25.0},
    "orin-nano-4": {"MAXN_SUPER": 25.0},
}
WAYS = ("one", "stop", "vote", "both")
"""Ways to answer: once, stopped when sure, by a vote, or both."""
_FIGURES = ("accuracy", "correct", "questions", "steps")


@dataclass(frozen=True)
class PlannedWay:
    """A way to answer on a device; figures are those of one question.

    Attributes:
        bundle: the bundle that it was measured with.
        way: one of `WAYS`.
        options: options of ``edge-llm run`` that answer this way.
        correct: right answers that were measured.
        questions: questions that were asked.
        seconds: predicted time: the measured steps, each as long as the plan says.
        joules: the most energy; None if neither rails nor a power budget are known.
        joules_are: ``measured`` by the rails of such a module in this power mode, or ``predicted``
            as the mode's budget all the time.
    """

    bundle: str
    way: str
    options: tuple[str, ...]
    correct: int
    questions: int
    seconds: float
    joules: float | None
    joules_are: Literal["measured", "predicted"] | None

    @property
    def right_per_minute(self) -> float:
        """Right answers per minute, one question after the other."""
        return 60 * self.correct / (self.questions * self.seconds)

    @property
    def right_per_kj(self) -> float | None:
        """Right answers per kJ, at least; None where the joules are not known."""
        return None if not self.joules else 1000 * self.correct / (self.questions * self.joules)


def power_limit_watts(device: PlanDevice) -> float | None:
    """Return the most watts of a module in its power mode; None if no data sheet has it."""
    if device.mode is None or device.name not in MODULES:
        return None
    budget = re.fullmatch(r"(\d+)W", device.mode.name)
    if budget is not None:
        return float(budget[1])
    return _MOST_WATTS[device.name].get(device.mode.name)


def read_ways(path: Path) -> list[dict[str, Any]]:
    """Read the lines that ``edge-llm eval --ways --json`` printed, one for each bundle.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        results = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
        for result in results:
            for way in result["ways"]:
                if way["way"] not in WAYS or not all(way[name] >= 0 for name in _FIGURES):
                    raise ValueError("an unknown way, or a figure below 0")
                if way["questions"] < 1 or way["steps"] <= 0:
                    raise ValueError("a way without questions")
            result["bundle"], result["stop_when_sure"], result["vote"]
    except OSError as error:
        raise ConfigError(f"--ways {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--ways {path} is not what edge-llm eval --ways --json prints ({error!s:.80}); "
            "write it anew"
        ) from error
    if not results:
        raise ConfigError(f"--ways {path} is empty; write it by edge-llm eval --ways --json")
    return results


def plan_ways(
    results: Sequence[dict[str, Any]], device: PlanDevice, tpot_s: float
) -> list[PlannedWay]:
    """Predict each measured way.

    Args:
        results: lines from `read_ways`.
        device: the device that answers.
        tpot_s: predicted time of a step of one row there.
    """
    return [_plan(result, way, device, tpot_s) for result in results for way in result["ways"]]


def _plan(
    result: dict[str, Any], way: dict[str, Any], device: PlanDevice, tpot_s: float
) -> PlannedWay:
    options: list[str] = []
    if way["way"] in ("stop", "both"):
        options += ["--stop-when-sure", f"{result['stop_when_sure']:g}"]
    if way["way"] in ("vote", "both"):
        options += ["--vote", f"{result['vote']}"]
    seconds = tpot_s * way["steps"] / way["questions"]
    joules: float | None = None
    joules_are: Literal["measured", "predicted"] | None = None
    watts = power_limit_watts(device)
    if way.get("joules") and _is_of(result, device):
        joules, joules_are = way["joules"] / way["questions"], "measured"
    elif watts is not None:
        joules, joules_are = watts * seconds, "predicted"
    return PlannedWay(
        result["bundle"], way["way"], tuple(options), way["correct"], way["questions"], seconds,
        joules, joules_are,
    )  # fmt: skip


def _is_of(result: dict[str, Any], device: PlanDevice) -> bool:
    mode = result.get("power_mode")
    return (
        result.get("device") == device.name
        and device.mode is not None
        and mode is not None
        and device.mode.is_called(mode)
    )


def best_within(ways: Sequence[PlannedWay], joules: float) -> PlannedWay | None:
    """Choose the way with the largest share of right answers for at most ``joules`` a question.

    Among equals it takes the one with less energy. None: no way is known to take so little.
    """
    within = [way for way in ways if way.joules is not None and way.joules <= joules]
    return max(
        within, key=lambda way: (way.correct / way.questions, -(way.joules or 0.0)), default=None
    )

"""The loop of an export without its files: every layer run, every block planned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.quantize.calibrated import Calibrated
from export.quantize.calibration import LayerActivations, LayerRunner
from export.quantize.plan import BlockPlan, linear_blocks
from export.sources.checkpoint import Checkpoint


def run_layers(checkpoint: Checkpoint, ids: NDArray[Any]) -> list[LayerActivations]:
    """What every decoder layer and, last, the lm_head see."""
    runner = LayerRunner(checkpoint, ids)
    seen: list[LayerActivations] = []
    for index in range(checkpoint.spec.num_layers + 1):
        seen.append(runner.run(index, seen[-1].hidden if seen else None))
    return seen


def plan_blocks(calibrated: Calibrated) -> list[BlockPlan]:
    """Every block's plan."""
    plans: list[BlockPlan] = []
    for block in linear_blocks(calibrated.runner.checkpoint.spec):
        seen = calibrated.look(block, plans[-1].hidden if plans else None)
        plans.append(calibrated.plan(block, seen))
    return plans


def all_factors(plans: list[BlockPlan]) -> dict[str, NDArray[np.float32]]:
    """The factors of every block, by linear."""
    return {name: factors for plan in plans for name, factors in plan.factors.items()}

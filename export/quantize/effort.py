"""Counts the arithmetic of GPTQ in a decoder layer, for the progress and the time estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edge.model.parts import Layer

from .fed_linears import fed_linears

# Other work on each weight, in operations that take as long: to read it and find AWQ's factors,
# and to round it.
_READ, _ROUNDED = 4000.0, 4000.0


@dataclass(frozen=True)
class LayerEffort:
    """Floating-point operations of one decoder layer.

    Attributes:
        look: operations to run the text through the float model's layer.
        plan: operations to round each linear, by its last name in the graph's order. The
            five parts are its inputs in the rounded model, the errors to make up for, their
            second moments, the correction, and its integers.
    """

    look: float
    plan: Mapping[str, tuple[float, ...]]

    @property
    def total(self) -> float:
        """All operations of the layer."""
        return self.look + sum(map(sum, self.plan.values()))

    def done(self, linear: str, parts: int) -> float:
        """Return the share of the layer that is done after this many parts of a linear."""
        names = list(self.plan)
        before = names[: names.index(linear)]
        operations = self.look + sum(sum(self.plan[name]) for name in before)
        return (operations + sum(self.plan[linear][:parts])) / self.total


def layer_effort(layer: Layer, tokens: int) -> LayerEffort:
    """Count the operations of a layer.

    Args:
        layer: its parts.
        tokens: tokens of the calibration text.
    """
    look, short = 0.0, ""
    plan: dict[str, tuple[float, ...]] = {}
    linears = fed_linears(layer)
    sizes = [(each.part.width, sum(size for _, size in each.part.outputs)) for each in linears]
    before = _READ * sum(map(math.prod, sizes))
    for each, (width, rows) in zip(linears, sizes, strict=True):
        product = 2.0 * tokens * width * rows
        look += product
        short = each.part.name
        if each.add is not None:  # its result is taken from the float model's residual stream
            made_up = product
        else:
            made_up = 2.0 * width**2 * (tokens + rows)
        solved = width**3 / 3 + 2.0 * width**2 * rows
        moments = 1.0 * tokens * width**2
        rounded = width**3 / 3 + width**2 * rows + _ROUNDED * width * rows
        # A linear's inputs take the product of the linear before it.
        plan[short] = (before, made_up, moments, solved, rounded)
        before = product
    plan[short] = (*plan[short][:-1], plan[short][-1] + before)
    return LayerEffort(look, plan)

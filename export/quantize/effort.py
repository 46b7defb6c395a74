"""Counts the arithmetic of GPTQ in a decoder layer: what its progress and its estimate go by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import ModelSpec

# What is done to each weight besides, in operations that take as long: to read it and to find AWQ's
# factors, and to round it.
_READ, _ROUNDED = 4000.0, 4000.0


@dataclass(frozen=True)
class LayerEffort:
    """Floating-point operations that one decoder layer takes.

    Attributes:
        look: to run the text through the float model's layer.
        plan: to round each linear, by its last name in the graph's order: to find its inputs in
            the rounded model, what they are to make up for, their second moments, how they do, and
            its integers.
    """

    look: float
    plan: Mapping[str, tuple[float, ...]]

    @property
    def total(self) -> float:
        """All of the layer."""
        return self.look + sum(map(sum, self.plan.values()))

    def done(self, linear: str, parts: int) -> float:
        """The share of the layer that is done with so many parts of a linear."""
        names = list(self.plan)
        before = names[: names.index(linear)]
        operations = self.look + sum(sum(self.plan[name]) for name in before)
        return (operations + sum(self.plan[linear][:parts])) / self.total


def layer_effort(model: ModelSpec, tokens: int) -> LayerEffort:
    """Count the operations of a layer.

    Args:
        model: the model's dimensions.
        tokens: of the calibration text.
    """
    one = msgspec.structs.replace(model, num_layers=1)
    look, short = 0.0, ""
    plan: dict[str, tuple[float, ...]] = {}
    linears = [layer for layer in linear_layers(one) if layer.name != "lm_head"]
    before = _READ * sum(math.prod(layer.shape) for layer in linears)
    for layer in linears:
        width, rows = layer.shape
        product = 2.0 * tokens * width * rows
        look += product
        short = layer.name.rpartition(".")[2]
        if short in ("o", "down"):  # whose results the float model's residual stream tells
            made_up = product
        else:
            made_up = 2.0 * width**2 * (tokens + rows)
        solved = width**3 / 3 + 2.0 * width**2 * rows
        moments = 1.0 * tokens * width**2
        rounded = width**3 / 3 + width**2 * rows + _ROUNDED * width * rows
        # A linear's inputs take the product of the one before it.
        plan[short] = (before, made_up, moments, solved, rounded)
        before = product
    plan[short] = (*plan[short][:-1], plan[short][-1] + before)
    return LayerEffort(look, plan)

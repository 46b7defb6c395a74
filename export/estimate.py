"""Estimates how long an export takes, before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import TensorScheme
from edge.model.spec import ModelSpec

from .quantize.calibrated import Method
from .quantize.effort import layer_effort
from .recipes import RECIPES

# Operations of `quantize.effort` per second on two x86-64 cores (AVX-512).
_OPERATIONS_PER_S = 1.6e11
# Operations per weight with AWQ alone, without running the text through the float model.
_AWQ_OPERATIONS = 20e3
_W8A8_PER_S = 1.9e6  # 20,000 tokens: 1,363 CPU seconds
# Weights per second: to round to nearest, and to write the float reference.
_ROUNDED_PER_S, _WRITTEN_PER_S = 3e7, 7e7
# Seconds per weight to run both models over one token; and seconds to start a process.
_MEASURED_S, _STARTED_S = 3.2e-11, 2.0
# Seconds per weight and token of a calibration's float model: 4.4e6 weights/s on 13,000 tokens.
_CALIBRATED_S = 1.75e-11
LONG_S = 300.0
"""From this time on, a default that has a faster alternative names it."""


def export_s(
    model: ModelSpec,
    schemes: Mapping[str, TensorScheme],
    rounding: Method,
    measured_tokens: int,
    cache_tokens: int = 0,
    tokens: int = RECIPES["default"].calibration_tokens,
) -> float:
    """Estimate the seconds that an export takes on two cores, as in docs/quantization.md.

    Args:
        model: the model's dimensions.
        schemes: the scheme of every linear layer, by name.
        rounding: how INT4 layers are rounded.
        measured_tokens: tokens on which the bundle is measured afterwards; 0 measures nothing.
        cache_tokens: tokens with which the KV cache is calibrated; 0 for a cache in float.
        tokens: tokens to calibrate the INT4 layers with.
    """
    plan = {
        f"layers.{number}.{name}": sum(operations)
        for number, layer in model.each_layer()
        for name, operations in layer_effort(layer, tokens).plan.items()
    }
    sizes = {layer.name: math.prod(layer.shape) for layer in linear_layers(model)}
    total = sum(sizes.values())
    kinds = {scheme.kind for scheme in schemes.values()}
    seconds = _STARTED_S
    for name, size in sizes.items():
        kind = schemes[name].kind
        if kind == "float":
            seconds += size / _WRITTEN_PER_S
        elif kind == "w8a8":
            seconds += size / _W8A8_PER_S
        elif kind == "int4" and rounding != "rtn" and name != "lm_head":
            operations = 2.0 * tokens * size
            if "gptq" in rounding:
                operations += plan[name]
            else:
                operations += _AWQ_OPERATIONS * size
            seconds += operations / _OPERATIONS_PER_S
        else:
            seconds += size / _ROUNDED_PER_S
    seconds += cache_tokens * total * _CALIBRATED_S
    if measured_tokens:
        # Measured as the CPU serves it, and alone.
        passes = 1 if kinds.isdisjoint(("int4", "int8")) else 2
        seconds += _STARTED_S + total / _WRITTEN_PER_S
        seconds += passes * measured_tokens * total * _MEASURED_S
    return seconds


def describe_s(seconds: float) -> str:
    """Write a rough time for a person: ``about 20 s`` or ``about 9 min``."""
    if seconds < 100:
        return f"about {math.ceil(seconds / 5) * 5} s"
    return f"about {round(seconds / 60)} min"

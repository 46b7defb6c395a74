"""Plans linears that keep the integers of a quantized checkpoint: ``--quant source``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec, linear_layers
from edge.bundle.manifest import TensorScheme, Treatment
from edge.bundle.schemes import GROUP_SIZES
from export.sources.checkpoint import Checkpoint
from export.sources.quantization_config import WeightFormat
from export.sources.quantized_weight import QuantizedWeight

from .plan import LinearPlan, ToNearest
from .rtn import storable_scales
from .smoothquant import token_scale

_FLOAT = TensorScheme("float")

# Compressed-tensors divides a token's largest input by half of the 255 steps of INT8.
_CT_LEVELS = 127.5


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Return whether some weights are no floats of 16 or 32 bits; GGUF files never count."""
    names = (name for layer in linear_layers(checkpoint.spec) for name in layer.weights)
    return any(checkpoint.weight_format(name) is not None for name in names)


def source_schemes(checkpoint: Checkpoint) -> dict[str, TensorScheme]:
    """Return the scheme that holds each linear as the checkpoint has it, by name.

    INT4 in groups stays INT4; a part's groups are cut to sizes that the graph knows (32, 64, 128).
    More bits become INT8 in planes. INT8 weights become ``w8a8`` if their inputs have a stored
    scale, or one for each token. A layer is float if one of its parts is not stored as integers.
    """
    return {layer.name: _scheme(checkpoint, layer) for layer in linear_layers(checkpoint.spec)}


def _scheme(checkpoint: Checkpoint, layer: LinearSpec) -> TensorScheme:
    formats = [checkpoint.weight_format(name) for name in layer.weights]
    integers = [form for form in formats if form is not None and form.is_integer]
    if len(integers) < len(formats):
        return _FLOAT
    if all(_is_w8a8(form) for form in integers) and len({form.inputs for form in integers}) == 1:
        return TensorScheme("w8a8")
    width = layer.shape[0]
    common = math.gcd(*(form.group_size or width for form in integers))
    # Groups that are too short for the graph are rounded anew in the shortest ones.
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    size = max(fitting) if fitting else min(GROUP_SIZES)
    if width % size:
        return _FLOAT
    if max(form.bits for form in integers) <= 4:
        return TensorScheme("int4", size)
    return TensorScheme("int8", size, planes=True)


def _is_w8a8(form: WeightFormat) -> bool:
    rounds = form.inputs in ("static", "per-token") and form.inputs_symmetric
    return rounds and form.bits == 8 and form.symmetric and form.group_size == 0


@dataclass(frozen=True)
class AsInSource(ToNearest):
    """A `plan.Calibrator` that keeps the integers of a quantized checkpoint.

    Attributes:
        kept: the linears that keep their integers; the others are rounded to nearest.
    """

    kept: frozenset[str]

    def _linear(self, layer: LinearSpec) -> LinearPlan:
        formats = [self.checkpoint.weight_format(name) for name in layer.weights]
        given = [form for form in formats if form is not None]
        scheme = self.schemes[layer.name]
        if not given:
            return self._anew(layer, None)
        if layer.name not in self.kept:
            return self._anew(layer, "as --keep asks")
        if scheme.kind == "float":
            same = len(set(formats)) == 1
            return self._anew(layer, None if same else "its parts are stored in different ways")
        found = [self.checkpoint.quantized_weight(name) for name in layer.weights]
        weights = [weight for weight in found if weight is not None]
        if len(weights) < len(found):
            return self._anew(layer, "an adapter is merged into it")
        order, problem = _common_order(weights)
        if order is None:
            return self._anew(layer, problem)
        width = layer.shape[0]
        if any(width // weight.scales.shape[1] % (scheme.group_size or 1) for weight in weights):
            sizes = sorted({width // weight.scales.shape[1] for weight in weights})
            return self._anew(layer, f"no groups of {' or '.join(map(str, sizes))} in the graph")
        plain = np.array_equal(order, np.arange(width))
        input_scale, note = None, None
        per_token = scheme.kind == "w8a8" and given[0].inputs == "per-token"
        if per_token:
            input_scale = token_scale(self.scale_type, _CT_LEVELS)
        elif scheme.kind == "w8a8":
            input_scale, note = _input_scale(weights, self.scale_type)
        elif any(form.inputs != "float" for form in given):
            note = f"inputs stay float, the source rounds them by {given[0].inputs} scales"
        return LinearPlan(
            layer,
            scheme,
            self.checkpoint,
            None,
            input_scale,
            per_token=per_token,
            kept=tuple(weights),
            input_order=() if plain else tuple(order.tolist()),
            treatment="kept",
            note=note,
        )

    def _anew(self, layer: LinearSpec, note: str | None) -> LinearPlan:
        """Convert the floats that the checkpoint gives."""
        plan = super()._linear(layer)
        is_float = all(self.checkpoint.weight_format(name) is None for name in layer.weights)
        treatment: Treatment = "dequantized" if plan.quantize is None else "requantized"
        return replace(plan, treatment=None if is_float else treatment, note=note)


def _common_order(
    weights: Sequence[QuantizedWeight],
) -> tuple[NDArray[np.int64] | None, str | None]:
    """Return the order of input channels that all parts of a layer share, or why there is none."""
    orders = [weight.channel_order() for weight in weights]
    first = orders[0]
    if first is None or any(order is None for order in orders):
        return None, "its act-order groups are not equally long"
    if any(not np.array_equal(first, order) for order in orders if order is not None):
        return None, "its parts do not share an act-order"
    return first, None


def _input_scale(
    weights: Sequence[QuantizedWeight], scale_type: np.dtype[np.generic]
) -> tuple[float, str | None]:
    """Return the stored scale of a layer's inputs; its parts read the same inputs."""
    scales = [weight.input_scale for weight in weights if weight.input_scale is not None]
    stored = storable_scales(np.array([max(scales)], dtype=np.float32), scale_type)
    note = "of the input scales of its parts the largest is taken"
    return float(stored[0]), None if min(scales) == max(scales) else note

"""Calibrated rounding: layer by layer, what each linear sees decides how it is rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import ModelSpec, TensorScheme
from export.sources.checkpoint import Checkpoint

from .awq import awq_factors
from .calibration import LayerActivations, LayerRunner
from .float_channels import loud_channels
from .gptq import gptq_factor, gptq_rows
from .linear import RowQuantizer
from .recipe import LinearSpec, linear_layers
from .rtn import quantize_rows
from .scaled_checkpoint import ScaledCheckpoint
from .smoothquant import activation_scale, smoothing_factors
from .statistics import mean_square, second_moment

Array = NDArray[np.float32]
Method = Literal["rtn", "awq", "gptq", "awq+gptq"]


class CalibratedLinears:
    """Iterates over the linears, each with the function that rounds its rows.

    AWQ's factors are found for a whole decoder layer before its first linear is handed out, so
    that `checkpoint` already has them folded in when the linear's weights are read from it. Only
    INT4 linears are calibrated; others come with None.

    Args:
        runner: the float model over the calibration text.
        schemes: of every linear.
        method: of the INT4 linears.
        scale_type: float16 or bfloat16, in which scales will be stored.
        factors: of layers that the runner leaves out, by linear; those found are added to it.

    Attributes:
        checkpoint: the float model with the factors folded in; it computes the same function.
        input_scales: of the W8A8 linears handed out so far, by name.
        float_channels: of those of them that have any, ascending, by name.
    """

    def __init__(
        self,
        runner: LayerRunner,
        schemes: Mapping[str, TensorScheme],
        method: Method,
        scale_type: np.dtype[np.generic],
        factors: dict[str, Array] | None = None,
    ) -> None:
        self._runner = runner
        self._schemes = schemes
        self._method = method
        self._scale_type = scale_type
        self._factors = {} if factors is None else factors
        self.input_scales: dict[str, float] = {}
        self.float_channels: dict[str, tuple[int, ...]] = {}
        self.checkpoint: Checkpoint = ScaledCheckpoint(runner.checkpoint, self._factors)

    def __iter__(self) -> Iterator[tuple[LinearSpec, RowQuantizer | None]]:
        layers = {layer.name: layer for layer in linear_layers(self._runner.checkpoint.spec)}
        for activations in self._runner:
            last = "lm_head" in activations.inputs
            prefix = "" if last else f"layers.{activations.index}."
            if not last:
                self._find_factors(activations, layers)
            for short in list(activations.inputs):
                layer = layers[f"{prefix}{short}"]
                # Popped: a wide layer's inputs are a good part of the memory.
                x = activations.inputs.pop(short)
                if self._schemes[layer.name].kind == "w8a8":
                    if last:
                        self._take_loud_channels(layer.name, x)
                    x /= self._factors.get(layer.name, np.float32(1))
                    self.input_scales[layer.name] = activation_scale(x, self._scale_type)
                yield layer, self._quantizer(layer.name, x)

    def _find_factors(
        self, activations: LayerActivations, layers: Mapping[str, LinearSpec]
    ) -> None:
        model = self._runner.checkpoint.spec
        for short, x in activations.inputs.items():
            layer = layers[f"layers.{activations.index}.{short}"]
            scheme = self._schemes[layer.name]
            if not (scheme.kind == "w8a8" or (scheme.kind == "int4" and "awq" in self._method)):
                continue
            weights = np.concatenate(
                [self._runner.checkpoint.tensor(name).astype(np.float32) for name in layer.weights]
            )
            shared = shared_channels(model) if short == "o" else None
            channels: tuple[int, ...] = ()
            if scheme.kind == "w8a8":
                channels = self._take_loud_channels(layer.name, x)
            find = smoothing_factors if scheme.kind == "w8a8" else awq_factors
            factors = find(weights, x, scheme, self._scale_type, shared)
            if factors is not None:
                # Zeros say nothing of a float channel's factor; in o it is its KV channel's.
                alone = list(channels)
                factors[alone if shared is None else np.isin(shared, shared[alone])] = 1
                self._factors[layer.name] = factors

    def _take_loud_channels(self, name: str, x: Array) -> tuple[int, ...]:
        """Set the channels that stay float to zero in ``x``: no range, no factor is theirs."""
        channels = tuple(loud_channels(x).tolist())
        if channels:
            x[:, list(channels)] = 0
            self.float_channels[name] = channels
        return channels

    def _quantizer(self, name: str, x: Array) -> RowQuantizer | None:
        scheme, scale_type = self._schemes[name], self._scale_type
        if scheme.kind != "int4" or self._method == "rtn":
            return None
        factors = self._factors.get(name)
        if "gptq" in self._method:
            moments = second_moment(x)
            if factors is not None:
                moments /= factors
                moments /= factors[:, None]
            factor = gptq_factor(moments)
            return lambda rows: gptq_rows(rows, scheme, factor, scale_type)
        importance = mean_square(x)
        if factors is not None:
            importance /= np.square(factors)
        return lambda rows: quantize_rows(rows, scheme, "mse", scale_type, importance)


def shared_channels(model: ModelSpec) -> NDArray[np.int64]:
    """For each input channel of ``o``, the channel of ``v`` that it is mixed from, ``[in]``."""
    heads = np.arange(model.num_heads, dtype=np.int64) // (model.num_heads // model.num_kv_heads)
    channels = heads[:, None] * model.head_dim + np.arange(model.head_dim, dtype=np.int64)
    return channels.reshape(-1)

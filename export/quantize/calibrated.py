"""Plans calibrated linears: what each linear sees of a text decides how it is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec
from edge.bundle.manifest import ModelSpec, TensorScheme
from edge.bundle.schemes import Clip

from .awq import awq_factors
from .calibration import LayerActivations, LayerRunner
from .float_channels import loud_channels
from .gptq import GptqRows, gptq_factor
from .plan import Block, BlockPlan, LinearPlan, nearest_rows
from .rtn import NearestRows, RowQuantizer
from .scaled_checkpoint import ScaledCheckpoint
from .smoothquant import activation_scale, smoothing_factors
from .statistics import mean_square, second_moment

Array = NDArray[np.float32]
Method = Literal["rtn", "awq", "gptq", "awq+gptq"]


@dataclass(frozen=True)
class _SeenLinear:
    """A linear with what calibration found about it.

    Attributes:
        layer: the linear.
        scheme: how its weight is stored.
        x: its inputs, float32 ``[tokens, in]``; zero in the float channels.
        float_channels: input channels that stay float, ascending.
        factors: factors on its input channels, float32 ``[in]``, or None.
    """

    layer: LinearSpec
    scheme: TensorScheme
    x: Array
    float_channels: tuple[int, ...]
    factors: Array | None


@dataclass(frozen=True)
class Calibrated:
    """A `plan.Calibrator` that runs the float model over a text.

    Attributes:
        runner: runs the float model over the text.
        schemes: the scheme of every linear, by name.
        method: how INT4 linears are rounded.
        clip: how the others are rounded, see `rtn.quantize_rows`.
        scale_type: type in which scales will be stored, float16 or bfloat16.
    """

    runner: LayerRunner
    schemes: Mapping[str, TensorScheme]
    method: Method
    clip: Clip
    scale_type: np.dtype[np.generic]

    def look(self, block: Block, hidden: Array | None) -> LayerActivations:
        """Run the text through a block; see `plan.Calibrator.look`."""
        return self.runner.run(block.index, hidden)

    def plan(self, block: Block, seen: LayerActivations | None) -> BlockPlan:
        """Plan a block; see `plan.Calibrator.plan`."""
        assert seen is not None
        # Popped here and below, since a wide linear's inputs take a good part of the memory.
        linears = [
            self._look(linear, seen.inputs.pop(linear.name.rpartition(".")[2]))
            for linear in block.linears
        ]
        factors = {each.layer.name: each.factors for each in linears if each.factors is not None}
        folded = ScaledCheckpoint(self.runner.checkpoint, factors)
        plans = []
        while linears:
            plans.append(self._plan(linears.pop(0), folded))
        return BlockPlan(tuple(plans), factors, seen.peaks, seen.hidden)

    def _look(self, layer: LinearSpec, x: Array) -> _SeenLinear:
        scheme = self.schemes[layer.name]
        channels: tuple[int, ...] = ()
        if scheme.kind == "w8a8":
            channels = tuple(loud_channels(x).tolist())
            x[:, list(channels)] = 0  # they count in no range and no factor
        return _SeenLinear(layer, scheme, x, channels, self._factors(layer, scheme, x, channels))

    def _factors(
        self, layer: LinearSpec, scheme: TensorScheme, x: Array, channels: tuple[int, ...]
    ) -> Array | None:
        smooth = scheme.kind == "w8a8"
        wanted = smooth or (scheme.kind == "int4" and "awq" in self.method)
        if not wanted or layer.name == "lm_head":
            return None
        checkpoint = self.runner.checkpoint
        weights = np.concatenate(
            [checkpoint.tensor(name).astype(np.float32) for name in layer.weights]
        )
        shared = shared_channels(checkpoint.spec) if layer.name.endswith(".o") else None
        find = smoothing_factors if smooth else awq_factors
        factors = find(weights, x, scheme, self.scale_type, shared)
        if factors is not None:
            # Zeros say nothing about a float channel's factor; in o it belongs to a KV channel.
            alone = list(channels)
            factors[alone if shared is None else np.isin(shared, shared[alone])] = 1
        return factors

    def _plan(self, seen: _SeenLinear, folded: ScaledCheckpoint) -> LinearPlan:
        input_scale = None
        if seen.scheme.kind == "w8a8":
            if seen.factors is not None:
                np.divide(seen.x, seen.factors, out=seen.x)
            input_scale = activation_scale(seen.x, self.scale_type)
        return LinearPlan(
            seen.layer, seen.scheme, folded, self._quantizer(seen), input_scale, seen.float_channels
        )

    def _quantizer(self, seen: _SeenLinear) -> RowQuantizer | None:
        scheme, factors = seen.scheme, seen.factors
        if scheme.kind != "int4" or self.method == "rtn":
            return nearest_rows(scheme, self.clip, self.scale_type)
        if "gptq" in self.method:
            moments = second_moment(seen.x)
            if factors is not None:
                moments /= factors
                moments /= factors[:, None]
            return GptqRows(scheme, gptq_factor(moments), self.scale_type)
        importance = mean_square(seen.x)
        if factors is not None:
            importance /= np.square(factors)
        return NearestRows(scheme, "mse", self.scale_type, importance)


def shared_channels(model: ModelSpec) -> NDArray[np.int64]:
    """Map each input channel of ``o`` to the channel of ``v`` that it is mixed from, ``[in]``."""
    heads = np.arange(model.num_heads, dtype=np.int64) // (model.num_heads // model.num_kv_heads)
    channels = heads[:, None] * model.head_dim + np.arange(model.head_dim, dtype=np.int64)
    return channels.reshape(-1)

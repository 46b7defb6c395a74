"""Plans calibrated linears: how each linear is rounded depends on its inputs in a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec
from edge.bundle.manifest import TensorScheme
from edge.model.parts import Attention
from edge.model.spec import ModelSpec
from edge_make.recipe import Clip
from export.graph.float_range import check_range
from export.sources.checkpoint import Checkpoint
from export.sources.quantized_weight import QuantizedWeight

from .awq import awq_factors
from .calibration import LayerActivations, LayerRunner
from .effort import LayerEffort
from .error_feedback import cross_moment, made_up
from .fed_linears import fed_linear, fed_linears
from .gptq import GptqRows, gptq_factor
from .plan import Block, BlockPlan, LinearPlan, nearest_rows
from .rotation import BlockRotatedCheckpoint
from .rounded_twin import RoundedLayer, RoundedTwin, flat
from .rtn import NearestRows, QuantizedRows, RowQuantizer, dequantize_rows, round_tiles
from .scaled_checkpoint import ScaledCheckpoint
from .signs import channel_signs
from .smoothquant import activation_scale, smoothing, token_scale
from .statistics import mean_square, second_moment

Array = NDArray[np.float32]
Method = Literal["rtn", "awq", "gptq", "awq+gptq"]


@dataclass(frozen=True)
class _SeenLinear:
    """A linear, and what calibration found about it.

    Attributes:
        layer: the linear.
        scheme: how its weight is stored.
        factors: factors on its input channels, float32 ``[in]``, or None.
        per_token: whether each token has its own INT8 range, as in `smoothquant.Smoothing`.
        rotation_block: input channels that are rotated together, as in `smoothquant.Smoothing`.
    """

    layer: LinearSpec
    scheme: TensorScheme
    factors: Array | None
    per_token: bool = False
    rotation_block: int = 0


@dataclass(frozen=True)
class Calibrated:
    """A `plan.Calibrator` that runs the float model over a text.

    Attributes:
        runner: runs the float model over the text.
        schemes: the scheme of every linear, by name.
        method: how INT4 linears are rounded.
        clip: how the others are rounded, as for `rtn.quantize_rows`.
        scale_type: type in which scales will be stored, float16 or bfloat16.
        twin: runs the model as rounded so far, for GPTQ. The runner then has `twin_taps`,
            layers are planned in their order, and ``hidden`` has both models' states, stacked.
        effort: operations of each layer with a twin; the runner reports the share of running it.
    """

    runner: LayerRunner
    schemes: Mapping[str, TensorScheme]
    method: Method
    clip: Clip
    scale_type: np.dtype[np.generic]
    twin: RoundedTwin | None = None
    effort: Sequence[LayerEffort] = ()

    def look(self, block: Block, hidden: Array | None) -> LayerActivations:
        """Run the text through a block, as `plan.Calibrator.look` describes."""
        if self.twin is None:
            return self.runner.run(block.index, hidden)
        if hidden is None:
            hidden = np.stack([self.runner.embed()] * 2)
        return replace(self.runner.run(block.index, hidden[0]), before=hidden)

    def plan(self, block: Block, seen: LayerActivations | None) -> BlockPlan:
        """Plan a block, as `plan.Calibrator.plan` describes."""
        assert seen is not None
        inputs = seen.inputs
        linears = [self._look(linear, inputs[_short(linear)]) for linear in block.linears]
        factors = {each.layer.name: each.factors for each in linears if each.factors is not None}
        if self.method != "rtn":
            # Signs flip rows of an earlier linear of the layer, so the last ones are chosen first.
            for at in reversed(range(len(linears))):
                linears[at] = self._with_signs(linears[at], factors, inputs)
        folded = ScaledCheckpoint(self.runner.checkpoint, factors)
        peaks = folded.peaks(seen.peaks)
        model = self.runner.checkpoint.spec
        if self.twin is not None and block.index < model.num_layers:
            assert seen.before is not None
            rounded = self.twin.layer(folded, block.index, seen.before[1])
            streams = {
                each.part.name: inputs.pop(each.add.name, flat(seen.hidden))
                for each in fed_linears(model.layer(block.index))
                if each.add is not None
            }
            plans = [self._plan_rounded(each, folded, inputs, rounded, streams) for each in linears]
            hidden = np.stack([seen.hidden, rounded.after()])
            return BlockPlan(tuple(plans), factors, peaks, hidden)
        plans = [self._plan(each, folded, inputs.pop(_short(each.layer))) for each in linears]
        return BlockPlan(tuple(plans), factors, peaks, seen.hidden)

    def _report(self, layer: LinearSpec, parts: int) -> None:
        """Report how many parts of a linear are done, as counted in `effort.LayerEffort`."""
        if self.effort:
            index = int(layer.name.split(".")[1])
            self.runner.report(index + self.effort[index].done(_short(layer), parts))

    def _is_foldable(self, layer: LinearSpec) -> bool:
        """Return whether something before a linear can take factors."""
        fed = fed_linear(self.runner.checkpoint.spec, layer.name)
        return fed is not None and fed.producer is not None

    def _look(self, layer: LinearSpec, x: Array) -> _SeenLinear:
        scheme, foldable = self.schemes[layer.name], self._is_foldable(layer)
        if scheme.kind == "w8a8":
            found = smoothing(
                *(self._weights(layer), x, scheme, self.scale_type, self._shared(layer)),
                foldable=foldable,
            )
            return _SeenLinear(layer, scheme, found.factors, found.per_token, found.rotation_block)
        factors = None
        if scheme.kind == "int4" and "awq" in self.method and foldable:
            factors = awq_factors(
                self._weights(layer), x, scheme, self.scale_type, self._shared(layer)
            )
        return _SeenLinear(layer, scheme, factors)

    def _with_signs(
        self, seen: _SeenLinear, factors: dict[str, Array], inputs: Mapping[str, Array]
    ) -> _SeenLinear:
        """Give a linear's factors the signs that suit INT4 (`signs`), in ``factors``, too."""
        layer = seen.layer
        if seen.scheme.kind != "int4" or not self._is_foldable(layer):
            return seen
        importance = mean_square(inputs[_short(layer)])
        found = np.ones_like(importance) if seen.factors is None else seen.factors
        importance /= np.square(found)
        weights = self._weights(layer, ScaledCheckpoint(self.runner.checkpoint, factors))
        signs = channel_signs(weights, seen.scheme, importance, self._shared(layer))
        factors[layer.name] = found * signs
        return replace(seen, factors=factors[layer.name])

    def _weights(self, layer: LinearSpec, checkpoint: Checkpoint | None = None) -> Array:
        return _stack(checkpoint or self.runner.checkpoint, layer.weights)

    def _shared(self, layer: LinearSpec) -> NDArray[np.int64] | None:
        return shared_channels(self.runner.checkpoint.spec, layer.name)

    def _plan(self, seen: _SeenLinear, folded: ScaledCheckpoint, x: Array) -> LinearPlan:
        """Plan a linear for its float inputs ``[tokens, in]``, which are overwritten."""
        quantize = self._quantizer(seen, x)
        if seen.per_token:
            block = seen.rotation_block
            rotated = BlockRotatedCheckpoint(folded, seen.layer.weights, block) if block else folded
            return LinearPlan(
                *(seen.layer, seen.scheme, rotated, quantize, token_scale(self.scale_type)),
                per_token=True,
                rotation_block=block,
            )
        scale = None
        if seen.scheme.kind == "w8a8":
            if seen.factors is not None:
                np.divide(x, seen.factors, out=x)
            scale = activation_scale(x, self.scale_type)
        return LinearPlan(seen.layer, seen.scheme, folded, quantize, scale)

    def _plan_rounded(
        self,
        seen: _SeenLinear,
        folded: ScaledCheckpoint,
        exact: dict[str, Array],
        rounded: RoundedLayer,
        streams: Mapping[str, Array],
    ) -> LinearPlan:
        """Round a linear for the inputs that the rounded model has, as in `error_feedback`.

        Args:
            seen: the linear.
            folded: the model with the factors of the whole layer.
            exact: inputs of linears in the float model, ``[tokens, in]``; this one's are removed.
            rounded: the layer, up to this linear.
            streams: residual stream of the float model after each linear that is added to it.

        Raises:
            CheckpointError: a weight is not finite, or too large for the graph's float type.
        """
        name = _short(seen.layer)
        # Only this name holds them, so that a wide linear's inputs are freed before it is rounded.
        float_inputs = exact.pop(name)
        if seen.scheme.kind != "int4":
            plan = self._plan(seen, folded, float_inputs)
            self._report(seen.layer, 5)
            return plan
        factors = np.ones_like(float_inputs[0]) if seen.factors is None else seen.factors
        parts = [folded.tensor(part).astype(np.float32) for part in seen.layer.weights]
        for values, part in zip(parts, seen.layer.weights, strict=True):
            check_range(values, part, self.scale_type)
        weights = np.concatenate(parts)
        inputs = rounded.inputs(name)
        self._report(seen.layer, 1)
        if name in streams:
            del float_inputs
            wanted = cross_moment(inputs, streams[name] - rounded.residual(name))
        else:
            float_inputs /= factors
            wanted = cross_moment(inputs, float_inputs) @ weights.T
            del float_inputs
        self._report(seen.layer, 2)
        moments = second_moment(inputs)
        self._report(seen.layer, 3)
        weights = made_up(weights, wanted, moments, factors)
        self._report(seen.layer, 4)
        rows = round_tiles(weights, GptqRows(seen.scheme, gptq_factor(moments), self.scale_type))
        rounded.round(name, dequantize_rows(rows))
        self._report(seen.layer, 5)
        return LinearPlan(
            seen.layer, seen.scheme, folded, None, kept=_split(rows, [len(p) for p in parts])
        )

    def _quantizer(self, seen: _SeenLinear, x: Array) -> RowQuantizer | None:
        scheme, factors = seen.scheme, seen.factors
        if scheme.kind != "int4" or self.method == "rtn":
            return nearest_rows(scheme, self.clip, self.scale_type)
        if "gptq" in self.method:
            moments = second_moment(x)
            if factors is not None:
                moments /= factors
                moments /= factors[:, None]
            return GptqRows(scheme, gptq_factor(moments), self.scale_type)
        importance = mean_square(x)
        if factors is not None:
            importance /= np.square(factors)
        return NearestRows(scheme, "mse", self.scale_type, importance)


def _stack(checkpoint: Checkpoint, names: Sequence[str]) -> Array:
    """Read tensors as float32 and stack them."""
    return np.concatenate([checkpoint.tensor(name).astype(np.float32) for name in names])


def _short(layer: LinearSpec) -> str:
    """Return a linear's name within its layer."""
    return layer.name.rpartition(".")[2]


def _split(rows: QuantizedRows, lengths: Sequence[int]) -> tuple[QuantizedWeight, ...]:
    """Return the rows of each of a linear's weights."""
    parts, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        scales = rows.scales[part]
        zeros = np.zeros(scales.shape, dtype=np.int16)
        parts.append(QuantizedWeight(4, rows.values[part], zeros, scales))
        start += length
    return tuple(parts)


def shared_channels(model: ModelSpec, name: str) -> NDArray[np.int64] | None:
    """Map each input channel of a linear to the channel of ``v`` that it is mixed from, ``[in]``.

    It is None where attention does not feed the linear.
    """
    fed = fed_linear(model, name)
    if fed is None or not isinstance(fed.source, Attention):
        return None
    part = fed.source
    heads = np.arange(part.heads, dtype=np.int64) // (part.heads // part.kv_heads)
    channels = heads[:, None] * part.dim + np.arange(part.dim, dtype=np.int64)
    return channels.reshape(-1)

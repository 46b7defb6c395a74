"""Plans the conversion of linear layers, as values, before any of them is converted.

A decoder layer is planned as a whole: the factors of a linear change the weights of the norm or
linear before it, so all of them must be known before the first weight is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec, linear_layers
from edge.bundle.manifest import TensorScheme, Treatment
from edge.model.spec import ModelSpec
from edge_make.recipe import Clip
from export.sources.checkpoint import Checkpoint
from export.sources.quantized_weight import QuantizedWeight

from .calibration import LayerActivations
from .rtn import NearestRows, RowQuantizer

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """The linears of one decoder layer, or the lm_head alone.

    Attributes:
        index: number of the decoder layer; for the lm_head the number of decoder layers.
        linears: the linears in the order in which the graph runs them.
    """

    index: int
    linears: tuple[LinearSpec, ...]


def linear_blocks(model: ModelSpec) -> list[Block]:
    """Group the linears by decoder layer; the lm_head is the last block."""
    grouped = groupby(linear_layers(model), key=lambda layer: layer.name.rpartition(".")[0])
    return [Block(i, tuple(linears)) for i, (_, linears) in enumerate(grouped)]


@dataclass(frozen=True)
class LinearPlan:
    """How one linear is converted.

    Attributes:
        layer: the linear.
        scheme: how its weight is stored.
        checkpoint: the model that its weights and biases are read from, factors folded in.
        quantize: how its rows are rounded; None for float weights.
        input_scale: scale of its inputs' INT8 range; None where inputs stay float.
        per_token: whether a token's inputs are first divided by the largest magnitude among them.
        rotation_block: input channels that are rotated together (`graph.block_rotation`), or 0.
        kept: integers to store as they are, one for each weight of the layer: those of a
            quantized checkpoint, or rounded by the calibrator; None where the floats of
            ``checkpoint`` are converted.
        input_order: the order in which the graph takes the input channels; empty keeps theirs.
        treatment: what happens to a quantized checkpoint's weight, as in `manifest.FromSource`;
            None where the weight is float, or where the whole model is quantized anew.
        note: remark on the treatment for a person, or None.
    """

    layer: LinearSpec
    scheme: TensorScheme
    checkpoint: Checkpoint
    quantize: RowQuantizer | None
    input_scale: float | None = None
    per_token: bool = False
    rotation_block: int = 0
    kept: tuple[QuantizedWeight, ...] | None = None
    input_order: tuple[int, ...] = ()
    treatment: Treatment | None = None
    note: str | None = None


@dataclass(frozen=True)
class BlockPlan:
    """How one block is converted, and what calibration passes on to the next.

    Attributes:
        linears: a plan for each linear of the block.
        factors: factors on the input channels of linears, float32 ``[in]`` by linear; they are
            folded into the plans' checkpoint, and norms must be read with them too.
        peaks: largest magnitudes that calibration met, factors folded in, by value.
        hidden: hidden states after the block, float32 ``[sequences, seq_len, hidden]``, with GPTQ
            ``[2, ...]``: the float model's and the rounded one's; None without calibration.
    """

    linears: tuple[LinearPlan, ...]
    factors: Mapping[str, Array] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    hidden: Array | None = None


class Calibrator(Protocol):
    """Decides how linears are converted, block by block."""

    def look(self, block: Block, hidden: Array | None) -> LayerActivations | None:
        """Run the text through a block; None without calibration.

        Args:
            block: the next block.
            hidden: `LayerActivations.hidden` of the block before, with GPTQ `BlockPlan.hidden`;
                None for the first.
        """
        ...

    def plan(self, block: Block, seen: LayerActivations | None) -> BlockPlan:
        """Plan a block; several threads may plan one block each, except with GPTQ.

        Args:
            block: any block.
            seen: result of `look`; its inputs are used up.
        """
        ...


@dataclass(frozen=True)
class ToNearest:
    """A `Calibrator` that needs no calibration: every linear is rounded to nearest.

    Attributes:
        checkpoint: the model that is converted.
        schemes: the scheme of every linear, by name, none of them ``w8a8``.
        clip: how a group's scale is chosen, as for `rtn.quantize_rows`.
        scale_type: type in which scales will be stored, float16 or bfloat16.
    """

    checkpoint: Checkpoint
    schemes: Mapping[str, TensorScheme]
    clip: Clip
    scale_type: np.dtype[np.generic]

    def look(self, block: Block, hidden: Array | None) -> None:
        """Return None: no text is needed."""

    def plan(self, block: Block, seen: object) -> BlockPlan:
        """Plan a block, as `Calibrator.plan` describes."""
        return BlockPlan(tuple(self._linear(layer) for layer in block.linears))

    def _linear(self, layer: LinearSpec) -> LinearPlan:
        scheme = self.schemes[layer.name]
        quantize = nearest_rows(scheme, self.clip, self.scale_type)
        return LinearPlan(layer, scheme, self.checkpoint, quantize)


def nearest_rows(
    scheme: TensorScheme, clip: Clip, scale_type: np.dtype[np.generic]
) -> NearestRows | None:
    """Make the quantizer that rounds to nearest in a scheme; None for float weights."""
    return None if scheme.kind == "float" else NearestRows(scheme, clip, scale_type)

"""Builds the graph of an EAGLE-3 head: one decoder layer in the contract of `edge.bundle.io_spec`.

The layer is that of SafeAILab/EAGLE (``eagle/model/cnets.py``): its attention reads the normalised
embedding of a token beside the normalised hidden state of the token before it, and the residual
stream goes on from that hidden state. Its own output, before the final norm, is the hidden state
for the next token that it guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from edge.bundle import io_spec
from edge.bundle.manifest import Dialect, FloatType
from edge.model.parts import AnyPart
from edge.model.spec import ModelSpec

from .decoder import Decoder, DecoderTensors, NativeDecoder, PortableDecoder

_EMBEDDING, _HIDDEN = "embedding", "hidden"


def build_head(
    model: ModelSpec,
    dialect: Dialect,
    float_type: FloatType,
    tensors: DecoderTensors,
    kv_capacity: int,
    *,
    norm_before_residual: bool,
) -> onnx.ModelProto:
    """Build a head.

    Args:
        model: the head's dimensions.
        dialect: ``native`` or ``portable``.
        float_type: type of activations, cache and logits.
        tensors: where its weights are, by the names of `eagle3.head_linears` and `head_norms`.
        kv_capacity: rows of its cache.
        norm_before_residual: whether the norm comes first, as in `manifest.DraftHead`.
    """
    writer = _NativeHead if dialect == "native" else _PortableHead
    head = writer(model, float_type, tensors)
    head.norm_before_residual = norm_before_residual
    return head.build(dialect, kv_capacity)


class _Head(Decoder):
    """The part that both dialects share."""

    norm_before_residual = False

    def __init__(self, model: ModelSpec, float_type: FloatType, tensors: DecoderTensors) -> None:
        super().__init__(model, float_type, tensors)
        self.embeds_width = 2 * model.hidden_size

    def build(self, dialect: Dialect, kv_capacity: int) -> onnx.ModelProto:
        hidden = self.model.hidden_size
        self.prologue()
        self.g.node(
            "Split",
            [io_spec.INPUTS_EMBEDS, self.g.constant("split.inputs", [hidden, hidden])],
            "split_inputs",
            outputs=[_EMBEDDING, _HIDDEN],
            axis=-1,
        )
        x = self.layer(0, _HIDDEN)
        self.g.node("Identity", [x], io_spec.HIDDEN_STATES)
        return self.finish(x, dialect, kv_capacity, hidden)

    def begin(self, i: int, x: str) -> tuple[str, str, Sequence[AnyPart]]:
        name = f"layers.{i}"
        embedding = self.norm(_EMBEDDING, f"{name}.embed_norm")
        hidden = self.norm(x, f"{name}.input_norm")
        joined = self.g.node("Concat", [embedding, hidden], f"{name}.joined", axis=-1)
        return joined, hidden if self.norm_before_residual else x, self.model.layer(i)[1:]


class _NativeHead(_Head, NativeDecoder):
    """The dialect of opset 24."""


class _PortableHead(_Head, PortableDecoder):
    """The dialect of opset 21."""

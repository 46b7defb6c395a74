"""Defines `ModelSpec`: every number of a decoder that its graph and the runtime need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from .parts import AnyPart, Attention, Layer, Name, Rope, Rows, Size, only

Task = Literal["generate", "embed", "rerank"]
MAX_LAYERS = 1000
_Positions = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the values of a model."""


class RopeSpec(_Value, frozen=True):
    """Rotary position embedding, as ``rope_theta`` and ``rope_scaling`` of an HF ``config.json``.

    Attributes:
        theta: base of the frequencies.
        kind: how the frequencies are scaled beyond the original context.
        factor: context extension (``linear``, ``llama3``, ``yarn``).
        original_max_positions: context of pre-training (``llama3``, ``yarn``).
        low_freq_factor, high_freq_factor: the two borders of ``llama3``.
        beta_fast, beta_slow: the two borders of ``yarn``, in rotations.
        attention_factor: scale on cos and sin (``yarn``); 1.0 elsewhere.
    """

    theta: Annotated[float, msgspec.Meta(gt=1, le=1e15)]
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: Annotated[float, msgspec.Meta(ge=1, le=1e6)] = 1.0
    original_max_positions: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0
    low_freq_factor: _Positive = 1.0
    high_freq_factor: _Positive = 4.0
    beta_fast: _Positive = 32.0
    beta_slow: _Positive = 1.0
    attention_factor: _Positive = 1.0


class LayerRun(_Value, frozen=True):
    """A layer that repeats ``count`` times in a row; each repetition has its own weights."""

    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
    parts: Layer


class ModelSpec(_Value, frozen=True):
    """A decoder: its layers, and what lies before and after them.

    Attributes:
        architecture: name of its family.
        ropes: the frequencies that `Rope` parts name by number.
        layers: the layers from first to last, run-length coded.
        task: what the graph puts out: logits of the whole vocabulary, the normed hidden state
            (``embed``), or the logits of the two tokens that judge a document (``rerank``).
    """

    architecture: Name
    hidden_size: Size
    vocab_size: Rows
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, le=1)]
    max_position_embeddings: _Positions
    ropes: Annotated[tuple[RopeSpec, ...], msgspec.Meta(max_length=4)]
    layers: Annotated[tuple[LayerRun, ...], msgspec.Meta(min_length=1, max_length=MAX_LAYERS)]
    tied_embeddings: bool = False
    task: Task = "generate"

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers."""
        return sum(run.count for run in self.layers)

    def each_layer(self) -> Iterator[tuple[int, tuple[AnyPart, ...]]]:
        """Return number and parts of every layer, from first to last."""
        every = (run.parts for run in self.layers for _ in range(run.count))
        return enumerate(every)

    def layer(self, number: int) -> tuple[AnyPart, ...]:
        """Return the parts of a layer."""
        return next(parts for at, parts in self.each_layer() if at == number)

    def attentions(self) -> list[Attention]:
        """Return the attention of every layer that has one, from first to last."""
        return [part for _, parts in self.each_layer() for part in only(parts, Attention)]

    def of_layer(self, number: int) -> ModelSpec:
        """Return the same model with this layer alone."""
        return msgspec.structs.replace(self, layers=(LayerRun(1, self.layer(number)),))

    def rope_dims(self, table: int) -> int:
        """Return the dimensions of a head that a table of ``ropes`` turns; 0 if nothing uses it."""
        parts = (part for run in self.layers for part in only(run.parts, Rope))
        return next((part.dims for part in parts if part.table == table), 0)

"""Makes decoders of the Llama kind, whose layers differ at most in that some have no RoPE."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from typing import Annotated

import msgspec

from edge.model.parts import (
    Add,
    AnyPart,
    Attention,
    GatedMlp,
    Heads,
    Linear,
    Name,
    Norm,
    Rope,
    Rows,
    Size,
    only,
)
from edge.model.spec import MAX_LAYERS, LayerRun, ModelSpec, RopeSpec, Task


class Dense(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers of a dense decoder: norm, attention, norm and gated MLP in each layer.

    Attributes:
        num_heads, num_kv_heads, head_dim: query heads, heads of keys and values, and their size.
        intermediate_size: width of the MLP.
        rope: the frequencies.
        qkv_bias: whether q, k and v have biases.
        qk_norm: whether the heads of q and k are normalized.
    """

    architecture: Name
    hidden_size: Size
    num_layers: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
    num_heads: Heads
    num_kv_heads: Heads
    head_dim: Heads
    intermediate_size: Size
    vocab_size: Rows
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    task: Task = "generate"

    def model(self, without_rope: Collection[int] = ()) -> ModelSpec:
        """Make the model; positions do not turn the layers ``without_rope``."""
        runs = [
            LayerRun(len(list(numbers)), self._layer(turns))
            for turns, numbers in groupby(range(self.num_layers), lambda i: i not in without_rope)
        ]
        return ModelSpec(
            architecture=self.architecture,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            ropes=(self.rope,) if any(only(run.parts, Rope) for run in runs) else (),
            layers=tuple(runs),
            tied_embeddings=self.tied_embeddings,
            task=self.task,
        )

    def _layer(self, turns: bool) -> tuple[AnyPart, ...]:
        hidden, wide, dim = self.hidden_size, self.intermediate_size, self.head_dim
        q_width, kv_width = self.num_heads * dim, self.num_kv_heads * dim
        qkv = ("q", q_width), ("k", kv_width), ("v", kv_width)
        return (
            Norm("input_norm", hidden),
            Linear("qkv", hidden, qkv, bias=self.qkv_bias),
            *([Norm("q_norm", dim, "q"), Norm("k_norm", dim, "k")] if self.qk_norm else []),
            *([Rope(dim)] if turns else []),
            Attention(self.num_heads, self.num_kv_heads, dim),
            Linear("o", q_width, (("o", hidden),)),
            Add("attention_residual"),
            Norm("post_norm", hidden),
            Linear("gate_up", hidden, (("gate", wide), ("up", wide))),
            GatedMlp(),
            Linear("down", wide, (("down", hidden),)),
            Add("mlp_residual"),
        )

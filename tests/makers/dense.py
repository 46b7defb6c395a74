"""Makes models of Llama's kind from their numbers, and reads the numbers back."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby

import msgspec

from edge.model.parts import Attention, Linear, Norm, Rope, only
from edge.model.spec import LayerRun, ModelSpec, RopeSpec, Task
from edge_make.families.dense import dense_layer


class Dense(msgspec.Struct, frozen=True):
    """The numbers of a dense decoder."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    task: Task = "generate"

    def model(self, without_rope: Collection[int] = ()) -> ModelSpec:
        """Make the model; positions do not turn the layers ``without_rope``."""
        layer = dense_layer(
            self.hidden_size,
            (self.num_heads, self.num_kv_heads, self.head_dim),
            self.intermediate_size,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
        )
        unturned = tuple(part for part in layer if not isinstance(part, Rope))
        runs = [
            LayerRun(len(list(numbers)), layer if turns else unturned)
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


def dense(model: ModelSpec) -> Dense:
    """Return what makes a model, but for the layers that have no RoPE."""
    layer = model.layer(0)
    attention = only(layer, Attention)[0]
    linears = {part.name: part for part in only(layer, Linear)}
    return Dense(
        architecture=model.architecture,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=attention.heads,
        num_kv_heads=attention.kv_heads,
        head_dim=attention.dim,
        intermediate_size=linears["down"].width,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.rms_norm_eps,
        max_position_embeddings=model.max_position_embeddings,
        rope=model.ropes[0],
        qkv_bias=linears["qkv"].bias,
        qk_norm=any(part.of for part in only(layer, Norm)),
        tied_embeddings=model.tied_embeddings,
        task=model.task,
    )

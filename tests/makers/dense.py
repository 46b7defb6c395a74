"""Reads the numbers of a dense decoder back from its layers."""

from __future__ import annotations

from edge.model.parts import Attention, Linear, Norm, only
from edge.model.spec import ModelSpec
from edge_make.families.dense import Dense


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

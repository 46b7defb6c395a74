"""The decoder's linear layers against the tensors of its checkpoint."""

from __future__ import annotations

import pytest

from edge.bundle.linears import linear_layers
from edge.model.spec import ModelSpec
from edge_make.checkpoint_tensors import expected_tensors
from tests.makers.manifests import make_model

UNTIED = make_model(tied_embeddings=False)
TIED = make_model(architecture="llama", qkv_bias=False, tied_embeddings=True)
LAYERS = [f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "o", "gate_up", "down")]


@pytest.mark.parametrize("model", [UNTIED, TIED], ids=["untied", "tied"])
def test_layers_hold_every_matrix_of_the_model_once(model: ModelSpec):
    tensors = expected_tensors(model)
    used = []
    for layer in linear_layers(model):
        shapes = [tensors[name] for name in layer.weights]
        assert layer.shape == (shapes[0][1], sum(rows for rows, _ in shapes)), layer
        assert all(columns == layer.shape[0] for _, columns in shapes)
        assert [name.replace(".bias", ".weight") for name in layer.biases] in (
            [],
            list(layer.weights),
        )
        used += [*layer.weights, *layer.biases]
    assert len(set(used)) == len(used)
    others = set(tensors) - set(used)
    embedding = set() if model.tied_embeddings else {"model.embed_tokens.weight"}
    assert {name for name in others if "norm" not in name} == embedding


def test_layers_in_the_order_of_the_graph():
    """And their parts in the order in which the graph splits them again."""
    layers = {layer.name: layer for layer in linear_layers(UNTIED)}
    assert list(layers) == [*LAYERS, "lm_head"]
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    qkv = [f"{attention}.{part}_proj" for part in ("q", "k", "v")]
    assert list(layers["layers.1.qkv"].weights) == [f"{name}.weight" for name in qkv]
    assert list(layers["layers.1.qkv"].biases) == [f"{name}.bias" for name in qkv]
    gate_up = [f"{mlp}.{part}_proj.weight" for part in ("gate", "up")]
    assert list(layers["layers.1.gate_up"].weights) == gate_up
    assert layers["lm_head"].weights == ("lm_head.weight",)
    assert linear_layers(TIED)[-1].weights == ("model.embed_tokens.weight",)

"""What feeds each linear, and what can take factors of its inputs."""

from __future__ import annotations

import numpy as np
import pytest

from edge.errors import CheckpointError
from edge.model.parts import Norm
from export.quantize.fed_linears import fed_linears
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints
from tests.export.quantize.made_layers import OfOtherLayers
from tests.makers.manifests import make_model


def test_each_linear_of_a_dense_layer_has_a_producer():
    found = {each.part.name: each for each in fed_linears(make_model(qk_norm=True).layer(0))}
    assert {name: each.value for name, each in found.items()} == {
        "qkv": "input_norm.out",
        "o": "merged",
        "gate_up": "post_norm.out",
        "down": "gated",
    }
    assert {name: each.producer for name, each in found.items()} == {
        "qkv": "input_norm",
        "o": "v",
        "gate_up": "post_norm",
        "down": "up",
    }
    assert {name: each.add and each.add.name for name, each in found.items()} == {
        "qkv": None,
        "o": "attention_residual",
        "gate_up": None,
        "down": "mlp_residual",
    }


def test_what_a_norm_undoes_is_no_producer(tiny_checkpoints: Checkpoints):
    with open_checkpoint(str(tiny_checkpoints("qwen3"))) as checkpoint:
        first = checkpoint.spec.layer(0)
        normed = (*first[:2], Norm("k_norm", 32, "v"), *first[4:])
        assert [each.producer for each in fed_linears(normed)] == [
            "input_norm",
            None,
            "post_norm",
            "up",
        ]
        width = fed_linears(normed)[1].part.width
        with pytest.raises(CheckpointError, match=r"layers\.0\.o: nothing before it can take"):
            ScaledCheckpoint(
                OfOtherLayers(checkpoint, normed), {"layers.0.o": np.ones(width, np.float32)}
            )


def test_a_linear_that_reads_the_residual_stream_is_named():
    layer = make_model().layer(0)
    bare = tuple(part for part in layer if not isinstance(part, Norm))
    for at, name in ((0, "qkv"), (2, "gate_up")):
        with pytest.raises(CheckpointError, match=f"{name} reads the residual .* --method rtn"):
            _ = fed_linears(bare)[at].value

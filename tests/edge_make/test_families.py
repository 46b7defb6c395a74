"""A family makes the layers and the weights of its models, and refuses what makes no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge.errors import CheckpointError
from edge.model.check import layer_faults
from edge.model.names import FINAL_NORM, TOKEN_TABLE
from edge.model.parts import Rope, only
from edge.model.spec import Task
from edge_make.families import FAMILIES
from edge_make.model_config import parse_config, parse_decoder

SMOLLM3_3B: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 11008,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "rope_theta": 5000000.0,
    "no_rope_layers": [1, 1, 1, 0] * 9,
}


def turned(config: dict[str, Any]) -> list[int]:
    return [i for i, layer in parse_config(config).each_layer() if only(layer, Rope)]


def test_smollm3_turns_three_of_four_layers() -> None:
    spec = parse_config(SMOLLM3_3B)
    assert [run.count for run in spec.layers] == [3, 1] * 9
    assert spec.tied_embeddings  # transformers' default for this class
    assert turned(SMOLLM3_3B) == [i for i in range(36) if i % 4 != 3]
    without = {key: value for key, value in SMOLLM3_3B.items() if key != "no_rope_layers"}
    assert parse_config(without) == spec
    assert turned({**without, "no_rope_layer_interval": 2}) == list(range(0, 36, 2))
    del without["rope_theta"]
    assert parse_config(without).ropes[0].theta == 2_000_000.0


def test_a_model_that_positions_turn_nowhere_has_no_table() -> None:
    spec = parse_config({**SMOLLM3_3B, "no_rope_layers": [0] * 36})
    assert spec.ropes == ()
    assert layer_faults(spec) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [1] * 35}, "no_rope_layers must have 0 or 1 for each of 36 layers"),
        ({"no_rope_layers": [2] * 36}, "no_rope_layers must have 0 or 1"),
        ({"no_rope_layers": 4}, "no_rope_layers must have 0 or 1"),
        (
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval must be at least 1, found 0",
        ),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_what_smollm3_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
        parse_config({**SMOLLM3_3B, **changes})


# The published config.json of granite-3.3-2b-instruct.
GRANITE_2B: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49159,
}


def scales(task: Task = "generate", **changes: Any) -> dict[str, float]:
    """What becomes of a weight of 1."""
    changed = parse_decoder({**GRANITE_2B, **changes}, "config.json", task).changes
    return {name: float(change(np.ones(1, np.float32))[0]) for name, change in changed.items()}


def test_granite_folds_its_multipliers_and_changes_no_linear() -> None:
    model = parse_decoder(GRANITE_2B).spec
    assert model.rms_norm_eps == pytest.approx(1e-5 / 0.22**2)
    assert {each.scale for each in model.attentions()} == {1 / 64}
    table = 12 / 0.22
    assert scales() == pytest.approx({TOKEN_TABLE: table, FINAL_NORM: 1 / (8 * table)})
    # A head of its own sees nothing of the table, and an embedder's vectors pass no head.
    assert scales(tie_word_embeddings=False)[FINAL_NORM] == pytest.approx(1 / 8)
    assert scales("embed")[FINAL_NORM] == 1
    names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    plain: dict[str, Any] = dict.fromkeys(names, 1.0)
    assert scales(**plain) == {TOKEN_TABLE: 1, FINAL_NORM: 1}


def test_granite_needs_the_scale_of_its_attention() -> None:
    with pytest.raises(CheckpointError, match="attention_multiplier is missing; copy the config"):
        parse_decoder({**GRANITE_2B, "attention_multiplier": None})


def test_every_family_has_names_of_its_own() -> None:
    classes = [name for each in FAMILIES.values() for name in (each.model_class, each.base_class)]
    assert len(set(classes)) == len(classes)
    assert all(name == family.name for name, family in FAMILIES.items())

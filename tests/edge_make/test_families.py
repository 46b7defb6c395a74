"""A family says which layers positions do not turn, and refuses what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from edge.errors import CheckpointError
from edge.model.check import layer_faults
from edge.model.parts import Rope, only
from edge_make.families import FAMILIES
from edge_make.model_config import parse_config

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


def test_every_family_has_names_of_its_own() -> None:
    classes = [name for each in FAMILIES.values() for name in (each.model_class, each.base_class)]
    assert len(set(classes)) == len(classes)
    assert all(name == family.name for name, family in FAMILIES.items())

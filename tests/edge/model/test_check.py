"""What is wrong with a layer is said before anything takes its widths."""

from __future__ import annotations

import msgspec
import pytest

from edge.model.check import layer_faults
from edge.model.parts import Add, Attention, Linear, Norm, Rope
from edge.model.spec import LayerRun, ModelSpec
from tests.makers.manifests import make_model


def turning(heads: int, kv_heads: int, dim: int, dims: int) -> ModelSpec:
    """Make a model of one layer of which RoPE turns ``dims`` of ``dim`` channels."""
    model = make_model(num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    parts = [Rope(dims) if isinstance(part, Rope) else part for part in model.layer(0)]
    return msgspec.structs.replace(model, layers=(LayerRun(1, tuple(parts)),))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dims", "fault"),
    [
        (24, 8, 128, 128, None),
        (24, 8, 128, 96, None),  # Phi-4-mini
        (24, 8, 128, 2, None),
        (24, 8, 128, 256, "rope turns 256 dimensions of heads of 128"),
        (24, 8, 128, 130, "rope turns 130 dimensions of heads of 128"),
        (24, 8, 128, 95, "rope turns 95 dimensions, an odd number"),
    ],
)
def test_rope_turns_at_most_a_head(
    heads: int, kv_heads: int, dim: int, dims: int, fault: str | None
) -> None:
    found = layer_faults(turning(heads, kv_heads, dim, dims))
    assert found == ([] if fault is None else [f"layers[0]: {fault}"])


def test_rope_stands_between_its_values_and_their_attention() -> None:
    model = turning(4, 2, 16, 16)
    parts = model.layer(0)
    rope = next(part for part in parts if isinstance(part, Rope))
    others = [part for part in parts if part != rope]
    first = msgspec.structs.replace(model, layers=(LayerRun(1, (rope, *others)),))
    assert layer_faults(first)[:2] == [
        "layers[0]: rope comes where there is no q",
        "layers[0]: rope comes where there is no k",
    ]
    width = model.hidden_size
    alone = (
        Norm("input_norm", width),
        Linear("qkv", width, (("q", 64), ("k", 32))),
        rope,
        Linear("o", width, (("o", width),)),
        Add("mlp_residual"),
    )
    without = msgspec.structs.replace(model, layers=(LayerRun(1, alone),))
    assert not [part for part in alone if isinstance(part, Attention)]
    assert "layers[0]: it has a rope and no attention" in layer_faults(without)

"""Translates manifests from before schema 9, which had a dense model's numbers and no layers.

The layers are written out here, since no bundle of that format will ever have others, whatever the
families of newer ones make (`edge_make.families`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from edge.model.parts import Add, Attention, GatedMlp, Linear, Norm, Rope

_COUNTS = "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"


def with_layers(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a manifest as schema 9 has it; whoever decodes it checks the numbers.

    Raises:
        msgspec.ValidationError: a number of the layers is none, or missing.
    """
    found = {**content, "model": _with_layers(content.get("model"))}
    if isinstance(head := content.get("head"), dict):
        found["head"] = {**head, "model": _with_layers(head.get("model"))}
    return found


def _with_layers(older: Any) -> Any:
    if not isinstance(older, dict):
        return older
    model = dict(older)
    for name in _COUNTS:
        if type(number := model.get(name)) is not int:
            raise msgspec.ValidationError(f"no `int`, but {number!r:.40} - at `$.model.{name}`")
    hidden = model["hidden_size"]
    count, heads, kv_heads, dim, wide = (model.pop(name) for name in _COUNTS[1:])
    norms = [Norm("q_norm", dim, "q"), Norm("k_norm", dim, "k")]
    qkv = ("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)
    parts = (
        Norm("input_norm", hidden),
        Linear("qkv", hidden, qkv, bias=model.pop("qkv_bias", False)),
        *(norms if model.pop("qk_norm", False) else ()),
        Rope(dim),
        Attention(heads, kv_heads, dim),
        Linear("o", heads * dim, (("o", hidden),)),
        Add("attention_residual"),
        Norm("post_norm", hidden),
        Linear("gate_up", hidden, (("gate", wide), ("up", wide))),
        GatedMlp(),
        Linear("down", wide, (("down", hidden),)),
        Add("mlp_residual"),
    )
    ropes = [model.pop("rope", None)]
    layers = [{"count": count, "parts": msgspec.to_builtins(parts)}]
    return {**model, "ropes": ropes, "layers": layers}

"""Defines what tells one family of dense decoders from another."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

WINDOW = frozenset({"sliding_window"})
"""For classes whose window counts only where ``use_sliding_window`` is true, which is refused."""


def every_layer(get: Callable[[str], Any], num_layers: int) -> Collection[int]:
    """Return the layers without RoPE: none."""
    return ()


@dataclass(frozen=True)
class Family:
    """A family whose layers `edge.model.dense.Dense` describes.

    Attributes:
        name: its name in manifests, and ``general.architecture`` of its GGUF files.
        model_class: its class with an lm_head in transformers.
        base_class: its class without one, which is enough for a model that embeds.
        has_qkv_bias: whether q, k and v have biases whatever the config says.
        qk_norm: whether the heads of q and k are normalized.
        gguf_interleaves: whether llama.cpp's converter reorders the rows of q and k, since its
            kernel rotates neighbouring rows and HF's rotates row i with row i + head_dim / 2.
        default_theta: base of RoPE's frequencies if the config names none.
        tied_by_default: whether the embeddings are tied if the config does not say.
        old_without_kv_heads: whether old configs leave out the number of KV heads, all of them.
        without_rope: finds the layers that positions do not turn, from the config's values and the
            number of layers.
        reads: keys that change the arithmetic, as `edge_make.model_config` lists them, and that
            the family reads, or that its class in transformers reads only beside one that is
            refused.
    """

    name: str
    model_class: str
    base_class: str
    has_qkv_bias: bool = False
    qk_norm: bool = False
    gguf_interleaves: bool = False
    default_theta: float = 10_000.0
    tied_by_default: bool = False
    old_without_kv_heads: bool = False
    without_rope: Callable[[Callable[[str], Any], int], Collection[int]] = every_layer
    reads: frozenset[str] = frozenset()

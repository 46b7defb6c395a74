"""Llama 2 and 3, SmolLM2 and DeepSeek-R1-Distill-Llama (``LlamaForCausalLM``)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.model.names import module_name
from edge.model.parts import Attention, only
from edge.model.spec import ModelSpec

from .config import Config
from .dense import Layers, dense
from .family import Change, Family


def layers(config: Config) -> Layers:
    """Make the layers; configs from before grouped-query attention name no KV heads."""
    return dense(config, kv_heads=config.integer("num_attention_heads"))


def neighbours_to_halves(model: ModelSpec) -> dict[str, Change]:
    """Undo the order of rows that llama.cpp's converter gives q and k.

    Its kernel rotates neighbouring rows of a head, HF's rotates row i with row i + head_dim / 2.
    """
    found: dict[str, Change] = {}
    for number, layer in model.each_layer():
        for part in only(layer, Attention):
            for value, heads in (("q", part.heads), ("k", part.kv_heads)):
                for kind in ("weight", "bias"):
                    found[f"{module_name(number, value)}.{kind}"] = partial(_unpermute, heads)
    return found


def _unpermute(num_heads: int, weights: NDArray[Any]) -> NDArray[Any]:
    pairs = weights.reshape(num_heads, -1, 2, *weights.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(weights.shape)


LLAMA = Family("llama", "LlamaForCausalLM", "LlamaModel", layers, gguf_weights=neighbours_to_halves)

"""Granite 3, and Granite 4 where GGUF files have it dense (``GraniteForCausalLM``).

Four multipliers are Llama's arithmetic otherwise. That of attention is its scale. The others are
folded, so that no linear layer differs from the checkpoint's, and adapters fit: the residual stream
of the graph is the model's divided by ``residual_multiplier``, which the norms do not see, and the
last norm takes what is left to the logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.model.names import FINAL_NORM, TOKEN_TABLE
from edge.model.spec import ModelSpec

from .config import Config
from .dense import Layers, dense
from .family import Change, Family
from .llama import neighbours_to_halves


def layers(config: Config) -> Layers:
    """Make Llama's layers with a scale of their own."""
    heads = config.integer("num_attention_heads")
    return dense(config, kv_heads=heads, scale=config.number("attention_multiplier"))


def stream(config: Config) -> float:
    """Return the factor with which o and down add to the stream unscaled."""
    return 1 / config.number("residual_multiplier", 1.0)


def weights(config: Config, model: ModelSpec) -> dict[str, Change]:
    """Scale the token table, and the last norm by what the head must not see of it."""
    table = config.number("embedding_multiplier", 1.0) * stream(config)
    last = 1.0
    if model.task != "embed":
        last /= config.number("logits_scaling", 1.0) * (table if model.tied_embeddings else 1.0)
    return {TOKEN_TABLE: partial(_times, table), FINAL_NORM: partial(_times, last)}


def _times(factor: float, values: NDArray[Any]) -> NDArray[Any]:
    scaled: NDArray[Any] = values.astype(np.float32) * np.float32(factor)
    return scaled


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "GraniteModel",
    layers,
    reads=frozenset(
        {
            "attention_multiplier",
            "residual_multiplier",
            "embedding_multiplier",
            "logits_scaling",
        }
    ),
    stream=stream,
    weights=weights,
    gguf_weights=neighbours_to_halves,
)

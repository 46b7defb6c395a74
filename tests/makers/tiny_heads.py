"""Tiny random EAGLE-3 heads as they are published, and what they compute, in plain NumPy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, DIM, WIDE, VOCAB = 64, 4, 2, 16, 96, 320
DRAFT_VOCAB = 96
LAYERS = (0, 1, 2)
EPS = 1e-5
THETA = 500.0
_TYPES = {"float16": "F16", "int64": "I64", "bool": "BOOL", "float32": "F32"}

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TinyHead:
    """A head for the tiny models, most of which have these numbers.

    Attributes:
        config: its config.json.
        tensors: as published.
    """

    config: dict[str, Any]
    tensors: dict[str, NDArray[Any]]

    def write(self, directory: Path) -> Path:
        """Write config and weights, the latter by hand; returns the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, tensor in self.tensors.items():
            place = [len(data), len(data) + tensor.nbytes]
            kind = _TYPES[tensor.dtype.name]
            header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": place}
            data += tensor.tobytes()
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        (directory / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
        return directory

    def weight(self, name: str) -> Array:
        """A weight in float32."""
        return self.tensors[name].astype(np.float32)

    def run(self, embeds: Array, hidden: Array) -> tuple[Array, Array]:
        """Run a sequence from its beginning; returns logits and hidden states ``[tokens, ...]``."""
        before = bool(self.config.get("norm_before_residual"))
        joined = np.concatenate(
            [
                _norm(embeds, self.weight("midlayer.input_layernorm.weight")),
                _norm(hidden, self.weight("midlayer.hidden_norm.weight")),
            ],
            axis=-1,
        )
        x = (joined[:, HIDDEN:] if before else hidden) + self._attend(joined)
        h = _norm(x, self.weight("midlayer.post_attention_layernorm.weight"))
        gate, up = (
            h @ self.weight(f"midlayer.mlp.{part}_proj.weight").T for part in ("gate", "up")
        )
        x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight("midlayer.mlp.down_proj.weight").T
        logits = _norm(x, self.weight("norm.weight")) @ self.weight("lm_head.weight").T
        return logits, x

    def _attend(self, joined: Array) -> Array:
        count = len(joined)
        parts = {}
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            projected = joined @ self.weight(f"midlayer.self_attn.{part}_proj.weight").T
            parts[part] = projected.reshape(count, heads, DIM).transpose(1, 0, 2)
        q, k = (_rotate(parts[part]) for part in "qk")
        shared = HEADS // KV_HEADS
        k, v = (np.repeat(part, shared, axis=0) for part in (k, parts["v"]))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(DIM)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        merged = mixed.transpose(1, 0, 2).reshape(count, HEADS * DIM)
        result: Array = merged @ self.weight("midlayer.self_attn.o_proj.weight").T
        return result


def make_head(seed: int = 0, *, draft_vocab: int = DRAFT_VOCAB, **config: Any) -> TinyHead:
    """Make a head that guesses ``draft_vocab`` tokens at random; ``config`` replaces keys."""
    rng = np.random.RandomState(seed)

    def bell(*shape: int) -> NDArray[np.float16]:
        return (rng.standard_normal(shape) * 0.15).astype(np.float16)

    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    tensors: dict[str, NDArray[Any]] = {
        "fc.weight": bell(HIDDEN, 3 * HIDDEN),
        "midlayer.self_attn.q_proj.weight": bell(HEADS * DIM, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": bell(KV_HEADS * DIM, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": bell(KV_HEADS * DIM, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": bell(HIDDEN, HEADS * DIM),
        "midlayer.mlp.gate_proj.weight": bell(WIDE, HIDDEN),
        "midlayer.mlp.up_proj.weight": bell(WIDE, HIDDEN),
        "midlayer.mlp.down_proj.weight": bell(HIDDEN, WIDE),
        **{f"midlayer.{name}.weight": 1 + bell(HIDDEN) for name in norms},
        "norm.weight": 1 + bell(HIDDEN),
        "lm_head.weight": bell(draft_vocab, HIDDEN) * np.float16(4),
    }
    if draft_vocab < VOCAB:
        ids = np.sort(rng.permutation(VOCAB)[:draft_vocab]).astype(np.int64)
        tensors["d2t"] = ids - np.arange(draft_vocab)
        tensors["t2d"] = np.isin(np.arange(VOCAB), ids)
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "intermediate_size": WIDE,
        "vocab_size": VOCAB,
        "draft_vocab_size": draft_vocab,
        "max_position_embeddings": 256,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS)},
    }
    return TinyHead({**values, **config}, tensors)


def _norm(x: Array, weight: Array) -> Array:
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    result: Array = x / root * weight
    return result


def _rotate(x: Array) -> Array:
    """Turn ``[heads, tokens, DIM]`` by positions from 0 on, halves paired."""
    frequencies = THETA ** (-np.arange(0, DIM, 2) / DIM)
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(np.float32)

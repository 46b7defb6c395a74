"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen (``Qwen2ForCausalLM``)."""

from __future__ import annotations

from .config import Config
from .dense import Layers, dense
from .family import WINDOW, Family


def layers(config: Config) -> Layers:
    """Make Llama's layers, whose q, k and v always have biases."""
    return dense(config, qkv_bias=True)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "Qwen2Model", layers, reads=WINDOW)

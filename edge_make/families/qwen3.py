"""Qwen3 and DeepSeek-R1-0528-Qwen3 (``Qwen3ForCausalLM``)."""

from __future__ import annotations

from .config import Config
from .dense import Layers, dense
from .family import WINDOW, Family


def layers(config: Config) -> Layers:
    """Make Llama's layers, whose heads of q and k are normalized."""
    return dense(config, qk_norm=True)


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "Qwen3Model", layers, reads=WINDOW)

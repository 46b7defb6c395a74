"""Llama 2 and 3, SmolLM2 and DeepSeek-R1-Distill-Llama (``LlamaForCausalLM``)."""

from __future__ import annotations

from .family import Family

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "LlamaModel",
    gguf_interleaves=True,
    old_without_kv_heads=True,  # configs from before grouped-query attention
)

"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen (``Qwen2ForCausalLM``)."""

from __future__ import annotations

from .family import WINDOW, Family

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "Qwen2Model", has_qkv_bias=True, reads=WINDOW)

"""Qwen3 and DeepSeek-R1-0528-Qwen3 (``Qwen3ForCausalLM``)."""

from __future__ import annotations

from .family import WINDOW, Family

QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "Qwen3Model", qk_norm=True, reads=WINDOW)

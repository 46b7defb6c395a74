"""Holds the families of models that can be exported, a file for each."""

from __future__ import annotations

from .config import Config
from .family import Change, Decoder, Family, decoder
from .granite import GRANITE
from .llama import LLAMA
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3

FAMILIES = {family.name: family for family in (QWEN2, LLAMA, QWEN3, SMOLLM3, GRANITE)}
"""Families by name."""

__all__ = ["FAMILIES", "Change", "Config", "Decoder", "Family", "decoder"]

"""Provides the module `deepseek_r1` that DeepSeek-R1 tutorials import.

No package by DeepSeek has it. pyproject.toml also installs this file beside `edge`, so that `from
deepseek_r1 import DeepSeekModel` works.
"""

from __future__ import annotations

from edge import DeepSeekModel

__all__ = ["DeepSeekModel"]

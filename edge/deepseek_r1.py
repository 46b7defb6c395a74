"""The module `deepseek_r1` of DeepSeek-R1 tutorials, which no package of DeepSeek's has.

pyproject.toml also installs this file beside `edge`, so that `from deepseek_r1 import
DeepSeekModel` finds it.
"""

from __future__ import annotations

from edge import DeepSeekModel

__all__ = ["DeepSeekModel"]

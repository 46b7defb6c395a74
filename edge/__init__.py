"""edge-llm: the slim runtime. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .deepseek import DeepSeekModel
    from .errors import EdgeError
    from .generation import GenerationStats
    from .llm import LLM, GenerationChunk, GenerationResult
    from .manifest import Manifest
    from .sampling import SamplingParams

_HOMES = {
    "LLM": ".llm",
    "DeepSeekModel": ".deepseek",
    "EdgeError": ".errors",
    "GenerationChunk": ".llm",
    "GenerationResult": ".llm",
    "GenerationStats": ".generation",
    "Manifest": ".manifest",
    "SamplingParams": ".sampling",
}

__all__ = [
    "LLM",
    "DeepSeekModel",
    "EdgeError",
    "GenerationChunk",
    "GenerationResult",
    "GenerationStats",
    "Manifest",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__

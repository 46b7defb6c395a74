"""edge-llm: the slim runtime. Importing it loads nothing heavy."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .deepseek import DeepSeekModel
    from .errors import EdgeError
    from .generation import GenerationStats
    from .llm import LLM
    from .manifest import Manifest
    from .sampling import SamplingParams
    from .stream import Generation, GenerationChunk, GenerationResult
    from .structured import OutputFormat

# From 1.29 on, ONNX Runtime's wheels for Linux report model and machine to Microsoft unless this is
# set before they are loaded. A value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "LLM": ".llm",
    "DeepSeekModel": ".deepseek",
    "EdgeError": ".errors",
    "Generation": ".stream",
    "GenerationChunk": ".stream",
    "GenerationResult": ".stream",
    "GenerationStats": ".generation",
    "Manifest": ".manifest",
    "OutputFormat": ".structured",
    "SamplingParams": ".sampling",
}

__all__ = [
    "LLM",
    "DeepSeekModel",
    "EdgeError",
    "Generation",
    "GenerationChunk",
    "GenerationResult",
    "GenerationStats",
    "Manifest",
    "OutputFormat",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__

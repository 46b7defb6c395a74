"""Turns a bundle and a prompt into an answer: the slim runtime that a device needs.

Here: bundles, backends, text, the scheduler, and what they need of the machine; the packages' own
docstrings say more. No training, export, engine build, HTTP or fleet: those packages stand on this
one, which imports none of them. ``import edge`` loads nothing heavy.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .bundle.manifest import Manifest
    from .engine_config import EngineConfig
    from .errors import EdgeError
    from .runtime.deepseek import DeepSeekModel
    from .runtime.generation import GenerationStats
    from .runtime.llm import LLM
    from .runtime.sampling_params import SamplingParams
    from .runtime.stream import Generation, GenerationChunk, GenerationResult
    from .runtime.structured_output import OutputFormat

# From 1.29 on, ONNX Runtime's wheels for Linux report model and machine to Microsoft unless this is
# set before they are loaded. A value that the user has set is kept.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "LLM": ".runtime.llm",
    "DeepSeekModel": ".runtime.deepseek",
    "EdgeError": ".errors",
    "EngineConfig": ".engine_config",
    "Generation": ".runtime.stream",
    "GenerationChunk": ".runtime.stream",
    "GenerationResult": ".runtime.stream",
    "GenerationStats": ".runtime.generation",
    "Manifest": ".bundle.manifest",
    "OutputFormat": ".runtime.structured_output",
    "SamplingParams": ".runtime.sampling_params",
}

__all__ = [
    "LLM",
    "DeepSeekModel",
    "EdgeError",
    "EngineConfig",
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

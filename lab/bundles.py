"""Finds the bundles that experiments use by default, and exports those that are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.models.real_models import fetch
from tools.models.smollm2 import smollm2_gguf

BUNDLES = Path("bundles")


def quickstart_bundle() -> Path:
    """Return the bundle of ``scripts/quickstart``: SmolLM2-135M in INT8."""
    bundle = BUNDLES / "smollm2-135m-int8"
    if not bundle.is_dir():
        _export(smollm2_gguf(), bundle, "--quant", "int8")
    return bundle


def coder_bundle(size: str) -> Path:
    """Return Qwen2.5-Coder of a size, ``0.5b`` or ``1.5b``, in INT4 as ``--fast`` rounds it."""
    bundle = BUNDLES / f"coder-{size}-int4"
    if not bundle.is_dir():
        _export(fetch(f"qwen2.5-coder-{size}"), bundle, "--fast", "--target", "cpu")
    return bundle


def _export(source: Path, bundle: Path, *options: str) -> None:
    command = [sys.executable, "-m", "edge.cli", "export", str(source), "-o", str(bundle)]
    subprocess.run([*command, *options], check=True)

"""A tiny checkpoint some of whose down projections have a few very loud input channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.tiny_models import Kind, write_checkpoint

LOUD = (3, 17, 40)
"""The loud channels."""


def write_loud_checkpoint(
    folder: Path, kind: Kind, layers: tuple[int, ...], factor: float = 64.0, **changes: Any
) -> Path:
    """Like `write_checkpoint`, and it computes the same, but through louder inputs of down.

    Args:
        folder: see `write_checkpoint`.
        kind: see `write_checkpoint`.
        layers: whose channels `LOUD` are loud.
        factor: how much louder, a power of two.
        changes: see `write_checkpoint`.
    """
    path = write_checkpoint(folder, kind, dtype="fp16", **changes)
    for file in path.glob("*.safetensors"):
        weights = load_file(file)
        for i in layers:
            for name, rows, scale in (
                ("up_proj", np.s_[list(LOUD)], factor),
                ("down_proj", np.s_[:, list(LOUD)], 1 / factor),
            ):
                key = f"model.layers.{i}.mlp.{name}.weight"
                if key in weights:
                    weights[key][rows] *= np.float16(scale)
        save_file(weights, file, metadata={"format": "pt"})
    return path

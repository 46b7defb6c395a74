"""A tiny checkpoint some of whose down projections have a few very loud input channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from export.quantize.smoothquant import Smoothing, smoothing
from tests.makers.tiny_models import Kind, write_checkpoint

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


@contextmanager
def loud_by_token() -> Iterator[None]:
    """While it lasts, very loud inputs are rotated and get ranges per token, like real ones."""

    def decide(weights: Any, x: NDArray[np.float32], *rest: Any, **named: Any) -> Smoothing:
        peaks = np.sort(np.abs(x).max(axis=0))[::-1]
        if peaks[0] > 16 * peaks[4]:
            return Smoothing(None, 0.0, per_token=True, rotation_block=64)
        return replace(smoothing(weights, x, *rest, **named), per_token=False, rotation_block=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.quantize.calibrated.smoothing", decide)
        yield

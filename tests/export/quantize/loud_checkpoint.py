"""A tiny checkpoint some of whose down projections have a few very loud input channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
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


@contextmanager
def loud_stay_float() -> Iterator[None]:
    """While it lasts, very loud channels stay float, though factors would tame so tiny a model."""

    def choices(peaks: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        order = np.argsort(-peaks, kind="stable")
        is_loud = peaks[order[0]] > 16 * peaks[order[4]]
        return [np.sort(order[: 4 if is_loud else 0]).astype(np.int64)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.quantize.smoothquant.loud_channels", choices)
        yield

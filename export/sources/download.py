"""Says what a download of a checkpoint's weights comes to, before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge.bundle.manifest import ModelSpec

from .quantization_config import QuantizationConfig


@dataclass(frozen=True)
class Download:
    """The weights that a hub is about to be asked for.

    Attributes:
        num_bytes: of the files that are not here yet; None if that is not known.
        directory: where they go, and stay.
    """

    num_bytes: int | None
    directory: Path


@dataclass(frozen=True)
class Preview:
    """A checkpoint of a hub by its small files alone.

    Attributes:
        source: its name, as the user wrote it.
        spec: its dimensions.
        quantization: how its weights are quantized already; None are floats.
        download: its weights.
    """

    source: str
    spec: ModelSpec
    quantization: QuantizationConfig | None
    download: Download

"""Describes the download of a checkpoint's weights, before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge.model.spec import ModelSpec

from .quantization_config import QuantizationConfig


@dataclass(frozen=True)
class Download:
    """Weights that are about to be fetched from a hub.

    Attributes:
        num_bytes: bytes of the files that are not here yet; None if that is not known.
        directory: directory that they go to, and stay in.
    """

    num_bytes: int | None
    directory: Path


@dataclass(frozen=True)
class Preview:
    """A hub's checkpoint, known from its small files only.

    Attributes:
        source: its name, as the user wrote it.
        spec: its dimensions.
        quantization: how its weights are quantized already; None if they are floats.
        download: the weights still to fetch.
    """

    source: str
    spec: ModelSpec
    quantization: QuantizationConfig | None
    download: Download

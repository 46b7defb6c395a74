"""Compares a bundle's vision encoder where it runs with the same encoder in FP32 on the CPU."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.bundle.manifest import Manifest
from edge.vision.section import VisionQuant, VisionSection, read_vision

Array = NDArray[np.float32]
LIMITS: dict[VisionQuant, float] = {"fp16": 0.01, "bf16": 0.05, "int8": 0.05}
"""Largest relative error of an encoder's rows. Tiny random models have 0.0005 in FP16, and 0.015
with INT8 weights, for which ONNX Runtime's CPU also rounds inputs to INT8."""


@dataclass(frozen=True)
class EncoderReport:
    """Agreement of two encoders on a drawn tile.

    Attributes:
        error: the rows' `relative_error`.
        limit: the largest error that passes.
    """

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the rows agree; a NaN fails like a large number."""
        return self.error <= self.limit


def compare_encoders(
    bundle: Path, manifest: Manifest, backend: Backend, num_threads: int | None
) -> EncoderReport | None:
    """Run a drawn tile through a backend's encoder and through the CPU's.

    On the CPU it compares the engine's graph, which ONNX Runtime runs in FP16 only.

    Args:
        bundle: its directory, whose files were checked before.
        manifest: its manifest.
        backend: runs the decoder.
        num_threads: CPU threads; None is one per physical core.

    Returns:
        The report; None for a text bundle, and on the CPU for an encoder in BF16.

    Raises:
        BundleError: the engine was built without an encoder, or a graph is not what the manifest
            says.
        BackendError: an encoder cannot be opened or run.
    """
    section = read_vision(manifest)
    if section is None:
        return None
    from edge.vision.encoder import OrtEncoder, open_encoder

    on_cpu = backend.name == "ort-cpu"
    if on_cpu and manifest.dtype != "fp16":
        return None

    def own(section: VisionSection) -> OrtEncoder:
        return OrtEncoder(bundle, manifest, section, None, num_threads)

    tile = drawn_tile(section.tile_px)[0]
    with closing(own(section)) as reference:
        wanted = reference.encode(tile)
    engines = msgspec.structs.replace(section, cpu_graph=section.graph)
    with closing(
        own(engines) if on_cpu else open_encoder(bundle, manifest, section, backend, num_threads)
    ) as candidate:
        found = candidate.encode(tile)
    return EncoderReport(relative_error(found, wanted), LIMITS[section.quant])


def drawn_tile(px: int) -> Array:
    """Draw a tile on which encoders are compared: slopes, a disc, edges and some noise.

    Returns:
        ``[1, 3, px, px]`` of -1 to 1.
    """
    y, x = np.mgrid[0:px, 0:px].astype(np.float32) / np.float32(px)
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.06).astype(np.float32)
    stripes = np.sign(np.sin(40 * (x + y))).astype(np.float32)
    noise = np.random.RandomState(0).uniform(-1, 1, (3, px, px)).astype(np.float32)
    planes = np.stack([x - y, 0.8 * disc - y, 0.5 * stripes * x]) + 0.1 * noise
    tile: Array = np.clip(planes, -1, 1)[None]
    return tile


def relative_error(found: Array, wanted: Array) -> float:
    """Return the norm of the difference over the norm of ``wanted``."""
    difference = found.astype(np.float64) - wanted
    return float(np.sqrt((difference**2).sum() / (wanted.astype(np.float64) ** 2).sum()))

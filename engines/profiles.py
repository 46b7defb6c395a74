"""The two optimization profiles: for every input, the least, the usual and the largest shape.

One profile for prefill (many tokens of few sequences), one for decode (one token of each): TensorRT
picks kernels per profile, so that decode gets matrix-vector kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edge.bundle import io_spec
from edge.bundle.manifest import Dialect, FloatType, ModelSpec

from .config import BuildShapes

Shape = tuple[int, ...]
ProfileName = Literal["prefill", "decode"]


@dataclass(frozen=True)
class ShapeRange:
    """Least, usual (what kernels are tuned for) and largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Profile:
    """One optimization profile.

    Attributes:
        name: ``prefill`` or ``decode``.
        inputs: every input of the graph in graph order.
    """

    name: ProfileName
    inputs: Mapping[str, ShapeRange]


def make_profiles(
    model: ModelSpec, dialect: Dialect, dtype: FloatType, shapes: BuildShapes
) -> tuple[Profile, Profile]:
    """Prefill and decode, in the order in which the engine has them."""
    buckets = shapes.kv_buckets
    kv = (buckets[0], buckets[len(buckets) // 2], buckets[-1])
    batch, seq = shapes.max_batch, shapes.max_prefill
    # A prompt usually comes alone and wants the logits of its last token; scoring wants all.
    prefill = {
        io_spec.BATCH: (1, 1, batch),
        io_spec.SEQ: (1, seq, seq),
        io_spec.NUM_LOGITS: (1, 1, seq),
        io_spec.KV: kv,
    }
    decode = {
        io_spec.BATCH: (1, batch, batch),
        io_spec.SEQ: (1, 1, 1),
        io_spec.NUM_LOGITS: (1, 1, 1),
        io_spec.KV: kv,
    }
    specs = io_spec.decoder_inputs(model, dialect, dtype, shapes.capacity)
    return (
        Profile("prefill", {spec.name: _range(spec, prefill) for spec in specs}),
        Profile("decode", {spec.name: _range(spec, decode) for spec in specs}),
    )


def _range(spec: io_spec.TensorSpec, sizes: Mapping[str, tuple[int, int, int]]) -> ShapeRange:
    least, usual, largest = (
        tuple(sizes[dim][i] if isinstance(dim, str) else dim for dim in spec.shape)
        for i in range(3)
    )
    return ShapeRange(least, usual, largest)

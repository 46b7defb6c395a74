"""Computes rotary position embedding: frequencies, and rotating vectors that carry a position.

Frequencies follow ``transformers.modeling_rope_utils``: ``default`` (RoFormer, arXiv 2104.09864),
``linear`` (arXiv 2306.15595), ``llama3`` (Llama 3.1's wavelength bands) and ``yarn``
(arXiv 2309.00071, by parts with an attention factor). Everything is float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge.model.spec import RopeSpec

Array = NDArray[np.float64]


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Array:
    """Return radians per position of each rotated pair, float64 ``[head_dim / 2]``."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base: Array = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    if rope.kind == "yarn":
        return _yarn(base, rope, head_dim)
    return base


def turn(vectors: NDArray[np.floating], frequencies: Array, positions: int) -> Array:
    """Rotate vectors that carry a position already by ``positions`` more (or fewer).

    Rotations add up, whatever the frequencies: a key of position ``p`` becomes that of position
    ``p + positions``. An attention factor stays in the vector's length.

    Args:
        vectors: ``[..., head_dim]``; element ``i`` pairs with ``i + head_dim / 2``, as in ONNX's
            ``RotaryEmbedding`` without ``interleaved``.
        frequencies: a result of `inverse_frequencies`, ``[head_dim / 2]``.
        positions: number of positions to add; may be negative.

    Returns:
        Float64, in the shape of ``vectors``.
    """
    angles = positions * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    half = len(frequencies)
    first, second = vectors[..., :half], vectors[..., half:]
    result = np.empty(vectors.shape, np.float64)
    result[..., :half] = first * cos - second * sin
    result[..., half:] = first * sin + second * cos
    return result


def _llama3(base: Array, rope: RopeSpec) -> Array:
    wavelengths = 2 * math.pi / base
    # 1 keeps a frequency, 0 divides it by the factor; between the two borders it is blended.
    turns = rope.original_max_positions / wavelengths
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    return keep * base + (1.0 - keep) * base / rope.factor


def _yarn(base: Array, rope: RopeSpec, head_dim: int) -> Array:
    def dimension_of(rotations: float) -> float:
        """Return the dimension whose pair turns ``rotations`` times in the original context."""
        return (
            head_dim
            * math.log(rope.original_max_positions / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float64) - low) / max(high - low, 0.001)
    interpolate = np.clip(ramp, 0.0, 1.0)
    return interpolate * base / rope.factor + (1.0 - interpolate) * base

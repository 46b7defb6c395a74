"""Computes the graph's tables for rotary position embedding, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.bundle.rope import inverse_frequencies
from edge.model.spec import RopeSpec

Array = NDArray[np.float64]


def rope_tables(rope: RopeSpec, head_dim: int, positions: int) -> tuple[Array, Array]:
    """Compute cosine and sine, float64 ``[positions, head_dim / 2]``, attention factor included."""
    angles = np.outer(np.arange(positions, dtype=np.float64), inverse_frequencies(rope, head_dim))
    return np.cos(angles) * rope.attention_factor, np.sin(angles) * rope.attention_factor

"""Chooses the KV capacity of a bundle for which none is given."""

from __future__ import annotations

KV_CAPACITY, REASONING_KV_CAPACITY = 4096, 8192


def default_kv_capacity(*, reasons: bool, positions: int) -> int:
    """Return the default KV capacity: tokens of prompt and answer.

    Args:
        reasons: whether the model thinks before it answers; R1 may do so for thousands of tokens.
        positions: most tokens that the model can take.
    """
    return min(REASONING_KV_CAPACITY if reasons else KV_CAPACITY, positions)

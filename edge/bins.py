"""Makes the edges of bins in which numbers are counted."""

from __future__ import annotations

import math


def geometric_edges(last: float) -> tuple[float, ...]:
    """Return the edges 0, 1 and on by factors of the square root of 2, up to ``last``.

    A value that doubles moves by two bins.
    """
    edges, power = [0.0], 0
    while edges[-1] < last:
        edges.append(float(math.floor(2 ** (power / 2))))
        power += 1
    return tuple(sorted(set(edges)))


def linear_edges(step: float, count: int) -> tuple[float, ...]:
    """Return edges between the multiples of ``step``, so that a round value is inside its bin."""
    return tuple(round((i + 0.5) * step, 6) for i in range(count))

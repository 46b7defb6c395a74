"""Draws from the best logits of a row the token that `Sampler` would draw from all of it, or none.

The definition is `Sampler._draw_place` on the whole row: an inverse CDF in the order of the ids. It
is repeated on fewer candidates as long as it falls on a token that top-p or min-p drop. Here only a
part of the row is known: some tokens with their logits, a bound on the other logits, and a bound on
their mass. The other tokens can be anywhere between the known ones. So a random number certainly
picks a known token if it does so wherever the others are, and every comparison uses the bounds. A
certain result is what the whole row gives, since all roundings there (`_EDGE`) are within the
bounds, too. If nothing is certain the result is None, and the caller fetches the row and draws with
the same random numbers.

This also holds after changes that only lower logits, since the bounds stay true: penalties that
discourage, negative biases, masks of a grammar. `Sampler` has the rule.

The engine gives the mass of the other tokens at temperature 1. Let ``r`` be that mass, ``n`` their
number and ``b`` the bound on their logits. At a temperature T <= 1 their mass is at most
``r * exp(b * (1 / T - 1))``, since ``exp(l / T) = exp(l) * exp(l * (1 / T - 1))`` and ``l <= b``.
At T > 1 it is at most ``n ** (1 - 1 / T) * r ** (1 / T)`` by Jensen's inequality, and at any T at
most ``n * exp(b / T)``. A graph with the temperature as an input would know it better, but every
engine, graph and caller would carry that input. These bounds leave few rows to fetch.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge.backends.best import BestLogits

Logits = NDArray[np.float32]

# Running sums of the whole row are off by at most 2e-5 of the total (`sampling._ROUNDING`), at both
# ends of a token's share, and the target by as much.
_EDGE = 7e-5
# A float32 exponential is off by a few units in the last place; sums here are in float64.
_EXACT = 1e-6
# A scaled logit is rounded twice: 1.3e-5 of the mass of a token that has any in float32.
_SCALED = 1e-4
_SMALL = math.log(1e-5)  # of a mass next to the best token's 1: less than `_EDGE`
_MOST = 700.0  # largest argument of `exp`


def rest_mass(best: BestLogits, top: float, temperature: float) -> float:
    """Bound the mass at a temperature of all tokens that are not among the best.

    Args:
        best: the best logits from the engine.
        top: the logit whose mass counts as 1.
        temperature: at least `sampling_reference.GREEDY_TEMPERATURE`.
    """
    others, bound = best.vocab_size - len(best.ids), float(best.values[-1])
    if not others or bound == -math.inf:
        return 0.0
    slope, greatest = 1.0 / temperature, float(best.values[0])
    by_number = math.log(others) + (bound - top) * slope
    if by_number < _SMALL:
        return math.exp(by_number) * (1 + _SCALED)
    rest = best.rest_bound()
    raised = math.log(rest) + greatest - top
    if temperature <= 1:
        by_mass = raised + (bound - top) * (slope - 1)
    else:
        by_mass = (1 - slope) * math.log(others) + slope * raised
    return math.exp(min(by_number, by_mass, _MOST)) * (1 + _SCALED)


def draw(
    x: Logits,
    bound: np.float32,
    rest: float,
    top_p: float,
    floor: np.float32,
    uniforms: list[float],
) -> int | None:
    """Draw a place of ``x`` if the whole row certainly gives it.

    Args:
        x: scaled logits of the known tokens, in the order of their ids; the greatest is 0.
        bound: no other scaled logit is above it.
        rest: bound on the mass of all others.
        top_p: share of the mass to keep, as in `SamplingParams`.
        floor: least scaled logit that min-p keeps.
        uniforms: random numbers, one per attempt.
    """
    weights = np.exp(x).astype(np.float64)
    until = np.cumsum(weights)
    total = float(until[-1])
    border_low, border_high = top_p * total * (1 - _EXACT), top_p * (total + rest) * (1 + _EXACT)
    mass = total
    for uniform in uniforms:
        edge = _EDGE * (mass + rest)
        target = uniform * mass
        place = int(np.searchsorted(until, target, side="right"))
        if place == len(x):
            return None
        before = float(until[place - 1]) if place else 0.0
        # The others may be before this token as well as after it.
        if (before or rest) and not before + (1 - uniform) * rest + edge < target:
            return None
        if not target + uniform * rest + edge < float(until[place]):
            return None
        value = x[place]
        if value < floor:
            if not floor > bound:
                return None
            kept = x >= floor
        else:
            if top_p >= 1:
                return place
            if not value > bound:
                return None
            kept = x > value
            kept[:place] |= x[:place] == value
            ahead = float(weights[kept].sum())
            if ahead < border_low:
                return place
            if not ahead > border_high:
                return None
        weights = np.where(kept, weights, 0.0)
        until = np.cumsum(weights)
        mass, rest = float(until[-1]), 0.0
    return None

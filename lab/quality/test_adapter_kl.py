"""Two bundles of one adapter are compared by the same places of the same texts."""

from __future__ import annotations

import numpy as np
import pytest

from .adapter_kl import compare


def test_the_difference_is_paired_and_its_interval_is_by_texts():
    random = np.random.default_rng(1)
    merged = [random.exponential(0.1, size) for size in (3, 50, 20, 8, 30)]
    equal = compare(merged, merged)
    assert (equal["difference"], equal["interval"], equal["ratio_interval"]) == (0, [0, 0], [1, 1])
    assert (equal["texts"], equal["places"]) == (5, 111)
    twice = compare([2 * each for each in merged], merged)
    assert twice["ratio"] == 2
    assert twice["ratio_interval"] == [2, 2]
    assert twice["difference"] == pytest.approx(np.concatenate(merged).mean(), abs=1e-5)
    # A long text counts by its places, and whichever texts are drawn the difference is there.
    low, high = twice["interval"]
    assert 0 < low < twice["difference"] < high
    # Texts that differ in both directions: nothing is sure.
    mixed = [each * factor for each, factor in zip(merged, (9, 0.5, 1.6, 0.2, 1.1), strict=True)]
    low, high = compare(mixed, merged)["interval"]
    assert low < 0 < high

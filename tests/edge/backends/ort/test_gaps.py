"""A decode step over slots that are not neighbours: one run, and what lies between stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge.backends.step import Step, step_after
from tests.conftest import Bundles, require_kernels
from tests.edge.backends.runner import Runner
from tests.standins.slot_rows import stacked


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_a_step_over_a_gap(tiny_bundles: Bundles, dialect: str, monkeypatch: pytest.MonkeyPatch):
    require_kernels(dialect)
    runner = Runner(tiny_bundles("llama", dialect), num_slots=4)
    backend = runner.backend
    ids = np.random.default_rng(0).integers(0, 300, (4, 6))
    for slot in range(4):
        embeds = runner.table[ids[slot][None]]
        backend.forward(step_after([slot], [0], embeds, np.array([[5]])))
    before = [stacked(backend.read_slot(slot, 6)) for slot in range(4)]

    def decode(slots: list[int]) -> Any:
        embeds = runner.table[ids[slots][:, :1]]
        wanted = np.zeros((len(slots), 1), np.int64)
        return backend.forward(step_after(slots, [6] * len(slots), embeds, wanted))

    alone = {slot: decode([slot]).copy() for slot in range(4)}
    calls: list[tuple[int, int]] = []
    run = backend._runner._run

    def counted(step: Step) -> Any:
        calls.append((step.slots[0], step.batch))
        return run(step)

    monkeypatch.setattr(backend._runner, "_run", counted)
    for slots, expected in (
        ([0, 2], [(0, 3)]),
        ([3, 1, 0], [(0, 4)]),
        ([3, 0], [(0, 1), (3, 1)]),
    ):
        calls.clear()
        logits = decode(slots)
        assert calls == expected
        for row, slot in zip(logits, slots, strict=True):
            np.testing.assert_allclose(row, alone[slot][0], atol=2e-4)
        for slot in range(4):
            assert np.array_equal(stacked(backend.read_slot(slot, 6)), before[slot])

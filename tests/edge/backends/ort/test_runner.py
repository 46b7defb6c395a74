"""Windows on ONNX Runtime, without it: what is bound, in which order, and what is put back."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.backends.ort.runner import (
    RunShape,
    StepOutputs,
    StepRunner,
    cache_bindings,
    fill_inputs,
    make_inputs,
)
from edge.backends.step import Step, step_after
from edge.bundle.io_spec import DIALECTS
from edge.errors import BackendError
from edge.model.slot_rows import SlotRows
from tests.standins.slot_rows import by_name

VOCAB, HIDDEN = 5, 3


class Engine:
    """Writes each sequence's position into a row of its slot, its logits and its hidden states."""

    def __init__(self, fused: bool = False) -> None:
        self.rows = np.full((8, 1), -1.0)
        self.bound: list[RunShape] = []
        self.outputs: list[StepOutputs] = []
        self.ran: list[tuple[int, int]] = []
        self.fails = False
        self.runner = StepRunner(
            self.bind,
            read_slot=lambda slot, length: by_name(self.rows[None, slot, :length].copy()),
            put_back=self.put_back,
            num_slots=len(self.rows),
            out_width=VOCAB,
            hidden_width=HIDDEN,
            dtype=np.float32,
            fused=fused,
        )

    def bind(self, shape: RunShape, outputs: StepOutputs) -> Bound:
        self.bound.append(shape)
        self.outputs.append(outputs)
        return Bound(self, outputs)

    def put_back(self, slot: int, rows: SlotRows) -> None:
        self.rows[slot] = rows["0.key"]

    def step(self, slots: list[int], past: list[int], seq: int = 1) -> NDArray[np.float32]:
        embeds = np.zeros((len(slots), seq, 2), np.float16)
        indices = np.full((len(slots), 1), seq - 1)
        return self.runner.run(step_after(slots, past, embeds, indices))


class Bound:
    def __init__(self, engine: Engine, outputs: StepOutputs) -> None:
        self.engine, (self.logits, self.hidden) = engine, outputs

    def run(self, step: Step) -> NDArray[np.float32]:
        self.engine.ran.append((step.slots[0], step.batch))
        self.engine.rows[list(step.slots), 0] = step.starts
        if self.engine.fails:
            raise BackendError("as told")
        for array in (self.logits, self.hidden):
            assert array is not None
            array[...] = np.asarray(step.starts)[:, None, None]
        return self.logits


def test_logits_come_in_the_callers_order_and_idle_rows_stay() -> None:
    engine = Engine()
    logits = engine.step([6, 2, 0], [3, 4, 5])
    assert_array_equal(logits[:, 0, 0], [3, 4, 5])
    assert engine.runner.hidden is not None
    assert_array_equal(engine.runner.hidden[:, 0], [[3] * HIDDEN, [4] * HIDDEN, [5] * HIDDEN])
    assert engine.ran == [(0, 3), (6, 1)]
    assert engine.rows[:, 0].tolist() == [5, -1, 4, -1, -1, -1, 3, -1]


def test_an_idle_row_is_put_back_after_a_failure_too() -> None:
    engine = Engine()
    engine.fails = True
    with pytest.raises(BackendError, match="as told"):
        engine.step([2, 0], [4, 5])
    assert engine.rows[1, 0] == -1


def test_decode_is_bound_once_until_it_is_forgotten() -> None:
    engine = Engine()
    for _ in range(3):
        engine.step([1, 0], [4, 5])
        engine.step([0], [5], seq=4)
    decode, chunk = RunShape(0, 2, 1, 1), RunShape(0, 1, 4, 1)
    assert engine.bound == [decode, chunk, chunk, chunk]
    engine.runner.forget()
    engine.step([1, 0], [4, 5])
    assert engine.bound[4:] == [decode]


def test_decode_steps_of_all_windows_put_out_into_the_same_memory() -> None:
    engine = Engine()
    for first in range(8):
        for end in range(first + 1, 9):
            slots = list(range(first, end))
            assert_array_equal(engine.step(slots, slots)[:, 0, 0], slots)
    assert len(engine.outputs) == 36
    for arrays, width in zip(zip(*engine.outputs, strict=True), (VOCAB, HIDDEN), strict=True):
        memory = {id(array.base): array.base.nbytes for array in arrays}
        assert sum(memory.values()) == 8 * width * 4


@pytest.mark.parametrize("fused", [False, True])
def test_fused_attention_takes_chunks_after_a_past_one_by_one(fused: bool) -> None:
    engine = Engine(fused)
    engine.step([0, 1], [0, 3], seq=4)
    assert engine.ran == ([(0, 1), (1, 1)] if fused else [(0, 2)])


def test_cache_outputs_are_the_cache_or_rows_to_append() -> None:
    caches = {"0.key": "k0", "0.value": "v0", "3.key": "k3"}
    inputs, outputs, new = cache_bindings(DIALECTS["native"], caches, lambda name, _: name)
    assert list(inputs.values()) == list(outputs.values()) == list(caches.values())
    assert not new
    inputs, outputs, new = cache_bindings(DIALECTS["portable"], caches, lambda name, _: name)
    assert inputs["past_key_values.3.key"] == "k3"
    assert outputs["new.0.value"] == "0.value"
    assert new == {name: name for name in caches}


def test_inputs_hold_the_step() -> None:
    embeds = np.ones((2, 3, 4), np.float16)
    step = step_after([1, 2], [7, 0], embeds, np.array([[2], [1]]))
    inputs = make_inputs(DIALECTS["portable"], 4, np.float32, RunShape(1, 2, 3, 1))
    fill_inputs(inputs, step, step.embeds)
    assert inputs["past_lengths"].tolist() == [7, 0]
    assert inputs["position_ids"].tolist() == [[7, 8, 9], [0, 1, 2]]
    assert inputs["logits_indices"].tolist() == [[2], [1]]
    assert (inputs["inputs_embeds"] == 1).all()

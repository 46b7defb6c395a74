"""Runs steps on ONNX Runtime: decides which slots run together, and names bindings.

A slot is a contiguous part of each cache tensor, so a step on slots ``first .. first + B`` binds
the addresses of that part. The backend decides about the memory, and how it is bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge.backends.batching import Batching, Window, window_step
from edge.backends.step import Step
from edge.bundle import io_spec
from edge.model.slot_rows import SlotRows

T = TypeVar("T")


class RunShape(NamedTuple):
    """Key of a binding: the first slot, the number of sequences, and tokens and logits of each."""

    first: int
    batch: int
    seq: int
    num_logits: int


class StepOutputs(NamedTuple):
    """Host memory for the outputs of the graph, in its own type.

    Attributes:
        logits: ``[B, N, width]``.
        hidden: ``[B, S, width]``; None without such an output.
    """

    logits: NDArray[Any]
    hidden: NDArray[Any] | None


class BoundStep(Protocol):
    """A step of one shape, prepared once and run many times.

    Attributes:
        hidden: float32 ``[B, S, width]`` of the newest run; None without such an output.
    """

    @property
    def hidden(self) -> NDArray[np.float32] | None:
        """Return the attribute that the class describes."""
        ...

    def run(self, step: Step) -> NDArray[np.float32]:
        """Return logits ``[B, N, vocab]`` of a step on the slots that are bound."""
        ...


class StepRunner:
    """Runs steps window by window; a decode step is bound once per run of slots.

    All decode steps share one output memory. There are 528 runs of 32 slots, which would take 3.6
    GB at a vocabulary of 151,936.

    A run reads all weights, and each row adds computation: at the 1.5B shape (INT4, 2 cores) 20 ms
    and 10 ms. So decode may span one idle slot; the row that it writes there is put back.

    Args:
        bind: prepares a step of a shape, which writes its outputs into the given memory.
        read_slot: reads rows, as `edge.backends.Backend.read_slot`.
        put_back: overwrites the first rows of a slot with rows that ``read_slot`` returned.
        num_slots: slots of the cache.
        out_width: length of a row of logits, from `io_spec.output_width`.
        hidden_width: width of hidden states, as in `manifest.Manifest`; 0 without that output.
        dtype: type of the outputs.
        fused: whether the graph has `GroupQueryAttention`, which takes several tokens after a past
            for one sequence at a time.

    Attributes:
        bind: the argument; `edge.adapters` wraps it.
        hidden: hidden states, as `edge.backends.Backend.hidden_states`.
    """

    def __init__(
        self,
        bind: Callable[[RunShape, StepOutputs], BoundStep],
        *,
        read_slot: Callable[[int, int], SlotRows],
        put_back: Callable[[int, SlotRows], None],
        num_slots: int,
        out_width: int,
        hidden_width: int,
        dtype: Any,
        fused: bool,
    ) -> None:
        self.bind, self._read_slot, self._put_back = bind, read_slot, put_back
        self._out_width, self._hidden_width, self._dtype = out_width, hidden_width, dtype
        self._batching = Batching(
            decode_gap=1, chunk_gap=0, alone_after_past=fused, num_slots=num_slots
        )
        self._decode_steps: dict[RunShape, BoundStep] = {}
        self._decode_outputs = self._make_outputs(num_slots, 1, 1)
        self.hidden: NDArray[np.float32] | None = None

    def run(self, step: Step) -> NDArray[np.float32]:
        """Run a checked step, as `edge.backends.Backend.forward` does."""
        windows = self._batching.plan(step)
        if len(windows) == 1 and windows[0].whole:
            return self._run(step)
        shape = (step.batch, step.num_logits, self._out_width)
        logits = np.empty(shape, dtype=np.float32)
        hidden: NDArray[np.float32] | None = None
        for window in windows:
            rows, places = list(window.rows), list(window.places)
            logits[rows] = self._run_window(window, step)[places]
            if self.hidden is not None:
                if hidden is None:
                    shape = (step.batch, step.seq, self.hidden.shape[2])
                    hidden = np.empty(shape, dtype=np.float32)
                hidden[rows] = self.hidden[places]
        self.hidden = hidden
        return logits

    def pair_lone_tokens(self) -> None:
        """From now on, run a decode step of one slot only beside an idle one."""
        self._batching = replace(self._batching, min_decode=2)

    def forget(self) -> None:
        """Drop all bindings, and with them the session."""
        self._decode_steps.clear()
        self.hidden = None

    def _run_window(self, window: Window, step: Step) -> NDArray[np.float32]:
        idle = [window.first + place for place in window.idle]
        kept = [(slot, self._read_slot(slot, 1)) for slot in idle]
        try:
            return self._run(window_step(window, step))
        finally:
            for slot, row in kept:
                self._put_back(slot, row)

    def _run(self, step: Step) -> NDArray[np.float32]:
        shape = RunShape(step.slots[0], step.batch, step.seq, step.num_logits)
        if shape.seq == shape.num_logits == 1:
            # Decode repeats the same shapes forever.
            bound = self._decode_steps.get(shape)
            if bound is None:
                logits, hidden = self._decode_outputs
                outputs = StepOutputs(
                    logits[: shape.batch], None if hidden is None else hidden[: shape.batch]
                )
                bound = self._decode_steps[shape] = self.bind(shape, outputs)
        else:
            bound = self.bind(shape, self._make_outputs(*shape[1:]))
        result = bound.run(step)
        self.hidden = bound.hidden
        return result

    def _make_outputs(self, batch: int, seq: int, num_logits: int) -> StepOutputs:
        logits = np.empty((batch, num_logits, self._out_width), self._dtype)
        if not self._hidden_width:
            return StepOutputs(logits, None)
        return StepOutputs(logits, np.empty((batch, seq, self._hidden_width), self._dtype))


def make_inputs(
    dialect: io_spec.DialectSpec, embeds_width: int, dtype: Any, shape: RunShape
) -> dict[str, NDArray[Any]]:
    """Make arrays for the inputs that change with each step, by name, for `fill_inputs`."""
    _, batch, seq, num_logits = shape
    return {
        io_spec.INPUTS_EMBEDS: np.empty((batch, seq, embeds_width), dtype),
        io_spec.POSITION_IDS: np.empty((batch, seq), np.int64),
        dialect.cursor: np.empty(batch, np.int64),
        io_spec.LOGITS_INDICES: np.empty((batch, num_logits), np.int64),
    }


def fill_inputs(inputs: dict[str, NDArray[Any]], step: Step, embeds: NDArray[Any]) -> None:
    """Write a step into the arrays of `make_inputs`.

    Args:
        inputs: the arrays.
        step: the step.
        embeds: its embeddings in the graph's float type.
    """
    values = (embeds, step.positions, step.starts, step.logits_indices)
    for array, value in zip(inputs.values(), values, strict=True):
        array[...] = value


def cache_bindings(
    dialect: io_spec.DialectSpec, caches: Mapping[str, T], make_rows: Callable[[str, T], T]
) -> tuple[dict[str, T], dict[str, T], dict[str, T]]:
    """Name the memory that the graph's cache inputs and outputs are bound to.

    Args:
        dialect: dialect of the graph.
        caches: the bound slots' part of each cache tensor, by the tensor's name.
        make_rows: makes memory for the rows that a step returns for one of them, in its type.

    Returns:
        Inputs and outputs by name, and the memory of the rows that the runtime must append to
        ``caches``, by the tensor's name; empty if the graph writes in place.
    """
    new = {} if dialect.in_place else {name: make_rows(name, at) for name, at in caches.items()}
    return (
        {io_spec.PAST_PREFIX + name: cache for name, cache in caches.items()},
        {dialect.new_prefix + name: rows for name, rows in (new or caches).items()},
        new,
    )

"""Stand-ins that keep the rules of what they stand in for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.backends import Rows, Step
from edge.backends.step import refuse_adapter
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.kv_scales import Scales
from edge.errors import BackendError
from edge.model.slot_rows import SlotRows

Script = Callable[[tuple[int, ...]], "int | NDArray[np.float32]"]
"""From the tokens so far to the next token, or to its row of logits."""


class ScriptedBackend:
    """A `Backend` whose cache holds token ids, and whose logits a script makes of them.

    A row of the cache that was never written, or a token that stands in the wrong row, changes what
    the script sees: whoever keeps the books of the cache wrongly gets another answer.

    Attributes:
        script: may be replaced at any time.
        steps: first position (of the first sequence) and length of every step so far.
        batches: the slots of every step so far.
        fails: makes the next step fail after it has spoilt its rows.
        failed: why nothing works any more, if a test says so.
        meanwhile: see `edge.backends.Backend`; with ``overlaps`` it is called in each step, and the
            backend refuses to be used until the step is over.
    """

    name = "scripted"
    rounds_activations = False
    forward_best: Callable[[Step], Rows] | None = None
    kv_scales: Scales = {}  # noqa: RUF012
    hidden_states: NDArray[np.float32] | None = None
    adapter_rank = 0

    def __init__(
        self,
        table: EmbeddingTable,
        script: Script,
        *,
        num_slots: int = 1,
        capacity: int = 64,
        max_step_tokens: int = 8,
        overlaps: bool = False,
    ) -> None:
        self.script = script
        self.meanwhile: Callable[[], None] | None = (lambda: None) if overlaps else None
        self._computes = False
        self.set_adapter = refuse_adapter
        self.num_slots = num_slots
        self.capacity = capacity
        self.max_step_tokens = max_step_tokens
        self.steps: list[tuple[int, int]] = []
        self.batches: list[list[int]] = []
        self.fails = False
        self.failed: str | None = None
        self.closed = False
        self._vocab_size = table.vocab_size
        rows = table[np.arange(table.vocab_size)]
        self._ids = {row.tobytes(): token_id for token_id, row in enumerate(rows)}
        assert len(self._ids) == table.vocab_size, "two tokens share a row of the table"
        self._cache = np.full((num_slots, capacity), -1)

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    def forward(self, step: Step) -> NDArray[np.float32]:
        step.check(self)
        self._be_free()
        if self.meanwhile is not None:
            self._computes = True
            self.meanwhile()
            self._computes = False
        self.steps.append((step.starts[0], step.seq))
        self.batches.append(list(step.slots))
        if self.fails:
            self.fails = False
            self._cache[list(step.slots)] = -1
            raise BackendError("the engine failed, as it was told to")
        for slot, row, place in zip(step.slots, step.embeds, step.positions, strict=True):
            self._cache[slot, place] = [self._ids[embed.tobytes()] for embed in row]
        rows = zip(step.slots, step.positions, step.logits_indices, strict=True)
        return np.stack(
            [
                [self._logits(slot, int(place[index])) for index in indices]
                for slot, place, indices in rows
            ]
        )

    def read_slot(self, slot: int, length: int) -> SlotRows:
        self._be_free()
        return SlotRows({"0.key": self._cache[None, slot, :length, None].astype(np.float32)})

    def write_slot(self, slot: int, rows: SlotRows) -> None:
        self._be_free()
        (ids,) = rows.values()
        assert (ids.shape[0], ids.shape[2]) == (1, 1)
        assert rows.length <= self.capacity
        self._cache[slot, : rows.length] = ids[0, :, 0]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self._be_free()
        assert source != target
        self._cache[target, :length] = self._cache[source, :length]

    def _be_free(self) -> None:
        assert not self._computes, "the backend is used while it computes a step"

    def rows_of(self, slot: int, length: int) -> list[int]:
        """The token in each of the first rows of a slot; -1 where none was written."""
        rows: list[int] = self._cache[slot, :length].tolist()
        return rows

    def close(self) -> None:
        self.closed = True
        self.failed = "the backend is closed"

    def _logits(self, slot: int, position: int) -> NDArray[np.float32]:
        seen = tuple(self._cache[slot, : position + 1].tolist())
        assert -1 not in seen, f"row {seen.index(-1)} is read before it is written"
        wanted = self.script(seen)
        if isinstance(wanted, np.ndarray):
            return wanted
        logits = np.zeros(self._vocab_size, np.float32)
        logits[wanted] = 100.0
        return logits


def write_table(path: Path, vocab_size: int) -> Path:
    """An embedding table of two numbers per token, each row another."""
    rows = np.arange(2 * vocab_size, dtype=np.float16).reshape(vocab_size, 2)
    entry = {"dtype": "F16", "shape": rows.shape, "data_offsets": [0, rows.nbytes]}
    head = json.dumps({"token_embeddings": entry}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + rows.tobytes())
    return path


def num_open_files() -> int:
    """Files that this process has open; 0 where the system does not say."""
    descriptors = Path("/proc/self/fd")
    return len(list(descriptors.iterdir())) if descriptors.exists() else 0


def random_logits(vocab_size: int) -> Script:
    """A language model of sorts: reproducible logits that depend on every token so far."""

    def script(seen: tuple[int, ...]) -> NDArray[np.float32]:
        rng = np.random.RandomState(np.array(seen, dtype=np.uint32))
        return rng.standard_normal(vocab_size).astype(np.float32) * 3

    return script

"""Defines one step of a decoder as a value, and the loop that runs a prompt in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError

if TYPE_CHECKING:
    from edge.adapters.weights import AdapterWeights
    from edge.model.slot_rows import SlotRows

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Step:
    """A prefill chunk or a decode step of ``B`` sequences, ``S`` tokens each.

    Attributes:
        slots: ``B`` distinct slots.
        embeds: ``[B, S, hidden]`` rows of the token table.
        positions: int64 ``[B, S]``, consecutive in each row; row ``b`` writes cache rows
            ``positions[b, 0] .. positions[b, 0] + S - 1`` of its slot.
        kv_len: least number of rows that attention must see: ``positions.max() + 1``.
        logits_indices: int64 ``[B, N]`` indices into ``S`` of the tokens that get logits.
        starts: the first position of each sequence.
        batch, seq, num_logits: ``B``, ``S`` and ``N``.
        end: the row after the last written one, of the longest sequence.

    Raises:
        BackendError: the arrays do not fit each other, slots repeat, positions are not
            consecutive, a token would not see itself, or an index is outside ``S``.
    """

    slots: Sequence[int]
    embeds: Floats
    positions: Ints
    kv_len: int
    logits_indices: Ints
    starts: list[int] = field(init=False, repr=False)
    batch: int = field(init=False, repr=False)
    seq: int = field(init=False, repr=False)
    num_logits: int = field(init=False, repr=False)
    end: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        positions, wanted, batch = self.positions, self.logits_indices, len(self.slots)
        if not positions.ndim == wanted.ndim == 2 or not positions.size:
            raise BackendError(
                f"positions of shape {positions.shape} and logits indices of shape "
                f"{wanted.shape} are not [batch, tokens] and [batch, logits]"
            )
        if batch != len(positions):
            raise BackendError(f"{batch} slots do not match {len(positions)} rows of tokens")
        if self.embeds.shape[:2] != positions.shape or len(wanted) != batch:
            raise BackendError(
                f"embeddings of shape {self.embeds.shape} and logits indices of shape "
                f"{wanted.shape} do not match positions of shape {positions.shape}"
            )
        if len(set(self.slots)) != batch:
            raise BackendError(f"slots {list(self.slots)} are not distinct")
        starts, seq = positions[:, 0].tolist(), positions.shape[1]
        end = max(starts) + seq
        # The class is frozen to others.
        vars(self).update(starts=starts, batch=batch, seq=seq, num_logits=wanted.shape[1], end=end)
        if min(starts) < 0 or end > self.kv_len:
            raise BackendError(
                f"a step at positions {min(starts)}..{end - 1} does not fit a cache that is "
                f"read up to row {self.kv_len}"
            )
        if seq > 1 and not (np.diff(positions) == 1).all():
            raise BackendError("the positions of a sequence are not consecutive")
        # This runs for every token of an answer, and for few numbers lists are faster than NumPy.
        if any(index < 0 or index >= seq for row in wanted.tolist() for index in row):
            raise BackendError(
                f"logits are wanted at {wanted.tolist()}, of {seq} tokens per sequence"
            )

    def check(self, backend: RunsSteps) -> None:
        """Refuse what a backend cannot run, since its operators write wherever they are told.

        Raises:
            BackendError: the backend is closed; or the step names a slot that it does not have,
                writes or reads past its capacity, or is longer than it takes.
        """
        if backend.failed is not None:
            raise BackendError(f"{backend.failed}; load the bundle again")
        if self.end > backend.capacity:
            raise BackendError(
                f"a step at positions {min(self.starts)}..{self.end - 1} does not fit a cache of "
                f"{backend.capacity} rows"
            )
        if self.kv_len > backend.capacity:
            raise BackendError(
                f"a step that reads {self.kv_len} rows exceeds the cache of {backend.capacity}"
            )
        if self.seq > backend.max_step_tokens:
            raise BackendError(
                f"a step of {self.seq} tokens exceeds max_step_tokens {backend.max_step_tokens}; "
                "split the prompt into chunks"
            )
        if min(self.slots) < 0 or max(self.slots) >= backend.num_slots:
            raise BackendError(
                f"slots {list(self.slots)} are not slots of the {backend.num_slots} that there are"
            )


class RunsSteps(Protocol):
    """A decoder that runs steps and holds their rows: the part of `Backend` that steps need.

    Attributes:
        num_slots: sequences that the cache holds.
        capacity: tokens that a slot holds.
        max_step_tokens: the most tokens per sequence that one `forward` takes.
    """

    num_slots: int
    capacity: int
    max_step_tokens: int

    @property
    def failed(self) -> str | None:
        """Return why no step can succeed any more (closed, or device lost); None while it works."""
        ...

    def forward(self, step: Step) -> NDArray[np.float32]:
        """Run one step (a prefill chunk or a decode step) and write its rows into the cache.

        Returns:
            Logits ``[B, N, vocab]`` in float32, valid until the next call.

        Raises:
            BackendError: the engine failed, or `Step.check` refuses the step.
        """
        ...

    def read_slot(self, slot: int, length: int) -> SlotRows:
        """Copy the first ``length`` rows of every cache tensor."""
        ...

    def write_slot(self, slot: int, rows: SlotRows) -> None:
        """Overwrite the first rows of a slot with rows that `read_slot` returned."""
        ...


def step_after(
    slots: Sequence[int], past: Sequence[int], embeds: Floats, logits_indices: Ints
) -> Step:
    """Make the step that follows the first ``past`` rows of each slot.

    Args:
        slots: ``B`` distinct slots.
        past: valid rows of each.
        embeds: ``[B, S, hidden]`` rows of the token table.
        logits_indices: ``[B, N]`` indices into ``S``.

    Raises:
        BackendError: the arrays do not fit each other, as in `Step`.
    """
    seq = embeds.shape[1]
    return Step(slots, embeds, positions_from(past, seq), max(past) + seq, logits_indices)


def positions_from(starts: Sequence[int], seq: int) -> Ints:
    """Return consecutive positions ``[B, seq]`` from the first one of each sequence on."""
    first = np.array(starts, dtype=np.int64)[:, None]
    return first if seq == 1 else first + np.arange(seq)


def refuse_adapter(slot: int, weights: AdapterWeights | None) -> None:
    """Implement `Backend.set_adapter` for a bundle without adapters."""
    raise BackendError("the bundle takes no adapters; export it again with --adapters RANK")


def all_tokens(count: int) -> Ints:
    """Return the indices of every token of a chunk, for `prefill`."""
    return np.arange(count)


def last_token(count: int) -> Ints:
    """Return the index of the last token of a chunk, for `prefill`."""
    return np.array([count - 1])


def zero_rows(backend: RunsSteps, slot: int, end: int, first: int = 0) -> None:
    """Overwrite rows ``first`` to ``end`` of a slot, which may hold a NaN, with 0.

    Masked rows are multiplied by an attention weight of 0, and a NaN stays a NaN. Left there, it
    would reach the next sequence in this slot.

    Raises:
        EdgeError: the engine failed.
    """
    backend.write_slot(slot, backend.read_slot(slot, max(first, 1)).zeroed(first, end))


class TokenTable(Protocol):
    """Rows of a token table by id, as `edge.bundle.embeddings.EmbeddingTable`."""

    def __getitem__(self, ids: Ints, /) -> Floats:
        """Return rows ``[..., hidden]`` of ids ``[...]``."""
        ...


def prefill(
    backend: RunsSteps,
    table: TokenTable,
    ids: Sequence[int] | Ints,
    *,
    slot: int = 0,
    past: int = 0,
    max_tokens: int | None = None,
    wanted: Callable[[int], Ints] = last_token,
    keep_nan: bool = False,
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Run tokens of one sequence in chunks; each chunk runs when it is requested.

    Args:
        backend: the engine, whose longest step bounds a chunk.
        table: its token table.
        ids: the tokens, ``[n]``.
        slot: slot whose rows are written.
        past: rows of the slot that are kept; the tokens' rows follow them.
        max_tokens: bounds a chunk, too.
        wanted: given a chunk's number of tokens, returns the indices of those that get logits.
        keep_nan: leave rows that hold a NaN; otherwise they are zeroed at the end (`zero_rows`),
            also if the caller stops early.

    Yields:
        The part of ``ids`` that has run, and its logits ``[len(wanted), vocab]`` in float32, valid
        until the backend's next step.

    Raises:
        RequestError: an id is outside the table.
        BackendError: the engine failed, or the tokens do not fit its cache.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    chunk = min(backend.max_step_tokens, max_tokens or backend.max_step_tokens)
    end, spoilt = past, False
    try:
        for start in range(0, len(tokens), chunk):
            part = slice(start, min(start + chunk, len(tokens)))
            embeds = table[tokens[None, part]]
            indices = wanted(part.stop - start)[None]
            logits = backend.forward(step_after([slot], [past + start], embeds, indices))[0]
            end = past + part.stop
            # The last token saw all before it, and all logits of a state with a NaN are NaN.
            spoilt = spoilt or (not keep_nan and bool(np.isnan(logits[-1, 0])))
            yield part, logits
    finally:
        if spoilt and backend.failed is None:
            zero_rows(backend, slot, end, first=past)

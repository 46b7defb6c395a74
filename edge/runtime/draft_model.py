"""Drafts with a second, smaller model that has the same tokenizer.

`ModelDrafter` has its own engine, with a slot for each slot of the target. It keeps no record of
accepted tokens. Before each draft it compares the tokens of its rows with those of the target and
continues after the last common one. So rejected drafts, cancelled sequences, reused prefixes and
failed steps need no code of their own here.

Guesses are drawn with the random numbers that the target will use at the same places
(`Sampler.guess`), by the same inverse CDF. So at temperatures above 0 a draft is right as often as
the two distributions overlap there, and the target's draw does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.choose import open_backend
from edge.backends.step import TokenTable, prefill, step_after, zero_rows
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import Manifest
from edge.bundle.trust import open_manifest
from edge.bundle.verified_files import verify_files
from edge.engine_config import BackendName, EngineConfig
from edge.errors import ConfigError
from edge.model.slot_rows import SlotRows
from edge.text.tokenizer_difference import tokenizer_difference

from .guesses import Guesses
from .kv_cache import common_prefix
from .open_bundle import files_to_check
from .overflow import SlidingWindow
from .sampling import is_sound
from .scheduler.drafter import DraftContext, Drafter, DraftWorth

CLOSE = 8
"""Most tokens that a draft's first step runs itself; if more are lacking they are read before."""

CutRows = Callable[[SlotRows, int, int], SlotRows]
"""Given rows of a slot, the first row to drop and a count, returns the rows left, keys turned."""


class ModelDrafter(Drafter):
    """A small model that guesses for a larger one.

    Args:
        backend: engine of the small model, with at least the target's slots; it is closed with
            the drafter, and nobody else uses it.
        embeddings: its token table, which is closed with the drafter, too.
        draft_vocab: length of its rows of logits.
        target_vocab: length of the target's rows. Ids mean the same in both as far as both have
            them; those beyond the smaller one are padding.
        stand_in: id that is read in place of one that the small model does not have.
        cut_rows: lets rows follow a target that slides; without it they are read again.

    Attributes:
        backend: the argument.
    """

    first_guess = 0.7  # of a model that has proposed nothing yet: high, so that it is tried
    newest = 0.05

    def __init__(
        self,
        backend: Backend,
        embeddings: EmbeddingTable,
        *,
        draft_vocab: int,
        target_vocab: int,
        stand_in: int = 0,
        cut_rows: CutRows | None = None,
    ) -> None:
        self.backend = backend
        self._embeddings = embeddings
        self._draft_vocab = draft_vocab
        self._shared = min(draft_vocab, target_vocab)
        self._stand_in = stand_in
        self._cut_rows = cut_rows
        self._row = np.full(target_vocab, -np.inf, np.float32)
        self._ids: list[list[int]] = [[] for _ in range(backend.num_slots)]
        self._salts = [""] * backend.num_slots
        self._spoilt: set[int] = set()  # slots whose text gave a NaN, and would do so again

    def begin(self, slot: int, salt: str) -> None:
        """Keep the rows of the previous sequence, if this one may share them."""
        self._spoilt.discard(slot)
        if self._salts[slot] != salt:
            self._ids[slot], self._salts[slot] = [], salt

    def slide(self, slot: int, before: list[int], after: list[int]) -> None:
        """Drop the same rows as the target did.

        Raises:
            EdgeError: the engine failed.
        """
        ids = self._ids[slot]
        shared = common_prefix(ids, before)
        start = common_prefix(before, after)
        dropped = len(before) - len(after)
        end = start + dropped
        # Rows from `end` on now follow those before `start`, if the target did just that.
        if self._cut_rows is None or shared <= end or after != [*before[:start], *before[end:]]:
            return
        rows = self.backend.read_slot(slot, shared)
        self._ids[slot] = []  # until they are written
        self.backend.write_slot(slot, self._cut_rows(rows, start, dropped))
        self._ids[slot] = [*ids[:start], *ids[end:shared]]

    def behind(self, context: DraftContext) -> int:
        """Copy rows that another slot has; return how many tokens to read then, or 0 if few.

        Raises:
            EdgeError: the engine failed.
        """
        if self._room(context) <= 0:
            return 0
        lacks = self._lacks(context)
        if lacks > CLOSE:
            self._copy_prefix(context)
            lacks = self._lacks(context)
        return lacks - 1 if lacks > CLOSE else 0

    def read(self, context: DraftContext, most: int) -> None:
        """Run lacking tokens, from the first on, without the last one.

        Raises:
            EdgeError: the engine failed.
        """
        if not self._read(context, most):
            self._spoil(context.slot)

    def offer(self, context: DraftContext) -> int:
        """Return the limit, or less if its own slot has less room."""
        return max(min(context.limit, self._room(context)), 0)

    def propose(
        self, contexts: Sequence[DraftContext], count: int, worth: DraftWorth
    ) -> list[list[int]]:
        """Guess token after token for all sequences together; each stops where it is unsure.

        Raises:
            EdgeError: the engine failed.
        """
        limits = [min(count, self.offer(context)) for context in contexts]
        going = [i for i, limit in enumerate(limits) if limit > 0]
        with Guesses(contexts, limits, worth) as guesses:
            tokens, past = self._first_step(contexts, going)
            while going:
                logits = self._forward([contexts[i].slot for i in going], past, tokens)
                rows = zip(going, logits, strict=True)
                going = [i for i, row in rows if guesses.add(i, self._fit(row))]
                tokens = [guesses.drafts[i][-1:] for i in going]
                past = [len(self._ids[contexts[i].slot]) for i in going]
        for i in guesses.spoilt:
            self._spoil(contexts[i].slot)
        return guesses.drafts

    def close(self) -> None:
        """Free the engine and close the table; calling it twice is harmless."""
        self.backend.close()
        self._embeddings.close()

    def _read(self, context: DraftContext, most: int) -> bool:
        """Do `read`; returns whether no row holds a NaN."""
        ids, rows = self._ids[context.slot], context.rows
        first = len(rows) - self._lacks(context)
        del ids[first:]
        last = min(first + most, len(rows) - 1)
        tokens = self._known(rows[first:last])
        sound = True
        for part, logits in prefill(
            self.backend, self._embeddings, tokens, slot=context.slot, past=first, keep_nan=True
        ):
            ids += rows[first + part.start : first + part.stop]
            sound = is_sound(logits[-1])  # a token attends to all before it
        return sound

    def _spoil(self, slot: int) -> None:
        """Draft no more for a text if one of its rows holds a NaN."""
        zero_rows(self.backend, slot, len(self._ids[slot]))
        self._ids[slot] = []
        self._spoilt.add(slot)

    def _first_step(
        self, contexts: Sequence[DraftContext], going: list[int]
    ) -> tuple[list[list[int]], list[int]]:
        """Return each sequence's lacking tokens; some run tokens again, to get equal numbers."""
        size = max((self._lacks(contexts[i]) for i in going), default=1)
        size = min([size, self.backend.max_step_tokens, *(len(contexts[i].rows) for i in going)])
        tokens, past = [], []
        for i in going:
            rows, ids = contexts[i].rows, self._ids[contexts[i].slot]
            first = len(rows) - size
            if self._lacks(contexts[i]) > size:  # because another text is very short
                self._read(contexts[i], self._lacks(contexts[i]) - size)
            del ids[first:]
            past.append(first)
            tokens.append(list(rows[first:]))
        return tokens, past

    def _forward(
        self, slots: list[int], past: list[int], tokens: list[list[int]]
    ) -> NDArray[np.float32]:
        """Run a step; returns the logits of each sequence's last token, ``[batch, vocab]``."""
        ids = np.stack([self._known(row) for row in tokens])
        last = np.full((len(slots), 1), ids.shape[1] - 1)
        logits = self.backend.forward(step_after(slots, past, self._embeddings[ids], last))
        for slot, row in zip(slots, tokens, strict=True):
            self._ids[slot] += row
        return logits[:, 0]

    def _fit(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """Convert a row of its logits to the target's length; other tokens cannot be guessed."""
        if len(row) == len(self._row):
            return row
        self._row[: self._shared] = row[: self._shared]
        return self._row

    def _known(self, ids: Sequence[int]) -> NDArray[np.int64]:
        found = np.array(ids, dtype=np.int64)
        return np.where(found < self._draft_vocab, found, self._stand_in)

    def _lacks(self, context: DraftContext) -> int:
        """Count the lacking tokens of the target's rows; at least the last, which gives logits."""
        shared = common_prefix(self._ids[context.slot], context.rows)
        return len(context.rows) - min(shared, len(context.rows) - 1)

    def _room(self, context: DraftContext) -> int:
        """Count the guesses that there are rows for; the last guess needs none."""
        if context.slot in self._spoilt:
            return 0
        return self.backend.capacity - len(context.rows) + 1

    def _copy_prefix(self, context: DraftContext) -> None:
        """Copy the rows that a slot of the same salt shares with this text, if they are more.

        Raises:
            EdgeError: the engine failed.
        """
        own, salt = context.slot, self._salts[context.slot]
        most = len(context.rows) - 1
        shared = {
            slot: min(common_prefix(ids, context.rows), most)
            for slot, ids in enumerate(self._ids)
            if self._salts[slot] == salt
        }
        best = max(shared, key=lambda slot: shared[slot])
        if shared[best] < shared[own] + CLOSE:
            return
        self._ids[own] = []
        self.backend.copy_slot(best, own, shared[best])
        self._ids[own] = self._ids[best][: shared[best]]


@dataclass(frozen=True)
class DraftBundle:
    """A bundle that drafts, read and checked.

    Attributes:
        path: its directory.
        manifest: its manifest.
        target_vocab: length of the target's rows of logits.
    """

    path: Path
    manifest: Manifest
    target_vocab: int

    def open(self, target: Backend, embeddings: TokenTable, config: EngineConfig) -> ModelDrafter:
        """Open it on the same kind of engine as the target, with the same slots.

        Its activations may be rounded whatever ``config`` says: that only decides how often it is
        right. A slot has the target's capacity, or what the model's positions allow. If that is
        less, longer texts continue without drafts.

        Args:
            target: the engine that answers.
            embeddings: the target's token table; a draft model reads its own.
            config: options with which the target was opened.

        Raises:
            ConfigError, BundleError, DependencyError, BackendError: `open_backend` fails, or a
                TensorRT engine of the draft has too few slots.
        """
        manifest, tensorrt = self.manifest, target.name == "tensorrt"
        onnxruntime: BackendName = "ort-cuda" if target.name == "ort-cuda" else "ort-cpu"
        options = EngineConfig(
            backend="tensorrt" if tensorrt else onnxruntime,
            # A TensorRT engine has the capacity that it was built with.
            kv_capacity=None if tensorrt else min(target.capacity, manifest.rope_positions),
            num_threads=config.num_threads,
            prefill_chunk=config.prefill_chunk,
            num_slots=target.num_slots,
            # The first step of a draft runs as many tokens as a check of this many guesses.
            speculative=CLOSE - 1,
        )
        backend = open_backend(self.path, manifest, options)
        try:
            own = EmbeddingTable(self.path / EMBEDDINGS_NAME)
        except BaseException:
            backend.close()
            raise
        return ModelDrafter(
            backend,
            own,
            draft_vocab=manifest.model.vocab_size,
            target_vocab=self.target_vocab,
            stand_in=manifest.tokens.eos[0],
            cut_rows=SlidingWindow(manifest.model).cut,
        )


def read_draft(bundle: Path, target: Path, target_vocab: int, keys: Path | None) -> DraftBundle:
    """Read the manifest of a bundle that drafts, and check its files and tokenizer.

    Args:
        bundle: the bundle that drafts.
        target: the bundle that answers, whose files have been checked.
        target_vocab: length of its rows of logits.
        keys: ``trusted_keys`` of `EngineConfig`.

    Raises:
        ConfigError: the tokenizers differ.
        BundleError, IntegrityError: the bundle is missing, damaged or incomplete.
    """
    manifest = open_manifest(bundle, keys)
    if manifest.model.task != "generate":
        raise ConfigError(
            f"the draft {bundle} is a bundle to {manifest.model.task} and guesses no tokens; take "
            "a smaller model of the same family"
        )
    verify_files(bundle, manifest, files_to_check(manifest))
    difference = tokenizer_difference(target / "tokenizer.json", bundle / "tokenizer.json")
    if difference is not None:
        raise ConfigError(
            f"the draft {bundle} has another tokenizer than {target}: {difference}; a draft must "
            "have the same, so take a smaller model of the same family, with the same "
            "--vocab-keep if one was given"
        )
    return DraftBundle(bundle, manifest, target_vocab)

"""Drafts with an EAGLE-3 head: a decoder layer that continues the target's hidden states.

Row ``j`` of the head's cache belongs to a row ``r = start + j`` of the target. It is computed from
the target's hidden state of row ``r`` and the token of row ``r + 1``, and its logits guess the
token of row ``r + 2``. After the newest hidden state the head continues from its own, as it was
trained to. Those rows are computed again once the target has run there.

`Eagle3Drafter.saw` gets the hidden states of every step of the target, with the tokens of its
rows. They wait until the head reads them: at a draft, or earlier if many have gathered. Rows are
known by their tokens, so rejected drafts, cancelled sequences and failed steps need no code of
their own. If the target has rows whose hidden states nobody saw (a prefix from a file, a slide),
the head begins anew after them, with an empty past. Its positions are relative to ``start``, and
RoPE depends on nothing else. Its guesses change no answer, whatever it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.choose import open_backend
from edge.backends.step import TokenTable, step_after, zero_rows
from edge.bundle.manifest import HeadManifest, Manifest, head_manifest
from edge.bundle.verified_files import VerifiedFiles
from edge.engine_config import EngineConfig
from edge.errors import BundleError, ConfigError
from edge.files import MALFORMED

from .guesses import Guesses
from .kv_cache import common_prefix
from .sampling import is_sound
from .scheduler.drafter import DraftContext, Drafter, DraftWorth

CLOSE = 8
"""Most rows that a draft's first step runs itself; if more are lacking they are read before."""
MOST_WAITING = 1024
"""Most hidden states that wait for the head in each slot: 6 MB at the 1.5B."""

Array = NDArray[np.float32]


@dataclass(eq=False)
class _Text:
    """The head's view of a slot.

    Attributes:
        salt: texts share rows only with those of the same salt.
        ids: tokens of the target's rows up to the newest whose hidden state was seen.
        start: the target's row to which the head's first row belongs.
        read: rows of the head.
        waiting: hidden states of the rows after those, ``[n, hidden]`` each, up to the end of
            ``ids``.
    """

    salt: str = ""
    ids: list[int] = field(default_factory=list)
    start: int = 0
    read: int = 0
    waiting: list[Array] = field(default_factory=list)

    def begin_after(self, ids: list[int]) -> None:
        """Start after the target's rows so far, about which nothing is known."""
        self.ids, self.start, self.read, self.waiting = list(ids), len(ids), 0, []

    def cut(self, length: int) -> None:
        """Forget the target's rows from ``length`` on."""
        excess = len(self.ids) - max(length, self.start + self.read)
        while excess > 0 and self.waiting:
            last = self.waiting.pop()
            if len(last) > excess:
                self.waiting.append(last[: len(last) - excess])
            excess -= len(last)
        del self.ids[length:]
        self.read = max(min(self.read, length - self.start), 0)
        self.start = min(self.start, length)

    def take(self, count: int) -> Array:
        """Remove and return the first waiting hidden states, which the head reads now."""
        states = np.concatenate(self.waiting)
        self.waiting = [states[count:]] if len(states) > count else []
        self.read += count
        return states[:count]


class Eagle3Drafter(Drafter):
    """A head that guesses for its model.

    Args:
        backend: engine of the head, with the target's slots; it is closed with the drafter, and
            nobody else uses it.
        embeddings: the target's token table.
        target_vocab: length of the target's rows of logits.
        vocabulary: the target's id of each of the head's tokens, int64 ``[draft vocab]``; None if
            they are the same.

    Attributes:
        backend: the argument.
    """

    first_guess = 0.7  # of a head that has proposed nothing yet: high, so that it is tried
    newest = 0.05

    def __init__(
        self,
        backend: Backend,
        embeddings: TokenTable,
        *,
        target_vocab: int,
        vocabulary: NDArray[np.int64] | None = None,
    ) -> None:
        self.backend = backend
        self._embeddings = embeddings
        self._vocabulary = vocabulary
        self._row = np.full(target_vocab, -np.inf, np.float32)
        self._texts = [_Text() for _ in range(backend.num_slots)]

    def begin(self, slot: int, salt: str) -> None:
        """Keep the rows of the previous sequence, if this one may share them."""
        if self._texts[slot].salt != salt:
            self._texts[slot] = _Text(salt)

    def slide(self, slot: int, before: list[int], after: list[int]) -> None:
        """Begin anew, since other rows are there now."""
        self._texts[slot].begin_after(after)

    def saw(self, slot: int, before: list[int], tokens: Sequence[int], hidden: Array) -> None:
        """Keep the hidden states of a step of the target.

        Raises:
            EdgeError: the engine failed.
        """
        text = self._texts[slot]
        if common_prefix(text.ids, before) < len(before):
            self._take_over(slot, before)
        text.cut(len(before))
        if not np.isfinite(hidden).all():  # the head's rows would keep them for the next sequence
            text.begin_after([*before, *tokens])
            return
        text.ids += tokens
        text.waiting.append(hidden.copy())
        # Of the step's own tokens, all but the first may be drafts, and wrong.
        count = len(before) - text.start - text.read
        if count >= MOST_WAITING:
            count = min(count, self.backend.capacity - text.read)
            if not self._read(slot, text.ids, count):
                self._spoil(slot)

    def behind(self, context: DraftContext) -> int:
        """Return the number of rows to read first; 0 if they are few."""
        lacks = self._lacks(context)
        return lacks - 1 if lacks > CLOSE and self._room(context) > 0 else 0

    def read(self, context: DraftContext, most: int) -> None:
        """Read the first lacking rows, without the last one.

        Raises:
            EdgeError: the engine failed.
        """
        self._texts[context.slot].cut(len(context.rows) - 1)
        if not self._read(context.slot, context.rows, min(most, self._lacks(context) - 1)):
            self._spoil(context.slot)

    def offer(self, context: DraftContext) -> int:
        """Return the limit, or less if there is less room; 0 without the newest hidden state."""
        if not self._lacks(context):
            return 0
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
        states: dict[int, Array] = {}
        with Guesses(contexts, limits, worth) as guesses:
            for i, logits, state in self._first_steps(contexts, going):
                states[i] = state
                if not guesses.add(i, self._fit(logits)):
                    del states[i]
            while states:
                going = list(states)
                slots = [contexts[i].slot for i in going]
                tokens = [guesses.drafts[i][-1:] for i in going]
                past = [
                    self._texts[contexts[i].slot].read + len(guesses.drafts[i]) - 1 for i in going
                ]
                hidden = np.stack([states[i] for i in going])[:, None]
                logits, found = self._forward(slots, past, tokens, hidden)
                # `add` runs no step, so the rows stay valid.
                states = {
                    i: found[row].copy()
                    for row, i in enumerate(going)
                    if guesses.add(i, self._fit(logits[row]))
                }
        for i in guesses.spoilt:
            self._spoil(contexts[i].slot, len(guesses.drafts[i]))
        return guesses.drafts

    def close(self) -> None:
        """Free the engine; calling it twice is harmless."""
        self.backend.close()

    def _first_steps(
        self, contexts: Sequence[DraftContext], going: list[int]
    ) -> list[tuple[int, Array, Array]]:
        """Read the lacking rows of each sequence, those of equal number together.

        Returns:
            Index, logits and hidden state after the newest row of each.
        """
        by_size: dict[int, list[int]] = {}
        for i in going:
            context = contexts[i]
            self._texts[context.slot].cut(len(context.rows) - 1)
            excess = self._lacks(context) - self.backend.max_step_tokens
            if excess > 0:
                self._read(context.slot, context.rows, excess)
            by_size.setdefault(self._lacks(context), []).append(i)
        results = []
        for size, members in by_size.items():
            slots = [contexts[i].slot for i in members]
            past = [self._texts[slot].read for slot in slots]
            hidden = np.stack([self._texts[slot].take(size) for slot in slots])
            tokens = [contexts[i].rows[-size:] for i in members]
            logits, found = self._forward(slots, past, tokens, hidden)
            results += [(i, logits[row].copy(), found[row].copy()) for row, i in enumerate(members)]
        return results

    def _read(self, slot: int, ids: Sequence[int], count: int) -> bool:
        """Run the first ``count`` waiting rows; ``ids`` are the tokens of the target's rows.

        Returns:
            Whether no row holds a NaN.
        """
        sound = True
        text, most = self._texts[slot], self.backend.max_step_tokens
        while count > 0:
            size = min(count, most)
            past, first = text.read, text.start + text.read + 1
            logits, _ = self._forward(
                [slot], [past], [ids[first : first + size]], text.take(size)[None]
            )
            sound = is_sound(logits[0])  # a token attends to all before it
            count -= size
        return sound

    def _spoil(self, slot: int, guessed: int = 0) -> None:
        """Zero the head's rows, one of which holds a NaN, and begin anew after them."""
        text = self._texts[slot]
        zero_rows(self.backend, slot, text.read + guessed)
        text.begin_after(text.ids)

    def _forward(
        self, slots: list[int], past: list[int], tokens: Sequence[Sequence[int]], hidden: Array
    ) -> tuple[Array, Array]:
        """Run a step; returns logits and hidden states of each sequence's last row."""
        embeds = self._embeddings[np.array(tokens, dtype=np.int64)]
        inputs = np.concatenate([embeds.astype(np.float32), hidden], axis=-1)
        last = np.full((len(slots), 1), inputs.shape[1] - 1)
        logits = self.backend.forward(step_after(slots, past, inputs, last))
        found = self.backend.hidden_states
        assert found is not None, "a head's engine puts out hidden states"
        return logits[:, 0], found[:, -1]

    def _fit(self, logits: Array) -> Array:
        """Convert a row of its logits to the target's length; unknown tokens cannot be guessed."""
        if self._vocabulary is None:
            return logits
        self._row[self._vocabulary] = logits
        return self._row

    def _lacks(self, context: DraftContext) -> int:
        """Count the rows to run for the next guess; 0 if the newest hidden state is missing."""
        text, length = self._texts[context.slot], len(context.rows) - 1
        if common_prefix(text.ids, context.rows) < length:
            return 0
        return max(length - text.start - text.read, 0)

    def _room(self, context: DraftContext) -> int:
        """Count the guesses that there are rows for; the last guess needs none."""
        rows = len(context.rows) - 1 - self._texts[context.slot].start
        return self.backend.capacity - rows + 1

    def _take_over(self, slot: int, before: list[int]) -> None:
        """Copy the target's rows ``before`` from a slot of the same salt, or begin after them."""
        text = self._texts[slot]
        for index, other in enumerate(self._texts):
            if index == slot or other.salt != text.salt:
                continue
            if common_prefix(other.ids, before) < len(before) or other.start >= len(before):
                continue
            taken = _Text(text.salt, list(other.ids), other.start, other.read, list(other.waiting))
            taken.cut(len(before))
            self._texts[slot].begin_after(before)  # until the rows are copied
            if taken.read:
                self.backend.copy_slot(index, slot, taken.read)
            text.ids, text.start, text.read = taken.ids, taken.start, taken.read
            text.waiting = taken.waiting
            return
        text.begin_after(before)


@dataclass(frozen=True, eq=False)
class Head:
    """A bundle's head, read and checked.

    Attributes:
        bundle: directory of the bundle.
        manifest: manifest of the head, from `manifest.head_manifest`.
        target_vocab: length of the target's rows of logits.
        vocabulary: the target's ids of the head's tokens, for `Eagle3Drafter`.
    """

    bundle: Path
    manifest: HeadManifest
    target_vocab: int
    vocabulary: NDArray[np.int64] | None

    def open(self, target: Backend, embeddings: TokenTable, config: EngineConfig) -> Eagle3Drafter:
        """Open it on the same kind of engine as the target, with the same slots.

        Args:
            target: the engine that answers, opened with hidden states.
            embeddings: the target's token table.
            config: options with which the target was opened.

        Raises:
            ConfigError, BundleError, DependencyError, BackendError: `open_backend` fails.
        """
        options = EngineConfig(
            backend="ort-cuda" if target.name == "ort-cuda" else "ort-cpu",
            kv_capacity=target.capacity,
            num_threads=config.num_threads,
            prefill_chunk=config.prefill_chunk,
            num_slots=target.num_slots,
        )
        backend = open_backend(self.bundle, self.manifest, options)
        return Eagle3Drafter(
            backend, embeddings, target_vocab=self.target_vocab, vocabulary=self.vocabulary
        )


def read_head(bundle: Path, manifest: Manifest, files: VerifiedFiles) -> Head:
    """Read the facts about a bundle's head that drafting needs.

    Args:
        bundle: directory of the bundle.
        manifest: manifest of the bundle.
        files: its files, including the head's.

    Raises:
        ConfigError: the bundle has no head.
        BundleError: the list of the head's tokens is malformed.
    """
    head, own = manifest.head, head_manifest(manifest)
    if head is None or own is None:
        raise ConfigError(
            f"--draft eagle3 needs a bundle with a head, and {bundle} has none: export it with "
            "--eagle3 DIR, or give a smaller bundle as draft"
        )
    total, vocabulary = manifest.model.vocab_size, None
    if head.vocabulary is not None:
        where = str(bundle / head.vocabulary)
        vocabulary = read_ids(files.read(head.vocabulary), head.model.vocab_size, total, where)
    return Head(bundle, own, total, vocabulary)


def read_ids(data: bytes, count: int, total: int, where: str) -> NDArray[np.int64]:
    """Parse a list of ``count`` different ids below ``total``.

    Raises:
        BundleError: it is malformed.
    """
    try:
        ids = np.array(msgspec.json.decode(data, type=list[int]), dtype=np.int64)
    except (OverflowError, *MALFORMED) as error:
        raise BundleError(
            f"{where} is no list of token ids ({error}); export the bundle again"
        ) from error
    if len(np.unique(ids)) != count or len(ids) != count or ids.min() < 0 or ids.max() >= total:
        raise BundleError(
            f"{where} has {len(ids)} ids, expected {count} different ones below {total}; export "
            "the bundle again"
        )
    return ids

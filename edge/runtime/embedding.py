"""Embeds texts and scores documents, with a bundle whose task that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Embedding, Manifest, Reranking
from edge.bundle.tasks import check_task
from edge.errors import ContextLengthError, OverloadError, RequestError
from edge.text.tokenizer import Tokenizer

from .scheduler import Request, Scheduler, SequenceState
from .scheduler.pooling import NEUTRAL, Pooled, RowSink

_RETRY_S = 0.05


class EmbeddingReader:
    """Turns texts into token ids, and the graph's output into vectors, as a manifest says.

    Args:
        manifest: manifest of a bundle that embeds.
        tokenizer: its tokenizer.

    Raises:
        RequestError: the bundle does not embed.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        check_task(manifest, "embed")
        assert manifest.embedding is not None
        self._facts: Embedding = manifest.embedding
        self._add_bos = manifest.tokens.add_bos
        self._tokenizer = tokenizer
        self.width = manifest.model.hidden_size

    def prompt(self, name: str | None) -> str:
        """Return the prompt of a name; None is the default one.

        Raises:
            RequestError: there is no such prompt.
        """
        name = self._facts.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self._facts.prompts:
            known = ", ".join(self._facts.prompts) or "none"
            raise RequestError(f"prompt_name: the model has no prompt {name!r}; it has: {known}")
        return self._facts.prompts[name]

    def check_dimensions(self, dimensions: int | None) -> None:
        """Refuse a number of dimensions to which vectors cannot be cut.

        Raises:
            RequestError: there are fewer or more than the model allows.
        """
        if dimensions is None or dimensions == self.width:
            return
        least = self._facts.least_dimensions
        if least is None:
            raise RequestError(
                f"dimensions: the model gives {self.width}, and it was not trained to be cut; "
                "leave dimensions out"
            )
        if not least <= dimensions <= self.width:
            raise RequestError(
                f"dimensions: {dimensions} is not in {least}..{self.width}, which the model allows"
            )

    def encode(
        self,
        text: str | Sequence[int],
        prompt: str,
        *,
        max_tokens: int,
        truncate: bool = False,
        on_piece: Callable[[], None] | None = None,
    ) -> list[int]:
        """Encode a text, or complete the ids of one: the prompt first, the end token last.

        Plain text never becomes a control token. Ids get no prompt, and an end only if they lack
        it. A text that surely has more than ``max_tokens`` is refused before it is encoded. With
        ``truncate`` it is cut instead: the first ``max_tokens`` stay, including the end token.

        Raises:
            ContextLengthError: the text surely has more tokens.
            RequestError: the text is empty or cannot be encoded.
        """
        end = list(self._facts.append)
        if isinstance(text, str):
            if not text:
                raise RequestError("the text is empty; give at least one character")
            text = prompt + text
            if not truncate:
                _check_least(self._tokenizer, text, max_tokens)
            ids = self._tokenizer.encode(text, add_bos=self._add_bos, on_piece=on_piece)
            return (ids[: max(max_tokens - len(end), 0)] if truncate else ids) + end
        ids = [int(id_) for id_ in text]
        if not ids:
            raise RequestError("the text is empty; give at least one token")
        return ids if ids[-len(end) :] == end else ids + end

    def finish(
        self, rows: NDArray[np.float32], dimensions: int | None = None
    ) -> NDArray[np.float32]:
        """Cut rows ``[n, hidden]`` of the graph's output to vectors ``[n, dimensions]``.

        Normalized vectors are normalized again after the cut.
        """
        vectors = rows if dimensions is None else rows[:, :dimensions]
        if not self._facts.normalize:
            return np.ascontiguousarray(vectors)
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        found: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
        return found


class DocumentJudge:
    """Turns a query and documents into prompts, and the graph's output into scores.

    Args:
        manifest: manifest of a bundle that judges documents.
        tokenizer: its tokenizer.

    Raises:
        RequestError: the bundle does not judge documents.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        check_task(manifest, "rerank")
        assert manifest.reranking is not None
        self._facts: Reranking = manifest.reranking
        self._tokenizer = tokenizer
        self._prefix = tokenizer.encode(self._facts.prefix, control=True)
        self._suffix = tokenizer.encode(self._facts.suffix, control=True)

    def encode(
        self,
        query: str,
        document: str,
        instruction: str | None = None,
        *,
        max_tokens: int,
        on_piece: Callable[[], None] | None = None,
    ) -> list[int]:
        """Encode a pair; text of a caller never becomes a control token.

        Raises:
            ContextLengthError: the pair surely has more than ``max_tokens``.
            RequestError: the query or document is empty, or cannot be encoded.
        """
        for name, text in (("query", query), ("documents", document)):
            if not text:
                raise RequestError(f"{name}: is empty; give at least one character")
        instruction = self._facts.instruction if instruction is None else instruction
        # As published, the pair is one text, and the texts around it are encoded separately.
        pair = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        _check_least(self._tokenizer, pair, max_tokens)
        return self._prefix + self._tokenizer.encode(pair, on_piece=on_piece) + self._suffix

    @staticmethod
    def scores(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn rows ``[n, 2]`` of logits, ``no`` first, into the probabilities ``[n]`` of yes."""
        margin = rows[:, 0].astype(np.float64) - rows[:, 1]
        found: NDArray[np.float32] = np.exp(-np.logaddexp(0.0, margin)).astype(np.float32)
        return found


def _check_least(tokenizer: Tokenizer, text: str, most: int) -> None:
    least = tokenizer.least_tokens(text)
    if least > most:
        raise ContextLengthError(least, most, at_least=True)


def check_lengths(ids: Sequence[Sequence[int]], capacity: int) -> None:
    """Refuse texts that do not fit, before any of them runs.

    Raises:
        ContextLengthError: one has as many tokens as the cache has rows, or more.
    """
    longest = max(map(len, ids), default=0)
    if longest >= capacity:
        raise ContextLengthError(longest, capacity)


def groups(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Deal texts into groups of up to ``size``, by index; similar lengths go together."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    return (order[at : at + size] for at in range(0, len(order), size))


def submit(
    scheduler: Scheduler,
    ids: Sequence[Sequence[int]],
    *,
    priority: int = 0,
    client: str = "",
    deadline_s: float | None = None,
    salt: str = "",
) -> tuple[list[SequenceState], list[RowSink]]:
    """Queue texts, all or none, by `Scheduler.submit`.

    Returns:
        The sequences, which can be ended early by ``cancelled``, and the sinks with their output,
        in order.
    """
    sinks = [RowSink() for _ in ids]
    requests = [
        Request(
            ids=tuple(each),
            params=NEUTRAL,
            end_ids=frozenset(),
            priority=priority,
            client=client,
            deadline_s=deadline_s,
            salt=salt,
        )
        for each in ids
    ]
    return scheduler.submit(requests, sinks), sinks


def run(scheduler: Scheduler, ids: Sequence[Sequence[int]], capacity: int) -> NDArray[np.float32]:
    """Run texts, as many at once as there are slots, and wait for all.

    Others may use the engine meanwhile; if the queue is full, the rest waits for room.

    Args:
        scheduler: scheduler of a bundle that embeds or judges.
        ids: the texts.
        capacity: tokens that a slot of its cache holds.

    Returns:
        The graph's output for the last token of each, ``[n, width]``.

    Raises:
        ContextLengthError: one does not fit; none has run.
        RequestError: an id is outside the vocabulary.
        OverloadError: the scheduler drains.
        BackendError: the engine failed, or its output is not finite.
    """
    check_lengths(ids, capacity)
    found: list[Pooled | None] = [None] * len(ids)
    flying: list[tuple[list[int], list[SequenceState], list[RowSink]]] = []
    try:
        for group in groups(ids, scheduler.max_batch):
            flying.append((group, *_submit_when_room(scheduler, [ids[i] for i in group])))
            if len(flying) > 1:  # one runs, and the next is queued for when it ends
                _collect(flying[0], found)
                del flying[0]
        for last in flying:
            _collect(last, found)
    finally:
        for _, sequences, _ in flying:
            for sequence in sequences:
                sequence.cancelled = True
    return np.stack([each.row for each in found if each is not None])


def _collect(
    group: tuple[list[int], list[SequenceState], list[RowSink]], found: list[Pooled | None]
) -> None:
    places, _, sinks = group
    for place, sink in zip(places, sinks, strict=True):
        found[place] = sink.future.result()


def _submit_when_room(
    scheduler: Scheduler, ids: list[Sequence[int]]
) -> tuple[list[SequenceState], list[RowSink]]:
    while True:
        try:
            return submit(scheduler, ids)
        except OverloadError:
            if scheduler.drains:
                raise
            time.sleep(_RETRY_S)

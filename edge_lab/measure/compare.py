"""Runs windows of tokens through a bundle and its reference, and merges the results.

Both models read the same tokens side by side, 64 at a time. Their logits are compared in float64 at
once, and only a few numbers per position are kept. So the figures are exact over the whole
vocabulary and memory is bounded: two chunks of logits (78 MB at a vocabulary of 151,936), whatever
the text's length.

Windows do not depend on each other, so they may run anywhere and in any order. `merge` takes them
in the order of the text, since sums of floats depend on the order. So the result is the same to the
bit wherever each window was run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import Manifest
from edge.logprobs import log_softmax
from edge.model.slot_rows import SlotRows
from edge_make.progress import Progress, silent

from .divergence import cosine_similarity, kl_divergence

CHUNK_TOKENS = 64
"""Positions whose logits are in memory at once, and the length of a bootstrap block."""
_ROWS = 4  # rows compared at a time in float64: 5 MB each at a vocabulary of 151,936

Vector = NDArray[np.float64]


class Model(Protocol):
    """A model as a comparison needs it; `edge.runtime.llm.LLM` is one."""

    backend: Backend
    embeddings: EmbeddingTable
    manifest: Manifest


@dataclass(frozen=True)
class Positions:
    """Numbers for each scored position, float64 ``[n]`` unless stated otherwise.

    Attributes:
        block: bootstrap block that the position belongs to, int64.
        offset: place in its window, int64.
        nll: negative log-probability of the token that follows, in nats.
        reference_nll: the same for the reference; NaN without one, like everything below.
        kl: KL(reference || bundle) of the distributions of the next token, in nats.
        agrees: 1 where both find the same token most probable.
        cosine: cosine of both rows of logits.
    """

    block: NDArray[np.int64]
    offset: NDArray[np.int64]
    nll: Vector
    reference_nll: Vector
    kl: Vector
    agrees: Vector
    cosine: Vector

    def __len__(self) -> int:
        return len(self.nll)

    def take(self, rows: NDArray[np.int64]) -> Positions:
        """Select rows of every array."""
        return Positions(*(getattr(self, item.name)[rows] for item in fields(self)))


@dataclass(frozen=True)
class LayerError:
    """Relative error of what a layer has written into the KV cache, over the whole text.

    Keys and values are linear in the layer's input, so this is the error of everything before the
    layer and of its own projections, on any backend.

    Attributes:
        layer: from 0.
        key_error: ``|K - K_ref| / |K_ref|`` (Frobenius norms).
        value_error: the same for values, after the linear map per head that fits best: a recipe
            may scale or rotate a head's values and undo it in the next matrix. None where the
            text has too few tokens to tell such a map from the error.
    """

    layer: int
    key_error: float
    value_error: float | None


@dataclass(frozen=True)
class CacheSums:
    """Sums over tokens, from which the errors of keys and values are computed.

    Attributes:
        num_tokens: number of tokens summed over.
        keys: by layer, float64 ``[2]``: squares of the difference, and of the reference.
        values: by layer, float64 ``[3, kv_heads, dim, dim]``: products of the reference with
            itself, of the bundle with itself, and of the bundle with the reference.
    """

    num_tokens: int
    keys: dict[int, Vector]
    values: dict[int, Vector]

    def __add__(self, other: CacheSums) -> CacheSums:
        """Return the sums over the tokens of both."""
        tokens = self.num_tokens + other.num_tokens
        keys = {layer: sums + other.keys[layer] for layer, sums in self.keys.items()}
        values = {layer: sums + other.values[layer] for layer, sums in self.values.items()}
        return CacheSums(tokens, keys, values)

    def errors(self) -> list[LayerError]:
        """Compute the error of every layer."""
        return [
            LayerError(layer, math.sqrt(difference / norm), self._value_error(layer))
            for layer, (difference, norm) in self.keys.items()
        ]

    def _value_error(self, layer: int) -> float | None:
        """Least squares per head from sums: |R - B M|² = tr(R'R) - tr((B'R)' (B'B)^-1 (B'R))."""
        own, bundle, cross = self.values[layer]
        spare = self.num_tokens - own.shape[-1]
        if spare < own.shape[-1]:
            return None
        total = float(np.trace(own, axis1=1, axis2=2).sum())
        fitted = np.linalg.pinv(bundle, rcond=1e-12, hermitian=True) @ cross
        explained = float((cross * fitted).sum())
        # A fit with head_dim parameters per column hides that share of the error.
        return math.sqrt(max(total - explained, 0.0) / total * self.num_tokens / spare)


@dataclass(frozen=True)
class WindowResult:
    """Results of one window.

    Attributes:
        blocks: scored positions of each bootstrap block, in order.
        columns: the last five arrays of `Positions`, float64 ``[5, n]``.
        cache: sums over the window's KV cache; None without a reference.
    """

    blocks: tuple[int, ...]
    columns: Vector
    cache: CacheSums | None


@dataclass(frozen=True)
class Comparison:
    """Results of one bundle."""

    positions: Positions
    layers: list[LayerError]


def compare(
    bundle: Model,
    reference: Model | None,
    windows: Sequence[Sequence[int]],
    progress: Progress = silent,
) -> Comparison:
    """Run a bundle, and a reference beside it, over a text.

    Args:
        bundle: a bundle with room for a window. Where its steps, or those of the reference, take
            fewer than `CHUNK_TOKENS` tokens, the blocks of the bootstrap are as short.
        reference: a model with the same vocabulary; None measures the perplexity alone.
        windows: tokens of both; the first of each window is given, all others are scored.
        progress: called with the tokens scored (step ``score``).

    Raises:
        RequestError: a token is outside the table.
        BackendError: an engine failed, or its logits are not finite.
    """
    done, total = 0, num_scored(windows)

    def scored(count: int) -> None:
        nonlocal done
        done += count
        progress("score", done, total, "tokens")

    scored(0)
    return merge(run_window(bundle, reference, window, scored) for window in windows)


def num_scored(windows: Sequence[Sequence[int]]) -> int:
    """Return the number of positions that get figures."""
    return sum(len(window) - 1 for window in windows)


def run_window(
    bundle: Model,
    reference: Model | None,
    window: Sequence[int],
    scored: Callable[[int], None] = lambda count: None,
) -> WindowResult:
    """Run one window.

    Args:
        bundle: the bundle, as in `compare`.
        reference: the reference or None, as in `compare`.
        window: its tokens.
        scored: called with the number of further positions that were scored.
    """
    ids = np.asarray(window, dtype=np.int64)
    blocks, columns = [], []
    for part, ours, theirs in _run_both(bundle, reference, ids):
        columns.append(compare_chunk(ours, theirs, ids[1:][part]))
        blocks.append(part.stop - part.start)
        scored(blocks[-1])
    cache = None
    if reference is not None:
        cache = cache_sums(
            reference.backend.read_slot(0, len(ids) - 1), bundle.backend.read_slot(0, len(ids) - 1)
        )
    return WindowResult(tuple(blocks), np.concatenate(columns, axis=1), cache)


def merge(results: Iterable[WindowResult]) -> Comparison:
    """Join the results of the windows of a text.

    Args:
        results: results of all windows, in the order of the text, at least one.
    """
    offsets: list[NDArray[np.int64]] = []
    columns: list[Vector] = []
    lengths: list[int] = []
    sums: CacheSums | None = None
    for result in results:
        lengths += result.blocks
        columns.append(result.columns)
        offsets.append(np.arange(result.columns.shape[1]))
        if result.cache is not None:
            sums = result.cache if sums is None else sums + result.cache
    blocks = np.repeat(np.arange(len(lengths)), lengths)
    joined = np.concatenate(columns, axis=1)
    positions = Positions(blocks, np.concatenate(offsets), *joined)
    return Comparison(positions, [] if sums is None else sums.errors())


def _run_both(
    bundle: Model, reference: Model | None, ids: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float32] | None]]:
    """Run both models side by side; yield parts of ``ids[:-1]`` and logits ``[n, vocab]`` of each.

    The last token of a window has no successor to score.
    """
    models = [bundle] if reference is None else [bundle, reference]
    chunk = min(CHUNK_TOKENS, *(model.backend.max_step_tokens for model in models))
    runs = [
        prefill(model.backend, model.embeddings, ids[:-1], max_tokens=chunk, wanted=all_tokens)
        for model in models
    ]
    for (part, ours), *others in zip(*runs, strict=True):
        yield part, ours, others[0][1] if others else None


def compare_chunk(
    logits: NDArray[np.float32],
    reference: NDArray[np.float32] | None,
    targets: NDArray[np.int64],
) -> Vector:
    """Compute the last five arrays of `Positions` for a chunk, ``[5, n]``."""
    result = np.full((5, len(targets)), np.nan)
    for at in range(0, len(targets), _ROWS):
        rows = slice(at, at + _ROWS)
        chosen = targets[rows, None]
        log_q = log_softmax(logits[rows])
        result[0, rows] = -np.take_along_axis(log_q, chosen, axis=1)[:, 0]
        if reference is None:
            continue
        log_p = log_softmax(reference[rows])
        result[1, rows] = -np.take_along_axis(log_p, chosen, axis=1)[:, 0]
        result[2, rows] = kl_divergence(log_p, log_q)
        result[3, rows] = log_p.argmax(axis=1) == log_q.argmax(axis=1)
        result[4, rows] = cosine_similarity(reference[rows], logits[rows])
    return result


def cache_sums(reference: SlotRows, bundle: SlotRows) -> CacheSums:
    """Sum over the tokens of both caches."""
    sums = CacheSums(reference.length, {}, {})
    for name, rows in reference.items():
        layer, _, part = name.partition(".")
        wanted, found = rows.astype(np.float64), bundle[name].astype(np.float64)
        if part == "key":
            sums.keys[int(layer)] = np.array([((found - wanted) ** 2).sum(), (wanted**2).sum()])
            continue
        turned = found.transpose(0, 2, 1)
        products = wanted.transpose(0, 2, 1) @ wanted, turned @ found, turned @ wanted
        sums.values[int(layer)] = np.stack(products)
    return sums

"""The loop from token ids to token ids: prefill in chunks, then decode, sample, stop.

No text here; `edge.llm` adds tokenizer, chat template and stop strings. The loop keeps the books of
its slot and measures itself; times come from the monotonic clock.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .backends import Backend
from .embeddings import EmbeddingTable
from .errors import BackendError, RequestError
from .kv_cache import SlotCursor
from .sampling import SampledToken, Sampler

FinishReason = Literal["stop", "length"]
# Logits of 64 positions at a time: 39 MB at a vocabulary of 151,936.
_SCORE_CHUNK = 64


@dataclass
class GenerationStats:
    """What one generation took.

    Attributes:
        prompt_tokens: tokens of the prompt, cached ones included.
        cached_tokens: prompt tokens whose cache rows were there already.
        completion_tokens: tokens sampled, the end token included.
        ttft_s: start to first token.
        total_s: start to last token.
        itl_s: gaps between tokens.
        model_s: part of ``total_s`` spent inside the backend.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    model_s: float = 0.0

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for fewer than two."""
        later = self.completion_tokens - 1
        return (self.total_s - self.ttft_s) / later if later > 0 else 0.0

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed per second until the first token."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.ttft_s if self.ttft_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first."""
        return 1.0 / self.tpot_s if self.tpot_s else 0.0

    @property
    def own_s(self) -> float:
        """Time outside the backend: sampling, bookkeeping, text, and the caller's own."""
        return self.total_s - self.model_s

    def as_dict(self) -> dict[str, float | int]:
        """Plain numbers for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_s": round(self.ttft_s, 6),
            "tpot_s": round(self.tpot_s, 6),
            "total_s": round(self.total_s, 6),
            "model_s": round(self.model_s, 6),
            "prefill_tps": round(self.prefill_tps, 3),
            "decode_tps": round(self.decode_tps, 3),
        }


class Decoder:
    """Runs token ids through a backend's slot and keeps the slot's books.

    Args:
        backend: the engine.
        embeddings: the token table.
        slot: the slot of the backend's cache that this decoder owns.
    """

    def __init__(self, backend: Backend, embeddings: EmbeddingTable, slot: int = 0) -> None:
        self.backend = backend
        self.embeddings = embeddings
        self.slot = slot
        self.cursor = SlotCursor(backend.capacity)

    def generate(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        stats: GenerationStats,
        *,
        max_tokens: int | None,
        end_ids: Collection[int],
        reuse: bool = False,
    ) -> Iterator[tuple[SampledToken, FinishReason | None]]:
        """Sample until an end id, ``max_tokens`` or the end of the cache.

        Args:
            prompt: token ids, at least one.
            sampler: fresh for this generation.
            stats: filled in as the generation runs.
            max_tokens: tokens to sample at most; None is as many as the cache takes.
            end_ids: ids that end the generation; the end token itself is yielded last.
            reuse: keep the rows that the slot shares with the prompt.

        Yields:
            Each token, with the finish reason on the last.

        Raises:
            RequestError: an empty prompt or an id outside the table.
            ContextLengthError: the prompt does not fit.
            BackendError: the engine failed; the slot starts empty next time.
        """
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        start = last = time.perf_counter()
        cached = self.cursor.start(prompt, reuse=reuse)
        stats.prompt_tokens, stats.cached_tokens = len(prompt), cached
        logits = self._prefill(prompt[cached:], stats)
        while True:
            try:
                token = sampler.sample(logits)
            except BackendError:
                # Where logits are NaN, so may be the rows that the next prompt would reuse.
                self.cursor.reset()
                raise
            stats.completion_tokens += 1
            now = time.perf_counter()
            if stats.completion_tokens == 1:
                stats.ttft_s = now - start
            else:
                stats.itl_s.append(now - last)
            stats.total_s, last = now - start, now
            reason: FinishReason | None = None
            if token.id in end_ids:
                reason = "stop"
            elif stats.completion_tokens == max_tokens or self.cursor.remaining == 0:
                reason = "length"
            yield token, reason
            if reason is not None:
                return
            logits = self._step([token.id], [0], stats)[0]

    def score(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Log-probability of every token but the first, given those before it.

        Returns:
            Natural logarithms, float64 ``[len(ids) - 1]``.

        Raises:
            RequestError: fewer than two tokens, or an id outside the table.
            ContextLengthError: more tokens than the cache holds.
        """
        if len(ids) < 2:
            raise RequestError(f"scoring needs at least two tokens, got {len(ids)}")
        self.embeddings.check(np.asarray(ids, dtype=np.int64))
        self.cursor.start(ids[:-1], reuse=False)
        chunk = min(_SCORE_CHUNK, self.backend.max_step_tokens)
        result = np.empty(len(ids) - 1, dtype=np.float64)
        stats = GenerationStats()
        for at in range(0, len(ids) - 1, chunk):
            part = ids[at : min(at + chunk, len(ids) - 1)]
            logits = self._step(part, range(len(part)), stats)
            targets = np.asarray(ids[at + 1 : at + 1 + len(part)])
            chosen = logits[np.arange(len(part)), targets].astype(np.float64)
            result[at : at + len(part)] = chosen - _log_sum_exp(logits)
        return result

    def _prefill(self, ids: Sequence[int], stats: GenerationStats) -> NDArray[np.float32]:
        """Run the prompt in chunks; logits ``[vocab]`` of its last token."""
        chunk = self.backend.max_step_tokens
        for at in range(0, len(ids) - chunk, chunk):
            # Every step returns logits somewhere; one row is next to nothing in a chunk.
            self._step(ids[at : at + chunk], [chunk - 1], stats)
        rest = ids[(len(ids) - 1) // chunk * chunk :]
        last: NDArray[np.float32] = self._step(rest, [len(rest) - 1], stats)[0]
        return last

    def _step(
        self, ids: Sequence[int], wanted: Sequence[int], stats: GenerationStats
    ) -> NDArray[np.float32]:
        """Run ``ids`` after the rows that are there; logits ``[len(wanted), vocab]``."""
        first = self.cursor.length
        embeds = self.embeddings[np.asarray(ids, dtype=np.int64)[None]]
        positions = np.arange(first, first + len(ids), dtype=np.int64)[None]
        indices = np.asarray(wanted, dtype=np.int64)[None]
        # Rows count once they are written; a failed step leaves the slot empty, not half true.
        kept, self.cursor.ids = self.cursor.ids, []
        started = time.perf_counter()
        logits = self.backend.forward([self.slot], embeds, positions, first + len(ids), indices)
        stats.model_s += time.perf_counter() - started
        self.cursor.ids = kept
        self.cursor.advance(ids)
        row: NDArray[np.float32] = logits[0]
        return row


def _log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Over the last axis, without overflow, summed in float64."""
    top = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - top).sum(axis=-1, dtype=np.float64)
    result: NDArray[np.float64] = top[..., 0].astype(np.float64) + np.log(total)
    return result

"""Defines counts and times of one generation.

The loop that generates is in `edge.runtime.scheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]
"""``stop``: end token, stop string or finished grammar; ``length``: ``max_tokens`` or a full cache;
``cancelled``: by the caller."""


@dataclass
class GenerationStats:
    """Counts and times of one generation.

    Attributes:
        prompt_tokens: tokens of the prompt, with cached ones.
        cached_tokens: prompt tokens whose cache rows were there already.
        completion_tokens: tokens sampled, with the end token.
        has_started: whether it had a slot; False if it was cancelled in the queue.
        queue_s: time from submission to the start of the prefill.
        ttft_s: time from submission to the first token.
        total_s: time from submission to the last token.
        itl_s: gaps between tokens.
        model_s: part of ``total_s`` that the backend worked, for this sequence or others.
        context_left: tokens that the slot had room for when the answer ended; 0 with the finish
            reason ``length`` means that the KV capacity cut it off. None before the end, for an
            answer that never had a slot, and if a full slot slides.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    has_started: bool = False
    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    model_s: float = 0.0
    context_left: int | None = None

    @property
    def tpot_s(self) -> float:
        """Return the mean time per output token after the first; 0 for fewer than two."""
        later = self.completion_tokens - 1
        return (self.total_s - self.ttft_s) / later if later > 0 else 0.0

    @property
    def prefill_tps(self) -> float:
        """Return prompt tokens computed per second, from prefill's start to the first token."""
        computed, seconds = self.prompt_tokens - self.cached_tokens, self.ttft_s - self.queue_s
        return computed / seconds if seconds > 0 else 0.0

    @property
    def decode_tps(self) -> float:
        """Return tokens per second after the first."""
        return 1.0 / self.tpot_s if self.tpot_s else 0.0

    @property
    def own_s(self) -> float:
        """Return the time outside the backend and the queue: sampling, bookkeeping, text."""
        return self.total_s - self.queue_s - self.model_s

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the numbers for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_s": round(self.queue_s, 6),
            "ttft_s": round(self.ttft_s, 6),
            "tpot_s": round(self.tpot_s, 6),
            "total_s": round(self.total_s, 6),
            "model_s": round(self.model_s, 6),
            "prefill_tps": round(self.prefill_tps, 3),
            "decode_tps": round(self.decode_tps, 3),
            "context_left": self.context_left,
        }


@dataclass(frozen=True)
class PromptProgress:
    """How far the prompt of one sequence has been read.

    Attributes:
        total: tokens of the prompt.
        cached: prompt tokens whose cache rows were there already; 0 while the sequence waits.
        processed: prompt tokens whose rows are there by now, with cached ones.
        prefill_s: seconds since the prefill began; 0 while the sequence waits.
        ahead: sequences in the queue that start before it; None once it has started.
    """

    total: int
    cached: int = 0
    processed: int = 0
    prefill_s: float = 0.0
    ahead: int | None = None

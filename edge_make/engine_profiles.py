"""Sizes the optimization profiles of an engine."""

from __future__ import annotations

from edge.bundle.sizes import DEFAULT_MAX_LOGITS, StepLimits


def profile_limits(max_batch: int, max_prefill: int) -> tuple[StepLimits, ...]:
    """Return the optimization profiles of an engine, in the order in which it has them.

    TensorRT sizes an engine's scratch memory for the largest run of any profile. So none takes more
    tokens in all than one chunk of a prompt: ``prefill`` takes one long chunk, ``batch`` short
    chunks of several sequences (drafts, ends of prompts), ``decode`` one token of each. Nor does
    one return more logits of a sequence than the runner requests.
    """
    prefill = StepLimits("prefill", 1, max_prefill, min(max_prefill, DEFAULT_MAX_LOGITS))
    decode = StepLimits("decode", max_batch, 1, 1)
    share = max_prefill // max_batch
    if max_batch == 1 or share <= 1:
        return prefill, decode
    return prefill, decode, StepLimits("batch", max_batch, share, min(share, DEFAULT_MAX_LOGITS))

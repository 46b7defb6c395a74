"""Compares two engines on the same prompts, logit by logit and cache row by cache row.

Both sides are a `Backend`, so that a TensorRT engine can be compared with ONNX Runtime on the CPU,
which runs the very same graph. Decoding is teacher-forced with the reference's own greedy tokens:
so one early difference does not make everything after it incomparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend, Ints
from edge.backends.step import TokenTable, prefill
from edge.bundle.manifest import Manifest
from edge.errors import ConfigError
from edge.logprobs import log_softmax
from edge_make.progress import Progress, silent

from .divergence import cosine_similarity, kl_divergence

_LOGITS_PER_CHUNK = 32  # a vocabulary of 150,000 in float32 takes 0.6 MB a position


@dataclass(frozen=True)
class Thresholds:
    """Bounds that an engine must reach.

    Attributes:
        cosine: the least cosine of the logits at a position.
        top1: share of positions with the same likeliest token.
        kl: mean Kullback-Leibler divergence from the reference, in nats per token.
        cache_cosine: the least cosine of a cached key or value row, over its head.
    """

    cosine: float = 0.999
    top1: float = 0.97
    kl: float = 0.01
    cache_cosine: float = 0.999


ROUNDED_ACTIVATIONS = Thresholds(cosine=0.95, top1=0.9, kl=0.02, cache_cosine=0.95)
"""Thresholds for engines that round blocks of activations to INT8 themselves, as ``ort-cpu`` does
for quantized weights: SmolLM2 INT4 measured 0.983, 0.94, 0.006 and 0.977."""
_INT8_CACHE_COSINES = {True: 0.85, False: 0.98}


def default_thresholds(manifest: Manifest, *, rounds: bool) -> Thresholds:
    """Return the thresholds for an engine.

    A vector has no likeliest token, and for two logits only their difference matters: thresholds
    that mean nothing for the bundle's task are left out.

    With an 8-bit cache, floats that differ a little become neighbouring integers, which is much in
    a row that is small beside its scales: SmolLM2 INT8 measured 0.929 for the cache where a float
    cache has 0.973. The logits are held to the same bounds. What an engine on a GPU reaches with
    such a cache has not been measured.

    Args:
        manifest: the bundle's.
        rounds: whether the engine rounds activations, as for `ROUNDED_ACTIVATIONS`.
    """
    usual = ROUNDED_ACTIVATIONS if rounds else Thresholds()
    if manifest.int8_layers:
        usual = replace(usual, cache_cosine=_INT8_CACHE_COSINES[rounds])
    if manifest.model.task == "embed":
        return replace(usual, top1=0.0, kl=float("inf"))
    return replace(usual, cosine=-1.0) if manifest.model.task == "rerank" else usual


@dataclass(frozen=True)
class Agreement:
    """Agreement of the logits of some positions; `Thresholds` names the figures."""

    positions: int
    min_cosine: float
    top1: float
    mean_kl: float


@dataclass(frozen=True)
class VerifyReport:
    """Agreement in prefill and decode over all prompts, and of the caches afterwards.

    Attributes:
        prefill, decode: agreement of the logits.
        min_cache_cosine: least cosine over all layers, heads and rows.
        misses: one sentence for each threshold that was not reached; empty is good.
    """

    prefill: Agreement
    decode: Agreement
    min_cache_cosine: float
    misses: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every threshold was reached."""
        return not self.misses


def compare_backends(
    reference: Backend,
    candidate: Backend,
    prompts: Sequence[Sequence[int]],
    table: TokenTable,
    *,
    decode_steps: int = 32,
    thresholds: Thresholds | None = None,
    progress: Progress = silent,
) -> VerifyReport:
    """Run prompts through both backends and compare.

    Args:
        reference: the backend that is taken to be right.
        candidate: the backend that is measured.
        prompts: token ids; each prompt is prefilled in chunks that both take, then decoded.
        table: the token table of both.
        decode_steps: steps after each prompt.
        thresholds: bounds for the candidate; None is `Thresholds` with its defaults.
        progress: called with the tokens that both have run (step ``compare``).

    Raises:
        ConfigError: there is nothing to compare, or a prompt does not fit a cache.
    """
    limit = min(reference.capacity, candidate.capacity)
    if not prompts or decode_steps < 1:
        raise ConfigError("nothing to compare: give one prompt and one decode step at least")
    longest = max(map(len, prompts))
    if min(map(len, prompts)) < 1 or longest + decode_steps > limit:
        raise ConfigError(
            f"prompts of 1 to {limit - decode_steps} tokens fit the cache of {limit} rows with "
            f"{decode_steps} decode steps; the longest has {longest}"
        )
    of_prompts: list[NDArray[np.float64]] = []
    decode: list[NDArray[np.float64]] = []
    worst_cache = 1.0
    ran, total = 0, sum(map(len, prompts)) + decode_steps * len(prompts)

    def count(tokens: int) -> None:
        nonlocal ran
        ran += tokens
        progress("compare", ran, total, "tokens")

    count(0)
    for prompt in prompts:
        token, length = 0, len(prompt)
        for ours, theirs, tokens in _run_both(reference, candidate, table, prompt):
            of_prompts.append(_measure(ours, theirs))
            token = int(ours[-1].argmax())
            count(tokens)
        for _ in range(decode_steps):
            for ours, theirs, tokens in _run_both(reference, candidate, table, [token], length):
                decode.append(_measure(ours, theirs))
                token = int(ours[-1].argmax())
                count(tokens)
            length += 1
        cosine = _cache_cosine(reference, candidate, length)
        worst_cache = float(np.minimum(worst_cache, cosine))  # keeps a NaN, as min() would not
    first, second = _summarize(of_prompts), _summarize(decode)
    wanted = thresholds or Thresholds()
    misses = [
        *_misses("prefill", first, wanted),
        *_misses("decode", second, wanted),
    ]
    if not worst_cache >= wanted.cache_cosine:  # a NaN is a miss too
        misses.append(f"cache: cosine {worst_cache:.6f}, at least {wanted.cache_cosine} is wanted")
    return VerifyReport(first, second, worst_cache, tuple(misses))


def _run_both(
    reference: Backend,
    candidate: Backend,
    table: TokenTable,
    ids: Sequence[int],
    past: int = 0,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], int]]:
    """Run tokens in slot 0 of both; yield each one's logits ``[n, vocab]`` and a chunk's tokens."""
    chunk = min(reference.max_step_tokens, candidate.max_step_tokens)
    runs = (
        # Compare rows as they are, a NaN included.
        prefill(backend, table, ids, past=past, max_tokens=chunk, wanted=_spread, keep_nan=True)
        for backend in (reference, candidate)
    )
    for (part, ours), (_, theirs) in zip(*runs, strict=True):
        yield ours, theirs, part.stop - part.start


def _spread(count: int) -> Ints:
    """Pick the tokens of a chunk to compare, the first and the last included."""
    places: Ints = np.linspace(0, count - 1, min(count, _LOGITS_PER_CHUNK)).round().astype(np.int64)
    return places


def _measure(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compare positions: cosine, same likeliest token, KL; ``[n, 3]``.

    Logits that are not finite are a finding here, not an error: cosine and KL are NaN, which
    fails every threshold.
    """
    same = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
    kl = np.full(len(ours), np.nan)
    finite = np.isfinite(ours).all(axis=-1) & np.isfinite(theirs).all(axis=-1)
    kl[finite] = kl_divergence(log_softmax(ours[finite]), log_softmax(theirs[finite]))
    return np.stack([cosine_similarity(ours, theirs), same.astype(np.float64), kl], axis=-1)


def _cache_cosine(reference: Backend, candidate: Backend, length: int) -> float:
    worst = 1.0
    ours, theirs = reference.read_slot(0, length), candidate.read_slot(0, length)
    for name, rows in ours.items():
        cosines = cosine_similarity(rows, theirs[name])
        worst = float(np.minimum(worst, cosines.min()))  # keeps a NaN, as min() would not
    return worst


def _summarize(measured: list[NDArray[np.float64]]) -> Agreement:
    rows = np.concatenate(measured)
    return Agreement(
        len(rows),
        float(rows[:, 0].min()),
        float(rows[:, 1].mean()),
        float(rows[:, 2].mean()),
    )


def _misses(phase: str, found: Agreement, wanted: Thresholds) -> list[str]:
    misses = []
    if not found.min_cosine >= wanted.cosine:
        misses.append(f"{phase}: cosine {found.min_cosine:.6f}, at least {wanted.cosine} is wanted")
    if not found.top1 >= wanted.top1:
        misses.append(
            f"{phase}: same likeliest token at {found.top1:.1%}, at least {wanted.top1:.1%} wanted"
        )
    if not found.mean_kl <= wanted.kl:
        misses.append(f"{phase}: KL {found.mean_kl:.5f}, at most {wanted.kl} is wanted")
    return misses

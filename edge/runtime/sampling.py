"""Chooses one token from one row of logits.

`Sampler` draws from exactly the distribution that `sampling_reference` defines, without sorting.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.backends.best import BestLogits
from edge.bundle.manifest import SamplingDefaults
from edge.errors import BackendError

from .sampling_params import SamplingParams
from .sampling_reference import (
    DROPPED,
    Ids,
    Logits,
    Mask,
    apply_logit_bias,
    apply_presence_frequency,
    apply_repetition_penalty,
    best_token,
    check_best,
    check_ids,
    is_greedy,
    keep_top_p,
    kept_probabilities,
    knobs_of,
    min_p_floor,
    ranking,
    scale,
)

_BLOCK = 256  # tokens per block of the two-level inverse CDF
_GROUP = 128  # most tokens per group of the top-k filter
_DRAWS = 16  # random numbers per token: attempts, and one for the full sort after them
_ROUNDING = 2e-5  # bound on the relative error of a block sum: 256 roundings to float32


class SampledToken(NamedTuple):
    """A token and, if requested, its log-probability.

    Attributes:
        id: the token.
        logprob: natural logarithm of its probability under the model's own logits, that is before
            penalties, mask and temperature; None unless requested.
        top_logprobs: the most probable tokens and their log-probabilities, best first; None unless
            requested.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class Sampler:
    """Draws the tokens of one answer.

    No vocabulary is sorted. A token is drawn by inverse CDF from all candidates and accepted if it
    belongs to the kept set, which one pass decides (how much mass ranks before it). Otherwise the
    candidates shrink to those that rank before it, and the draw is repeated. An accepted token is
    distributed as if drawn from the kept set, so this is exact. The idea is that of FlashInfer
    (https://flashinfer.ai/2025/03/10/sampling.html). If float32 sums are too close to a border to
    tell, the full sort of `keep_top_p` decides.

    Every token takes the same number of random numbers. So the token at a given place depends only
    on the seed, the place and its own logits. And another model that draws with the numbers of the
    same place (`guess`) draws the same token as often as the two distributions let an inverse CDF
    agree. That makes drafts right at temperatures above 0.

    Attributes:
        params: the resolved parameters.
        seed: seed of the random numbers: ``params.seed``, or the fresh one that was drawn.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int] | Ids = ()
    ) -> None:
        """Prepare for one answer.

        Args:
            params: resolved parameters.
            vocab_size: length of a row of logits.
            prompt_ids: the prompt, for the repetition penalty.

        Raises:
            RequestError: the parameters are not resolved, or an id is outside the vocabulary.
        """
        self.params = params
        self._knobs = knobs_of(params)
        self._greedy = is_greedy(self._knobs)
        check_ids("logit_bias", tuple(params.logit_bias), vocab_size)
        # 53 bits, so that a reported seed survives JSON readers that know only doubles.
        self.seed = secrets.randbits(53) if params.seed is None else params.seed
        self._bits = np.random.PCG64(self.seed)
        self._rng = np.random.Generator(self._bits)
        self._ahead: deque[list[float]] = deque()  # random numbers of the next places, if drawn
        self._guessed: list[_Counted] = []

        self._counts = np.zeros(vocab_size, np.int32)  # of generated tokens
        self._generated = _DistinctIds(vocab_size)
        self._seen = _DistinctIds(vocab_size)
        for token_id in np.unique(check_ids("the prompt", prompt_ids, vocab_size)).tolist():
            self._seen.add(token_id)

        self._penalizes = bool(params.presence_penalty or params.frequency_penalty)
        self._adjusts = bool(
            self._knobs.repetition_penalty != 1 or self._penalizes or params.logit_bias
        )
        self._lowers_only = (
            self._knobs.repetition_penalty >= 1
            and params.presence_penalty >= 0
            and params.frequency_penalty >= 0
        )
        # Fresh temporaries of this size would cost more in page faults than the arithmetic.
        self._adjusted = np.empty(vocab_size, np.float32)
        self._x = np.empty(vocab_size, np.float32)
        self._weights = np.empty(vocab_size, np.float32)
        self._spare = np.empty(vocab_size, np.float32)
        self._before = np.empty(vocab_size, np.bool_)

    def accept(self, token_id: int) -> None:
        """Count a token that did not come from `sample` as part of the answer, for the penalties.

        Raises:
            RequestError: the id is outside the vocabulary.
        """
        check_ids("the answer", (token_id,), self._counts.size)
        self._count(token_id)

    def replay(self, answer: Sequence[int]) -> None:
        """Advance to the state of a sampler with the same parameters and seed after ``answer``.

        Args:
            answer: all tokens of an answer so far; this sampler has sampled none.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        for token_id in answer:
            self.accept(token_id)
        self._bits.advance(_DRAWS * len(answer))  # each number takes one word of 64 bits

    def guess(self, logits: Logits) -> tuple[int, float]:
        """Draw what may come next from another model's logits; the answer does not change.

        The first call uses the random numbers of the next place, the next call those of the place
        after, as if the guessed tokens were part of the answer. `forget_guesses` ends that.

        Args:
            logits: float32 ``[vocab]``, not changed; -inf for a token that it does not know.

        Returns:
            The token, and its probability at this temperature (at 1 if the draw is greedy)
            before anything is cut off.

        Raises:
            BackendError: the row is malformed, as in `sample`.
        """
        self._check_row(logits)
        with np.errstate(over="ignore", invalid="ignore"):
            adjusted = self._adjust(logits, None)
            if self._greedy:
                token_id = best_token(adjusted)
                scale(adjusted, 1.0, out=self._x)
            else:
                token_id = self._draw(adjusted, self._uniforms(len(self._guessed)))
            total = _running_sums(np.exp(self._x, out=self._weights))[-1]
        chance = float(self._weights[token_id]) / float(total)
        self._guessed.append(self._count(token_id))
        return token_id, chance

    def forget_guesses(self) -> None:
        """Undo the counts of `guess`."""
        while self._guessed:
            counted = self._guessed.pop()
            self._counts[counted.token_id] -= 1
            if counted.is_new:
                self._generated.drop_last()
            if counted.is_unseen:
                self._seen.drop_last()

    def sample(self, logits: Logits | BestLogits, mask: Logits | None = None) -> SampledToken:
        """Draw the next token of the answer; the penalties of later tokens count it.

        Args:
            logits: float32 ``[vocab]``, not changed; or the best of such a row, which is fetched if
                they do not decide. The token is the same.
            mask: float32 ``[vocab]``, added to the logits: 0, or -inf to forbid a token.

        Raises:
            BackendError: the row has another shape or type, a logit is NaN or +inf, or all are
                -inf.
        """
        assert not self._guessed, "guesses must be forgotten before a token is sampled"
        if isinstance(logits, BestLogits):
            with np.errstate(over="ignore", invalid="ignore"):
                token = self._from_best(logits, mask)
            if token is not None:
                if not self._greedy:
                    self._ahead.popleft()
                self._count(token)
                return SampledToken(token)
            logits = logits.row()
        self._check_row(logits)
        with np.errstate(over="ignore", invalid="ignore"):
            adjusted = self._adjust(logits, mask)
            if self._greedy:
                token_id = best_token(adjusted)
            else:
                uniforms = self._uniforms(0)
                self._ahead.popleft()
                token_id = self._draw(adjusted, uniforms)
            self._count(token_id)
            if self.params.logprobs is None:
                return SampledToken(token_id)
            return self._with_logprobs(token_id, logits, self.params.logprobs)

    def _from_best(self, best: BestLogits, mask: Logits | None) -> int | None:
        """Draw from the best of a row; None if only the whole row can decide.

        It handles only parameters that lower logits, since the bounds on the other logits then stay
        true (`edge.runtime.best_draw`). Log-probabilities need the sum with the host's roundings.
        """
        params, knobs = self.params, self._knobs
        if params.logprobs is not None or not self._lowers_only:
            return None
        order = np.argsort(best.ids)
        ids, values = best.ids[order].astype(np.int64, copy=False), best.values[order]
        raised = [token_id for token_id, value in params.logit_bias.items() if value > 0]
        if raised and not np.isin(raised, ids).all():
            return None
        if self._adjusts or mask is not None:
            self._adjust_some(values, ids, mask)
        top, bound = values.max(), best.values[-1]
        if ids.size == best.vocab_size:
            bound = DROPPED  # there are no others
        # Another token may be as good, with a lower id. And the row itself tells what is wrong.
        if not (math.isfinite(best.rest) and bound < top < math.inf):
            return None
        if self._greedy:
            return int(ids[values.argmax()])
        uniforms, inverse = self._uniforms(0), np.float32(1.0 / knobs.temperature)
        x = (values - top) * inverse
        bound = (bound - top) * inverse
        if 0 < knobs.top_k < best.vocab_size:
            if knobs.top_k > np.count_nonzero(x > bound):
                return None
            places = _top_ids(x, knobs.top_k)
            return int(ids[places[self._draw_place(x[places], knobs, uniforms)]])
        from . import best_draw

        rest = best_draw.rest_mass(best, float(top), knobs.temperature)
        floor = min_p_floor(knobs.min_p)
        place = best_draw.draw(x, bound, rest, knobs.top_p, floor, uniforms[:-1])
        return None if place is None else int(ids[place])

    def _check_row(self, logits: Logits) -> None:
        if logits.shape != self._x.shape or logits.dtype != np.float32:
            raise BackendError(
                f"the model produced a row of logits of shape {list(logits.shape)} and type "
                f"{logits.dtype}, expected {list(self._x.shape)} and float32; "
                "export and build the bundle again"
            )

    def _uniforms(self, place: int) -> list[float]:
        """Return the random numbers of a place, counted from the next one on."""
        while len(self._ahead) <= place:
            self._ahead.append(self._rng.random(_DRAWS).tolist())
        return self._ahead[place]

    def _count(self, token_id: int) -> _Counted:
        self._counts[token_id] += 1
        return _Counted(token_id, self._generated.add(token_id), self._seen.add(token_id))

    def _adjust(self, logits: Logits, mask: Logits | None) -> Logits:
        """Apply penalties, bias and mask; returns the row itself if there are none."""
        if not self._adjusts and mask is None:
            return logits
        adjusted = self._adjusted
        np.copyto(adjusted, logits)
        generated = self._generated.ids
        self._change(adjusted, self._seen.ids, generated, generated, self.params.logit_bias)
        if mask is not None:
            adjusted += mask
        return adjusted

    def _adjust_some(self, values: Logits, ids: Ids, mask: Logits | None) -> None:
        """Apply `_adjust` to the logits of some tokens, ascending, in place."""
        if self._adjusts:
            seen, generated = (
                np.flatnonzero(self._seen.holds(ids)),
                np.flatnonzero(self._counts[ids]),
            )
            places = {int(token_id): place for place, token_id in enumerate(ids)}
            bias = self.params.logit_bias.items()
            known = {places[token_id]: value for token_id, value in bias if token_id in places}
            self._change(values, seen, generated, ids[generated], known)
        if mask is not None:
            values += mask[ids]

    def _change(
        self, logits: Logits, seen: Ids, generated: Ids, ids: Ids, bias: Mapping[int, float]
    ) -> None:
        """Apply penalties and bias in place.

        Args:
            logits: logits of a row, or of some of its tokens.
            seen: indices into ``logits`` of the tokens of prompt and answer.
            generated: indices of the tokens of the answer.
            ids: the tokens at ``generated``.
            bias: bias by index into ``logits``.
        """
        params, repetition = self.params, self._knobs.repetition_penalty
        if repetition != 1:
            apply_repetition_penalty(logits, seen, repetition)
        if self._penalizes:
            apply_presence_frequency(
                logits,
                generated,
                self._counts[ids],
                params.presence_penalty,
                params.frequency_penalty,
            )
        apply_logit_bias(logits, bias)

    def _draw(self, logits: Logits, uniforms: list[float]) -> int:
        knobs = self._knobs
        x = scale(logits, knobs.temperature, out=self._x)
        ids = None
        if 0 < knobs.top_k < x.size:
            ids = _top_ids(x, knobs.top_k)
            x = x[ids]
        place = self._draw_place(x, knobs, uniforms)
        return place if ids is None else int(ids[place])

    def _draw_place(self, x: Logits, knobs: SamplingDefaults, uniforms: list[float]) -> int:
        """Draw from what top-p and min-p keep of ``x``, whose greatest value is 0."""
        weights = np.exp(x, out=self._weights[: x.size])
        spare = self._spare[: x.size]
        before = self._before[: x.size]
        floor = min_p_floor(knobs.min_p)
        sums = _running_sums(weights)
        total = float(sums[-1])
        # A heavier token is in the nucleus wherever it ranks.
        heavy = (1.0 - knobs.top_p + 3 * _ROUNDING) * total
        for uniform in uniforms[:-1]:
            place = _pick(weights, sums, uniform)
            improbable = bool(x[place] < floor)
            if improbable:
                np.greater_equal(x, floor, out=before)
            elif knobs.top_p >= 1 or weights[place] > heavy:
                return place
            else:
                _mark_before(x, place, before)
            fewer = np.multiply(weights, before, out=spare)
            sums = _running_sums(fewer)
            if not improbable and _in_nucleus(x, place, float(sums[-1]), total, knobs.top_p):
                return place
            weights, spare = fewer, weights
        until = np.cumsum(kept_probabilities(x, knobs))
        return _first_above(until, uniforms[-1] * float(until[-1]))

    def _with_logprobs(self, token_id: int, logits: Logits, num_top: int) -> SampledToken:
        # Not `logprobs.log_softmax`: this runs per token of every answer, so in float32 and in
        # place.
        best = logits.max()
        check_best(best)
        shifted = np.subtract(logits, best, out=self._spare)
        total = _running_sums(np.exp(shifted, out=self._weights))[-1]
        log_total = float(best) + math.log(total)
        top: list[int] = []
        if num_top:
            ids = _top_ids(logits, num_top)
            top = ids[ranking(logits[ids])].tolist()
        return SampledToken(
            token_id,
            float(logits[token_id]) - log_total,
            tuple((i, float(logits[i]) - log_total) for i in top),
        )


class _Counted(NamedTuple):
    """A counted token, and whether it was the first of its kind, so that it can be undone."""

    token_id: int
    is_new: bool  # not in the answer before
    is_unseen: bool  # not in prompt and answer before


class _DistinctIds:
    """Distinct token ids in the order in which they came."""

    def __init__(self, vocab_size: int) -> None:
        self._is_in = np.zeros(vocab_size, np.bool_)
        self._ids = np.empty(vocab_size, np.int64)  # pages that are never written cost nothing
        self._size = 0

    @property
    def ids(self) -> Ids:
        return self._ids[: self._size]

    def add(self, token_id: int) -> bool:
        """Add an id; returns whether it is new."""
        if self._is_in[token_id]:
            return False
        self._is_in[token_id] = True
        self._ids[self._size] = token_id
        self._size += 1
        return True

    def holds(self, ids: Ids) -> Mask:
        """Mark those of ``ids`` that are in."""
        found: Mask = self._is_in[ids]
        return found

    def drop_last(self) -> None:
        self._size -= 1
        self._is_in[self._ids[self._size]] = False


def _top_ids(logits: Logits, k: int) -> Ids:
    """Return the tokens of `keep_top_k`, ascending, without those at -inf; no full sort."""
    # At least k logits, and few more, are not below the k-th greatest of the groups' maxima. A
    # group is a column, because SIMD is best at maxima across rows.
    group = min(_GROUP, logits.size // (4 * k))
    bound = DROPPED
    if group > 1:
        num_groups = logits.size // group
        maxima = logits[: num_groups * group].reshape(group, num_groups).max(axis=0)
        bound = np.partition(maxima, num_groups - k)[num_groups - k]
    # A row masked by a grammar may hold fewer than k tokens.
    ids: Ids = np.flatnonzero(logits >= bound if bound > DROPPED else logits > bound)
    if ids.size <= k:
        return ids
    values = logits[ids]
    kth = np.partition(values, ids.size - k)[ids.size - k]
    kept = values > kth
    kept[np.flatnonzero(values == kth)[: k - np.count_nonzero(kept)]] = True
    top: Ids = ids[kept]
    return top


def _running_sums(weights: Logits) -> NDArray[np.float64]:
    """Return the mass up to the end of each block: the first level of the inverse CDF."""
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK))
    return np.cumsum(blocks, dtype=np.float64)


def _pick(weights: Logits, sums: NDArray[np.float64], uniform: float) -> int:
    """Return the inverse CDF at ``uniform`` (0..1): by blocks, then within the block."""
    target = uniform * float(sums[-1])
    block = _first_above(sums, target)
    if block:
        target -= float(sums[block - 1])
    start = block * _BLOCK
    within = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + _first_above(within, target)


def _first_above(sums: NDArray[np.float64], target: float) -> int:
    """Return the first index whose running sum exceeds ``target``; never one that adds nothing."""
    index = int(np.searchsorted(sums, target, side="right"))
    if index == sums.size:  # rounding carried the target past the end
        index = int(np.searchsorted(sums, sums[-1], side="left"))
    return index


def _mark_before(x: Logits, place: int, out: Mask) -> None:
    """Mark the tokens that rank before the one at ``place``."""
    value = x[place]
    np.greater_equal(x[:place], value, out=out[:place])
    np.greater(x[place:], value, out=out[place:])


def _in_nucleus(x: Logits, place: int, mass_before: float, total: float, top_p: float) -> bool:
    """Whether `keep_top_p` keeps a token, given the (rounded) mass that ranks before it."""
    border = top_p * total
    if abs(mass_before - border) > _ROUNDING * (mass_before + border):
        return mass_before < border
    return bool(keep_top_p(x, top_p)[place])


def is_sound(logits: Logits | BestLogits) -> bool:
    """Whether a row is free of NaN, judged by one logit: a NaN in a hidden state makes all NaN.

    Args:
        logits: float32 ``[vocab]``; or the best of such a row, which is fetched if in doubt.
    """
    if isinstance(logits, BestLogits):
        if not math.isnan(logits.rest):
            return True
        logits = logits.row()
    return not math.isnan(logits[0])

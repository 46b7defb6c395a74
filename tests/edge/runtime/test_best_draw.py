from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.backends.best import BestLogits
from edge.errors import BackendError
from edge.runtime.best_draw import draw, rest_mass
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.sampling_reference import Logits
from lab.quality.best_logits import best_of, compare
from tests.edge.runtime.test_sampling import aim, knobs, params, row, rows

INF = math.inf
# As a model's row: the n-th best token is about 2 log(n) below the best.
PEAKED = (-2 * np.log1p(np.random.default_rng(1).permutation(20_000))).astype(np.float32)


def never() -> Logits:
    raise AssertionError("the row is fetched")


def kept(logits: Logits, keep: int = 256) -> BestLogits:
    return best_of(logits, keep, never)


def test_random_rows_give_the_same_tokens():
    found = compare(1500, seed=7)
    assert not found.differences
    assert all(found.fetched[kind] < 0.9 * count for kind, count in found.rows.items())


@settings(deadline=None, max_examples=300)
@given(rows, knobs, st.integers(1, 300), st.data())
def test_a_random_number_beside_a_border_gives_the_same_token(logits, options, keep, data):
    """The first random number is aimed at the end of a token's share, where the rest decides."""
    made = params(**options, seed=3)
    whole, part = Sampler(made, logits.size), Sampler(made, logits.size)
    x = (logits - logits.max()).astype(np.float64) / made.temperature
    until = np.cumsum(np.exp(x))
    border = until[data.draw(st.integers(0, logits.size - 1))] / until[-1]
    offset = data.draw(st.sampled_from([0.0, 1e-12, -1e-12, 1e-5, -1e-5, 1e-3, -1e-3]))
    uniform = min(max(border + offset, 0.0), 1 - 2**-53)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for sampler in (whole, part):
        aim(sampler, uniform)
    assert part.sample(best_of(logits, keep, lambda: logits, rng)) == whole.sample(logits)


@pytest.mark.parametrize(("offset", "place"), [(-1e-6, None), (1e-6, None), (-1e-3, 0), (1e-3, 1)])
def test_what_a_rounding_of_the_whole_row_could_change_is_not_certain(offset, place):
    """Its sums are in float32, so a random number this near to a border may fall either way."""
    two = np.zeros(2, np.float32)
    assert draw(two, np.float32(-INF), 0.0, 1.0, np.float32(-INF), [0.5 + offset]) == place


@settings(deadline=None, max_examples=300)
@given(rows, st.sampled_from([1e-4, 0.1, 0.6, 1.0, 1.5, 10.0]), st.integers(1, 300), st.integers())
def test_the_rest_has_no_more_mass_than_its_bound(logits, temperature, keep, seed):
    best = best_of(logits, keep, never, np.random.default_rng(abs(seed)))
    others = np.delete(logits, best.ids).astype(np.float64)
    # The best one, and what a mask may leave of the known ones.
    for top in best.values[np.isfinite(best.values)][[0, -1]].tolist():
        mass = np.exp((others - top) / temperature).sum()
        # Less than what a float32 sum of a row sees beside the best token's 1 is nothing.
        assert mass <= rest_mass(best, top, temperature) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"temperature": 1, "top_k": 20},
        {"temperature": 1, "top_k": 200, "min_p": 0.1},
        {"temperature": 0.6, "top_p": 0.95},
        {"temperature": 0.6, "top_p": 0.95, "frequency_penalty": 0.1, "logit_bias": {3: -1.0}},
    ],
    ids=str,
)
def test_what_is_decided_by_the_best_fetches_nothing(options):
    made = params(**options, seed=11)
    whole, part = (Sampler(made, PEAKED.size, [1, 2, 3]) for _ in range(2))
    for _ in range(60):
        assert part.sample(kept(PEAKED)) == whole.sample(PEAKED)


def test_a_grammars_mask_fetches_nothing_while_the_best_have_what_it_allows():
    allowed = np.argsort(-PEAKED)[[3, 20, 100]]
    mask = np.full(PEAKED.size, -INF, np.float32)
    mask[allowed] = 0
    made = params(temperature=0.3, seed=2)
    whole, part = Sampler(made, PEAKED.size), Sampler(made, PEAKED.size)
    tokens = [part.sample(kept(PEAKED), mask) for _ in range(50)]
    assert tokens == [whole.sample(PEAKED, mask) for _ in range(50)]
    assert {token.id for token in tokens} <= set(allowed.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 0},
        {"repetition_penalty": 0.9},
        {"presence_penalty": -0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {19_999: 5.0}},
        {"temperature": 1.0, "top_k": 256},  # what equals the last may be among the others
    ],
    ids=str,
)
def test_an_undecided_draw_fetches_the_row(options):
    logits: Logits = np.sort(PEAKED)[::-1].copy()
    made = SamplingParams(**{"temperature": 0.0, **options}, seed=1)
    sampler = Sampler(params(**vars(made)), logits.size)
    fetched: list[int] = []

    def fetch() -> Logits:
        fetched.append(1)
        return logits

    sampler.sample(best_of(logits, 256, fetch))
    assert len(fetched) == 1


def test_equal_best_tokens_beyond_the_kept_fetch_the_row():
    """The engine may keep any of them; the answer has the lowest id."""
    logits = np.zeros(300, np.float32)
    best = best_of(logits, 8, lambda: logits)._replace(ids=np.arange(100, 108))
    assert Sampler(params(temperature=0), 300).sample(best).id == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2}])
@pytest.mark.parametrize(
    ("values", "rest"),
    [((0, math.nan, 1), math.nan), ((0, INF, 1), math.nan), ((-INF, -INF, -INF), math.nan)],
    ids=str,
)
def test_a_row_without_a_distribution_is_the_engines_fault(options, values, rest):
    logits = row(*values)
    best = best_of(row(0, 0, 0), 2, lambda: logits)._replace(rest=rest)
    with pytest.raises(BackendError, match=r"non-finite|no token is left"):
        Sampler(params(**options), 3).sample(best)

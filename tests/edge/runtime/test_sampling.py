from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge.bundle.manifest import SamplingDefaults
from edge.cli.settings_options import attribute_texts
from edge.errors import BackendError, RequestError
from edge.runtime.sampling import SampledToken, Sampler, _mark_before, _running_sums, _top_ids
from edge.runtime.sampling_params import KNOBS, SamplingParams
from edge.runtime.sampling_reference import (
    apply_logit_bias,
    apply_presence_frequency,
    apply_repetition_penalty,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    scale,
)
from tests.edge.runtime.sampling_definition import final_probabilities

DEFAULTS = SamplingDefaults()
INF = math.inf


def params(**options) -> SamplingParams:
    return SamplingParams(**options).resolve(DEFAULTS)


def row(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def log_row(*probabilities: float) -> np.ndarray:
    return np.array([math.log(p) for p in probabilities], np.float32)


class Fixed:
    """A generator whose first number of each batch the test chooses; the others are 0."""

    def __init__(self, first: float) -> None:
        self.first = first

    def random(self, size: int) -> np.ndarray:
        return np.array([self.first] + [0.0] * (size - 1))


def aim(sampler: Sampler, uniform: float) -> None:
    sampler._rng = Fixed(uniform)  # type: ignore[assignment]


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, "from 0 to 10"),
        ("temperature", 10.5, "from 0 to 10"),
        ("temperature", math.nan, "from 0 to 10"),
        ("temperature", INF, "from 0 to 10"),
        ("temperature", True, "from 0 to 10"),
        ("temperature", "0.6", "from 0 to 10"),
        ("top_p", 1.01, "from 0 to 1"),
        ("min_p", -0.01, "from 0 to 1"),
        ("repetition_penalty", 0.0, "from 0.1 to 10"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("presence_penalty", None, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("top_k", -1, "from 0 to"),
        ("top_k", 50.0, "an integer"),
        ("top_k", True, "an integer"),
        ("seed", -1, "from 0 to 18446744073709551615"),
        ("seed", 2**64, "from 0 to 18446744073709551615"),
        ("max_tokens", 0, "from 1 to"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", True, "from 0 to 20"),
        ("stop", "###", "a tuple of texts"),
        ("stop", ("",), "not empty"),
        ("stop", (1,), "a text"),
        ("stop_token_ids", 7, "a tuple of token ids"),
        ("stop_token_ids", (-1,), "from 0 to"),
        ("logit_bias", [(1, 2.0)], "a mapping"),
        ("logit_bias", {-1: 1.0}, "from 0 to"),
        ("logit_bias", {1: 101.0}, "from -100 to 100"),
        ("logit_bias", {1: -INF}, "from -100 to 100"),
        ("ignore_eos", 1, "true or false"),
    ],
)
def test_wrong_values_are_refused_by_name_value_and_range(name, value, allowed):
    shown = value
    if isinstance(value, tuple):
        (shown,) = value
    elif isinstance(value, dict):
        ((key, bias),) = value.items()
        shown = key if key < 0 else bias
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert name in message
    assert message.endswith(f"not {shown!r}")
    assert allowed in message


@pytest.mark.parametrize("name", KNOBS)
def test_the_docstring_names_the_range_that_the_table_has(name: str):
    """It is the help of the command line, too."""
    knob, text = KNOBS[name], attribute_texts(SamplingParams)[name]
    for end in (knob.low, knob.high):
        values: dict[str, Any] = {name: end}
        assert getattr(SamplingParams(**values), name) == end
    if name not in ("top_k", "max_tokens"):  # no bound that anybody meets
        high = "2**64 - 1" if name == "seed" else f"{knob.high:g}"
        assert f"{knob.low:g}..{high}" in text


def test_models_have_defaults_for_knobs_only():
    assert set(SamplingDefaults.__struct_fields__) - {"assumed"} < KNOBS.keys()


def test_parameters_are_frozen_copies():
    bias = {1: 2}
    made = SamplingParams(logit_bias=bias, stop=["a"], temperature=1)  # type: ignore[arg-type]
    bias[1] = 3
    assert made.logit_bias == {1: 2.0}
    assert made.stop == ("a",)
    assert made == SamplingParams(logit_bias={1: 2.0}, stop=("a",), temperature=1.0)
    with pytest.raises(AttributeError):
        made.temperature = 0.5  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(made)) == copy.copy(made) == made


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("max_new_tokens", "did you mean max_tokens?"),
        ("n_predict", "did you mean max_tokens?"),
        ("repeat_penalty", "did you mean repetition_penalty?"),
        ("temprature", "did you mean temperature?"),
        ("do_sample", "temperature 0 takes the likeliest token, more draws it"),
        ("qqq", "there are temperature, top_k, "),
    ],
)
def test_a_wrong_name_says_the_right_one(name: str, instead: str):
    options: dict[str, Any] = {name: 1}
    with pytest.raises(RequestError, match=f"no {name}: {re.escape(instead)}"):
        SamplingParams(**options)
    with pytest.raises(RequestError, match=f"no {name}: "):
        replace(SamplingParams(), **options)
    with pytest.raises(RequestError, match=r"names: SamplingParams\(temperature=0.6\)"):
        SamplingParams(0.5)  # type: ignore[call-arg]


def test_numbers_of_numpy_are_numbers():
    values: Any = {
        "max_tokens": np.int64(5),
        "temperature": np.float32(0.5),
        "seed": np.uint64(2**64 - 1),
        "logprobs": np.int32(2),
        "stop_token_ids": [np.int64(7)],
        "logit_bias": {np.int64(1): np.float16(2)},
    }
    made = SamplingParams(**values)
    plain = SamplingParams(
        max_tokens=5,
        temperature=0.5,
        seed=2**64 - 1,
        logprobs=2,
        stop_token_ids=(7,),
        logit_bias={1: 2.0},
    )
    assert made == plain
    assert repr(made) == repr(plain)  # and are stored as Python's


def test_resolve_fills_only_open_parameters():
    defaults = SamplingDefaults(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.2
    )
    resolved = SamplingParams(temperature=0, top_k=0, seed=3).resolve(defaults)
    assert resolved == SamplingParams(
        temperature=0.0, top_k=0, top_p=0.95, min_p=0.1, repetition_penalty=1.2, seed=3
    )
    with pytest.raises(RequestError, match="top_p must be"):
        SamplingParams().resolve(SamplingDefaults(top_p=3.0))


def test_unresolved_parameters_are_refused():
    with pytest.raises(RequestError, match=r"top_k, top_p, min_p, repetition_penalty open"):
        Sampler(SamplingParams(temperature=0.5), 4)


def test_ids_outside_the_vocabulary_are_refused():
    for made in (
        lambda: Sampler(params(), 4, [0, 4]),
        lambda: Sampler(params(logit_bias={4: 1.0}), 4),
        lambda: Sampler(params(), 4).accept(4),
        lambda: final_probabilities(row(1, 2, 3, 4), params(), generated_ids=[4]),
    ):
        with pytest.raises(RequestError, match=r"token id 4.*ends at 3"):
            made()


# --- the steps, on four numbers -----------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = row(2, -2, 0, 3)
    apply_repetition_penalty(logits, np.array([0, 1, 2, 0]), 2.0)  # a repeat counts once
    assert logits.tolist() == [1, -4, 0, 3]


def test_presence_is_subtracted_once_and_frequency_per_occurrence():
    logits = row(1, 1, 1, 1)
    apply_presence_frequency(logits, np.array([1, 3]), np.array([1, 3]), 0.5, 0.25)
    assert logits.tolist() == [1, 0.25, 1, -0.25]


def test_bias_is_added_and_lifts_no_forbidden_token():
    logits = row(1, 1, -INF, 1)
    apply_logit_bias(logits, {1: -100.0, 2: 5.0, 3: 2.5})
    assert logits.tolist() == [1, -99, -INF, 3.5]


def test_scale_divides_by_the_temperature():
    logits = row(3, 1, -INF, 2)
    assert scale(logits, 0.5).tolist() == [0, -4, -INF, -2]
    assert logits.tolist() == [3, 1, -INF, 2]


def test_top_k_breaks_ties_by_id():
    assert keep_top_k(row(1, 2, 2, 2), 2).tolist() == [False, True, True, False]
    assert keep_top_k(row(1, 2, 2, 2), 0).all()
    assert keep_top_k(row(1, 2, 2, 2), 9).all()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.0, [0, 0, 0, 1]),
        (0.45, [0, 0, 0, 1]),
        (0.55, [0, 0, 1, 1]),
        (0.85, [0, 1, 1, 1]),
        (0.95, [1, 1, 1, 1]),
        (1.0, [1, 1, 1, 1]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    assert keep_top_p(log_row(0.1, 0.1, 0.3, 0.5)[[1, 0, 2, 3]], top_p).tolist() == [
        bool(kept[1]),  # equal to its neighbour, so the lower id comes first
        bool(kept[0]),
        bool(kept[2]),
        bool(kept[3]),
    ]


def test_top_p_border_belongs_to_the_tokens_before_it():
    # Half of the mass is reached exactly by two of four equal tokens; the third is not needed.
    assert keep_top_p(row(0, 0, 0, 0), 0.5).tolist() == [True, True, False, False]


def test_min_p_is_relative_to_the_best_token():
    assert keep_min_p(log_row(0.6, 0.1, 0.05, 0.25), 0.4).tolist() == [True, False, False, True]
    assert keep_min_p(row(2, 1, 2, -INF), 1.0).tolist() == [True, False, True, False]
    assert keep_min_p(row(2, 1, 2, -INF), 0.0).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"temperature": 0}, [0, 0, 0, 1]),
        ({"temperature": 1e-6}, [0, 0, 0, 1]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.65}, [0, 0, 3 / 7, 4 / 7]),
        # Of 0.1 .. 0.4, 75 % would take three; of the two that top-k left (3/7, 4/7) it takes both.
        ({"top_k": 2, "top_p": 0.75}, [0, 0, 3 / 7, 4 / 7]),
        # Of all four, 50 % would take two; of the two that top-k left, one.
        ({"top_k": 2, "top_p": 0.5}, [0, 0, 0, 1]),
        ({"min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.85, "min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"logit_bias": {0: math.log(4)}}, [4 / 13, 2 / 13, 3 / 13, 4 / 13]),
        # Penalties see logits, not probabilities: here log(p), all of them negative.
        ({"repetition_penalty": 2.0}, [0.01 / 0.75, 0.04 / 0.75, 0.3 / 0.75, 0.4 / 0.75]),
        ({"presence_penalty": math.log(2)}, [0.1 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
        ({"frequency_penalty": math.log(2)}, [0.1 / 0.85, 0.05 / 0.85, 0.3 / 0.85, 0.4 / 0.85]),
    ],
)
def test_final_probabilities(options, expected):
    found = final_probabilities(
        log_row(0.1, 0.2, 0.3, 0.4), params(**options), prompt_ids=[0], generated_ids=[1, 1]
    )
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_mask_forbids_tokens_before_anything_is_ranked():
    logits, mask = log_row(0.1, 0.2, 0.3, 0.4), row(0, 0, 0, -INF)
    for options, expected in (
        ({}, [1 / 6, 2 / 6, 3 / 6, 0]),
        ({"top_k": 1}, [0, 0, 1, 0]),
        ({"temperature": 0}, [0, 0, 1, 0]),
        ({"top_k": 2}, [0, 0.4, 0.6, 0]),
    ):
        found = final_probabilities(logits, params(**options), mask=mask)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        sampler = Sampler(params(seed=0, **options), 4)
        assert {sampler.sample(logits, mask).id for _ in range(50)} == set(np.flatnonzero(found))


@pytest.mark.parity
def test_same_distribution_as_transformers():
    pytest.importorskip("torch", reason="live parity needs torch and transformers")
    hf = pytest.importorskip(
        "transformers.generation.logits_process", reason="live parity needs transformers"
    )
    import torch

    rng = np.random.default_rng(5)
    for _ in range(30):
        logits = (rng.standard_normal(500) * 3).astype(np.float32)
        seen = rng.choice(500, 40, replace=False)
        made = params(
            temperature=float(rng.uniform(0.3, 2)),
            top_k=int(rng.integers(1, 400)),
            top_p=float(rng.uniform(0.2, 1)),
            min_p=float(rng.uniform(0, 0.1)),
            repetition_penalty=float(rng.uniform(0.8, 1.5)),
        )
        ids = torch.tensor(seen)[None]
        scores = torch.tensor(logits)[None]
        for warper in (
            hf.RepetitionPenaltyLogitsProcessor(made.repetition_penalty),
            hf.TemperatureLogitsWarper(made.temperature),
            hf.TopKLogitsWarper(made.top_k),
            hf.TopPLogitsWarper(made.top_p),
            hf.MinPLogitsWarper(made.min_p),
        ):
            scores = warper(ids, scores)
        expected = torch.softmax(scores.double(), -1)[0].numpy()
        found = final_probabilities(logits, made, prompt_ids=seen[:20], generated_ids=seen[20:])
        np.testing.assert_allclose(found, expected, rtol=2e-5)


# --- the sampler is its definition --------------------------------------------------------------

# Few distinct values give ties; -200 has a weight that underflows, -30 one below float32's epsilon.
few = st.sampled_from([-INF, -200.0, -30.0, -1.0, -0.5, 0.0, 0.5, 1.0])
any_logit = st.floats(-40, 40, width=32)
rows = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 40), elements=few),
    hnp.arrays(np.float32, st.integers(1, 40), elements=any_logit),
    # Several blocks of the inverse CDF and groups of the top-k filter.
    hnp.arrays(np.float32, st.integers(250, 1500), elements=any_logit, fill=few),
).filter(lambda logits: logits.max() > -INF)
knobs = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.6, 1.0, 3.0]),
        "top_k": st.one_of(st.just(0), st.integers(1, 60)),
        "top_p": st.one_of(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(0, 1)),
        "min_p": st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    }
)


@settings(deadline=None, max_examples=150)
@given(rows, knobs)
def test_the_sampler_accepts_exactly_the_kept_set(logits, options):
    made = params(**options)
    reference = final_probabilities(logits, made)
    sampler = Sampler(made, logits.size)
    # Aim at the middle of each token's interval of the CDF of what top-k keeps: the token comes out
    # at the first attempt if and only if it is kept.
    candidates = final_probabilities(logits, params(**{**options, "top_p": 1.0, "min_p": 0.0}))
    ends = np.cumsum(candidates)
    # Narrower intervals than the rounding of a float32 block sum cannot be aimed at.
    for token_id in np.flatnonzero(candidates > 1e-5)[:50].tolist():
        aim(sampler, ends[token_id] - candidates[token_id] / 2)
        found = sampler.sample(logits).id
        assert reference[found] > 0
        assert (found == token_id) == (reference[token_id] > 0)


@settings(deadline=None, max_examples=60)
@given(rows, st.data())
def test_a_border_within_rounding_is_decided_as_by_the_full_sort(logits, data):
    # top_p right at a running sum, as exactly as a float can say it.
    x = scale(logits, 1.0)
    order = np.argsort(-x, kind="stable")
    shares = np.cumsum(np.exp(x)[order], dtype=np.float64)
    shares /= shares[-1]
    place = data.draw(st.integers(0, min(len(shares), 20) - 1))
    top_p = float(shares[place]) + data.draw(st.sampled_from([-1e-16, 0.0, 1e-16]))
    made = params(top_p=min(max(top_p, 0.0), 1.0))
    reference = final_probabilities(logits, made)
    weights = np.exp(x).astype(np.float64)
    ends = np.cumsum(weights) / weights.sum()
    sampler = Sampler(made, logits.size)
    for token_id in order[max(place - 2, 0) : place + 3].tolist():
        share = weights[token_id] / weights.sum()
        if share > 1e-5:
            aim(sampler, ends[token_id] - share / 2)
            assert (sampler.sample(logits).id == token_id) == (reference[token_id] > 0)


@settings(deadline=None, max_examples=150)
@given(rows, st.integers(1, 80))
def test_the_top_k_filter_is_the_sort(logits, k):
    expected = np.flatnonzero(keep_top_k(logits, k) & (logits > -INF))
    assert _top_ids(logits, k).tolist() == expected.tolist()


@settings(deadline=None, max_examples=50)
@given(rows)
def test_rank_is_decided_as_by_the_sort(logits):
    order = np.argsort(-logits, kind="stable")
    before = np.empty(logits.size, bool)
    for rank in range(0, logits.size, max(1, logits.size // 20)):
        _mark_before(logits, int(order[rank]), before)
        assert set(np.flatnonzero(before)) == set(order[:rank])


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_running_sums_cover_the_row(size):
    weights = np.random.default_rng(size).random(size, np.float32)
    sums = _running_sums(weights)
    assert len(sums) == -(-size // 256)
    np.testing.assert_allclose(sums[-1], math.fsum(weights.tolist()), rtol=1e-6)


def test_the_end_of_the_cdf_never_gives_a_token_without_mass():
    sampler = Sampler(params(), 600)
    logits = np.full(600, -INF, np.float32)
    logits[[3, 300]] = 0
    for uniform, expected in ((0.0, 3), (0.4999, 3), (0.5, 300), (1 - 2**-53, 300), (1.0, 300)):
        aim(sampler, uniform)
        assert sampler.sample(logits).id == expected


@given(
    data=st.data(),
    temperature=st.sampled_from([0.0, 0.6, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([0.8, 1.0]),
    penalties=st.sampled_from([(1.0, 0.0), (1.3, 0.5)]),
    seed=st.integers(0, 2**32),
)
def test_a_guess_is_what_would_be_drawn_and_changes_nothing(
    data, temperature, top_k, top_p, penalties, seed
):
    """From the same logits: whatever is guessed how far ahead, in between and before."""
    made = params(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalties[0],
        frequency_penalty=penalties[1],
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((12, 30)).astype(np.float32) * 2
    others = rng.standard_normal((12, 30)).astype(np.float32) * 2
    plain, guessing = (Sampler(made, 30, [1, 2, 3]) for _ in range(2))
    expected = [plain.sample(each).id for each in rows]
    place = 0
    while place < len(rows):
        ahead = data.draw(st.integers(0, len(rows) - place))
        guesses = [guessing.guess(each) for each in rows[place : place + ahead]]
        assert [guess for guess, _ in guesses] == expected[place : place + ahead]
        assert all(0 < chance <= 1 + 1e-6 for _, chance in guesses)
        guessing.forget_guesses()
        for each in others[: data.draw(st.integers(0, 3))]:
            guessing.guess(each)
        guessing.forget_guesses()
        assert guessing.sample(rows[place]).id == expected[place]
        place += 1


def test_the_chance_of_a_guess_is_its_probability():
    logits = log_row(0.5, 0.3, 0.2)
    greedy = Sampler(params(temperature=0.0), 3)
    guess, chance = greedy.guess(logits)
    assert guess == 0
    assert chance == pytest.approx(0.5)
    drawn = {}
    for seed in range(40):
        sampler = Sampler(params(temperature=1.0, top_k=2, seed=seed), 3)
        guess, chance = sampler.guess(logits)
        drawn[guess] = chance
    assert drawn == {0: pytest.approx(0.5), 1: pytest.approx(0.3)}  # nothing is renormalised


def test_a_row_that_the_draft_spoilt_is_refused():
    sampler = Sampler(params(temperature=1.0), 3)
    with pytest.raises(BackendError, match="non-finite"):
        sampler.guess(row(0.0, math.nan, 1.0))
    with pytest.raises(BackendError, match="shape"):
        sampler.guess(row(0.0, 1.0))


CASES = [
    {"temperature": 0.6},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 1.3, "top_k": 15, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.8, "repetition_penalty": 1.3, "logit_bias": {2: 1.5}},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("size", [24, 700])
def test_frequencies_match_the_definition(options, size):
    num_draws = 6000
    rng = np.random.default_rng(size)
    logits = rng.standard_normal(size).astype(np.float32)
    logits[5] = -INF
    logits[7:10] = logits[7]  # ties
    made = params(seed=11, **options)
    prompt = [1, 2, 3, 3]
    sampler = Sampler(made, size, prompt)
    # Every draw is the first.
    sampler._count = lambda _: None  # type: ignore[assignment,method-assign,return-value]
    counts = np.bincount([sampler.sample(logits).id for _ in range(num_draws)], minlength=size)
    expected = final_probabilities(logits, made, prompt_ids=prompt) * num_draws
    assert counts[expected == 0].sum() == 0
    # Tokens that are expected less than ten times are pooled, as the chi-square test asks for.
    common = expected >= 10
    found = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    chi2 = float(((found - wanted) ** 2 / wanted).sum())
    degrees = max(len(found) - 1, 1)
    # Wilson and Hilferty's normal approximation; 4 sigma is one false alarm in 30,000.
    z = ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert z < 4


def test_when_every_attempt_fails_the_full_sort_draws(monkeypatch):
    logits = np.random.default_rng(2).standard_normal(50).astype(np.float32)
    made = params(top_p=0.2, seed=4)
    expected = final_probabilities(logits, made)
    sampler = Sampler(made, 50)
    monkeypatch.setattr("edge.runtime.sampling._in_nucleus", lambda *_: False)
    found = np.bincount([sampler.sample(logits).id for _ in range(3000)], minlength=50) / 3000
    assert np.abs(found - expected).max() < 0.05


@pytest.mark.parametrize("spread", [0.8, 6.0])  # nearly flat, and peaked
def test_a_whole_vocabulary(spread):
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal(151_936) * spread).astype(np.float32)
    for options in ({"top_p": 0.95}, {"top_p": 0.4}, {"top_k": 50}, {"top_k": 3000, "min_p": 0.1}):
        made = params(temperature=0.6, seed=2, **options)
        reference = final_probabilities(logits, made)
        sampler = Sampler(made, logits.size)
        ids = [sampler.sample(logits).id for _ in range(200)]
        assert (reference[ids] > 0).all()
        # The kept set is halved into its likelier and its less likely tokens.
        order = np.argsort(-reference, kind="stable")
        likely = order[: 1 + int(np.searchsorted(np.cumsum(reference[order]), 0.5))]
        expected = reference[likely].sum()
        share = np.isin(ids, likely).mean()
        assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / len(ids)) + 1e-9


# --- one answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_penalties_follow_the_answer(temperature):
    rng = np.random.default_rng(3)
    made = params(
        temperature=temperature,
        top_p=0.6,
        repetition_penalty=1.4,
        presence_penalty=0.3,
        frequency_penalty=0.7,
        logit_bias={4: 2.0, 9: -3.0},
        seed=8,
    )
    prompt = [3, 3, 17]
    answer: list[int] = []
    sampler = Sampler(made, 20, prompt)
    for _ in range(60):
        logits = rng.standard_normal(20).astype(np.float32)
        expected = final_probabilities(logits, made, prompt_ids=prompt, generated_ids=answer)
        # A second sampler that is told the same history stands at the same distribution.
        told = Sampler(made, 20, prompt)
        for token_id in answer:
            told.accept(token_id)
        np.testing.assert_array_equal(told._adjust(logits, None), sampler._adjust(logits, None))
        token = sampler.sample(logits)
        assert expected[token.id] > 0
        answer.append(token.id)
    assert len(set(answer)) > 10


def test_the_seed_the_place_and_the_logits_decide():
    made = params(top_p=0.2, seed=5)
    rng = np.random.default_rng(0)
    flat, peaked = rng.standard_normal((2, 300)).astype(np.float32)
    peaked[7] += 30
    # Top-p 0.2 on the flat row costs many attempts, on the peaked one none.
    one, other = Sampler(made, 300), Sampler(made, 300)
    for _ in range(5):
        one.sample(flat)
        other.sample(peaked)
    assert [one.sample(flat) for _ in range(20)] == [other.sample(flat) for _ in range(20)]
    another = Sampler(params(top_p=0.2, seed=6), 300)
    assert [another.sample(flat) for _ in range(20)] != [one.sample(flat) for _ in range(20)]


GOLDEN_DRAWS: list[tuple[dict[str, Any], list[int]]] = [
    ({"top_p": 1.0, "top_k": 0}, [50, 200, 279, 0, 143, 193, 86, 250, 143, 100, 293, 8]),
    ({"top_p": 0.5, "top_k": 0}, [50, 200, 200, 0, 143, 43, 0, 250, 143, 100, 150, 250]),
    (
        {"top_p": 0.9, "top_k": 20, "min_p": 0.1},
        [50, 200, 200, 0, 143, 193, 293, 250, 143, 93, 293, 0],
    ),
]


def test_a_seed_gives_the_answers_that_it_always_gave():
    """Recorded: who keeps a seed keeps its answer over versions of this package."""
    logits = -0.5 * (np.arange(300) * 7 % 50).astype(np.float32)
    for options, golden in GOLDEN_DRAWS:
        sampler = Sampler(params(temperature=1.0, seed=12345, **options), 300)
        assert [sampler.sample(logits).id for _ in range(12)] == golden


def test_a_fresh_seed_is_reported_and_repeats_the_answer():
    logits = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    first, second = Sampler(params(), 300), Sampler(params(), 300)
    assert first.seed != second.seed
    again = Sampler(params(seed=first.seed), 300)
    assert [first.sample(logits).id for _ in range(9)] == [
        again.sample(logits).id for _ in range(9)
    ]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0}])
def test_greedy_takes_the_lowest_id_of_equal_ones(options):
    logits = row(1, 3, 2, 3)
    sampler = Sampler(params(**options), 4)
    assert {sampler.sample(logits).id for _ in range(20)} == {1}
    assert final_probabilities(logits, params(**options)).tolist() == [0, 1, 0, 0]


def test_logprobs_are_those_of_the_model_itself():
    logits = log_row(0.1, 0.2, 0.2, 0.5)
    options = {"temperature": 0.3, "logit_bias": {3: -100.0, 1: 9.0}}
    token = Sampler(params(logprobs=3, **options), 4).sample(logits)
    assert token.id == 1
    assert token.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert token.top_logprobs is not None
    assert [i for i, _ in token.top_logprobs] == [3, 1, 2]
    assert [math.exp(p) for _, p in token.top_logprobs] == pytest.approx([0.5, 0.2, 0.2], abs=1e-6)
    assert Sampler(params(**options), 4).sample(logits) == SampledToken(1, None, None)
    assert Sampler(params(logprobs=0, **options), 4).sample(logits).top_logprobs == ()


def test_logprobs_leave_out_tokens_that_cannot_come():
    token = Sampler(params(logprobs=5, seed=0), 4).sample(row(0, -INF, 0, -INF))
    assert token.top_logprobs is not None
    assert [i for i, _ in token.top_logprobs] == [0, 2]
    assert [p for _, p in token.top_logprobs] == pytest.approx([-math.log(2)] * 2)


def test_the_row_is_left_alone_and_may_be_any_view():
    whole = np.random.default_rng(1).standard_normal((300, 2)).astype(np.float32)
    logits = whole[:, 0]
    before = whole.copy()
    whole.flags.writeable = False
    options = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "top_k": 9, "logprobs": 2}
    for made in (params(seed=1, **options), params(seed=1, top_p=0.5), params(temperature=0)):
        found = Sampler(made, 300, [1]).sample(logits)
        assert found == Sampler(made, 300, [1]).sample(before[:, 0].copy())
    assert (whole == before).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2}, {"logprobs": 1}])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, math.nan, 2, 3), "non-finite logits"),
        ((1, INF, 2, 3), "non-finite logits"),
        ((-INF, math.nan, -INF, -INF), "non-finite logits"),
        ((-INF,) * 4, "no token is left"),
    ],
)
def test_rows_without_a_distribution_are_the_engines_fault(options, values, message):
    made = params(logit_bias={0: 1.0}, **options)
    with pytest.raises(BackendError, match=message):
        Sampler(made, 4).sample(row(*values))
    with pytest.raises(BackendError, match=message):
        final_probabilities(row(*values), made)


def test_a_mask_that_forbids_everything_is_refused():
    with pytest.raises(BackendError, match="mask"):
        Sampler(params(), 4).sample(row(1, 2, 3, 4), np.full(4, -INF, np.float32))


@pytest.mark.parametrize("logits", [np.zeros(5, np.float32), np.zeros(4), np.zeros((1, 4))])
def test_rows_of_another_shape_or_type_are_refused(logits):
    with pytest.raises(BackendError, match=r"expected \[4\] and float32"):
        Sampler(params(), 4).sample(logits)


def test_the_greatest_finite_spread_neither_warns_nor_fails():
    # Some models mask with the lowest finite float instead of -inf.
    logits = row(np.finfo(np.float32).min, 10, 9, np.finfo(np.float32).min)
    made = params(temperature=1e-5, repetition_penalty=2.0, top_p=0.9, logprobs=4, seed=0)
    token = Sampler(made, 4, [0, 3]).sample(logits)
    assert token.id == 1
    assert token.top_logprobs is not None
    assert all(math.isfinite(p) for _, p in token.top_logprobs)

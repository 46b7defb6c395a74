"""The policy on machines of known speed: it must find out what they are good at."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.runtime.scheduler.draft_policy import DecodeRun, Draft, DraftPolicy
from edge.runtime.scheduler.policy import CostCurve, Policy


class Machine:
    """A step takes ``base_s`` and so much per token, but no less than reading the weights."""

    def __init__(self, read_s: float, base_s: float, token_s: float, noise: float = 0.0) -> None:
        self.read_s, self.base_s, self.token_s = read_s, base_s, token_s
        self._noise = noise
        self._random = random.Random(0)

    def seconds(self, tokens: int) -> float:
        exact = max(self.read_s, self.base_s + self.token_s * tokens)
        return exact * (1 + self._noise * self._random.random())


CPU = Machine(0.0, 0.020, 0.010, 0.1)  # the 1.5B shape on two cores
GPU = Machine(0.010, 0.004, 0.0001, 0.1)  # flat up to 60 tokens


def mixed_load(machine: Machine, decoding: int, target_itl_s: float | None = None) -> list[float]:
    """Gaps between tokens while long prompts run between the decode steps, once it has settled."""
    policy = Policy(8, 512, target_itl_s)
    policy.costs.prefill.observe(512, machine.seconds(512))
    policy.costs.decode.observe(1, machine.seconds(1))
    policy.costs.prefill.observe(1, machine.seconds(1))
    gaps = []
    for _ in range(600):
        chunk = policy.chunk_tokens(decoding)
        assert 0 <= chunk <= 512
        gap = machine.seconds(decoding + (chunk == 0))
        policy.costs.decode.observe(decoding + (chunk == 0), gap)
        if chunk:
            chunk_s = machine.seconds(chunk)
            policy.costs.prefill.observe(chunk, chunk_s)
            gap += chunk_s
        gaps.append(gap)
    return gaps[100:]


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("decoding", [1, 2, 8])
def test_chunks_are_no_larger_than_nine_tenths_of_the_speed_need(machine: Machine, decoding: int):
    machine = Machine(machine.read_s, machine.base_s, machine.token_s, 0.02)
    gaps = sorted(mixed_load(machine, decoding))
    alone = 512 / machine.seconds(512)
    needed = next(
        size
        for size in range(1, 513)
        if size / (machine.seconds(size) + machine.seconds(decoding)) >= 0.9 * alone or size == 512
    )
    gap = machine.seconds(decoding) + machine.seconds(needed)
    assert 0.75 * gap <= gaps[len(gaps) // 2] <= 1.35 * gap  # noise, and sizes that count as one


def test_a_target_gives_prompts_what_it_leaves():
    gaps = sorted(mixed_load(CPU, 1, target_itl_s=0.5))
    assert 0.35 < gaps[len(gaps) // 2] < 0.55
    assert Policy(4, 512).chunk_tokens(0) == 512
    assert Policy(4, 512).chunk_tokens(2) == 32  # before anything is known


def test_a_target_is_kept_where_no_chunk_fits():
    gaps = sorted(mixed_load(CPU, 2, target_itl_s=0.06))  # 40 ms, and 30 ms for the least chunk
    assert gaps[len(gaps) // 2] < 0.06  # 50 ms: a token of the prompt runs in the decode step
    assert gaps[int(0.99 * len(gaps))] < 0.06


def test_a_slow_hour_is_forgotten():
    """Sizes that are passed over are not measured: what is believed of them must fade."""
    policy = Policy(8, 512, target_itl_s=0.05)
    policy.costs.decode.observe(1, 0.03)
    policy.costs.decode.observe(2, 0.30)
    refused = next(i for i in range(20_000) if policy.allows(1))
    assert refused > 100
    policy = Policy(8, 512)
    for size, seconds in ((1, 0.010), (64, 0.5), (512, 4.0)):
        policy.costs.prefill.observe(size, seconds)
    policy.costs.decode.observe(1, 0.010)
    most = 0
    for _ in range(20_000):
        chunk = max(policy.chunk_tokens(1), 1)
        policy.costs.prefill.observe(chunk, GPU.seconds(chunk))
        most = max(most, chunk)
    assert most >= 48  # as much as it computes while it reads its weights


def test_a_lone_slow_step_counts_for_little_and_not_for_long():
    curve = CostCurve()
    curve.observe(1, 0.01)
    curve.observe(1, 0.1)  # a page fault
    assert (curve.estimate(1) or 0) <= 0.0325  # a quarter of it is believed
    for _ in range(4):
        curve.observe(1, 0.01)
    assert (curve.estimate(1) or 0) < 0.0125
    for _ in range(20):  # a machine that really became slow
        curve.observe(1, 0.1)
    assert (curve.estimate(1) or 0) > 0.099


def test_the_target_limits_the_batch():
    policy = Policy(8, 512, target_itl_s=0.065)
    running = 1
    for _ in range(50):
        policy.costs.decode.observe(running, 0.020 + 0.010 * running)
        if policy.allows(running):
            running += 1
        elif running > 4:
            running -= 1
    assert running == 4
    assert policy.allows(0)
    assert not policy.allows(4)
    assert Policy(2, 512).allows(1)
    assert not Policy(2, 512).allows(2)


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=30),
    size=st.integers(1, 600),
    read_s=st.floats(0.001, 0.1),
    token_s=st.floats(0.0001, 0.01),
)
def test_estimates_of_a_roofline_are_never_dearer_than_it(
    sizes: list[int], size: int, read_s: float, token_s: float
):
    curve = CostCurve()
    assert curve.estimate(size) is None
    for each in sizes:
        curve.observe(each, max(read_s, token_s * each))
    estimate = curve.estimate(size)
    assert estimate is not None
    # Sizes of one bucket differ by a quarter.
    assert estimate <= 1.3 * max(read_s, token_s * size)


def simulate(machine: Machine, acceptance: float, batch: int, steps: int = 1500) -> float:
    """Tokens per second with drafts of 8, relative to plain decode, as the policy plays it."""
    policy = DraftPolicy(Policy(8, 512))
    policy.plain.costs.prefill.observe(512, machine.seconds(512))
    policy.plain.costs.decode.observe(1, machine.seconds(1))
    draw = random.Random(1)
    believed = [0.3] * batch
    tokens = seconds = 0.0
    for _ in range(steps):
        if not tokens:
            policy.plain.costs.decode.observe(batch, machine.seconds(batch))
        for run in policy.draft_plan([Draft(8, p) for p in believed]):
            took = machine.seconds(len(run.rows) * (1 + run.drafted))
            seconds += took
            if run.drafted:
                policy.costs.observe_verify(len(run.rows), 1 + run.drafted, took)
            else:
                policy.plain.costs.decode.observe(len(run.rows), took)
            for row in run.rows:
                for place in range(1 + run.drafted):
                    tokens += 1
                    right = draw.random() < acceptance
                    believed[row] += 0.15 * (right - believed[row])
                    if not right or place == run.drafted:
                        break
    return tokens / seconds / (batch / machine.seconds(batch))


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("batch", [1, 4])
def test_speculation_never_costs_much_and_pays_where_it_can(machine: Machine, batch: int):
    for acceptance in (0.0, 0.2, 0.5):
        assert simulate(machine, acceptance, batch) > 0.95 / 1.1  # noise of one plain step
    if machine is GPU:
        assert simulate(machine, 0.9, batch) > 3
    elif batch == 1:
        assert simulate(machine, 0.95, batch) > 1.5


@pytest.mark.parametrize(("gain", "drafted"), [(0.97, 0), (1.03, 0), (1.08, 1)])
def test_speculation_must_promise_more_than_plain_decode(gain: float, drafted: int):
    policy = DraftPolicy(Policy(8, 512))
    policy.plain.costs.decode.observe(1, 0.010)
    policy.costs.observe_verify(1, 2, 0.015 / gain)  # 1.5 tokens are to be expected of it
    assert policy.draft_plan([Draft(1, 0.5)]) == [DecodeRun((0,), drafted)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_reading_for_a_drafter_costs_at_most_twice_what_was_possible(share: float):
    """However many tokens come in the end; others gave hope of a share of what would pay."""
    policy, draft = DraftPolicy(Policy(4, 512)), Draft(4, 0.8)
    policy.plain.costs.decode.observe(1, 1.0)
    policy.costs.reading.observe(512, 20.0)
    price = policy.costs.reading_s(512)

    def reads(written: int, expected: float) -> bool:
        return policy.reads(512, draft, 1, written=written, expected=expected)

    pays = next(tokens for tokens in range(1, 1000) if reads(tokens, 0.0))
    assert pays > 10
    saved_s = price / pays  # by a token, about
    bought = next(tokens for tokens in range(1, 1000) if reads(tokens, share * pays))
    assert bought * saved_s + price <= 2.1 * min(price, bought * saved_s)
    assert reads(0, pays + 1.0), "hope of enough is enough"


def test_those_without_a_draft_run_apart_where_that_is_cheaper():
    policy = DraftPolicy(Policy(8, 512))
    for batch in range(1, 5):
        policy.plain.costs.decode.observe(batch, 0.03 + 0.01 * (batch - 1))
    drafts = [Draft(4, 0.95), Draft(0, 0.3), Draft(0, 0.3), Draft(0, 0.3)]
    policy.costs.observe_verify(4, 5, 0.24)  # row by row
    policy.costs.observe_verify(1, 5, 0.035)
    for drafted in (1, 2, 3):
        policy.costs.observe_verify(4, 1 + drafted, 0.2)
    plan = policy.draft_plan(drafts)
    assert plan == [DecodeRun((0,), 4), DecodeRun((1, 2, 3), 0)]
    assert policy.draft_plan([Draft(0, 0.9)] * 4) == [DecodeRun((0, 1, 2, 3), 0)]


@given(fixed=st.floats(0.001, 0.1), per_token=st.floats(0.0001, 0.01), decode=st.floats(0.001, 0.1))
def test_a_chunk_lasts_a_few_decode_steps_while_other_clients_are_about(
    fixed: float, per_token: float, decode: float
):
    policy = Policy(4, 512)
    assert policy.chunk_tokens(0, alert=True) == 32  # before anything is known
    for size in range(1, 513):
        policy.costs.prefill.observe(size, fixed + per_token * size)
    assert policy.chunk_tokens(0) == 512
    assert policy.chunk_tokens(1, alert=True) == 32  # no decode step is known
    policy.costs.observe_plain(1, decode)
    for decoding in (0, 1):
        size = policy.chunk_tokens(decoding, alert=True)
        assert 1 <= size <= policy.chunk_tokens(decoding)
        assert size <= 16 or fixed + per_token * size <= 1.2 * 2 * decode  # sizes are grouped
        if size < policy.chunk_tokens(decoding):
            assert size >= 16
            assert fixed + per_token * 2 * (size + 1) >= 2 * decode or size == 16

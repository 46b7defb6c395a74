"""What a draft model is predicted to give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_lab.planner.drafting import MOST_GUESSES, draft_speed, least_acceptance
from edge_lab.planner.memory import Deployment, plan_process_pair
from edge_lab.planner.models import BUILT_IN
from edge_lab.planner.plan import ModelPlan, find_device, make_plan
from edge_lab.planner.speed import FITTED, decode_s, verify_s


def make(
    draft: str | None = "deepseek-r1:1.5b", batch: int = 1, device: str = "agx-orin-64"
) -> ModelPlan:
    return make_plan(
        BUILT_IN["deepseek-r1:7b"],
        find_device(device),
        Deployment(batch=batch),
        FITTED,
        quants=["int4"],
        draft=None if draft is None else BUILT_IN[draft],
    )


def test_the_pair_of_7b_and_1_5b_pays_as_measured_elsewhere():
    """The figures of a pair with a fifth of the weights: 1.2 to 1.4 times at 70 to 80 %."""
    (option,) = make().options
    gains = {s.acceptance: s.gain for s in option.drafts if s.context == 512}
    assert gains[0.7] == pytest.approx(1.2, abs=0.12)
    assert gains[0.8] == pytest.approx(1.4, abs=0.15)
    assert option.least_acceptance is not None
    assert 0.3 < option.least_acceptance < 0.6


@given(
    acceptance=st.floats(0.0, 1.0),
    batch=st.sampled_from([1, 2, 4, 8]),
    context=st.integers(1, 4096),
)
def test_the_best_number_of_guesses_is_never_worse_than_none(
    acceptance: float, batch: int, context: int
):
    plan = make(batch=batch)
    mode, draft = plan.device.mode, plan.draft
    assert mode is not None
    assert draft is not None
    work = plan.options[0].work
    found = draft_speed(work, draft.work, mode, FITTED, batch, context, acceptance)
    assert 0 <= found.guesses <= MOST_GUESSES
    assert found.gain >= 1
    plain = batch / decode_s(work, mode, FITTED, batch, context)
    assert found.decode_tps == pytest.approx(found.gain * plain)
    better = draft_speed(work, draft.work, mode, FITTED, batch, context, min(acceptance + 0.1, 1.0))
    assert better.decode_tps >= found.decode_tps
    assert verify_s(work, mode, FITTED, batch, 0, context) == decode_s(
        work, mode, FITTED, batch, context
    )


def test_full_batches_need_more_acceptance_than_one_stream_and_a_large_draft_never_pays():
    least = {batch: make(batch=batch).options[0].least_acceptance for batch in (1, 8)}
    assert least[1] is not None
    assert least[8] is None or least[8] > least[1]
    (alike,) = make("deepseek-r1:7b").options
    assert alike.least_acceptance is None
    assert {speed.guesses for speed in alike.drafts} == {0}


def test_the_least_acceptance_is_where_drafts_begin():
    plan = make()
    mode, draft, (option,) = plan.device.mode, plan.draft, plan.options
    assert mode is not None
    assert draft is not None
    least = least_acceptance(
        lambda a: draft_speed(option.work, draft.work, mode, FITTED, 1, 512, a)
    )
    assert least == option.least_acceptance
    assert least is not None
    for shift, guesses in ((-0.002, 0), (0.002, 1)):
        found = draft_speed(option.work, draft.work, mode, FITTED, 1, 512, least + shift)
        assert min(found.guesses, 1) == guesses


def test_the_memory_of_a_pair_is_that_of_both_engines_in_one_process():
    both, alone = make().options[0].memory, make(None).options[0].memory
    own = make_plan(
        BUILT_IN["deepseek-r1:1.5b"],
        find_device("agx-orin-64"),
        Deployment(),
        FITTED,
        quants=["int4"],
    ).options[0]
    draft = own.memory
    assert both.device_bytes == alone.device_bytes + draft.device_bytes
    assert both.cache == alone.cache + draft.cache
    assert (both.python, both.runtime) == (alone.python, alone.runtime)
    assert both.process_bytes == alone.process_bytes + draft.device_bytes + draft.embeddings
    assert both.load_peak >= both.process_bytes
    assert both.build_peak == max(alone.build_peak, draft.build_peak)
    assert plan_process_pair(alone, None) is alone


def test_the_draft_of_a_cpu_is_planned_for_one():
    cpu = find_device("cpu")
    plan = make_plan(
        BUILT_IN["deepseek-r1:7b"],
        cpu,
        Deployment("ort-cpu"),
        FITTED,
        quants=["int4"],
        draft=BUILT_IN["deepseek-r1:1.5b"],
    )
    assert plan.draft is not None
    assert plan.options[0].drafts == ()  # of unknown bandwidth
    assert plan.options[0].memory.load_peak > plan.draft.memory.device_bytes

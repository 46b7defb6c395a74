"""The arithmetic of the predictions, and what a measurement changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.errors import ConfigError
from edge_lab.planner.devices import MODULES
from edge_lab.planner.memory import Deployment, plan_process_memory
from edge_lab.planner.models import BUILT_IN
from edge_lab.planner.speed import (
    FITTED,
    Efficiency,
    Measured,
    Work,
    calibrate,
    ceiling,
    decode_s,
    predict,
    prefill_ceiling_s,
    prefill_s,
    work_of,
)
from edge_make.recipe import VARIANTS, find_variant, recipe_linears

DOCUMENT = Path(__file__).parents[3] / "docs" / "planner.md"
AGX = MODULES["agx-orin-64"].mode(None)
PERFECT = Efficiency(weights=1, layer_s=0, cache=1, compute=1, batch=0, source="ideal")


def work_for(name: str, quant: str) -> Work:
    model = BUILT_IN[name].spec
    linears = recipe_linears(model, find_variant(quant))
    plan = plan_process_memory(model, linears, 4096, Deployment())
    return work_of(model, linears, plan.weights, Deployment())


@pytest.mark.parametrize(
    ("name", "quant", "ceiling"),
    [  # tokens per second of reading layers and lm_head once at 204.8 GB/s
        ("deepseek-r1:1.5b", "fp16", 66.3),
        ("deepseek-r1:1.5b", "int4-head-fp16", 170.0),
        ("deepseek-r1:1.5b", "int4-g128", 225.0),
        ("deepseek-r1:1.5b", "int4", 210.0),
        ("deepseek-r1:7b", "int4-g128", 52.4),
        ("deepseek-r1:7b", "int4", 48.5),
        ("deepseek-r1:8b", "fp16", 13.6),
        ("deepseek-r1:8b-0528", "int4-head-int4", 48.1),
    ],
)
def test_the_roofline_is_the_known_one(name: str, quant: str, ceiling: float):
    found = predict(work_for(name, quant), AGX, PERFECT, 1, 1)
    assert found.decode_ceiling_tps == pytest.approx(ceiling, rel=0.012)
    assert found.decode_tps == pytest.approx(found.decode_ceiling_tps)


def test_no_prediction_exceeds_the_roofline():
    for quant in ("fp16", "int8", "int4"):
        for context in (1, 512, 4096):
            found = predict(work_for("deepseek-r1:7b", quant), AGX, FITTED, 4, context)
            assert found.decode_tps < found.decode_ceiling_tps


def test_operations_are_two_per_weight_and_token():
    work = work_for("deepseek-r1:1.5b", "fp16")
    assert work.linear_ops == pytest.approx(2 * 1.310e9, rel=0.001)
    ideal = prefill_s(work, AGX, dataclasses.replace(PERFECT, weights=1e9), 1000)
    pairs = 1000 * 1001 / 2 * 4 * 28 * 12 * 128
    assert ideal * AGX.fp16_flops == pytest.approx(1000 * work.linear_ops + work.head_ops + pairs)


def test_every_chunk_of_a_prompt_reads_the_weights_again():
    work = work_for("deepseek-r1:7b", "fp16")
    whole, chunked = (prefill_s(work, AGX, PERFECT, 2000, size) for size in (None, 512))
    assert chunked - whole == pytest.approx(3 * work.step_bytes / AGX.bytes_per_s)
    assert prefill_s(work, AGX, PERFECT, 512, 512) == prefill_s(work, AGX, PERFECT, 512)


def test_int8_activations_speed_up_prefill_alone():
    w8a8, int8 = (work_for("deepseek-r1:7b", quant) for quant in ("int8-w8a8", "int8"))
    assert w8a8.int8_share == 1  # of the layers; the lm_head keeps float inputs
    assert int8.int8_share == 0
    assert prefill_s(w8a8, AGX, FITTED, 2048) < 0.6 * prefill_s(int8, AGX, FITTED, 2048)
    assert decode_s(w8a8, AGX, FITTED, 1, 512) == pytest.approx(
        decode_s(int8, AGX, FITTED, 1, 512), rel=0.03
    )


@given(
    weights=st.floats(0.05, 1.0),
    compute=st.floats(0.05, 0.95),
    batch=st.integers(1, 8),
    context=st.integers(1, 4096),
    prompt=st.integers(64, 4096),
)
@example(weights=1.0, compute=0.5, batch=1, context=1472, prompt=64)  # 1 but for rounding
def test_calibration_meets_the_measurement(
    weights: float, compute: float, batch: int, context: int, prompt: int
):
    """Whatever the truth is: predicted again with what was found, the measurement comes out."""
    truth = dataclasses.replace(FITTED, weights=weights, compute=compute)
    measured = measure("int4", truth, batch, context, prompt)
    found = calibrate(AGX, FITTED, [measured], "measured: bench.json")
    assert found.weights == pytest.approx(weights)
    assert found.compute == pytest.approx(compute)
    assert found.source == "measured: bench.json"


def test_faster_than_the_time_per_layer_drops_it():
    work = work_for("deepseek-r1:1.5b", "int4")
    truth = dataclasses.replace(FITTED, layer_s=0.0, weights=0.95)
    measured = Measured(work, 1, 256, decode_s(work, AGX, truth, 1, 256), 8, None, 1.0, "fast.json")
    found = calibrate(AGX, FITTED, [measured], "measured")
    assert found.layer_s == 0.0
    assert decode_s(work, AGX, found, 1, 256) == pytest.approx(measured.tpot_s)


def test_faster_than_memory_is_refused():
    work = work_for("deepseek-r1:1.5b", "int4")
    with pytest.raises(ConfigError, match=r"wrong\.json: 1\.00 ms per step is less than"):
        calibrate(
            AGX, FITTED, [Measured(work, 1, 256, 0.001, 512, 512, 0.1, "wrong.json")], "measured"
        )


@given(
    weights=st.floats(0.05, 1.0),
    layer_s=st.floats(0.0, 2e-4),
    compute=st.floats(0.05, 0.95),
    batch=st.integers(1, 8),
)
def test_several_precisions_also_give_the_time_per_layer(
    weights: float, layer_s: float, compute: float, batch: int
):
    """What one benchmark cannot tell apart: reading grows with the bits, launching does not."""
    truth = dataclasses.replace(FITTED, weights=weights, layer_s=layer_s, compute=compute)
    runs = [measure(quant, truth, batch, 256, 512) for quant in ("fp16", "int4", "int8")]
    found = calibrate(AGX, FITTED, runs, "measured: report.json")
    assert found.weights == pytest.approx(weights)
    assert found.layer_s == pytest.approx(layer_s, abs=1e-9)
    assert found.compute == pytest.approx(compute)


@given(st.lists(st.floats(0.8, 1.25), min_size=3, max_size=3), st.floats(0.4, 0.8))
def test_measurements_that_disagree_are_met_in_the_middle(noise: list[float], weights: float):
    """Within what a device can do: no layer in less than no time, no more than all bandwidth."""
    truth = dataclasses.replace(FITTED, weights=weights)
    runs = [
        dataclasses.replace(run, tpot_s=run.tpot_s * factor)
        for factor, quant in zip(noise, ("fp16", "int4", "int8"), strict=True)
        for run in [measure(quant, truth, 1, 256, 512)]
    ]
    found = calibrate(AGX, FITTED, runs, "measured")
    assert found.layer_s >= 0.0
    assert 0.0 < found.weights <= 1.0
    ratios = [decode_s(run.work, AGX, found, 1, 256) / run.tpot_s for run in runs]
    assert min(ratios) <= 1.0 + 1e-9 or found.weights == 1.0
    assert max(ratios) >= 1.0 - 1e-9


def measure(quant: str, truth: Efficiency, batch: int, context: int, prompt: int) -> Measured:
    """What a benchmark says of a device that is as ``truth``."""
    work = work_for("deepseek-r1:1.5b", quant)
    return Measured(
        work=work,
        batch=batch,
        context=context,
        tpot_s=decode_s(work, AGX, truth, batch, context),
        prompt_tokens=prompt,
        max_prefill=512,
        prefill_s=prefill_s(work, AGX, truth, prompt, 512),
        where=quant,
    )


def test_the_ceilings_of_the_document_are_those_of_the_planner():
    """docs/planner.md says which commands give its table; the numbers here are theirs."""
    text = DOCUMENT.read_text("utf-8").split("## Ceilings")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    shown = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}
    nano = MODULES["orin-nano-8"].mode("15W")
    expected = {}
    for variant in VARIANTS:
        model = BUILT_IN["deepseek-r1:1.5b"].spec
        linears = recipe_linears(model, find_variant(variant))
        weights = plan_process_memory(model, linears, 8192, Deployment()).weights
        work = work_of(model, linears, weights, Deployment())
        speeds = [
            f"{predict(work, mode, FITTED, 1, 1).decode_ceiling_tps:.1f}"
            for mode in (AGX, MODULES["orin-nx-16"].mode(None), nano)
        ]
        read = work.read_bytes(1, 1)
        expected[variant] = [f"{read / 1e6:,.0f}", f"{weights['scales'] / 1e6:,.0f}", *speeds]
    assert shown == expected


def test_a_ceiling_is_the_longer_of_reading_and_multiplying():
    work = work_for("deepseek-r1:1.5b", "int4")
    one, many = ceiling(work, AGX, 1, 1, 1), ceiling(work, AGX, 1, 512, 512)
    assert (one.bound, many.bound) == ("bandwidth", "arithmetic")
    assert one.step_s == work.read_bytes(1, 1) / AGX.bytes_per_s
    ideal = prefill_s(work, AGX, dataclasses.replace(PERFECT, weights=1e9), 512)
    assert many.step_s == pytest.approx(ideal)
    on_cpu = dataclasses.replace(AGX, knows_arithmetic=False)
    assert ceiling(work, on_cpu, 1, 512, 512).bound == "bandwidth"
    assert predict(work, on_cpu, FITTED, 1, 512).prefill_ceiling_tps is None


def test_no_prefill_is_faster_than_its_chunks_can_be():
    for name, quant in (("deepseek-r1:1.5b", "int4"), ("deepseek-r1:7b", "int8-w8a8")):
        work = work_for(name, quant)
        for tokens in (1, 511, 512, 513, 3000):
            least = prefill_ceiling_s(work, AGX, tokens, 512)
            assert least < prefill_s(work, AGX, FITTED, tokens, 512)
            whole = prefill_ceiling_s(work, AGX, tokens)
            assert least >= whole * (1 - 1e-9)
            assert (least == whole) == (tokens <= 512)


def test_planes_multiply_twice_on_a_gpu_and_once_on_a_cpu():
    model = BUILT_IN["deepseek-r1:1.5b"].spec
    linears = recipe_linears(model, find_variant("int8"))
    for deployment, times in ((Deployment("tensorrt"), 2), (Deployment("ort-cpu"), 1)):
        memory = plan_process_memory(model, linears, 4096, deployment)
        found = work_of(model, linears, memory.weights, deployment)
        assert found.linear_ops == times * work_for("deepseek-r1:1.5b", "fp16").linear_ops

"""Predictions against every published figure; the error is documented, whatever it is."""

from __future__ import annotations

import statistics

import pytest

from edge_lab.planner.published import SPEED_FIGURES, Figure
from edge_lab.planner.speed import FITTED
from tests.edge_lab.planner import record
from tests.edge_lab.planner.fit import MEMORY_FIGURES, error, fit, predicted_memory
from tests.edge_lab.planner.unseen import UNSEEN, errors


def test_every_figure_and_its_error_is_recorded():
    assert record.RECORD.read_text("utf-8") == record.text(), (
        "run: python -m tests.edge_lab.planner.record"
    )
    known = {(f.source, f.device, f.model, f.value) for f in SPEED_FIGURES}
    assert not known & {(f.source, f.device, f.model, f.value) for _, f in UNSEEN}


def test_one_unseen_request_on_the_fitted_module_is_predicted_within_a_fifth_in_the_median():
    assert len(UNSEEN) == 40
    assert statistics.median(errors("agx-orin-64", 1)) == pytest.approx(0.18, abs=0.01)
    assert statistics.median(map(abs, errors())) == pytest.approx(0.53, abs=0.01)


def test_the_factors_are_those_of_the_fit():
    found = fit()
    assert found.weights == pytest.approx(FITTED.weights, abs=0.001)
    assert found.layer_s == pytest.approx(FITTED.layer_s, abs=0.1e-6)
    assert found.compute == pytest.approx(FITTED.compute, abs=0.001)
    assert found.batch == pytest.approx(FITTED.batch, abs=0.001)


def of(kind: str, *, fitted: bool, source: str = "") -> list[Figure]:
    found = [
        f
        for f in SPEED_FIGURES
        if f.kind == kind and f.fitted == fitted and f.source.startswith(source)
    ]
    assert found
    return found


def test_fitted_decode_is_within_6_percent():
    assert max(abs(error(figure)) for figure in of("decode", fitted=True)) < 0.06


def test_fitted_prefill_is_within_25_percent():
    assert max(abs(error(figure)) for figure in of("prefill", fitted=True)) < 0.25


def test_held_out_tensorrt_modules_are_within_16_percent():
    held_out = of("decode", fitted=False, source="TensorRT")
    assert {figure.device for figure in held_out} == {"orin-nx-16", "orin-nano-8"}
    assert max(abs(error(figure)) for figure in held_out) < 0.16


def test_another_engine_with_fused_kernels_is_within_10_percent():
    assert max(abs(error(figure)) for figure in of("decode", fitted=False, source="embedl")) < 0.1


def test_memory_is_within_10_percent():
    for figure in MEMORY_FIGURES:
        assert predicted_memory(figure) == pytest.approx(figure.value, rel=0.1)


def test_no_published_figure_exceeds_what_the_memory_allows():
    """The model's skeleton: nobody read weights faster than the data sheet says."""
    from edge_lab.planner.speed import Efficiency

    perfect = Efficiency(weights=1, layer_s=0, cache=1, compute=1, batch=0, source="ideal")
    for figure in SPEED_FIGURES:
        assert error(figure, perfect) > 0, figure

"""AWQ: factors that lower the output error, and that fold away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edge_make.checkpoint_tensors import norm_sources
from edge_make.recipe import Recipe
from export.quantize.awq import awq_factors
from export.quantize.calibrated import Calibrated, Method, shared_channels
from export.quantize.calibration import LayerRunner, linear_taps
from export.quantize.rounded_twin import RoundedTwin, twin_taps
from export.quantize.rtn import dequantize_rows, quantize_rows
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.quantize.statistics import mean_square
from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints
from tests.export.quantize.layers import all_factors, plan_blocks, run_layers
from tests.export.quantize.test_gptq import FP16, INT4, correlated, weights
from tests.makers.goldens import Golden
from tests.makers.tiny_models import KINDS, Kind, write_checkpoint


def error_of(x: NDArray[np.float32], w: NDArray[np.float32], factors: NDArray[np.float32]) -> float:
    rows = quantize_rows(w * factors, INT4, "mse", FP16, mean_square(x) / factors**2)
    return float(np.square(x @ (dequantize_rows(rows) / factors - w).T).sum(dtype=np.float64))


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_no_factors(seed: int):
    x, w = correlated(300, 96, seed), weights(40, 96, seed + 50)
    assert error_of(x, w, awq_factors(w, x, INT4, FP16)) <= error_of(x, w, np.ones_like(x[0]))


def test_channels_of_large_inputs_are_rounded_more_finely():
    x, w = correlated(300, 96, 1) * 0.01, weights(40, 96, 2)
    x[:, 7] = 30 * np.random.RandomState(0).normal(size=300)
    factors = awq_factors(w, x, INT4, FP16)
    assert factors.argmax() == 7
    assert error_of(x, w, factors) < 0.5 * error_of(x, w, np.ones_like(x[0]))


def test_factors_are_a_power_of_the_mean_magnitude_around_1():
    """s = mean|x| ** alpha (equation 5 of the paper), its largest and least as far from 1."""
    x, w = correlated(300, 96, 1), weights(40, 96, 2)
    factors = awq_factors(w, x, INT4, FP16)
    magnitude = np.abs(x).mean(axis=0)
    alpha = np.log(factors.max() / factors.min()) / np.log(magnitude.max() / magnitude.min())
    assert 0 < alpha <= 1
    middle = np.sqrt(magnitude.max() * magnitude.min())
    np.testing.assert_allclose(factors, (magnitude / middle) ** alpha, rtol=1e-4)


def errors_by_hand(x: NDArray[np.float32], w: NDArray[np.float32]) -> dict[int, float]:
    """Output error for each tenth of alpha, in float64 and with an INT4 of its own.

    A group takes the scale with which the error of ``w * s`` on the inputs ``x / s`` is least, as
    if channels did not move together.
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    errors = {}
    for tenths in range(11):
        s = np.abs(x).mean(axis=0) ** (tenths / 10)
        s /= np.sqrt(s.max() * s.min())
        groups = (w * s).reshape(len(w), -1, 32)
        power = np.square(x / s).mean(axis=0).reshape(-1, 32)
        tried = []
        for fraction in (1, 0.96, 0.92, 0.875, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6):
            scale = np.abs(groups).max(axis=-1, keepdims=True) / 7 * fraction
            tried.append(np.clip(np.round(groups / scale), -8, 7) * scale)
        costs = [(np.square(each - groups) * power).sum(axis=-1) for each in tried]
        best = np.argmin(costs, axis=0)[None, ..., None]
        stored = np.take_along_axis(np.stack(tried), best, axis=0)[0].reshape(w.shape) / s
        errors[tenths] = float(np.square(x @ (stored - w).T).sum())
    return errors


@pytest.mark.parametrize("seed", [6, 7, 10])  # where a wrong weight of the error picks another one
def test_alpha_is_that_of_the_least_output_error(seed: int):
    x, w = correlated(300, 96, seed), weights(40, 96, seed + 50)
    magnitude = np.abs(x).mean(axis=0)
    factors = awq_factors(w, x, INT4, FP16)
    alpha = np.log(factors.max() / factors.min()) / np.log(magnitude.max() / magnitude.min())
    errors = errors_by_hand(x, w)
    assert errors[round(10 * alpha)] < 1.01 * min(errors.values())


def test_shared_channels_get_one_factor():
    x, w = correlated(100, 64, 3), weights(8, 64, 4)
    shared = np.arange(64) % 16
    factors = awq_factors(w, x, INT4, FP16, shared)
    np.testing.assert_array_equal(factors.reshape(4, 16), factors[:16][None].repeat(4, axis=0))
    assert len(np.unique(factors)) == 16


def test_dead_channels_do_no_harm():
    x, w = correlated(100, 64, 3), weights(8, 64, 4)
    x[:, ::2] = 0
    assert np.isfinite(awq_factors(w, x, INT4, FP16)).all()
    np.testing.assert_array_equal(awq_factors(w, np.zeros_like(x), INT4, FP16), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folded_model_computes_the_same(kind: Kind, tiny_checkpoints: Checkpoints):
    """Logits of the folded float model against the unfolded one; weights really differ."""
    ids = Golden.load(kind).ids[None, :64]
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        schemes = Recipe("int4", group_size=32).schemes(checkpoint.spec)
        plans = plan_blocks(Calibrated(LayerRunner(checkpoint, ids), schemes, "awq", "mse", FP16))
        assert [plan.layer.name for block in plans for plan in block.linears] == list(schemes)
        factors = all_factors(plans)
        assert list(factors) == [name for name, scheme in schemes.items() if scheme.kind == "int4"]
        folded = ScaledCheckpoint(checkpoint, factors)
        expected = run_layers(checkpoint, ids)[-1]
        found = run_layers(folded, ids)[-1]
        changed = np.concatenate(
            [
                folded.tensor(source) / checkpoint.tensor(source).astype(np.float32)
                for name, source in norm_sources(checkpoint.spec).items()
                if name.endswith(("input_norm", "post_norm"))
            ]
        )
        # A plan reads its weights with every factor of its block.
        for block in plans[:-1]:
            for plan in block.linears:
                for name in plan.layer.weights + plan.layer.biases:
                    np.testing.assert_array_equal(plan.checkpoint.tensor(name), folded.tensor(name))
    assert np.abs(changed).max() / np.abs(changed).min() > 1.1  # something was folded
    assert changed.min() < 0 < changed.max()  # and some channels were flipped
    scale = np.abs(expected.inputs["lm_head"]).max()
    difference = np.abs(found.inputs["lm_head"] - expected.inputs["lm_head"]).max()
    assert difference < 1e-5 * scale


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_peaks_are_those_of_the_folded_model(method: Method, tmp_path: Path):
    """What a factor below 1 divides grows: here the rows of up whose gate is shut."""
    ids = np.random.RandomState(5).randint(1, 200, (2, 64))
    path = write_checkpoint(tmp_path / "model", "qwen2", dtype="fp16")
    for file in path.glob("*.safetensors"):
        weights = load_file(file)
        for name, values in weights.items():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                values[:5] *= np.float16(8 if "up" in name else 0)
        save_file(weights, file, metadata={"format": "pt"})
    with open_checkpoint(str(path)) as checkpoint:
        schemes = Recipe("int4", group_size=32).schemes(checkpoint.spec)
        both = twin_taps if "gptq" in method else linear_taps
        runner = LayerRunner(checkpoint, ids, taps=both)
        twin = RoundedTwin(checkpoint, ids.shape[1]) if "gptq" in method else None
        plans = plan_blocks(Calibrated(runner, schemes, method, "mse", FP16, twin))
        found = {name: peak for plan in plans for name, peak in plan.peaks.items()}
        before, after = (
            {name: float(peak.max()) for seen in layers for name, peak in seen.peaks.items()}
            for layers in (
                run_layers(checkpoint, ids),
                run_layers(ScaledCheckpoint(checkpoint, all_factors(plans)), ids),
            )
        )
    assert found == pytest.approx(after, rel=1e-3)
    changes = [after[name] / peak for name, peak in before.items()]
    assert max(changes) > 1.5  # what the unfolded model has is too little here
    assert min(changes) < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_o_come_from_those_of_v(kind: Kind, tiny_checkpoints: Checkpoints):
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        spec = checkpoint.spec
    values = np.random.RandomState(0).normal(
        size=(spec.attentions()[0].kv_heads, 1, spec.attentions()[0].dim)
    )
    repeated = values.repeat(
        spec.attentions()[0].heads // spec.attentions()[0].kv_heads, axis=1
    ).reshape(-1)
    np.testing.assert_array_equal(values.reshape(-1)[shared_channels(spec, "layers.1.o")], repeated)

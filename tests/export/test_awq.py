"""AWQ: factors that lower the output error, and that fold away."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from export.calibrated import CalibratedLinears, shared_channels
from export.calibration import LayerRunner
from export.checkpoint import open_checkpoint
from export.quantize.awq import awq_factors
from export.quantize.rtn import dequantize_rows, quantize_rows
from export.quantize.statistics import mean_square
from export.recipe import Recipe, norm_sources
from tests.conftest import Checkpoints
from tests.export.test_gptq import FP16, INT4, correlated, weights
from tests.parity import Golden
from tests.tiny_models import KINDS, Kind


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
        linears = CalibratedLinears(LayerRunner(checkpoint, ids), schemes, "awq", FP16)
        names = [layer.name for layer, quantize in linears if quantize is not None]
        assert names == [name for name, scheme in schemes.items() if scheme.kind == "int4"]
        *_, expected = LayerRunner(checkpoint, ids)
        *_, found = LayerRunner(linears.checkpoint, ids)
        source = norm_sources(checkpoint.spec)["layers.0.input_norm"]
        changed = linears.checkpoint.tensor(source) / checkpoint.tensor(source).astype(np.float32)
    assert changed.max() / changed.min() > 1.1  # something was folded
    scale = np.abs(expected.inputs["lm_head"]).max()
    difference = np.abs(found.inputs["lm_head"] - expected.inputs["lm_head"]).max()
    assert difference < 1e-5 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_o_come_from_those_of_v(kind: Kind, tiny_checkpoints: Checkpoints):
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        spec = checkpoint.spec
    values = np.random.RandomState(0).normal(size=(spec.num_kv_heads, 1, spec.head_dim))
    repeated = values.repeat(spec.num_heads // spec.num_kv_heads, axis=1).reshape(-1)
    np.testing.assert_array_equal(values.reshape(-1)[shared_channels(spec)], repeated)

"""Which input channels of a W8A8 linear stay float, and what that does to its output."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import TensorScheme
from export.quantize.calibrated import Calibrated
from export.quantize.calibration import LayerRunner
from export.quantize.float_channels import MOST_CHANNELS, TOLERATED, loud_channels
from export.quantize.rtn import dequantize_rows, quantize_rows
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.quantize.smoothquant import activation_scale, smoothing
from export.sources.opening import open_checkpoint
from tests.export.quantize.layers import all_factors, plan_blocks
from tests.export.quantize.loud_checkpoint import LOUD, loud_stay_float, write_loud_checkpoint
from tests.export.quantize.test_rotation import float_logits

W8A8 = TensorScheme(kind="w8a8")
FP16 = np.dtype(np.float16)
Array = NDArray[np.float32]


def one_loud_token() -> Array:
    """Two channels that are loud at the first token only, as in real models."""
    x = np.random.RandomState(0).randn(512, 64).astype(np.float32)
    x[0, [9, 30]] = 900, -2000
    return x


def peaks_of(x: Array) -> Array:
    return np.asarray(np.abs(x).max(axis=0))


def test_channels_loud_at_one_token_are_found():
    none, four = loud_channels(peaks_of(one_loud_token()))
    assert not len(none)
    assert {9, 30} < set(four.tolist())


@settings(deadline=None)
@given(peaks=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=2000))
def test_each_choice_has_the_loudest_and_those_before(peaks: list[float]):
    values = np.array(peaks, np.float32)
    choices = list(loud_channels(values))
    assert [len(each) for each in choices] == [
        count for count in (0, 4, 16, MOST_CHANNELS) if 16 * count <= len(peaks)
    ]
    for before, channels in zip([np.empty(0, int), *choices], choices, strict=False):
        assert list(channels) == sorted(set(channels.tolist()))
        assert set(before.tolist()) <= set(channels.tolist())
        quiet = np.delete(values, channels)
        assert not len(channels) or values[channels].min() >= quiet.max()


def test_quiet_inputs_have_none():
    random = np.random.RandomState(1)
    x = random.randn(512, 1024).astype(np.float32)
    found = smoothing(random.randn(96, 1024).astype(np.float32), x, W8A8, FP16)
    assert found.float_channels == ()
    assert found.error < TOLERATED


@pytest.mark.parametrize("loud", [3, 14, 60])
def test_as_few_as_are_enough(loud: int):
    """Channels that are loud at one token each: factors cannot tame them for all others."""
    random = np.random.RandomState(loud)
    x = random.randn(512, 1024).astype(np.float32)
    x[np.arange(loud), random.permutation(1024)[:loud]] = 3000
    found = smoothing(random.randn(96, 1024).astype(np.float32), x, W8A8, FP16)
    assert len(found.float_channels) == next(count for count in (4, 16, 64) if count >= loud)
    assert set(np.flatnonzero(peaks_of(x) == 3000)) <= set(found.float_channels)
    assert found.error < TOLERATED


def output_error(x: Array, weights: Array, channels: NDArray[np.int64]) -> float:
    """Median relative error of a token's output, with the best factors and the best range."""
    wanted = x @ weights.T
    added = x[:, channels] @ weights[:, channels].T
    x, weights = x.copy(), weights.copy()
    x[:, channels] = weights[:, channels] = 0
    factors = smoothing(weights, x, W8A8, FP16).factors
    factors = np.ones(x.shape[1], np.float32) if factors is None else factors
    smooth = x / factors
    scale = np.float32(activation_scale(smooth, FP16))
    rounded = np.clip(np.rint(smooth / scale), -128, 127) * scale
    stored = dequantize_rows(quantize_rows(weights * factors, W8A8, "absmax", FP16))
    error = np.linalg.norm(rounded @ stored.T + added - wanted, axis=1)
    return float(np.median(error / np.linalg.norm(wanted, axis=1)))


def test_float_channels_spare_the_other_tokens():
    x = one_loud_token()
    weights = np.random.RandomState(2).randn(96, 64).astype(np.float32)
    none, four = loud_channels(peaks_of(x))
    assert smoothing(weights, x, W8A8, FP16).float_channels == tuple(four.tolist())
    assert output_error(x, weights, four) < 0.25 * output_error(x, weights, none)


@pytest.mark.parametrize("short", ["down", "o"])
def test_factors_stay_exact_and_tame(
    short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folding is exact beside float channels, and no factor comes from the zeros put there."""
    if short == "o":  # no tiny model has a loud one: two query heads share a KV channel
        found: Any = lambda x: [np.arange(4) if len(x) == 64 else np.empty(0, int)]  # noqa: E731
        monkeypatch.setattr("export.quantize.smoothquant.loud_channels", found)
    path = write_loud_checkpoint(tmp_path / "model", "qwen2", layers=(0, 1))
    with open_checkpoint(str(path)) as checkpoint:
        schemes = {layer.name: W8A8 for layer in linear_layers(checkpoint.spec)}
        ids = np.random.RandomState(3).randint(1, 200, (2, 64))
        calibrated = Calibrated(LayerRunner(checkpoint, ids), schemes, "rtn", "mse", FP16)
        with loud_stay_float() if short == "down" else nullcontext():
            plans = plan_blocks(calibrated)
        factors = all_factors(plans)
        found_channels = {
            plan.layer.name: plan.float_channels for block in plans for plan in block.linears
        }
        channels = list(found_channels[f"layers.1.{short}"])
        if short == "down":
            assert set(LOUD) < set(channels)
        assert (factors[f"layers.1.{short}"][channels] == 1).all()
        assert all(each.min() > 1e-3 and each.max() < 1e3 for each in factors.values())
        wanted = float_logits(checkpoint)
        found_logits = float_logits(ScaledCheckpoint(checkpoint, factors))
    np.testing.assert_allclose(found_logits, wanted, atol=2e-4 * float(np.abs(wanted).max()))

"""SmoothQuant: exact folding, factors that help, ranges that keep loud tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import TensorScheme
from export.quantize.calibrated import shared_channels
from export.quantize.rtn import dequantize_rows, quantize_rows
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.quantize.smoothquant import activation_scale, smoothing
from export.sources.opening import open_checkpoint
from tests.export.quantize.test_rotation import float_logits
from tests.tiny_models import KINDS, Kind, write_checkpoint

W8A8 = TensorScheme(kind="w8a8")
FP16 = np.dtype(np.float16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_the_logits(kind: Kind, tied: bool, tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", kind, tie_word_embeddings=tied)
    random = np.random.RandomState(1)
    with open_checkpoint(str(path)) as checkpoint:
        shared = shared_channels(checkpoint.spec)
        scales = {}
        for layer in linear_layers(checkpoint.spec)[:-1]:
            factors = np.exp(random.randn(layer.shape[0])).astype(np.float32)
            scales[layer.name] = factors[shared] if layer.name.endswith(".o") else factors
        wanted = float_logits(checkpoint)
        found = float_logits(ScaledCheckpoint(checkpoint, scales))
        np.testing.assert_allclose(found, wanted, atol=2e-4 * float(np.abs(wanted).max()))
        # The test can fail: one scale that nothing takes back moves the logits.
        lone = {"layers.0.o": random.rand(len(shared)).astype(np.float32)}
        lopsided = ScaledCheckpoint(ScaledCheckpoint(checkpoint, lone), scales)
        assert np.abs(float_logits(lopsided) - wanted).max() > 1e-2 * np.abs(wanted).max()


def outputs_error(x, weights, factors) -> float:
    smooth = x / factors
    scale = np.float32(np.abs(smooth).max() / 127)
    rounded = np.rint(smooth / scale) * scale
    stored = dequantize_rows(quantize_rows(weights * factors, W8A8, "absmax", FP16))
    return float(np.square(rounded @ stored.T - x @ weights.T).sum())


def test_factors_tame_a_loud_channel():
    random = np.random.RandomState(2)
    x = random.randn(256, 64).astype(np.float32)
    x[:, 5] *= 200
    weights = random.randn(96, 64).astype(np.float32)
    factors = smoothing(weights, x, W8A8, FP16).factors
    assert factors is not None
    assert outputs_error(x, weights, factors) < 0.2 * outputs_error(x, weights, np.ones(64, "f"))


@pytest.mark.parametrize(("alpha", "loud", "quiet"), [(0.5, 4, 1 / 4), (0.75, 8, 1 / 2)])
def test_factors_by_hand(alpha: float, loud: float, quiet: float, monkeypatch: pytest.MonkeyPatch):
    """max|x|^alpha / max|w|^(1-alpha), equation 4 of the paper, around a geometric mean of 1.

    One channel has inputs up to 16 and weights up to 1, one inputs up to 1 and weights up to 16,
    all others 1 and 1: at 0.75 the factors are 16^0.75 / 1 = 8 and 1 / 16^0.25 = 1/2.
    """
    random = np.random.RandomState(5)
    x, weights = (random.uniform(-1, 1, (200, 32)).astype(np.float32) for _ in range(2))
    x[0] = weights[0] = 1
    x[:, 3] *= 16
    weights[:, 7] *= 16
    monkeypatch.setattr("export.quantize.smoothquant.ALPHAS", (alpha,))
    wanted = np.ones(32)
    wanted[3], wanted[7] = loud, quiet
    factors = smoothing(weights, x, W8A8, FP16).factors
    assert factors is not None
    np.testing.assert_allclose(factors, wanted / (loud * quiet) ** (1 / 32), rtol=1e-5)


def test_channels_of_one_value_share_their_factor():
    random = np.random.RandomState(3)
    x = random.randn(128, 32).astype(np.float32) * np.exp(random.randn(32)).astype(np.float32) ** 2
    shared = np.tile(np.arange(8), 4)
    weights = random.randn(48, 32).astype(np.float32)
    factors = smoothing(weights, x, W8A8, FP16, shared).factors
    assert factors is not None
    assert np.array_equal(factors, factors[:8][shared])


def test_a_range_keeps_a_loud_token():
    x = np.random.RandomState(4).randn(4000, 16).astype(np.float32)
    x[0] *= 1000
    assert activation_scale(x, FP16) * 127 > 0.65 * np.abs(x).max()
    # A lone loud token, not among the evenly spread ones. At 0.9 of the range it would lose
    # 16 * 12.7**2 = 2,580 and the quiet ones win 1,088 * 16 * (0.3**2 - 0.2**2) = 870.
    x = np.full((4000, 16), 0.7, np.float32)
    x[1] = 127
    assert activation_scale(x, FP16) == 1
    assert activation_scale(np.zeros((4, 8), np.float32), FP16) > 0

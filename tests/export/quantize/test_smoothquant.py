"""SmoothQuant: exact folding, factors that help, ranges that keep loud tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import TensorScheme
from export.graph.block_rotation import block_size, rotate_blocks
from export.quantize.calibrated import Calibrated, shared_channels
from export.quantize.calibration import LayerRunner
from export.quantize.rtn import dequantize_rows, quantize_rows
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.quantize.smoothquant import TOLERATED, activation_scale, smoothing
from export.sources.opening import open_checkpoint
from tests.export.quantize.layers import all_factors, plan_blocks
from tests.export.quantize.loud_checkpoint import loud_by_token, write_loud_checkpoint
from tests.export.quantize.test_rotation import float_logits
from tests.makers.tiny_models import KINDS, Kind, write_checkpoint

W8A8 = TensorScheme(kind="w8a8")
FP16 = np.dtype(np.float16)


@pytest.fixture
def one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever factors leave is tolerated."""
    monkeypatch.setattr("export.quantize.smoothquant.TOLERATED", np.inf)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_the_logits(kind: Kind, tied: bool, tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", kind, tie_word_embeddings=tied)
    random = np.random.RandomState(1)
    with open_checkpoint(str(path)) as checkpoint:
        shared = shared_channels(checkpoint.spec, "layers.0.o")
        assert shared is not None
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


def test_factors_tame_a_loud_channel(one_range: None):
    random = np.random.RandomState(2)
    x = random.randn(256, 64).astype(np.float32)
    x[:, 5] *= 200
    weights = random.randn(96, 64).astype(np.float32)
    factors = smoothing(weights, x, W8A8, FP16).factors
    assert factors is not None
    assert outputs_error(x, weights, factors) < 0.2 * outputs_error(x, weights, np.ones(64, "f"))


@pytest.mark.parametrize(("alpha", "loud", "quiet"), [(0.5, 4, 1 / 4), (0.75, 8, 1 / 2)])
def test_factors_by_hand(
    alpha: float, loud: float, quiet: float, one_range: None, monkeypatch: pytest.MonkeyPatch
):
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


def test_channels_of_one_value_share_their_factor(one_range: None):
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


def loud_somewhere(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Each of some tokens has two loud channels, other ones than the next."""
    random = np.random.RandomState(0)
    x = random.randn(512, 1024).astype(np.float32)
    for token in tokens:
        x[token, random.permutation(1024)[:2]] = 90, -200
    return x


def token_errors(
    x: NDArray[np.float32], weights: NDArray[np.float32], block: int, *, per_token: bool = True
) -> NDArray[np.float32]:
    """Relative error of each token's output."""
    wanted = x @ weights.T
    x, weights = rotate_blocks(x, block), rotate_blocks(weights, block)
    sizes = np.abs(x).max(axis=1, keepdims=True) if per_token else np.abs(x).max()
    rounded = np.rint(x / sizes * 127) / 127 * sizes
    stored = dequantize_rows(quantize_rows(weights, W8A8, "absmax", FP16))
    error = np.linalg.norm(rounded @ stored.T - wanted, axis=1)
    return np.asarray(error / np.linalg.norm(wanted, axis=1))


def test_quiet_inputs_share_a_range():
    random = np.random.RandomState(1)
    x = random.randn(512, 1024).astype(np.float32)
    found = smoothing(random.randn(96, 1024).astype(np.float32), x, W8A8, FP16)
    assert not found.per_token
    assert found.error < TOLERATED


@pytest.mark.parametrize(("tokens", "block"), [([0], 0), (range(512), 64)])
def test_the_loudness_of_inputs_decides_how_they_are_rounded(tokens: Sequence[int], block: int):
    """A loud token needs a range of its own, loud channels in all tokens the rotation besides."""
    x = loud_somewhere(tokens)
    weights = np.random.RandomState(2).randn(96, 1024).astype(np.float32)
    found = smoothing(weights, x, W8A8, FP16)
    assert (found.per_token, found.rotation_block, found.factors) == (True, block, None)
    own = token_errors(x, weights, block)
    assert found.error == pytest.approx(np.square(own).mean(), rel=0.2)
    without = token_errors(x, weights, 0, per_token=bool(block))
    assert np.median(own) < 0.3 * np.median(without)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1 << 16), loud=st.floats(1, 1e4), width=st.sampled_from([36, 64, 130]))
def test_ranges_per_token_are_taken_only_where_they_lose_less(seed: int, loud: float, width: int):
    random = np.random.RandomState(seed)
    x = random.randn(64, width).astype(np.float32)
    x[random.randint(64), random.randint(width)] *= np.float32(loud)
    weights = random.randn(24, width).astype(np.float32)
    found = smoothing(weights, x, W8A8, FP16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.quantize.smoothquant.TOLERATED", -1)
        least = smoothing(weights, x, W8A8, FP16)
        patch.setattr("export.quantize.smoothquant.TOLERATED", np.inf)
        one_range = smoothing(weights, x, W8A8, FP16)
    assert not one_range.per_token
    assert least.error <= found.error <= max(least.error, TOLERATED)
    assert found.per_token == (one_range.error > TOLERATED and found.error < one_range.error)
    assert found.rotation_block in ((0, block_size(width)) if found.per_token else (0,))


def test_nothing_is_folded_into_what_feeds_ranges_per_token(tmp_path: Path):
    path = write_loud_checkpoint(tmp_path / "model", "qwen2", layers=(0, 1))
    with open_checkpoint(str(path)) as checkpoint:
        schemes = {layer.name: W8A8 for layer in linear_layers(checkpoint.spec)}
        ids = np.random.RandomState(3).randint(1, 200, (2, 64))
        calibrated = Calibrated(LayerRunner(checkpoint, ids), schemes, "rtn", "mse", FP16)
        with loud_by_token():
            plans = plan_blocks(calibrated)
        factors = all_factors(plans)
        per_token = {plan.layer.name: plan.per_token for block in plans for plan in block.linears}
        assert per_token["layers.1.down"]
        assert not per_token["layers.1.o"]
        assert not factors.keys() & {name for name, own in per_token.items() if own}
        assert all(each.min() > 1e-3 and each.max() < 1e3 for each in factors.values())
        wanted = float_logits(checkpoint)
        found = float_logits(ScaledCheckpoint(checkpoint, factors))
    np.testing.assert_allclose(found, wanted, atol=2e-4 * float(np.abs(wanted).max()))

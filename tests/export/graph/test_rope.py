"""RoPE tables against transformers' frequencies, and against decimal arithmetic far out."""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from edge.bundle.rope import inverse_frequencies
from edge.model.spec import RopeSpec
from edge_make.model_config import parse_config
from export.graph.rope import rope_tables

HEAD_DIM = 128
# As in Llama-2, an early long-context Llama, R1-Distill-Llama-8B, Qwen3's advice for 131k, and
# DeepSeek-V2's variant of YaRN.
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
}
# `LlamaRotaryEmbedding` of transformers 5.24 (float32) at these pairs, for the table above: it is
# recomputed by `test_frequencies_equal_transformers_live` wherever torch is installed.
PAIRS = (0, 1, 20, 24, 30, 33, 36, 40, 50, 63)
# fmt: off
GOLDEN: dict[str, tuple[float, tuple[float, ...]]] = {
    "default": (1.0, (
        1.0, 0.86596435, 0.056234129, 0.031622779, 0.013335215,
        0.0086596431, 0.0056234132, 0.0031622779, 0.00074989418, 0.00011547819,
    )),
    "linear": (1.0, (
        0.25, 0.21649109, 0.014058532, 0.0079056947, 0.0033338037,
        0.0021649108, 0.0014058533, 0.00079056947, 0.00018747355, 2.8869548e-05,
    )),
    "llama3": (1.0, (
        1.0, 0.81461722, 0.016560441, 0.0072926651, 0.0013718937,
        0.00031269365, 7.7846555e-05, 3.4281024e-05, 4.4115345e-06, 3.0689259e-07,
    )),
    "yarn": (1.138629436111989, (
        1.0, 0.80584222, 0.013335215, 0.0053753215, 0.001064361,
        0.00045032357, 0.00017984115, 4.4456985e-05, 5.1338125e-06, 3.1023444e-07,
    )),
    "yarn with mscale": (1.0815612985589222, (
        1.0, 0.86596435, 0.056234129, 0.031622779, 0.0092981867,
        0.0044651283, 0.0018781321, 0.00029028722, 2.3434193e-05, 3.6086935e-06,
    )),
}
# fmt: on


def config(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": HEAD_DIM,
        "intermediate_size": 64,
        "vocab_size": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": parameters,
    }


def rope_of(name: str) -> RopeSpec:
    return parse_config(config(PARAMETERS[name])).ropes[0]


every_kind = pytest.mark.parametrize("name", PARAMETERS)


@every_kind
def test_frequencies_equal_transformers(name: str):
    rope = rope_of(name)
    attention_factor, expected = GOLDEN[name]
    found = inverse_frequencies(rope, HEAD_DIM)
    assert found.shape == (HEAD_DIM // 2,)
    np.testing.assert_allclose(found[list(PAIRS)], expected, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@every_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parity
def test_frequencies_equal_transformers_live(name: str):
    pytest.importorskip("torch", reason="live parity needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="live parity needs transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    keys = config(dict(PARAMETERS[name]))
    live = LlamaRotaryEmbedding(transformers.LlamaConfig(**keys))
    rope = rope_of(name)
    found = inverse_frequencies(rope, HEAD_DIM)
    np.testing.assert_allclose(found, live.inv_freq.numpy(), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(live.attention_scaling, rel=1e-12)


def test_default_and_linear_by_their_formulas():
    for pair in range(HEAD_DIM // 2):
        plain = 10_000.0 ** (-2 * pair / HEAD_DIM)
        default = inverse_frequencies(rope_of("default"), HEAD_DIM)[pair]
        linear = inverse_frequencies(rope_of("linear"), HEAD_DIM)[pair]
        assert default == pytest.approx(plain, rel=1e-14)
        assert linear == pytest.approx(plain / 4, rel=1e-14)


def test_llama3_by_its_wavelengths():
    """Meta's own code (llama_models/llama3/model.py, apply_scaling), pair by pair."""
    found = inverse_frequencies(rope_of("llama3"), HEAD_DIM)
    bands = set()
    for pair, frequency in enumerate(found):
        plain = 500_000.0 ** (-2 * pair / HEAD_DIM)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4.0:
            expected, band = plain, "kept"
        elif wavelength > 8192 / 1.0:
            expected, band = plain / 8, "divided"
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected, band = (1 - smooth) * plain / 8 + smooth * plain, "blended"
        bands.add(band)
        assert frequency == pytest.approx(expected, rel=1e-12), (pair, band)
    assert bands == {"kept", "blended", "divided"}


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    """The paper's borders: 32 turns within the original context are fast, one turn is slow."""
    found = inverse_frequencies(rope_of("yarn"), HEAD_DIM)
    plain = 1_000_000.0 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    turns = 32768 * plain / (2 * math.pi)
    ratio = found / plain
    np.testing.assert_allclose(ratio[turns >= 40], 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio[turns <= 0.8], 0.25, rtol=1e-12)
    between = ratio[(turns < 32) & (turns > 1)]
    assert (np.diff(between) < 0).all()
    assert ((between >= 0.25) & (between <= 1)).all()


@every_kind
def test_tables_are_cosine_and_sine_times_the_attention_factor(name: str):
    rope = rope_of(name)
    cos, sin = rope_tables(rope, HEAD_DIM, 50)
    assert cos.shape == sin.shape == (50, HEAD_DIM // 2)
    assert cos.dtype == sin.dtype == np.float64
    angles = np.arange(50)[:, None] * inverse_frequencies(rope, HEAD_DIM)
    np.testing.assert_allclose(cos, rope.attention_factor * np.cos(angles), rtol=0, atol=1e-14)
    np.testing.assert_allclose(sin, rope.attention_factor * np.sin(angles), rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.hypot(cos, sin), rope.attention_factor, rtol=1e-14)


def test_float64_at_the_end_of_the_table():
    """Position 32767 against fifty decimal digits; float32 angles would be off by 1e-3 there."""
    position, theta = 32767, 500_000
    cos, sin = rope_tables(RopeSpec(theta=float(theta)), HEAD_DIM, position + 1)
    with decimal.localcontext() as context:
        context.prec = 50
        pi = Decimal("3.14159265358979323846264338327950288419716939937510")
        for pair in (0, 1, 7, 31, 63):
            exponent = Decimal(-2 * pair) / HEAD_DIM
            angle = position * (exponent * Decimal(theta).ln()).exp()
            reduced = float(angle % (2 * pi))
            # 1e-16 of an angle of 32767, a few times over.
            assert cos[position, pair] == pytest.approx(math.cos(reduced), abs=5e-11)
            assert sin[position, pair] == pytest.approx(math.sin(reduced), abs=5e-11)

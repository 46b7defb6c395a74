"""The scales of an 8-bit cache: what they hold, which layers stay in float, and why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge.bundle.manifest import read_manifest
from edge.bundle.rope import inverse_frequencies, turn
from edge.errors import CheckpointError, ConfigError
from edge.model.parts import Attention, Linear, Rope, only
from edge.model.spec import LayerRun
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from export.quantize import kv_scales
from export.quantize.kv_scales import Observed, cache_taps, find_scales, observe, score_error
from export.sources.opening import open_checkpoint
from tests.conftest import Bundles, Checkpoints
from tests.edge.backends.runner import Runner, random_ids
from tests.makers.manifests import make_model
from tests.makers.tiny_models import KINDS, Kind

SIZES = st.floats(0, 1000, width=32)


@given(
    keys=arrays.arrays(np.float32, (2, 4), elements=SIZES),
    values=arrays.arrays(np.float32, (2, 8), elements=SIZES),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16]),
)
def test_every_observed_number_fits_into_eight_bits(keys: Any, values: Any, dtype: Any) -> None:
    observed = Observed(keys, values, np.ones((4, 4), np.float32))
    scales = find_scales(observed, np.dtype(dtype), wide=False)
    assert (127 * scales.keys >= np.concatenate([keys, keys], axis=1)).all()
    assert (127 * scales.values >= values).all()
    for each in (scales.keys, scales.values):
        assert (each >= 2.0**-14).all()  # normal in fp16 (trap 3)
        np.testing.assert_array_equal(each, each.astype(dtype).astype(np.float32))
    # Both channels of a pair share a scale, so turning it changes nothing.
    np.testing.assert_array_equal(scales.keys[:, :4], scales.keys[:, 4:])
    # Rounded up by two units in the last place at most.
    limit = np.maximum(values / 127, 2.0**-14) * (1 + (2.0**-6 if dtype != np.float16 else 2.0**-9))
    assert (scales.values <= limit).all()


def test_a_key_is_in_range_wherever_its_token_stands() -> None:
    model = make_model(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)
    random = np.random.default_rng(0)
    qkv = random.standard_normal((50, 8 * 16)).astype(np.float32)
    observed = observe(model, None, 0, qkv)  # type: ignore[arg-type]
    scales = find_scales(observed, np.dtype(np.float16), wide=False)
    keys = qkv[:, 64:96].reshape(50, 2, 16).transpose(1, 0, 2)
    frequencies = inverse_frequencies(model.ropes[0], 16)
    for position in (0, 1, 50, 777, 30000):
        turned = turn(keys, frequencies, position)
        assert (np.abs(turned) <= 127.01 * scales.keys[:, None]).all()


def test_keys_of_which_rope_turns_a_part_are_in_range_too() -> None:
    """The leading channels are turned in pairs, the others keep a scale each."""
    model = make_model(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)
    parts = [Rope(12) if isinstance(part, Rope) else part for part in model.layer(0)]
    model = msgspec.structs.replace(model, layers=(LayerRun(1, tuple(parts)),))
    random = np.random.default_rng(0)
    qkv = random.standard_normal((50, 8 * 16)).astype(np.float32)
    qkv[:, 64 + 15] *= 30  # a large channel that is left, of the first KV head
    observed = observe(model, None, 0, qkv)  # type: ignore[arg-type]
    assert observed.key_length.shape == (2, 6 + 4)
    scales = find_scales(observed, np.dtype(np.float16), wide=False)
    keys = qkv[:, 64:96].reshape(50, 2, 16).transpose(1, 0, 2)
    frequencies = inverse_frequencies(model.ropes[0], 12)
    for position in (0, 1, 50, 777, 30000):
        turned = turn(keys[..., :12], frequencies, position)
        rows = np.concatenate([turned, keys[..., 12:]], axis=-1)
        assert (np.abs(rows) <= 127.01 * scales.keys[:, None]).all()
    wide = scales.keys[0] > 5 * np.median(scales.keys[0])
    assert np.flatnonzero(wide).tolist() == [15]
    # The error of a score has each group's step once, whatever the order of the channels.
    steps = np.concatenate([scales.keys[:, :6], scales.keys[:, 12:]], axis=-1)
    noise = (observed.query_square * np.repeat(steps**2, 2, axis=0)).sum(axis=1)
    assert score_error(observed, scales) == pytest.approx(np.sqrt(noise.max() / (12 * 16)))


def test_the_expected_error_of_a_score_is_what_rounding_gives() -> None:
    """The rule's figure against scores that are really computed with rounded keys."""
    model = make_model(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)
    random = np.random.default_rng(1)
    qkv = random.standard_normal((4000, 8 * 16)).astype(np.float32)
    for head, size in enumerate((1, 3, 2, 0.5)):  # a size of its own for the queries of each head
        qkv[:, head * 16 : (head + 1) * 16] *= size
    qkv[:, 64 + 3] += 40  # a biased channel, as Qwen2 has
    observed = observe(model, None, 0, qkv)  # type: ignore[arg-type]
    scales = find_scales(observed, np.dtype(np.float16), wide=False)
    keys = qkv[:, 64:96].reshape(-1, 2, 16)
    wrong = np.rint(keys / scales.keys) * scales.keys - keys
    errors = []
    for head in range(4):
        queries = qkv[: len(wrong), head * 16 : (head + 1) * 16]
        shuffled = random.permutation(wrong[:, head // 2])
        errors.append(np.sqrt(np.mean(np.square((queries * shuffled).sum(axis=1) / 4))))
    assert score_error(observed, scales) == pytest.approx(max(errors), rel=0.1)


def test_a_channel_that_nothing_turns_has_its_own_scale() -> None:
    dense = make_model(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)
    parts = tuple(part for part in dense.layer(0) if not isinstance(part, Rope))
    model = msgspec.structs.replace(dense, layers=(LayerRun(1, parts),))
    random = np.random.default_rng(2)
    qkv = random.standard_normal((4000, 8 * 16)).astype(np.float32)
    qkv[:, 64:96] *= np.linspace(0.1, 4, 32, dtype=np.float32)
    observed = observe(model, None, 0, qkv)  # type: ignore[arg-type]
    scales = find_scales(observed, np.dtype(np.float16), wide=False)
    keys = qkv[:, 64:96].reshape(-1, 2, 16)
    np.testing.assert_allclose(127 * scales.keys, np.abs(keys).max(axis=0), rtol=2e-3)
    wrong = np.rint(keys / scales.keys) * scales.keys - keys
    queries = qkv[:, :64].reshape(-1, 2, 2, 16)
    errors = np.sqrt(np.square((queries * wrong[:, :, None]).sum(axis=-1) / 4).mean(axis=0))
    assert score_error(observed, scales) == pytest.approx(errors.max(), rel=0.1)


def test_small_keys_are_normed_with_the_models_epsilon() -> None:
    model = make_model(
        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, rms_norm_eps=1e-2
    )
    qkv = np.full((3, 8 * 16), 0.1, np.float32)
    ones: Any = SimpleNamespace(tensor=lambda _name: np.ones(16, np.float32))
    observed = observe(model, ones, 0, qkv)
    length = np.hypot(0.1, 0.1) / np.sqrt(0.01 + 0.01)
    np.testing.assert_allclose(observed.key_length, length, rtol=1e-5)
    np.testing.assert_allclose(observed.query_square, length**2, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_observed_ranges_are_those_of_the_cache(
    kind: Kind, tiny_checkpoints: Checkpoints, tiny_bundles: Bundles
) -> None:
    """Biases, norms of keys and YaRN's factor are in the scales, as they are in the rows."""
    from export.quantize.calibration import LayerRunner

    ids = random_ids(1, 60)
    with Runner(tiny_bundles(kind, "portable")) as runner:
        runner.step(ids, [0])
        rows = runner.cache(0)
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        layers = LayerRunner(checkpoint, ids, taps=cache_taps)
        hidden = None
        for layer in range(checkpoint.spec.num_layers):
            seen = layers.run(layer, hidden)
            hidden = seen.hidden
            observed = observe(checkpoint.spec, checkpoint, layer, seen.inputs["qkv"])
            keys, values = rows[2 * layer], rows[2 * layer + 1]
            lengths = np.abs(keys).max(axis=1)
            if only(checkpoint.spec.layer(layer), Rope):  # a pair turns, and keeps its length
                half = keys.shape[-1] // 2
                lengths = np.hypot(keys[..., :half], keys[..., half:]).max(axis=1)
            np.testing.assert_allclose(observed.key_length, lengths, rtol=1e-3, atol=1e-3)
            sizes = np.abs(values).max(axis=1)
            np.testing.assert_allclose(observed.value_size, sizes, rtol=1e-3, atol=1e-3)


def export(source: Path, output: Path, **options: Any) -> Any:
    options = {"quant": "fp16", "kv_cache": "int8", "kv_capacity": 64, **options}
    return export_checkpoint(ExportConfig(source=str(source), output=output, **options))


def test_the_manifest_says_which_layers_and_why(
    tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    manifest = export(tiny_checkpoints("llama"), tmp_path / "b", dialect="portable", seed=3)
    assert manifest == read_manifest(tmp_path / "b")
    found = manifest.kv_cache
    assert (found.kind, found.limit, found.float_layers) == ("int8", kv_scales.SCORE_LIMIT, ())
    assert len(found.score_errors) == manifest.model.num_layers
    assert 0 < max(found.score_errors) < found.limit
    assert (found.calibration.text, found.calibration.seed) == ("built-in", 3)
    assert manifest.int8_layers == (0, 1)
    again = export(tiny_checkpoints("llama"), tmp_path / "c", dialect="portable", seed=3)
    assert again.files == manifest.files


def test_a_model_whose_keys_all_lose_too_much_is_refused(
    tiny_checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_scales, "SCORE_LIMIT", 1e-6)
    with pytest.raises(ConfigError, match=r"scores of every layer by more than 1e-06"):
        export(tiny_checkpoints("qwen2"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_factors_that_are_folded_into_the_values_are_in_the_scales(
    method: Any, tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    options = {"quant": "int4", "method": method, "dialect": "portable"}
    options["calibration_tokens"] = kv_scales.CACHE_TOKENS
    manifest = export(tiny_checkpoints("qwen2"), tmp_path / "b", **options)
    assert manifest.kv_cache is not None
    export(tiny_checkpoints("qwen2"), tmp_path / "f", kv_cache="float", **options)
    with Runner(tmp_path / "b") as int8, Runner(tmp_path / "f") as plain:
        for runner in (int8, plain):
            runner.step(random_ids(1, 40), [0])
        ours, theirs = int8.cache(0), plain.cache(0)
        for plane in (0, 1):  # of the first layer, which no cache has touched
            scale = int8.backend.kv_scales[("0.key", "0.value")[plane]]
            assert (np.abs(ours[plane] - theirs[plane]) <= 0.51 * scale).mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "fp8"}, "--kv-cache fp8 is unknown; use float or int8"),
        ({"target": "jetpack7", "dialect": "native"}, "contradicts --dialect native for --target"),
        ({"target": "trt11", "dialect": "native"}, "TensorRT updates a cache of floats only"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig("model", Path("bundle"), **{"kv_cache": "int8", **options})


def test_the_target_decides_the_dialect() -> None:
    def dialect(target: str | None, kv_cache: Any) -> str:
        config = ExportConfig("model", Path("bundle"), target=target, kv_cache=kv_cache)
        return config.dialect_with(kv_cache)

    assert dialect("jetpack7", "float") == "native"
    assert dialect("jetpack7", "int8") == "portable"
    assert dialect("cpu", "int8") == "native"
    assert dialect(None, "int8") == "native"
    # A calibration of the cache alone has these options, too.
    ExportConfig("model", Path("bundle"), quant="fp16", kv_cache="int8", calibration_tokens=512)
    with pytest.raises(ConfigError, match="--calibration-tokens has no effect"):
        ExportConfig("model", Path("bundle"), quant="fp16", calibration_tokens=512)


def test_no_tokens_are_not_the_default(tiny_checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--calibration-tokens 0 is less than one sequence"):
        export(tiny_checkpoints("llama"), tmp_path / "b", calibration_tokens=0)


@pytest.mark.parametrize("target", ["jetpack6", "jetpack7", "trt11"])
def test_the_graph_keeps_the_rules_of_the_targets_tensorrt(
    target: str, tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    manifest = export(tiny_checkpoints("qwen3"), tmp_path / "b", target=target)
    assert manifest.dialect == "portable"
    assert set(manifest.tensorrt) >= set(
        ExportConfig("m", Path("b"), target=target).device.versions
    )


def test_tensorrt_takes_no_8_bit_cache_in_the_native_dialect(tiny_bundles: Bundles) -> None:
    from engines.rules.check import check_graph
    from engines.rules.table import VERSIONS

    path = tiny_bundles("qwen2", "native", kv_cache="int8") / "decoder.onnx"
    verdicts = check_graph(path.read_bytes(), path.parent, VERSIONS)
    assert not any(verdict.legal for verdict in verdicts)
    assert any("kv-types" in str(refusal) for refusal in verdicts[-1].refusals)


def test_queries_and_keys_of_a_linear_without_the_values_are_refused() -> None:
    layer = (Linear("qk", 64, (("q", 64), ("k", 32))), Attention(4, 2, 16))
    with pytest.raises(CheckpointError, match="--kv-cache int8: a layer has no linear"):
        cache_taps(layer)

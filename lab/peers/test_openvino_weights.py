"""What OpenVINO's INT4 weights are, held against its own inference of the compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_make.checkpoint_tensors import expected_tensors
from export.sources.opening import open_checkpoint
from tests.makers.tiny_models import Kind, write_checkpoint

# They are in an environment of their own, which python3 -m lab openvino-weights --check has.
nncf = pytest.importorskip("nncf", reason="needs NNCF: OpenVINO's rounding")
openvino = pytest.importorskip("openvino", reason="needs NNCF: OpenVINO's rounding")
from . import openvino_weights as script  # noqa: E402

Array = NDArray[np.float32]
SYM_32: dict[str, Any] = {"sym": True, "group_size": 32}


def random_rows(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Bits by hand: a group's scale has 16, an INT4 zero point 4.
@pytest.mark.parametrize(
    ("settings", "columns", "group", "bits"),
    [
        ({}, 256, 128, 4 + (16 + 4) / 128),
        (SYM_32, 192, 32, 4 + 16 / 32),
        ({"fallback": "adjust"}, 192, 64, 4 + (16 + 4) / 64),
        ({"group_size": -1}, 96, 96, 4 + (16 + 4) / 96),
    ],
)
def test_openvino_computes_with_the_weights_that_are_read_back(
    settings: dict[str, Any], columns: int, group: int, bits: float
):
    weights = {"a": random_rows(24, columns), "b": 3 * random_rows(8, columns, seed=1)}
    model = script.compress(weights, script.int4(**settings))
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32"}
    inference = openvino.compile_model(model, "CPU", exact)
    x = random_rows(5, columns, seed=2)
    outputs = inference([x, x])
    for index, rows in enumerate(weights.values()):
        values, num_bytes = script.decompress(model, index)
        assert num_bytes * 8 / rows.size == bits
        np.testing.assert_allclose(outputs[index], x @ values.T, rtol=1e-3, atol=2e-3)
        per_group = values.reshape(-1, group)
        assert max(len(np.unique(each)) for each in per_group) <= 16
        # A step of the group at most: an end is cut where zero is no whole number of steps away.
        span = np.ptp(rows.reshape(-1, group), axis=1, keepdims=True)
        error = np.abs(per_group - rows.reshape(-1, group))
        assert (error <= span / (8 if settings.get("sym") else 14.9)).all()


def tensors(directory: Path) -> dict[str, Array]:
    with open_checkpoint(str(directory)) as checkpoint:
        names = expected_tensors(checkpoint.spec)
        return {name: checkpoint.tensor(name).astype(np.float32) for name in names}


@pytest.mark.parametrize(("kind", "heads"), [("qwen2", 2), ("qwen3", 1)])
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_directory_gets_each_layers_weights(
    tmp_path: Path, kind: Kind, heads: int, embeddings: bool
):
    source = write_checkpoint(tmp_path / "source", kind)
    settings = script.int4(**SYM_32)
    done = script.write(source, tmp_path / "output", settings, embeddings=embeddings)
    before, after = tensors(source), tensors(tmp_path / "output")
    assert list(before) == list(after)
    for name, value in after.items():
        if "proj.weight" in name:
            wanted = script.decompress(script.compress({name: before[name]}, settings), 0)[0]
            np.testing.assert_array_equal(value, wanted.astype(np.float16))
            assert np.abs(value - before[name]).max() > 0
        elif embeddings and value.ndim == 2:
            span = np.ptp(before[name], axis=1, keepdims=True)
            error = np.abs(value - before[name])
            assert error.max() > 0
            assert (error <= span / 250).all()  # a step is a 255th
        else:
            np.testing.assert_array_equal(value, before[name])
    layers = done["decoder layers"]
    assert layers.num_weights == sum(v.size for n, v in before.items() if "proj.weight" in n)
    assert layers.num_bytes * 8 / layers.num_weights == 4.5
    if embeddings:
        rest = done["embeddings and lm_head"]
        assert rest.num_weights == heads * before["model.embed_tokens.weight"].size
        assert rest.num_bytes == rest.num_weights * (1 + 3 / 64)  # scale and zero point of 64
    with pytest.raises(SystemExit, match="exists; remove it"):
        script.write(source, tmp_path / "output", settings)


def test_a_gguf_file_gets_each_layers_weights(tmp_path: Path):
    source, output = tmp_path / "source.gguf", tmp_path / "output.gguf"
    stored = {
        "token_embd.weight": random_rows(10, 64),
        "blk.0.attn_q.weight": random_rows(32, 64, seed=1),
        "blk.0.attn_norm.weight": random_rows(64, seed=2),
        "blk.0.ffn_down.weight": random_rows(64, 96, seed=3),
    }
    writer = gguf.GGUFWriter(source, "llama")
    for name, value in stored.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn" in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = script.int4(group_size=32)
    done = script.write(source, output, settings)
    assert list(done) == ["decoder layers"]
    before = {each.name: each for each in gguf.GGUFReader(source).tensors}
    after = {each.name: each for each in gguf.GGUFReader(output).tensors}
    assert list(before) == list(after)
    for name, tensor in after.items():
        floats = gguf.quants.dequantize(before[name].data, before[name].tensor_type)
        if name.startswith("blk") and floats.ndim == 2:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F16
            wanted = script.decompress(script.compress({name: floats}, settings), 0)[0]
            floats = wanted.astype(np.float16)
        np.testing.assert_array_equal(tensor.data, floats)
    assert 8 * done["decoder layers"].num_bytes == (4 + 20 / 32) * (32 * 64 + 64 * 96)
    with pytest.raises(SystemExit, match="exists; remove it"):
        script.write(source, output, settings)


def test_a_ratio_keeps_the_layers_in_int8_that_nncf_chooses():
    # NNCF's rule without data: INT8 for the layers that lose least by INT8.
    weights = {name: random_rows(16, 64, seed=seed) for seed, name in enumerate("abcd")}
    for name in "bd":
        weights[name][:, ::16] *= 40
    part = script.Rounded(
        weights, lambda name: weights[name], script.int4(group_size=64, ratio=0.6)
    )
    int4 = script.int4(group_size=64)
    int8 = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    kept = set()
    for name, rows in weights.items():
        small, large = (
            script.decompress(script.compress({name: rows}, each), 0)[0].astype(np.float16)
            for each in (int4, int8)
        )
        found = part(name)
        if np.array_equal(found, large):
            kept.add(name)
        else:
            np.testing.assert_array_equal(found, small)
    assert kept == {"a", "c"}
    assert part.num_weights == 4 * 16 * 64
    assert part.num_bytes == 2 * 16 * (64 / 2 + 2.5) + 2 * 16 * (64 + 3)


def test_rows_that_no_group_divides_are_refused_by_name(tmp_path: Path):
    source = write_checkpoint(tmp_path / "source", "qwen2")
    wanted = (
        r'"model\.layers\.0\.self_attn\.q_proj\.weight" \(channel size: 64\)\ngive a --group-size'
    )
    with pytest.raises(SystemExit, match=wanted):
        script.write(source, tmp_path / "output", script.int4())

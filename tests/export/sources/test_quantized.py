"""Checkpoints that others quantized: read as their tools read them, or refused by name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.bundle.linears import linear_layers
from edge.errors import CheckpointError
from edge.limited_child import Limits
from export.sources import untrusted_pattern
from export.sources.hf_directory import HfDirectory
from export.sources.opening import open_checkpoint
from export.sources.quantization_config import WeightFormat, read_quantization
from export.sources.quantized_module import QuantizedModule, unpack
from export.sources.quantized_weight import QuantizedWeight
from export.sources.safetensors_file import SafetensorsFile, TensorEntry
from tests.makers.quantized_golden import (
    NAMES,
    QuantizedGolden,
    Raw,
    change_config,
    read_raw,
    write_base,
    write_raw,
)

UP = "model.layers.0.mlp.up_proj"
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# ---------------------------------------------------------------- what the tools wrote


def test_every_kind_of_checkpoint_has_a_golden_file() -> None:
    methods = {QuantizedGolden.load(name).config["quant_method"] for name in NAMES}
    assert methods == {"awq", "gptq", "compressed-tensors", "auto-round", "modelopt"}
    assert sum(path.stat().st_size for path in Path("tests/data/quantized").iterdir()) < 320_000


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_tool_bit_for_bit(name: str, tmp_path: Path) -> None:
    golden = QuantizedGolden.load(name)
    directory = golden.write(tmp_path / name)
    assert weights_of(directory, golden) == golden.weights_sha256
    with open_checkpoint(str(directory)) as checkpoint:
        source = checkpoint.source.quantization
    assert source is not None
    assert source.method == golden.config["quant_method"]


@pytest.mark.parametrize(
    ("name", "details"),
    [
        ("gptq", "4 bits, groups of 32, symmetric"),
        ("gptq-v2", "4 bits, groups of 32, symmetric"),
        ("gptq-asym-act-order", "4 bits, groups of 32, asymmetric, act-order"),
        ("awq", "4 bits, groups of 32, asymmetric"),
        ("ct-w8a16", "8 bits, one scale per output, symmetric"),
        ("ct-w8a8-static", "8 bits, one scale per output, symmetric, static scales of inputs"),
        ("ct-w8a8-dynamic", "8 bits, one scale per output, symmetric, per-token scales of inputs"),
        ("ct-fp8", "FP8 weights, dynamic scales of inputs"),
        ("ct-nvfp4", "NVFP4 weights"),
        ("modelopt-nvfp4", "NVFP4 weights, static scales of inputs"),
    ],
)
def test_the_manifest_says_how_the_source_was_quantized(
    name: str, details: str, tmp_path: Path
) -> None:
    with HfDirectory(QuantizedGolden.load(name).write(tmp_path / name)) as checkpoint:
        source = checkpoint.source.quantization
    assert source is not None
    assert source.details == details


OLDER: dict[str, dict[str, Any]] = {
    "auto-round-gptq": {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"},
    "auto-round-gptqmodel": {"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"},
    "auto-round-awq": {"quant_method": "intel/auto-round", "backend": "auto_round:awq:gemm"},
    "ct-w4a16": {"quantization_status": "frozen"},
    "ct-w8a8-dynamic": {"quantization_status": "frozen", "format": "naive-quantized"},
    "ct-fp8": {"quantization_status": "frozen", "format": "naive-quantized"},
    "modelopt-fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": []},
}


@pytest.mark.parametrize("name", OLDER)
def test_files_of_older_versions_are_read_alike(name: str, tmp_path: Path) -> None:
    golden = QuantizedGolden.load(name)
    section = {key: value for key, value in golden.config.items() if key != "packing_format"}
    section |= OLDER[name]
    for group in section.get("config_groups", {}).values():
        group.pop("format", None)  # older ones name it once
    directory = golden.write(tmp_path / name)
    change_config(directory, quantization_config=section)
    assert weights_of(directory, golden) == golden.weights_sha256


def weights_of(directory: Path, golden: QuantizedGolden) -> dict[str, str]:
    kind, found = TYPES[golden.weights_type], {}
    with open_checkpoint(str(directory)) as checkpoint:
        for key in golden.weights_sha256:
            weight = checkpoint.tensor(key).astype(kind) + kind(0)
            found[key] = hashlib.sha256(weight.tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("says", ["config.json", "quantize_config.json"])
def test_file_names_of_autogptq_are_found(says: str, tmp_path: Path) -> None:
    golden = QuantizedGolden.load("gptq")
    directory = golden.write(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-32g.safetensors")
    if says != "config.json":
        section = {key: value for key, value in golden.config.items() if key != "quant_method"}
        change_config(directory, quantization_config=None)
        (directory / says).write_text(json.dumps(section))
    assert weights_of(directory, golden) == golden.weights_sha256
    weights = directory / "gptq_model-4bit-32g.safetensors"
    names = dict.fromkeys(read_raw(weights), weights.name)
    index = directory / f"{weights.name}.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    (directory / "other.safetensors").write_bytes(b"")
    assert weights_of(directory, golden) == golden.weights_sha256
    index.unlink()
    with pytest.raises(CheckpointError, match=r"has 2 files \*\.safetensors, gptq_model-4bit"):
        open_checkpoint(str(directory)).close()


def test_quantize_config_of_autogptq_is_named(tmp_path: Path) -> None:
    directory = QuantizedGolden.load("gptq").write(tmp_path / "model")
    change_config(directory, quantization_config=None)
    path = directory / "quantize_config.json"
    path.write_text('{"bits": 3, "group_size": 32}')
    with pytest.raises(CheckpointError, match=r"model/quantize_config\.json: bits is 3"):
        open_checkpoint(str(directory)).close()
    path.write_text('{"bits": 8, "group_size": 32}')
    words = r"qweight has shape .*; quantize_config\.json says 8 bits"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(directory)).close()


def test_zero_points_of_compressed_tensors_before_it_packed_them(tmp_path: Path) -> None:
    golden = QuantizedGolden.load("ct-w4a16-asym")
    directory = golden.write(tmp_path / "model")
    tensors = read_raw(directory / "model.safetensors")
    for name, (kind, shape, raw) in list(tensors.items()):
        if name.endswith("weight_zero_point"):
            assert kind == "I32"
            words = np.frombuffer(raw, np.int32).reshape(shape)
            out = tensors[name.replace("zero_point", "packed")][1][0]
            zeros = (unpack(np.ascontiguousarray(words.T), 4).T[:out].astype(np.int16) - 8).astype(
                np.int8
            )
            tensors[name] = ("I8", zeros.shape, zeros.tobytes())
    write_raw(directory / "model.safetensors", tensors)
    assert weights_of(directory, golden) == golden.weights_sha256


def test_scales_of_a_cache_are_passed_over_if_the_config_names_one(tmp_path: Path) -> None:
    golden = QuantizedGolden.load("ct-fp8")
    directory = golden.write(tmp_path / "model")
    tensors = read_raw(directory / "model.safetensors")
    scale = np.float32(0.5).tobytes()
    extra = {
        f"model.layers.0.self_attn.{part}_proj.output_scale": ("F32", (), scale) for part in "kv"
    }
    write_raw(directory / "model.safetensors", {**tensors, **extra})
    with pytest.raises(CheckpointError, match=r"k_proj\.output_scale is not part"):
        open_checkpoint(str(directory)).close()
    change_config(
        directory, quantization_config={**golden.config, "kv_cache_scheme": {"num_bits": 8}}
    )
    assert weights_of(directory, golden) == golden.weights_sha256


def test_gptqmodels_rules_hold_for_awq(tmp_path: Path) -> None:
    golden = QuantizedGolden.load("awq")
    directory = golden.write(tmp_path / "model")
    down = "model.layers.0.mlp.down_proj"
    tensors = read_raw(directory / "model.safetensors")
    kept = {name: raw for name, raw in tensors.items() if not name.startswith(down)}
    floats = read_raw(write_base(tmp_path / "base") / "model.safetensors")
    weights = {**kept, f"{down}.weight": floats[f"{down}.weight"]}
    write_raw(directory / "model.safetensors", weights)
    section = {**golden.config, "dynamic": {"-:.*down_proj": {}}}
    change_config(directory, quantization_config=section)
    with open_checkpoint(str(directory)) as checkpoint:
        assert checkpoint.weight_format(f"{down}.weight") is None
        assert checkpoint.weight_format(f"{UP}.weight") is not None


def test_frozen_weights_that_are_floats_are_refused(tmp_path: Path) -> None:
    golden = QuantizedGolden.load("ct-w8a8-dynamic")
    directory = golden.write(tmp_path / "model")
    change_config(directory, quantization_config={**golden.config, "quantization_status": "frozen"})
    tensors = read_raw(directory / "model.safetensors")
    name = f"{UP}.weight"
    _, shape, raw = tensors[name]
    write_raw(directory / "model.safetensors", {**tensors, name: ("F16", shape, raw * 2)})
    with pytest.raises(CheckpointError, match=rf"{name} has type F16, expected I8"):
        open_checkpoint(str(directory)).close()


# --------------------------------------------------------------------------- packings


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Pack elements ``[rows, n]`` into words, the lowest bits first."""
    per_word = 32 // bits
    rows = values.reshape(len(values), -1, per_word)
    words = (rows << (bits * np.arange(per_word))).sum(axis=-1)
    packed: NDArray[np.int32] = words.astype(np.uint64).astype(np.uint32).view(np.int32)
    return packed


@given(data=st.data(), bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 5), n=st.integers(1, 4))
def test_unpacking_undoes_packing(data: st.DataObject, bits: int, rows: int, n: int) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    values = np.random.RandomState(seed).randint(0, 1 << bits, size=(rows, n * 32 // bits))
    assert_array_equal(unpack(pack(values, bits), bits), values)
    assert_array_equal(unpack(pack(values, bits)[::-1], bits), values[::-1])  # not contiguous


def read_module(
    form: WeightFormat, tensors: dict[str, NDArray[Any]], shape: tuple[int, int] = (32, 64)
) -> QuantizedWeight:
    module = QuantizedModule("m", form, shape, "quantization_config", Path("model"))
    names = {f"m.{part}": values for part, values in tensors.items()}
    kinds = {"int32": "I32", "int64": "I64", "int8": "I8", "float16": "F16", "float32": "F32"}
    entries = {
        name: TensorEntry(kinds[str(values.dtype)], values.shape, 0, 0)
        for name, values in names.items()
    }
    assert module.check(entries) == names.keys()
    module.check_values(names.__getitem__, names.__contains__)
    return module.read(names.__getitem__, names.__contains__)


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 4, 8]),
    offset=st.sampled_from([0, 1]),
    act_order=st.booleans(),
)
def test_gptq_of_any_bits_and_order(seed: int, bits: int, offset: int, act_order: bool) -> None:
    rng = np.random.RandomState(seed)
    q = rng.randint(0, 1 << bits, size=(32, 64))
    z = rng.randint(offset, 1 << bits, size=(32, 2))
    scales = rng.uniform(0.01, 1, size=(32, 2)).astype(np.float16)
    group_of = np.repeat([0, 1], 32)
    if act_order:
        rng.shuffle(group_of)
    form = WeightFormat("gptq", bits, 32, symmetric=False, zero_offset=offset, act_order=act_order)
    weight = read_module(
        form,
        {
            "qweight": pack(q, bits).T.copy(),
            "qzeros": pack((z - offset).T, bits),
            "scales": scales.T.copy(),
            "g_idx": group_of.astype(np.int32),
        },
    )
    half = 1 << (bits - 1)
    assert_array_equal(weight.codes, q - half)
    assert_array_equal(weight.zeros, z - half)
    expected = scales.astype(np.float32)[:, group_of] * (q - z[:, group_of])
    assert_array_equal(weight.dequantize(), expected)
    order = weight.channel_order()
    assert order is not None
    assert_array_equal(group_of[order], np.repeat([0, 1], 32))


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans())
def test_compressed_tensors_of_any_bits(seed: int, bits: int, symmetric: bool) -> None:
    rng = np.random.RandomState(seed)
    half = 1 << (bits - 1)
    q = rng.randint(0, 1 << bits, size=(32, 64))
    z = np.full((32, 2), half) if symmetric else rng.randint(0, 1 << bits, size=(32, 2))
    scales = rng.uniform(0.01, 1, size=(32, 2)).astype(np.float32)
    tensors = {
        "weight_packed": pack(q, bits),
        "weight_scale": scales,
        "weight_shape": np.array([32, 64]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(z.T, bits).T.copy()
    weight = read_module(WeightFormat("packed", bits, 32, symmetric=symmetric), tensors)
    assert_array_equal(weight.codes, q - half)
    expected = scales.repeat(32, axis=1) * (q - z.repeat(32, axis=1)).astype(np.float32)
    assert_array_equal(weight.dequantize(), expected)


def test_zero_points_that_borrowed_from_their_neighbours() -> None:
    """GPTQModel subtracts 0x11111111 from a word of zero points, whatever is in it."""
    zeros = np.random.RandomState(0).randint(0, 16, size=(2, 32))
    zeros[:, ::3] = 0
    words = (pack(zeros, 4).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    weight = read_module(
        WeightFormat("gptq", 4, 32, symmetric=False, zero_offset=1),
        {
            "qweight": np.zeros((8, 32), np.int32),
            "qzeros": words,
            "scales": np.ones((2, 32), np.float16),
        },
    )
    assert_array_equal(weight.zeros, zeros.T - 8)


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 4, 8]),
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    symmetric=st.booleans(),
)
def test_gptq_whose_last_words_are_not_full(
    seed: int, bits: int, out: int, width: int, symmetric: bool
) -> None:
    rng = np.random.RandomState(seed)
    q = rng.randint(0, 1 << bits, size=(out, width))
    half = 1 << (bits - 1)
    z = np.full((out, 1), half) if symmetric else rng.randint(0, 1 << bits, size=(out, 1))

    def filled(values: NDArray[np.int64]) -> NDArray[np.int32]:
        return pack(np.pad(values, ((0, 0), (0, -values.shape[1] % (32 // bits)))), bits)

    tensors = {"qweight": filled(q).T, "qzeros": filled(z.T), "scales": np.ones((1, out), "f4")}
    weight = read_module(WeightFormat("gptq", bits, 0, symmetric=symmetric), tensors, (out, width))
    assert_array_equal(weight.dequantize(), q - z)


def test_awq_whose_outputs_do_not_fill_words_is_refused() -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "qweight": np.zeros((64, 4), np.int32),
        "qzeros": np.zeros((2, 4), np.int32),
        "scales": np.ones((2, 36), np.float16),
    }
    words = r"tensor m\.qweight is of 36 outputs, no multiple of the 8 of a word; .*damaged"
    with pytest.raises(CheckpointError, match=words):
        read_module(WeightFormat("awq", 4, 32, symmetric=False), tensors, (36, 64))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_fp8_in_blocks(seed: int) -> None:
    rng = np.random.RandomState(seed)
    weight = rng.normal(0, 20, size=(40, 48)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.01, 1, size=(3, 2)).astype(np.float32)
    form = WeightFormat("fp8-inv", 8, block=(16, 32))
    module = QuantizedModule("m", form, (40, 48), "quantization_config", Path("model"))
    names: dict[str, NDArray[Any]] = {"m.weight": weight, "m.weight_scale_inv": scales}
    found = module.read_floats(names.__getitem__, names.__contains__)
    blocks = scales.repeat(16, axis=0).repeat(32, axis=1)[:40, :48]
    assert_array_equal(found, weight.astype(np.float32) * blocks)


# ------------------------------------------------------------------------------ configs

OLD_ROUND = {"quant_method": "intel/auto-round", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
ARGS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
GROUP = {"targets": ["Linear"], "weights": ARGS, "format": "pack-quantized"}
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
BLOCKLESS = {"quant_method": "fp8", "weight_block_size": []}
EVIL = r"(?:(?:\w+)+\.?)+!"
CHANNELS = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
FP8 = {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
BLOCKS = {"weights": {**FP8["weights"], "strategy": "block", "block_structure": "128x64"}}
TENSORS = {"quant_method": "compressed-tensors", "config_groups": {"g": GROUP}}


def targets(eight_bits: list[str], four_bits: list[str]) -> dict[str, Any]:
    eight = {**GROUP, "targets": eight_bits, "weights": {**ARGS, "num_bits": 8}}
    four = {**GROUP, "targets": four_bits}
    return {**TENSORS, "config_groups": {"group_0": eight, "group_1": four}}


def of(section: dict[str, Any], module: str = UP) -> WeightFormat | None:
    config = read_quantization({"quantization_config": section}, Path("dir"))
    assert config is not None
    return config.format_of(module)


@pytest.mark.parametrize(
    ("section", "module", "expected"),
    [
        (AWQ, UP, WeightFormat("awq", 4, 128, symmetric=False)),
        (AWQ, "lm_head", None),
        ({**AWQ, "modules_to_not_convert": ["mlp"]}, UP, None),
        ({**AWQ, "lm_head": True}, "lm_head", WeightFormat("awq", 4, 128, symmetric=False)),
        (
            {**AWQ, "dynamic": {r"+:.*up_proj": {"group_size": 32}}},
            UP,
            WeightFormat("awq", 4, 32, symmetric=False),
        ),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64},
            UP,
            WeightFormat("awq", 4, 64, symmetric=False),
        ),
        (GPTQ, UP, WeightFormat("gptq", 4, 128, zero_offset=1)),
        (GPTQ, "lm_head", None),
        ({**GPTQ, "lm_head": True}, "lm_head", WeightFormat("gptq", 4, 128, zero_offset=1)),
        (
            {**GPTQ, "group_size": -1, "checkpoint_format": "gptq_v2"},
            UP,
            WeightFormat("gptq", 4, 0),
        ),
        ({**GPTQ, "dynamic": {r"-:.*up_proj": {}}}, UP, None),
        (
            {**GPTQ, "dynamic": {r"+:.*up_proj": {"bits": 8, "group_size": 32}}},
            UP,
            WeightFormat("gptq", 8, 32, zero_offset=1),
        ),
        ({**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"]]}, UP, None),
        ({**GPTQ, "checkpoint_format": "gemm"}, UP, WeightFormat("awq", 4, 128, symmetric=False)),
        (ROUND, UP, WeightFormat("gptq", 4, 128, zero_offset=1)),
        ({**ROUND, "packing_format": "auto_round:gptqmodel"}, UP, WeightFormat("gptq", 4, 128)),
        ({**ROUND, "packing_format": "auto_round:auto_awq"}, UP, WeightFormat("awq", 4, 128)),
        (
            {**ROUND, "packing_format": "auto_round:gptqmodel", "autoround_version": "0.5.1"},
            UP,
            WeightFormat("gptq", 4, 128, zero_offset=1),
        ),
        ({**OLD_ROUND, "backend": "auto_round:exllamav2"}, UP, WeightFormat("gptq", 4, 128)),
        ({**OLD_ROUND, "backend": "autoround:exllamav2"}, UP, WeightFormat("gptq", 4, 128)),
        (
            {**OLD_ROUND, "backend": "auto_round:gptq:exllamav2"},
            UP,
            WeightFormat("gptq", 4, 128, zero_offset=1),
        ),
        ({**OLD_ROUND, "backend": "auto_round:awq:gemm"}, UP, WeightFormat("awq", 4, 128)),
        ({**ROUND, "extra_config": {UP: {"bits": 16, "data_type": "float"}}}, UP, None),
        (
            {**ROUND, "extra_config": {r".*mlp\.up_proj": {"bits": 8}}},
            UP,
            WeightFormat("gptq", 8, 128, zero_offset=1),
        ),
        (ROUND, "lm_head", None),
        (
            {**ROUND, "extra_config": {"lm_head": {"bits": 4}}},
            "lm_head",
            WeightFormat("gptq", 4, 128, zero_offset=1),
        ),
        (TENSORS, UP, WeightFormat("packed", 4, 128)),
        (TENSORS, "lm_head", WeightFormat("packed", 4, 128)),
        ({**TENSORS, "quantization_status": "frozen"}, UP, WeightFormat("packed", 4, 128)),
        (
            {**TENSORS, "config_groups": {"g": {**GROUP, "format": "naive-quantized", **CHANNELS}}},
            UP,
            WeightFormat("int8", 8),
        ),
        (
            {**TENSORS, "config_groups": {"g": {**GROUP, "format": "naive-quantized", **FP8}}},
            UP,
            WeightFormat("fp8", 8),
        ),
        ({**TENSORS, "ignore": ["lm_head", r"re:.*mlp\..*"]}, UP, None),
        (targets(["re:model.layers.0.mlp"], [UP]), UP, WeightFormat("packed", 4, 128)),
        (targets([UP], ["re:.*", "Linear"]), UP, WeightFormat("packed", 8, 128)),
        (targets(["re:.*up_proj"], ["re:.*mlp.*"]), UP, WeightFormat("packed", 4, 128)),
        (targets(["re:.*mlp.*"], ["re:.*up_proj"]), UP, WeightFormat("packed", 8, 128)),
        (targets(["Linear", "lm_head"], ["re:.*mlp.*"]), UP, WeightFormat("packed", 4, 128)),
        (
            {**TENSORS, "config_groups": {"g": {**GROUP, "format": "float-quantized", **BLOCKS}}},
            UP,
            WeightFormat("fp8", 8, block=(128, 64)),
        ),
        (
            {
                **TENSORS,
                "config_groups": {
                    "all": GROUP,
                    "some": {
                        **GROUP,
                        "targets": [r"re:.*up_proj"],
                        "weights": {**ARGS, "num_bits": 8},
                    },
                },
            },
            UP,
            WeightFormat("packed", 8, 128),
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            UP,
            WeightFormat("fp8-inv", 8, block=(128, 128), inputs="dynamic"),
        ),
        (AUTO_FP8, UP, WeightFormat("fp8", 8, inputs="dynamic")),
        ({**AUTO_FP8, "activation_scheme": "static"}, UP, WeightFormat("fp8", 8, inputs="static")),
        ({**AUTO_FP8, "ignored_layers": [UP, "lm_head"]}, UP, None),
        (AUTO_FP8, "lm_head", None),
        ({**AUTO_FP8, "modules_to_not_convert": ["mlp"]}, UP, None),
        ({**AUTO_FP8, "weight_block_size": [8, 8], "ignored_layers": [UP]}, UP, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*.mlp.*"]}, UP, None),
    ],
)
def test_formats_of_modules_are_read_from_the_config(
    section: dict[str, Any], module: str, expected: WeightFormat | None
) -> None:
    assert of(section, module) == expected


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "quant_method must name a method"),
        ({"group_size": 64, "bits": 4}, "is missing, as MLX writes it: not read; export the orig"),
        ({"quant_method": "magic"}, "'magic' is not known; known: awq, gptq"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"bitsandbytes: NF4.*export the original model.*model\.dequantize\(\)",
        ),
        ({"quant_method": "hqq"}, "hqq: the layout is not read; export the original"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; what is read: gemm"),
        ({**AWQ, "bits": 8}, "bits is 8; what is read: 4"),
        ({**AWQ, "dynamic": {".*up_proj": {"bits": 8}}}, "dynamic: bits is 8; what is read: 4"),
        ({**AWQ, "group_size": 0}, "group_size must be positive or -1"),
        ({**GPTQ, "bits": 3}, "bits is 3; what is read: 2, 4, 8"),
        ({**GPTQ, "bits": "4"}, "Expected `int`"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({**GPTQ, "rotation": "hadamard"}, "rotation asks for transforms at run time"),
        ({**AWQ, "rotation": "random"}, "rotation asks for transforms at run time"),
        ({**ROUND, "rotation_config": {"block_size": 32}}, "rotation_config asks for transforms"),
        ({**ROUND, "spinquant_config": {"r4": True}}, "spinquant_config asks for transforms"),
        ({**GPTQ, "dynamic": {"+:(": {"bits": 8}}}, "dynamic holds a pattern that is not valid"),
        ({**GPTQ, "dynamic": {"a{99999999999}": {}}}, "dynamic holds a pattern .* is too large"),
        ({**ROUND, "extra_config": {"(" * 5000 + ")" * 5000: {}}}, "extra_config holds a pattern"),
        ({**TENSORS, "ignore": ["re:\ud800"]}, "ignore holds a pattern .* no Unicode"),
        ({**GPTQ, "\ud800": 1}, "surrogates"),
        ({**ROUND, "packing_format": "auto_round:mlx"}, "packing_format is 'auto_round:mlx'"),
        ({**OLD_ROUND, "backend": "auto_round:hpu"}, "backend is 'auto_round:hpu'"),
        ({**ROUND, "data_type": "mx_fp"}, "data_type is 'mx_fp'"),
        ({**ROUND, "act_bits": 8}, "act_bits is 8"),
        ({**TENSORS, "quantization_status": "calibration"}, "quantization_status is 'calibration'"),
        ({**TENSORS, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**TENSORS, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config asks"),
        ({**TENSORS, "config_groups": {}}, "config_groups has no group"),
        (
            {**TENSORS, "config_groups": {"g": {**GROUP, "format": "marlin-24"}}},
            "config_groups: g: format is 'marlin-24'",
        ),
        (
            {**TENSORS, "config_groups": {"g": {**GROUP, "weights": None}}},
            "config_groups: g: weights is missing",
        ),
        (
            {**TENSORS, "config_groups": {"g": {**GROUP, "output_activations": ARGS}}},
            "output_activations are not read",
        ),
        (
            {**TENSORS, "config_groups": {"g": {**GROUP, "weights": {**ARGS, "num_bits": 3}}}},
            "num_bits is 3",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "must be two positive sizes"),
        ({"quant_method": "fp8", "activation_scheme": "token"}, "Invalid enum value 'token'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^dir/config\.json: .*{words}"):
        of(section)
    with pytest.raises(CheckpointError, match=r"must be an object, found 'awq'"):
        read_quantization({"quantization_config": "awq"}, Path("dir"))


@pytest.mark.parametrize(
    "section",
    [
        {**GPTQ, "dynamic": {EVIL: {"bits": 8}}},
        {**ROUND, "extra_config": {EVIL: {"bits": 8}}},
        {**TENSORS, "ignore": [f"re:{EVIL}"]},
        {**TENSORS, "config_groups": {"g": {**GROUP, "targets": [f"re:{EVIL}"]}}},
    ],
)
def test_patterns_that_never_end_are_refused(
    section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted_pattern._child, "_limits", Limits(0.3, 1 << 28))
    untrusted_pattern._child.close()
    with pytest.raises(CheckpointError, match=r"^dir/config\.json: .* takes more than"):
        of(section, f"{UP}.{'a' * 40}")
    untrusted_pattern._child.close()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)  # a pattern is tried in another process
@given(
    section=st.sampled_from([AWQ, GPTQ, ROUND, TENSORS, BLOCKLESS]),
    key=st.sampled_from(
        [
            "bits",
            "group_size",
            "sym",
            "dynamic",
            "extra_config",
            "config_groups",
            "ignore",
            "version",
        ]
    ),
    value=_JSON,
)
def test_any_value_is_followed_or_refused(section: dict[str, Any], key: str, value: Any) -> None:
    try:
        of({**section, key: value})
    except CheckpointError:
        pass
    else:
        assert section is not BLOCKLESS


# ---------------------------------------------------------------- weights that do not fit


def change(name: str, **parts: Raw | None) -> Callable[[dict[str, Raw]], None]:
    def run(tensors: dict[str, Raw]) -> None:
        for part, raw in parts.items():
            tensors.pop(f"{name}.{part}", None)
            if raw is not None:
                tensors[f"{name}.{part}"] = raw

    return run


def scaled(name: str, value: float) -> Callable[[dict[str, Raw]], None]:
    """Overwrite the last value of a tensor of 16 or 32 bits."""

    def run(tensors: dict[str, Raw]) -> None:
        kind, shape, raw = tensors[name]
        dtype = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}[kind]
        last = np.array([value], dtype).tobytes()
        tensors[name] = (kind, shape, raw[: -len(last)] + last)

    return run


def words(*shape: int, value: int = 0) -> Raw:
    return ("I32", shape, np.full(shape, value, np.int32).tobytes())


@pytest.mark.parametrize(
    ("name", "config", "edit", "expected"),
    [
        ("gptq", {}, change(UP, scales=None), r"up_proj\.scales is missing, expected \[2, 64\]"),
        (
            "gptq",
            {},
            change(UP, qweight=words(64, 8)),
            r"qweight has shape \[64, 8\], expected \[8, 64\]",
        ),
        (
            "gptq",
            {},
            change(UP, qweight=("F32", (8, 64), bytes(2048))),
            "qweight has type F32, expected I32",
        ),
        ("gptq", {"bits": 8}, None, r"q_proj\.qweight has shape \[8, 64\], expected \[16, 64\]"),
        ("gptq", {"group_size": 64}, None, r"q_proj\.qzeros has shape \[2, 8\], expected \[1, 8\]"),
        ("gptq", {"group_size": 48}, None, "q_proj has 64 inputs, no multiple of its groups of 48"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, None, "q_proj.qzeros holds zero points other"),
        (
            "gptq-v2",
            {"checkpoint_format": "gptq", "format": "gptq"},
            None,
            "q_proj.qzeros holds zero",
        ),
        (
            "gptq-asym-act-order",
            {"sym": True},
            None,
            "q_proj.qzeros holds zero points other than 8",
        ),
        ("gptq-asym-act-order", {"desc_act": False}, None, "g_idx does not follow the order"),
        ("gptq-asym-act-order", {}, change(UP, g_idx=words(64, value=2)), "names groups 2 to 2"),
        ("gptq-asym-act-order", {}, change(UP, g_idx=None), r"g_idx is missing, expected \[64\]"),
        ("gptq", {}, scaled(f"{UP}.scales", np.nan), "up_proj.scales holds NaN or infinite scales"),
        ("awq", {}, scaled(f"{UP}.scales", np.inf), "up_proj.scales holds NaN or infinite scales"),
        ("awq", {"modules_to_not_convert": ["up_proj"]}, None, r"no tensor .*up_proj\.weight"),
        ("ct-w4a16", {}, scaled(f"{UP}.weight_scale", np.nan), "weight_scale holds NaN"),
        ("ct-w4a16", {}, change(UP, weight_scale=None), "weight_scale is missing"),
        (
            "ct-w8a8-static",
            {},
            change(UP, input_scale=("BF16", (1,), bytes(2))),
            "input_scale is 0, expected a positive number",
        ),
        (
            "ct-w8a8-static",
            {},
            change(UP, input_zero_point=("I8", (1,), b"\1")),
            "input_zero_point is not 0",
        ),
        (
            "ct-w8a8-static",
            {"ignore": ["lm_head"]},
            None,
            "down_proj.weight has type BF16, expected I8",
        ),
        ("ct-w8a8-static", {"ignore": ["re:.*"]}, None, "leaves every linear layer float"),
        (
            "ct-nvfp4",
            {},
            scaled(f"{UP}.weight_global_scale", 0),
            "weight_global_scale is not positive",
        ),
        (
            "ct-fp8",
            {},
            change(UP, weight_scale=("BF16", (1, 64), bytes(128))),
            r"expected \[64, 1\]",
        ),
        (
            "gptq",
            {},
            change("lm_head", qweight=words(8, 320)),
            r"lm_head\.qweight is not part .*: quantization_config in config\.json says of "
            "lm_head: not quantized",
        ),
        (
            "gptq",
            {},
            change(UP, bias=("F16", (64,), b"\0\x3c" * 64)),
            "up_proj.bias is not part of",
        ),
    ],
)
def test_weights_that_the_config_lies_about_are_refused(
    name: str,
    config: dict[str, Any],
    edit: Callable[[dict[str, Raw]], None] | None,
    expected: str,
    tmp_path: Path,
) -> None:
    """The tensor and the key of the config are named, and no weight was read by then."""
    golden = QuantizedGolden.load(name)
    directory = golden.write(tmp_path / name)
    change_config(directory, quantization_config={**golden.config, **config})
    if edit is not None:
        tensors = read_raw(directory / "model.safetensors")
        edit(tensors)
        write_raw(directory / "model.safetensors", tensors)
    read: list[str] = []
    original = SafetensorsFile.tensor

    def record(self: SafetensorsFile, tensor: str) -> NDArray[Any]:
        read.append(tensor)
        return original(self, tensor)

    with (
        mock.patch.object(SafetensorsFile, "tensor", record),
        pytest.raises(CheckpointError, match=expected) as caught,
    ):
        HfDirectory(directory)
    assert not [tensor for tensor in read if re.search(r"(qweight|packed|proj\.weight)$", tensor)]
    if "no tensor" not in expected:
        assert "quantization_config" in str(caught.value)


def test_float_weights_under_a_config_that_says_int4(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "base")
    change_config(directory, quantization_config=QuantizedGolden.load("gptq").config)
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight is missing"):
        HfDirectory(directory)


def test_integers_without_a_word_in_the_config(tmp_path: Path) -> None:
    directory = QuantizedGolden.load("gptq").write(tmp_path / "gptq")
    change_config(directory, quantization_config=None)
    with pytest.raises(CheckpointError, match="type 'I32', expected one of F32, F16, BF16"):
        HfDirectory(directory)


def test_biases_of_zeros_that_old_tools_add_change_nothing(tmp_path: Path) -> None:
    directory = QuantizedGolden.load("gptq").write(tmp_path / "gptq")
    tensors = read_raw(directory / "model.safetensors")
    write_raw(
        directory / "model.safetensors", {**tensors, f"{UP}.bias": ("F16", (64,), bytes(128))}
    )
    HfDirectory(directory).close()


def test_scales_of_a_cache_are_left_out_and_said(tmp_path: Path) -> None:
    golden = QuantizedGolden.load("ct-fp8")
    directory = golden.write(tmp_path / "fp8")
    tensors = read_raw(directory / "model.safetensors")
    scale: Raw = ("BF16", (1,), b"\x80\x3f")
    names = ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale")
    write_raw(directory / "model.safetensors", {**tensors, **dict.fromkeys(names, scale)})
    with pytest.raises(CheckpointError, match="k_scale is not part of"):
        HfDirectory(directory)
    scheme = {"num_bits": 8, "type": "float"}
    change_config(directory, quantization_config={**golden.config, "kv_cache_scheme": scheme})
    with HfDirectory(directory) as checkpoint:
        source = checkpoint.source.quantization
    assert source is not None
    assert "8-bit KV cache are left out" in source.details


@pytest.mark.parametrize("name", ["modelopt-fp8", "modelopt-nvfp4"])
def test_modelopt_may_say_it_in_a_file_of_its_own(name: str, tmp_path: Path) -> None:
    golden = QuantizedGolden.load(name)
    directory = golden.write(tmp_path / name)
    change_config(directory, quantization_config=None)
    kept = {"quant_algo": golden.config["quant_algo"], "exclude_modules": ["lm_head"]}
    file = directory / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": kept}))
    with HfDirectory(directory) as checkpoint:
        weight = checkpoint.tensor(f"{UP}.weight").tobytes()
    change_config(directory, quantization_config=golden.config)
    with HfDirectory(directory) as checkpoint:
        assert checkpoint.tensor(f"{UP}.weight").tobytes() == weight
    change_config(directory, quantization_config=None)
    file.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: .*quant_algo is 'W4A8_AWQ'"):
        HfDirectory(directory)


def test_a_closed_checkpoint_is_not_read(tmp_path: Path) -> None:
    checkpoint = HfDirectory(QuantizedGolden.load("gptq").write(tmp_path / "gptq"))
    name = linear_layers(checkpoint.spec)[0].weights[0]
    weight = checkpoint.quantized_weight(name)
    assert weight is not None
    assert_array_equal(weight.dequantize(), checkpoint.tensor(name))
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor(name)

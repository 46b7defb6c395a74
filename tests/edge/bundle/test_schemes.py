"""Recipes: which layer gets which scheme, and what is refused before any weight is read."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from edge.bundle.linears import expected_tensors, linear_layers
from edge.bundle.manifest import ModelSpec, RopeSpec, SchemeKind, TensorScheme
from edge.bundle.schemes import RULES, SCHEMES, Quant, Recipe, stored_bytes
from edge.errors import ConfigError

# DeepSeek-R1-Distill-Qwen-1.5B's numbers, two layers of it.
QWEN = ModelSpec(
    architecture="qwen2",
    hidden_size=1536,
    num_layers=2,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=8960,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    max_position_embeddings=131072,
    rope=RopeSpec(theta=10000.0),
    qkv_bias=True,
)
# SmolLM2-135M: 576 = 4.5 * 128 = 9 * 64.
SMOLLM2 = msgspec.structs.replace(
    QWEN,
    architecture="llama",
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    qkv_bias=False,
    tied_embeddings=True,
)
ODD = msgspec.structs.replace(QWEN, intermediate_size=8968)  # 8 divides it, 32 does not
FLOAT = TensorScheme(kind="float")
LAYERS = [f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "o", "gate_up", "down")]


def int8(group_size: int) -> TensorScheme:
    """As new bundles store it."""
    return TensorScheme(kind="int8", group_size=group_size, planes=True)


def int4(group_size: int) -> TensorScheme:
    return TensorScheme(kind="int4", group_size=group_size)


@pytest.mark.parametrize("model", [QWEN, SMOLLM2], ids=["untied", "tied"])
def test_layers_hold_every_matrix_of_the_model_once(model: ModelSpec):
    tensors = expected_tensors(model)
    used = []
    for layer in linear_layers(model):
        shapes = [tensors[name] for name in layer.weights]
        assert layer.shape == (shapes[0][1], sum(rows for rows, _ in shapes)), layer
        assert all(columns == layer.shape[0] for _, columns in shapes)
        assert [name.replace(".bias", ".weight") for name in layer.biases] in (
            [],
            list(layer.weights),
        )
        used += [*layer.weights, *layer.biases]
    assert len(set(used)) == len(used)
    others = set(tensors) - set(used)
    embedding = set() if model.tied_embeddings else {"model.embed_tokens.weight"}
    assert {name for name in others if "norm" not in name} == embedding


def test_layers_in_the_order_of_the_graph():
    """And their parts in the order in which the graph splits them again."""
    layers = {layer.name: layer for layer in linear_layers(QWEN)}
    assert list(layers) == [*LAYERS, "lm_head"]
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    qkv = [f"{attention}.{part}_proj" for part in ("q", "k", "v")]
    assert list(layers["layers.1.qkv"].weights) == [f"{name}.weight" for name in qkv]
    assert list(layers["layers.1.qkv"].biases) == [f"{name}.bias" for name in qkv]
    gate_up = [f"{mlp}.{part}_proj.weight" for part in ("gate", "up")]
    assert list(layers["layers.1.gate_up"].weights) == gate_up
    assert layers["lm_head"].weights == ("lm_head.weight",)
    assert linear_layers(SMOLLM2)[-1].weights == ("model.embed_tokens.weight",)


def test_int4_has_groups_of_32_and_keeps_the_head_in_int8():
    expected = {**dict.fromkeys(LAYERS, int4(32)), "lm_head": int8(128)}
    assert Recipe("int4").schemes(QWEN) == expected
    assert Recipe("int4", keep=(("lm_head", "int4"),)).schemes(QWEN)["lm_head"] == int4(32)
    assert set(Recipe("int4", 64).schemes(QWEN).values()) == {int4(64), int8(64)}


def test_int8_takes_every_layer():
    assert set(Recipe("int8").schemes(QWEN).values()) == {int8(128)}


@pytest.mark.parametrize("quant", ["fp16", "bf16"])
def test_float_recipes_leave_every_layer(quant: Quant):
    schemes = Recipe(quant).schemes(QWEN)
    assert schemes == dict.fromkeys([*LAYERS, "lm_head"], FLOAT)


def test_int8_has_the_largest_group_that_fits_every_layer():
    assert Recipe("int8").schemes(SMOLLM2)["layers.0.down"] == int8(64)
    narrow = msgspec.structs.replace(SMOLLM2, intermediate_size=1536 + 32)
    assert Recipe("int8").schemes(narrow)["layers.0.qkv"] == int8(32)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_group_size_as_asked(group_size: int):
    schemes = Recipe("int4", group_size).schemes(QWEN)
    assert {scheme.group_size for scheme in schemes.values()} == {group_size}


def test_keep_by_name_and_the_last_match_wins():
    keep = (("layers.*", "int8"), ("layers.1.*", "float"), ("*.down", "int4"), ("lm_head", "int4"))
    assert Recipe("int4", 64, keep).schemes(QWEN) == {
        "layers.0.qkv": int8(64),
        "layers.0.o": int8(64),
        "layers.0.gate_up": int8(64),
        "layers.0.down": int4(64),
        "layers.1.qkv": FLOAT,
        "layers.1.o": FLOAT,
        "layers.1.gate_up": FLOAT,
        "layers.1.down": int4(64),
        "lm_head": int4(64),
    }


def test_layers_may_have_a_group_size_of_their_own():
    keep = (("*.down", "int4-g128"), ("*.qkv", "int8-g64"), ("lm_head", "int8"))
    schemes = Recipe("int4", keep=keep).schemes(SMOLLM2)  # 576 wide but for down's inputs
    assert schemes["layers.0.down"] == int4(128)
    assert schemes["layers.0.qkv"] == int8(64)
    assert schemes["layers.0.o"] == int4(32)
    assert schemes["lm_head"] == int8(64)


def test_keep_quantizes_single_layers_of_a_float_recipe():
    schemes = Recipe("fp16", 32, (("lm_head", "int8"),)).schemes(QWEN)
    assert schemes == {**dict.fromkeys(LAYERS, FLOAT), "lm_head": int8(32)}


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (QWEN, Recipe("int4", 48), r"--group-size 48 .*\[1536, 8960\].*\[128, 64, 32\]"),
        (SMOLLM2, Recipe("int4", 128), r"--group-size 128 .*\[576, 1536\].*\[64, 32\]"),
        (QWEN, Recipe("int8", -128), "--group-size -128 does not fit"),
        (QWEN, Recipe("int8", 1), "--group-size 1 does not fit"),
        (QWEN, Recipe("int4", 0), "INT4 needs groups"),
        (QWEN, Recipe("int8", 0), "INT8 needs groups: leave --group-size 0 out"),
        (ODD, Recipe("int4"), r"no group size .*\[1536, 8968\].*--quant fp16"),
        (QWEN, Recipe("int4", None, (("lm-head", "int8"),)), "lm-head=int8 matches no .* lm_head"),
        (QWEN, Recipe("int4", None, (("layers.2.*", "int8"),)), r"layers\.2\.\*=int8 matches no"),
        (QWEN, Recipe("int4", None, (("lm_head", "fp8"),)), "unknown scheme 'fp8'"),
        (QWEN, Recipe("int4", None, (("lm_head", ""),)), "unknown scheme ''"),
        (QWEN, Recipe("int4", None, (("*.o", "int4-g48"),)), r"of int4-g48 does .*\[128, 64, 32\]"),
        (SMOLLM2, Recipe("int4", None, (("*", "int4-g128"),)), r"int4-g128 .*\[576, 1536\]"),
        (QWEN, Recipe("int4", None, (("*.o", "int8-g0"),)), "leave the group size of int8-g0 out"),
        (QWEN, Recipe("int4", None, (("*.o", "int4-g"),)), "unknown scheme 'int4-g'"),
        (QWEN, Recipe("int4", None, (("*.o", "int4-g\u0663"),)), "unknown scheme"),
        (QWEN, Recipe("int4", None, (("*.o", "w8a8-g64"),)), "w8a8 has no groups; say w8a8"),
        (QWEN, Recipe("fp16", 64), "--group-size 64 has no effect"),
        (QWEN, Recipe("int4", 64, (("*", "float"),)), "--group-size 64 has no effect"),
        (QWEN, Recipe("bf16", clip="absmax"), "--clip absmax has no effect"),
    ],
    ids=str,
)
def test_refusals(model: ModelSpec, recipe: Recipe, message: str):
    with pytest.raises(ConfigError, match=message):
        recipe.schemes(model)


def test_a_quantization_of_no_name_is_refused():
    quant: Any = "int3"
    with pytest.raises(ConfigError, match="--quant int3 is unknown; use fp16 or bf16 or int8"):
        Recipe(quant).schemes(QWEN)


def test_every_kind_has_its_facts_and_every_quantization_its_rules():
    assert set(SCHEMES) == set(get_args(SchemeKind))
    assert set(RULES) == set(get_args(Quant))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (FLOAT, (2 * 64 * 30, 0)),
        (int8(32), (64 * 30, 2 * 2 * 2 * 30)),  # a scale in each plane
        (TensorScheme(kind="int8", group_size=32), (64 * 30, 2 * 2 * 30)),  # of an old bundle
        (TensorScheme(kind="int8"), (64 * 30, 2 * 30)),
        (int4(32), (32 * 30, 2 * 2 * 30)),
        (TensorScheme(kind="w8a8"), (64 * 30, 2 * 30 + 2)),  # and the scale of the inputs
    ],
    ids=str,
)
def test_bytes_of_a_stored_weight_and_its_scales(scheme: TensorScheme, expected: tuple[int, int]):
    assert stored_bytes((64, 30), scheme) == expected
    assert stored_bytes((1, 3), int4(0))[0] == 2  # two in a byte

"""Recipes: which layer gets which scheme, and what is refused before any weight is read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import TensorScheme
from edge.bundle.quant_rules import Quant
from edge.errors import ConfigError
from edge.model.spec import ModelSpec, RopeSpec
from edge_lab.planner.models import BUILT_IN
from edge_make.recipe import VARIANTS, Recipe, find_variant, recipe_linears
from tests.makers.dense import Dense
from tests.makers.manifests import change_model, make_model

# DeepSeek-R1-Distill-Qwen-1.5B's numbers, two layers of it.
QWEN = Dense(
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
).model()
# SmolLM2-135M: 576 = 4.5 * 128 = 9 * 64.
SMOLLM2 = change_model(
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
ODD = change_model(QWEN, intermediate_size=8968)  # 8 divides it, 32 does not
FLOAT = TensorScheme(kind="float")
LAYERS = [f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "o", "gate_up", "down")]


def int8(group_size: int) -> TensorScheme:
    """As new bundles store it."""
    return TensorScheme(kind="int8", group_size=group_size, planes=True)


def int4(group_size: int) -> TensorScheme:
    return TensorScheme(kind="int4", group_size=group_size)


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
    narrow = change_model(SMOLLM2, intermediate_size=1536 + 32)
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


@pytest.mark.parametrize("name", list(BUILT_IN))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_fits_the_models_by_name(name: str, variant: str):
    model = BUILT_IN[name].spec
    linears = recipe_linears(model, find_variant(variant))
    assert [linear.name for linear in linears] == [layer.name for layer in linear_layers(model)]
    expected = math.prod(linear_layers(model)[0].shape) * model.num_layers
    qkv = [linear for linear in linears if linear.name.endswith(".qkv")]
    assert sum(math.prod(linear.shape) for linear in qkv) == expected
    assert {linear.part for linear in qkv} == {"attention"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_options_are_those_of_export(variant: str):
    from export.cli import export

    recipe = find_variant(variant)
    arguments = ["source", "-o", "bundle", *recipe.export_options()]
    with export.make_context("export", arguments) as context:
        assert context.params["quant"] == recipe.quant
        assert context.params["group_size"] == recipe.group_size
        assert tuple(context.params["keep"]) == recipe.keep


def test_what_does_not_fit_is_refused():
    narrow = make_model(hidden_size=96, num_heads=4, head_dim=24)
    with pytest.raises(ConfigError, match=r"--group-size 128 does not fit.*\[32\]"):
        recipe_linears(narrow, find_variant("int4-g128"))
    with pytest.raises(ConfigError, match="--quant int3 is unknown"):
        find_variant("int3")


@pytest.mark.parametrize("name", ["INT8-W8A8", "int8_w8a8", "W8A8", " int8-w8a8 "])
def test_a_precision_is_known_in_any_spelling(name: str):
    assert find_variant(name) is VARIANTS["int8-w8a8"]

"""config.json to ModelSpec: what is read, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import CheckpointError
from edge.model.spec import RopeSpec, Task
from edge_make.checkpoint_tensors import expected_tensors
from edge_make.model_config import parse_config
from tests.makers.dense import Dense, dense

# The published config.json of DeepSeek-R1-Distill-Qwen-1.5B.
R1_QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def config(**changes: Any) -> dict[str, Any]:
    merged = {**R1_QWEN, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def rope(**scaling: Any) -> RopeSpec:
    return parse_config(config(rope_scaling=scaling)).ropes[0]


def test_r1_distill_qwen() -> None:
    assert (
        parse_config(R1_QWEN)
        == Dense(
            architecture="qwen2",
            hidden_size=1536,
            num_layers=28,
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
    )


def test_r1_distill_qwen_has_the_published_number_of_weights() -> None:
    shapes = expected_tensors(parse_config(R1_QWEN))
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_777_088_000
    assert shapes["model.layers.27.self_attn.k_proj.bias"] == (256,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (1536, 8960)


def test_qwen3_has_norms_of_the_heads_and_a_head_dim_of_its_own() -> None:
    spec = parse_config(
        config(architectures=["Qwen3ForCausalLM"], head_dim=256, tie_word_embeddings=True)
    )
    shapes = expected_tensors(spec)
    assert (spec.attentions()[0].dim, dense(spec).qk_norm, dense(spec).qkv_bias) == (
        256,
        True,
        False,
    )
    assert shapes["model.layers.3.self_attn.q_norm.weight"] == (256,)
    assert shapes["model.layers.3.self_attn.o_proj.weight"] == (1536, 12 * 256)
    assert "model.layers.3.self_attn.q_proj.bias" not in shapes
    assert "lm_head.weight" not in shapes


@pytest.mark.parametrize(
    ("architecture", "said", "has"),
    [
        ("Qwen2ForCausalLM", True, True),
        ("Qwen2ForCausalLM", False, True),
        ("LlamaForCausalLM", True, True),
        ("LlamaForCausalLM", None, False),
        ("Qwen3ForCausalLM", True, True),
        ("Qwen3ForCausalLM", False, False),
    ],
)
def test_biases_of_q_k_and_v(architecture: str, said: bool | None, has: bool) -> None:
    assert (
        dense(
            parse_config(
                config(architectures=[architecture], attention_bias=said, sliding_window=None)
            )
        ).qkv_bias
        is has
    )


def test_old_llama_has_as_many_kv_heads_as_heads_and_the_default_theta() -> None:
    spec = parse_config(
        config(
            architectures=["LlamaForCausalLM"],
            num_key_value_heads=...,
            rope_theta=...,
            sliding_window=...,
        )
    )
    assert (spec.attentions()[0].kv_heads, spec.ropes[0]) == (12, RopeSpec(theta=10000.0))
    with pytest.raises(CheckpointError, match="num_key_value_heads is missing"):
        parse_config(config(num_key_value_heads=...))


def test_llama3_scaling() -> None:
    expected = RopeSpec(
        theta=500000.0,
        kind="llama3",
        factor=8.0,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert parse_config(config(rope_theta=500000.0, rope_scaling=LLAMA3)).ropes[0] == expected
    style_5 = config(rope_theta=..., rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    assert parse_config(style_5).ropes[0] == expected


@pytest.mark.parametrize(
    ("extra", "attention_factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        # R1-0528-Qwen3-8B; SGLang multiplies by it.
        ({"attn_factor": 0.8782488562869419}, 1.0),
        ({"attn_factor": 0.5, "attention_factor": 0.75}, 0.75),
        ({"attention_factor": 0.75}, 0.75),
        (
            {"mscale": 0.7, "mscale_all_dim": 2.0},
            (0.07 * math.log(4) + 1) / (0.2 * math.log(4) + 1),
        ),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.75, "mscale": 0.7, "mscale_all_dim": 2.0}, 0.75),
    ],
)
def test_yarn_attention_factor(extra: dict[str, float], attention_factor: float) -> None:
    spec = rope(**YARN, **extra)
    assert (spec.kind, spec.factor, spec.original_max_positions) == ("yarn", 4.0, 32768)
    assert (spec.beta_fast, spec.beta_slow) == (32.0, 1.0)
    assert spec.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3,
        YARN,
        {**YARN, "beta_fast": 20, "beta_slow": 2},
        {**YARN, "original_max_position_embeddings": None},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 2.0},
        {"type": "linear", "factor": 2},
        None,
    ],
)
@pytest.mark.parity
def test_rope_as_transformers_reads_it(scaling: dict[str, Any] | None) -> None:
    transformers = pytest.importorskip("transformers", reason="live parity needs transformers")
    if scaling is not None:
        scaling = {key: value for key, value in scaling.items() if value is not None}
    values = config(rope_scaling=scaling, rope_theta=250000.0)
    spec = parse_config(json.loads(json.dumps(values))).ropes[0]
    theirs = transformers.Qwen2Config(**values)
    theirs.standardize_rope_params()
    parameters = theirs.rope_parameters
    assert spec.theta == parameters["rope_theta"]
    assert spec.kind == parameters["rope_type"]
    if spec.kind == "default":
        return
    assert spec.factor == parameters["factor"]
    if spec.kind != "linear":
        assert spec.original_max_positions == parameters["original_max_position_embeddings"]
    functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    _, attention_factor = functions[spec.kind](theirs, device="cpu")
    assert spec.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM is not supported"),
        ({"architectures": ...}, "architectures must name one"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        # With the code of gte-Qwen2-7B-instruct, to be deleted from no copy.
        ({"is_causal": False, "auto_map": {"AutoModel": "x.Y"}}, "is_causal is false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, found 'gelu'"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"mlp_bias": True}, "mlp_bias is True, which changes the arithmetic"),
        ({"use_sliding_window": True}, "use_sliding_window is True, which changes"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_attention_heads": "12"}, "num_attention_heads must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 65}, "head_dim is 65"),
        ({"hidden_size": 1537}, r"hidden_size \(1537\)"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be positive"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
        ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "per layer"),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}, "rope_theta": ...},
            "rope_scaling: rope_theta is missing, and rope_parameters, which has 1000000.0",
        ),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        parse_config(config(**changes), "dir/config.json")
    assert str(caught.value).startswith("dir/config.json")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_multiplier": 0.0078125},
        {"residual_multiplier": 0.22},
        {"embedding_multiplier": 12.0},
        {"logits_scaling": 8.0},
        {"query_pre_attn_scalar": 256},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"rope_parameters": {"llama_4_scaling_beta": 0.1, "rope_theta": 1e6}},
        {"hidden_activation": "gelu_pytorch_tanh"},
        {"no_rope_layers": [1, 1, 1, 0] * 7},
    ],
)
def test_arithmetic_that_a_class_may_read_is_refused_by_its_key(
    architecture: str, changes: dict[str, Any]
) -> None:
    """Granite's, Gemma's, Mistral's and Llama 4's keys, under the name of a class without them."""
    values = config(architectures=[architecture], sliding_window=None)
    parse_config(values)
    key = next(iter(changes.get("rope_parameters", changes)))
    with pytest.raises(CheckpointError, match=f"{key} is .*, which changes the arithmetic"):
        parse_config({**values, **changes})


def test_a_window_counts_only_where_the_class_reads_it() -> None:
    """Qwen's configs name a window that another key turns on; Llama's class has none."""
    assert parse_config(config(sliding_window=4096)) == parse_config(config(sliding_window=...))
    with pytest.raises(
        CheckpointError, match=r"sliding_window is 4096, .* nothing of llama reads it"
    ):
        parse_config(config(architectures=["LlamaForCausalLM"], use_sliding_window=...))
    saved_as_llama = parse_config(config(architectures=["LlamaForCausalLM"]))
    assert saved_as_llama.architecture == "llama"


def test_multipliers_of_one_change_nothing() -> None:
    ones = {"residual_multiplier": 1.0, "embedding_multiplier": 1, "logits_scaling": 1.0}
    assert parse_config(config(**ones, attention_multiplier=None)) == parse_config(config())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([*R1_QWEN, "rope_scaling", "head_dim", "layer_types"]), JSON)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(CheckpointError):  # anything else fails the test
        spec = parse_config(config(**{key: value}))
        assert spec.attentions()[0].heads % spec.attentions()[0].kv_heads == 0
        assert spec.attentions()[0].dim % 2 == 0


@pytest.mark.parametrize("task", ["generate", "embed"])
def test_another_family_says_what_to_take(task: Task):
    with pytest.raises(
        CheckpointError, match=r"MBartModel is not supported; .*; mBART needs"
    ) as said:
        parse_config(config(architectures=["MBartModel"]), task=task)
    assert str(said.value).endswith("(docs/support-matrix.md)")
    assert ("Qwen/Qwen3-Embedding" in str(said.value)) == (task == "embed")


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_experts_are_told_by_the_config_whatever_the_class_is_called(key: str):
    with pytest.raises(CheckpointError, match=f"{key} is 8, .* needs .* a mixture of experts"):
        parse_config(config(**{key: 8}))
    for count in (0, 1, None):  # Granite 4's dense models have the class of those with experts
        assert parse_config(config(**{key: count})) == parse_config(config())


def test_the_page_that_is_named_has_what_is_supported():
    text = (Path(__file__).parents[2] / "docs" / "support-matrix.md").read_text("utf-8")
    for name in ("Qwen2ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"):
        assert f"`{name}`" in text

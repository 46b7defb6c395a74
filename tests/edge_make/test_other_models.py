"""What a model that is not supported is called, what it lacks, and what is taken instead."""

from __future__ import annotations

from typing import Any

import pytest

from edge_make.families import FAMILIES
from edge_make.other_models import experts, instead, named_otherwise

# The numbers of published configs that decide.
GEMMA3_4B = {
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 262208, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}  # fmt: skip
MISTRAL_7B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
MIXTRAL = {**MISTRAL_7B, "num_local_experts": 8, "sliding_window": None}
QWEN3_30B_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "sliding_window": 4096, "use_sliding_window": False,
}  # fmt: skip
GRANITE4_MICRO = {
    "hidden_size": 2560, "intermediate_size": 8192, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 100352,
    "num_local_experts": 0,
}  # fmt: skip
GEMMA3_1B_GGUF = {
    "embedding_length": 1152, "feed_forward_length": 6912, "block_count": 26,
    "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 256,
    "tokenizer.ggml.tokens": ["x"] * 262144,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        (
            "Gemma3ForConditionalGeneration",
            GEMMA3_4B,
            "Gemma 3 needs what is missing here: its encoder of pictures, attention in windows, "
            "tanh-GELU, four norms a layer; the nearest in size is qwen3:4b: edge-llm pull "
            "qwen3:4b (docs/support-matrix.md)",
        ),
        ("gemma3", GEMMA3_1B_GGUF, "four norms a layer; the nearest in size is llama3.2:1b: "),
        ("MistralForCausalLM", MISTRAL_7B, "Mistral is not read yet; the nearest in size is qwen2"),
        (
            "MistralForCausalLM",
            {**MISTRAL_7B, "sliding_window": 4096},
            "Mistral needs what is missing here: attention in windows; ",
        ),
        (
            "MixtralForCausalLM",
            MIXTRAL,
            "Mixtral needs what is missing here: a mixture of experts (num_local_experts is 8); "
            "the nearest in size is qwen3:32b",
        ),
        (
            "Qwen3MoeForCausalLM",
            QWEN3_30B_A3B,
            "Qwen3 MoE needs what is missing here: a mixture of experts (num_experts is 128); "
            "the nearest in size is qwen3:32b",
        ),
        ("GraniteMoeHybridForCausalLM", GRANITE4_MICRO, "Granite 4 needs what is missing here: "),
        ("phi3", {}, "Phi-3 or Phi-4 needs what is missing here: its fused tensors; "),
        ("deepseek2", {"expert_count": 64}, "DeepSeek V2 or V3 needs what is missing here: a "),
        ("M2M100ForConditionalGeneration", {"is_encoder_decoder": True}, "an encoder beside "),
        ("Qwen2_5_VLForConditionalGeneration", {"vision_config": {}}, "its encoder of pictures"),
        (
            "NewForCausalLM",
            {},
            "NewForCausalLM is not read yet; take a supported one, for example: ",
        ),
        ("InternVLChatModel", {}, "take the same model as transformers has it"),
    ],
)
def test_it_is_called_what_people_call_it(name: str, config: dict[str, Any], words: str):
    assert words in instead(name, config)
    assert "such as Qwen/Qwen3-Embedding-0.6B" in instead(name, config, "embed") or name[:2] == "In"


def test_a_class_with_moe_in_its_name_may_be_dense():
    assert experts(GRANITE4_MICRO) is None
    assert "experts" not in instead("GraniteMoeHybridForCausalLM", GRANITE4_MICRO)
    assert experts(MIXTRAL) == ("num_local_experts", 8)


@pytest.mark.parametrize("value", [10**400, -1, True, "8", [8], None])
def test_no_number_of_a_config_breaks_the_message(value: Any):
    for key in (*MIXTRAL, "vision_config", "text_config"):
        assert "edge-llm pull" in instead("MixtralForCausalLM", {**MIXTRAL, key: value})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma3:1b", "Gemma 3 needs what is missing here: attention in windows, tanh-GELU, "),
        ("gemma3:4b", "the nearest in size is qwen3:4b: "),
        ("Phi4", "Phi-4 needs what is missing here: its fused tensors; take a supported one"),
        ("mixtral:8x7b", "Mixtral is not read yet; the nearest in size is qwen3:32b: "),
        ("gpt-oss:20b", "gpt-oss needs what is missing here: attention sinks"),
        ("qwen3.5:2b", "the nearest in size is qwen3:1.7b: "),
    ],
)
def test_names_of_ollama_are_known(name: str, words: str):
    assert words in str(named_otherwise(name))


@pytest.mark.parametrize("name", ["qwen3:5b", "llama3.2", "deepsek-r1:1.5b", "", *FAMILIES])
def test_a_name_that_may_be_a_slip_is_left_to_others(name: str):
    assert named_otherwise(name) is None

"""Says of a model that is not supported what it is, what is missing, and what to take instead."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from edge.bundle.library import CATALOGUE
from edge.model.spec import Task

_WINDOW = "attention in windows"
_RECURRENT = "layers with a state (Mamba, linear attention or short convolutions)"
_OLD = "LayerNorm and an MLP without a gate"
_OTHERS = {
    "apertus": ("Apertus", "its activation (xIELU)"),
    "bamba": ("Bamba", _RECURRENT),
    "bart": ("BART", "an encoder beside the decoder"),
    "bloom": ("BLOOM", f"ALiBi, {_OLD}"),
    "cohere": ("Command R", "attention and MLP side by side, LayerNorm"),
    "commandr": ("Command R", "attention and MLP side by side, LayerNorm"),
    "dbrx": ("DBRX", "LayerNorm"),
    "deepseek2": ("DeepSeek V2 or V3", "latent attention (MLA)"),
    "deepseekv": ("DeepSeek V2 or V3", "latent attention (MLA)"),
    "exaone": ("EXAONE", ""),
    "falcon": ("Falcon", _OLD),
    "falconh1": ("Falcon H1", _RECURRENT),
    "gemma": ("Gemma", "tanh-GELU, norms that multiply by 1 + weight"),
    "gemma2": ("Gemma 2", f"{_WINDOW}, tanh-GELU, four norms a layer, soft caps"),
    "gemma3": ("Gemma 3", f"{_WINDOW}, tanh-GELU, four norms a layer"),
    "gemma3n": ("Gemma 3n", f"embeddings per layer, {_WINDOW}"),
    "gemma4": ("Gemma 4", f"embeddings per layer, {_WINDOW}, layers that share keys and values"),
    "glm": ("GLM", "RoPE on a part of each head"),
    "gpt2": ("GPT-2", f"learned positions, {_OLD}"),
    "gptneox": ("GPT-NeoX", _OLD),
    "gptoss": ("gpt-oss", f"attention sinks, {_WINDOW}"),
    "granitehybrid": ("Granite 4", _RECURRENT),
    "granitemoe": ("Granite MoE", ""),
    "granitemoehybrid": ("Granite 4", _RECURRENT),
    "internlm": ("InternLM", ""),
    "jamba": ("Jamba", _RECURRENT),
    "lfm2": ("LFM2", _RECURRENT),
    "llama4": ("Llama 4", "attention in chunks"),
    "llava": ("LLaVA", "its encoder of pictures"),
    "mamba": ("Mamba", _RECURRENT),
    "mbart": ("mBART", "an encoder beside the decoder"),
    "minicpm": ("MiniCPM", "multipliers of embeddings, residuals and logits"),
    "ministral": ("Ministral", ""),
    "mistral": ("Mistral", ""),
    "mistral3": ("Mistral Small 3 or Ministral 3", ""),
    "mixtral": ("Mixtral", ""),
    "mllama": ("Llama 3.2 Vision", "attention from text to pictures"),
    "nemotron": ("Nemotron", "LayerNorm and an MLP without a gate"),
    "nemotronh": ("Nemotron-H or Nemotron 3 Nano", _RECURRENT),
    "olmo": ("OLMo", "norms after attention and MLP"),
    "pegasus": ("Pegasus", "an encoder beside the decoder"),
    "phi": ("Phi", _OLD),
    "phi3": ("Phi-3 or Phi-4", "its fused tensors"),
    "phi4": ("Phi-4", "its fused tensors"),
    "phimoe": ("Phi-3.5 MoE", ""),
    "qwen2moe": ("Qwen2 MoE", ""),
    "qwen25omni": ("Qwen2.5-Omni", "its encoders of sound and pictures"),
    "qwen25vl": ("Qwen2.5-VL", "its encoder of pictures"),
    "qwen2vl": ("Qwen2-VL", "its encoder of pictures"),
    "qwen35": ("Qwen3.5", _RECURRENT),
    "qwen3moe": ("Qwen3 MoE", ""),
    "qwen3next": ("Qwen3-Next", _RECURRENT),
    "qwen3vl": ("Qwen3-VL", "its encoder of pictures"),
    "rwkv": ("RWKV", _RECURRENT),
    "stablelm": ("StableLM", "LayerNorm, RoPE on a part of each head"),
    "starcoder2": ("StarCoder2", _OLD),
    "t5": ("T5", "an encoder beside the decoder"),
}
"""Maps a family to what people call it, and to what it needs that is missing here.

The keys are beginnings of its class, of its architecture in GGUF files and of its name in ollama,
of which the longest counts. What a config says of itself is not repeated here.
"""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GGUF_EXPERTS = "expert_count"
_MOST = 1 << 31  # a larger number is none of a model
_PARAMETERS = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")
# They think at length, are for code, or no real weights of them were run here.
_NOT_OFFERED = ("deepseek-r1:", "qwen2.5-coder:", "granite3.3:")


def experts(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the key that makes a config one of a mixture of experts, and their number."""
    for key in (*_EXPERTS, _GGUF_EXPERTS):
        if isinstance(count := config.get(key), int) and count > 1:
            return key, count
    return None


def instead(name: str, config: Mapping[str, Any], task: Task = "generate") -> str:
    """Say what a model is, what it needs that is missing here, and which model to take.

    Args:
        name: its class, or its architecture in a GGUF file.
        config: its ``config.json``, or a GGUF file's keys without their architecture.
        task: use of the model.
    """
    if name == "InternVLChatModel":
        return "take the same model as transformers has it, whose name ends in -hf"
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, dict) else config
    called, lack = _family(name) or (name, "")
    missing = []
    if config.get("is_encoder_decoder") is True:
        missing.append("an encoder beside the decoder")
    if (mixture := experts(values)) is not None:
        missing.append(f"a mixture of experts ({mixture[0]} is {mixture[1]})")
    if isinstance(config.get("vision_config"), dict) and "pictures" not in lack:
        missing.append("its encoder of pictures")
    if values.get("sliding_window") and values.get("use_sliding_window") is not False:
        missing.append(_WINDOW)
    missing = list(dict.fromkeys([*missing, *filter(None, lack.split(", "))]))
    return f"{_what(called, missing)}; {_take(_parameters(values), task)}"


def named_otherwise(name: str) -> str | None:
    """Say the same of a model by its name in ollama; None if that is not known."""
    family, _, tag = name.lower().partition(":")
    if (found := _family(family)) is None:
        return None
    called, lack = found
    size = _PARAMETERS.search(tag)
    return f"{_what(called, lack.split(', ') if lack else [])}; {_take(_size(size), 'generate')}"


def _family(name: str) -> tuple[str, str] | None:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _OTHERS.get(max(filter(plain.startswith, _OTHERS), key=len, default=""))


def _what(called: str, missing: list[str]) -> str:
    if not missing:
        return f"{called} is not read yet"
    return f"{called} needs what is missing here: {', '.join(missing)}"


def _take(parameters: float | None, task: Task) -> str:
    if task == "embed":
        return (
            "take a model that embeds, such as Qwen/Qwen3-Embedding-0.6B (docs/support-matrix.md)"
        )
    if parameters is None:
        return "take a supported one, for example: edge-llm pull qwen3:8b (docs/support-matrix.md)"
    offered = [each for each in CATALOGUE if not each.startswith(_NOT_OFFERED)]
    sizes = {each: _size(_PARAMETERS.search(each, each.index(":"))) or 1.0 for each in offered}
    short = min(sizes, key=lambda each: abs(math.log(sizes[each] / parameters)))
    return f"the nearest in size is {short}: edge-llm pull {short} (docs/support-matrix.md)"


def _size(found: re.Match[str] | None) -> float | None:
    if found is None:
        return None
    times, number, unit = found.groups()
    return int(times or 1) * float(number) * (1e9 if unit == "b" else 1e6)


def _parameters(config: Mapping[str, Any]) -> float | None:
    """Estimate how many parameters a config means; None if it lacks the numbers."""

    def number(*keys: str, default: int = 0) -> int:
        found = (value for key in keys if type(value := config.get(key)) is int)
        return next((value for value in found if 0 < value < _MOST), default)

    hidden = number("hidden_size", "embedding_length")
    heads = number("num_attention_heads", "attention.head_count", default=1)
    kv_heads = number("num_key_value_heads", "attention.head_count_kv", default=heads)
    dim = number("head_dim", "attention.key_length", default=hidden // heads)
    wide = number("intermediate_size", "feed_forward_length")
    mixture = experts(config)
    if mixture is not None:
        wide = number("moe_intermediate_size", "expert_feed_forward_length", default=wide)
    mlp = 3 * hidden * wide * (1 if mixture is None else min(mixture[1], _MOST))
    layer = mlp + 2 * hidden * dim * (heads + kv_heads)
    if (layers := number("num_hidden_layers", "block_count")) == 0:
        return None
    tokens = config.get("tokenizer.ggml.tokens")
    vocab = number("vocab_size", default=len(tokens) if isinstance(tokens, list) else 0)
    return float(layers * layer + vocab * hidden) or None

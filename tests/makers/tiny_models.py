"""Tiny random checkpoints in Hugging Face's format: real files, real tricks, no download.

Every weight is a small integer times a power of two: the same on every platform and numpy version
(`numpy.random.RandomState` streams are frozen and integers need no libm), and exact in fp16 and in
bf16, so both dtypes hold the same model. The configs carry the traps of the real R1 distills:
config.json's ``bos_token_id`` is the eos id (Qwen2), the vocabulary has more rows than the
tokenizer has tokens, control tokens are not all special.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["qwen2", "llama", "qwen3", "smollm3", "granite"]
KINDS: tuple[Kind, ...] = ("qwen2", "llama", "qwen3", "smollm3", "granite")

# The first merges of GPT-2 (Ġ is a space in its byte alphabet), then a few longer words.
_MERGES = (
    "Ġ t,Ġ a,h e,i n,r e,o n,Ġt he,e r,Ġ s,a t,Ġ w,Ġ o,e n,Ġ c,i t,i s,a n,o r,e s,Ġ b,e d,Ġ f,"
    "in g,Ġ p,o u,Ġa n,a l,a r,Ġt o,Ġ m,Ġo f,Ġ in,Ġ d,Ġ h,Ġan d,i c,a s,l e,Ġt h,l l,he ll,hell o,"
    "or l,Ġw orl,Ġworl d,t he,Ġw h,Ġwh at"
)
EOS = "<｜end▁of▁sentence｜>"
BOS = "<｜begin▁of▁sentence｜>"
# In the order of DeepSeek-R1-Distill-Qwen's ids; only eos and bos are "special" there.
CONTROL = (EOS, "<｜User｜>", "<｜Assistant｜>", BOS, "<|EOT|>", "<think>", "</think>")
FIRST_CONTROL_ID = 304
CONTROL_IDS = {token: FIRST_CONTROL_ID + i for i, token in enumerate(CONTROL)}
EOS_ID, BOS_ID = CONTROL_IDS[EOS], CONTROL_IDS[BOS]

# Qwen2's pre-tokenizer, as in the tokenizer.json of the R1 distills.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The later revision of R1's template: the generation prompt opens the thinking.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_CONFIGS: dict[Kind, dict[str, Any]] = {
    "qwen2": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": EOS_ID,
        "max_window_layers": 1,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    # Wavelengths of head_dim 16 are 6, 20, 63, ...: one below, one between, six above the borders.
    "llama": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    # The ramp of YaRN runs from dimension 2 to 5 of 16: all three of its regions are in use.
    "qwen3": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "max_window_layers": 2,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 2.0,
        },
    },
    # Positions do not turn the second layer.
    "smollm3": {
        **_COMMON,
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "pad_token_id": EOS_ID,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 0],
        "no_rope_layer_interval": 2,
        "sliding_window": None,
        "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"],
    },
    # No multiplier is the other's inverse, and attention's is not that of the heads' size.
    "granite": {
        **_COMMON,
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.75,
        "logits_scaling": 0.9,
    },
}


def write_checkpoint(
    directory: Path,
    kind: Kind,
    *,
    dtype: Literal["fp16", "bf16"] = "bf16",
    num_shards: int = 1,
    seed: int = 2,
    **overrides: Any,
) -> Path:
    """Write a complete checkpoint directory: config, weights, tokenizer, generation config.

    Args:
        directory: made if missing.
        kind: architecture, see the table of configs above.
        dtype: how the weights are stored; their values are the same either way.
        num_shards: safetensors files; more than one comes with an index, as on the hub.
        seed: of the weights.
        overrides: keys of config.json that replace or extend the kind's own.

    Returns:
        ``directory``.
    """
    config: dict[str, Any] = {
        **_CONFIGS[kind],
        "torch_dtype": {"fp16": "float16", "bf16": "bfloat16"}[dtype],
        **overrides,
    }
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
    )
    write_tokenizer(directory)
    weights = make_weights(config, seed)
    if num_shards == 1:
        _write_safetensors(directory / "model.safetensors", weights, dtype)
        return directory
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        names = list(weights)[shard::num_shards]
        _write_safetensors(directory / file, {name: weights[name] for name in names}, dtype)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(2 * weight.size for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write ``tokenizer.json`` (byte-level BPE) and its config as in the R1 distills."""
    merges = [merge.split(" ") for merge in _MERGES.split(",")]
    vocab = {token: i for i, token in enumerate(_byte_alphabet())}
    for left, right in merges:
        assert left in vocab, left
        assert right in vocab, right
        vocab[left + right] = len(vocab)
    assert len(vocab) == FIRST_CONTROL_ID, len(vocab)
    bos_piece = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text_piece = {"Sequence": {"id": "A", "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in (EOS, BOS),
            }
            for token, token_id in CONTROL_IDS.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_piece, text_piece],
            "pair": [bos_piece, text_piece, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [BOS_ID], "tokens": [BOS]}},
        },
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 16384,
            "tokenizer_class": "LlamaTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
    )


def make_weights(config: dict[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Random weights by their names in the checkpoint, float32, exact in fp16 and bf16.

    The scales make attention sharp and the layers outweigh the embedding, so that the next token
    depends on the whole context. The rows of control tokens and of the padding behind them are
    small, as rows that were never trained: a greedy continuation stays clear of them.
    """
    rng = np.random.RandomState(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads

    def bell(*shape: int, exponent: int) -> NDArray[np.float32]:
        # Four uniform integers of [-31, 31]: |sum| < 128 has 7 bits, standard deviation 36.
        total = rng.randint(-31, 32, size=(4, *shape)).sum(axis=0)
        values: NDArray[np.float32] = (total * 2.0**exponent).astype(np.float32)
        return values

    def norm(size: int) -> NDArray[np.float32]:
        return 1 + bell(size, exponent=-7)

    table = bell(config["vocab_size"], hidden, exponent=-7)
    table[FIRST_CONTROL_ID:] /= 4
    weights = {"model.embed_tokens.weight": table, "model.norm.weight": norm(hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            projection = f"{prefix}self_attn.{name}_proj."
            weights[projection + "weight"] = bell(
                rows * head_dim, hidden, exponent=-7 if name == "q" else -8
            )
            if config["model_type"] == "qwen2":
                weights[projection + "bias"] = bell(rows * head_dim, exponent=-6)
        weights[prefix + "self_attn.o_proj.weight"] = bell(hidden, heads * head_dim, exponent=-7)
        if config["model_type"] == "qwen3":
            weights[prefix + "self_attn.q_norm.weight"] = 2 * norm(head_dim)
            weights[prefix + "self_attn.k_norm.weight"] = norm(head_dim)
        weights[prefix + "mlp.gate_proj.weight"] = bell(inner, hidden, exponent=-8)
        weights[prefix + "mlp.up_proj.weight"] = bell(inner, hidden, exponent=-8)
        weights[prefix + "mlp.down_proj.weight"] = bell(hidden, inner, exponent=-8)
        weights[prefix + "input_layernorm.weight"] = norm(hidden)
        weights[prefix + "post_attention_layernorm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        head = bell(config["vocab_size"], hidden, exponent=-7)
        head[FIRST_CONTROL_ID:] /= 4
        weights["lm_head.weight"] = head
    return weights


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_safetensors(path: Path, weights: dict[str, NDArray[np.float32]], dtype: str) -> None:
    """Write the format by hand, so that the reader under test does not check its own writer."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, weight in weights.items():
        if dtype == "fp16":
            stored: NDArray[Any] = weight.astype("<f2")
            restored = stored.astype(np.float32)
        elif dtype == "fp32":
            stored = restored = weight
        else:
            stored = (weight.view(np.uint32) >> 16).astype("<u2")
            restored = (stored.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(restored, weight, equal_nan=True), f"{name} is not exact in {dtype}"
        header[name] = {
            "dtype": {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype],
            "shape": weight.shape,
            "data_offsets": (len(data), len(data) + stored.nbytes),
        }
        data += stored.tobytes()
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)

"""GGUF files: the same model, weights and token ids as the checkpoint they were made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge.bundle.manifest import SamplingDefaults, Tokens
from edge.errors import CheckpointError
from edge.model.spec import RopeSpec
from edge_make.checkpoint_tensors import expected_tensors
from export.sources import checkpoint_text, gguf_file
from export.sources.gguf_source import derive_llama3
from export.sources.opening import open_checkpoint
from tests.makers import tiny_models as tiny
from tests.makers.dense import dense

gguf = pytest.importorskip("gguf")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Smaller steps between the frequencies than the tiny Llama's own: two lie between the borders.
# llama.cpp takes every fourth layer of SmolLM3 as one without RoPE, and no key says so.
SMOLLM3 = {"num_hidden_layers": 4, "no_rope_layers": None, "layer_types": None}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 100.0, "rope_scaling": LLAMA3},
    "smollm3": {**SMOLLM3, "no_rope_layer_interval": 4},
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def gguf_name(name: str) -> str:
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers", "blk"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"), ("mlp.", "ffn_"), ("_proj", ""),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama."""
    rows, columns = weights.shape
    halves = weights.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.swapaxes(halves, 1, 2).reshape(rows, columns)


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter stores as rope_freqs.weight."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def model_metadata(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if config["model_type"] == "granite":
        values["embedding_scale"] = config["embedding_multiplier"]
        values["residual_scale"] = config["residual_multiplier"]
        values["attention.scale"] = config["attention_multiplier"]
        values["logit_scale"] = config["logits_scaling"]
    if "head_dim" in config:
        values["attention.key_length"] = values["attention.value_length"] = config["head_dim"]
    scaling = config["rope_scaling"] or {}
    if scaling.get("rope_type") == "yarn":
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = scaling["factor"]
        values["rope.scaling.yarn_beta_fast"] = scaling["beta_fast"]
        original = scaling["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    return {f"{config['model_type']}.{key}": value for key, value in values.items()}


def tokenizer_metadata(directory: Path) -> dict[str, Any]:
    tokenizer = json.loads((directory / "tokenizer.json").read_bytes())
    ids = dict(tokenizer["model"]["vocab"])
    types = dict.fromkeys(ids.values(), NORMAL)
    for token in tokenizer["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    texts = {number: text for text, number in ids.items()}
    vocab_size = json.loads((directory / "config.json").read_bytes())["vocab_size"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-r1-qwen",
        "tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [types.get(i, UNUSED) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tiny.BOS_ID,
        "tokenizer.ggml.eos_token_id": tiny.EOS_ID,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }


def tensors_of(config: dict[str, Any], ggml_type: str) -> dict[str, tuple[np.ndarray, Any]]:
    """Stored tensors by GGUF name; vectors are fp32, as llama.cpp keeps them."""
    kind = gguf.GGMLQuantizationType[ggml_type]
    stored = {}
    for name, weights in tiny.make_weights(config, seed=2).items():
        if config["model_type"] in ("llama", "smollm3", "granite") and re.search(
            r"[qk]_proj", name
        ):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weights = permute(weights, config[key])
        if weights.ndim == 1:
            stored[gguf_name(name)] = (weights, gguf.GGMLQuantizationType.F32)
        else:
            stored[gguf_name(name)] = (gguf.quants.quantize(weights, kind), kind)
    if config["model_type"] == "llama":
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        factors = llama3_factors(config["rope_scaling"], config["rope_theta"], head_dim)
        stored["rope_freqs.weight"] = (factors, gguf.GGMLQuantizationType.F32)
    return stored


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Any]]) -> Path:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny(
    folder: Path,
    kind: tiny.Kind,
    changes: Mapping[str, Any] | None = None,
    ggml_type: str = "F16",
) -> Path:
    """A GGUF file beside the HF directory of the same model; ... removes a key or a tensor."""
    hf = tiny.write_checkpoint(folder / "hf", kind, **OVERRIDES.get(kind, {}))
    config = json.loads((hf / "config.json").read_bytes())
    tensors: dict[str, Any] = tensors_of(config, ggml_type)
    metadata = {
        "general.architecture": kind,
        "general.license": "mit",
        **model_metadata(config),
        **tokenizer_metadata(hf),
    }
    for key, value in (changes or {}).items():
        (tensors if key in tensors or isinstance(value, tuple) else metadata)[key] = value
    return write(
        folder / "Tiny-Model.gguf",
        {key: value for key, value in metadata.items() if value is not ...},
        {key: value for key, value in tensors.items() if value is not ...},
    )


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("ggml_type", ["F32", "F16", "BF16", "Q8_0"])
def test_same_model_as_the_hf_directory(kind, ggml_type, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gguf_file, "_CHUNK_WEIGHTS", 1000)  # 15 rows of 64, and a rest
    path = write_tiny(tmp_path, kind, ggml_type=ggml_type)
    with open_checkpoint(str(path)) as found, open_checkpoint(str(tmp_path / "hf")) as expected:
        assert found.spec == expected.spec
        for name, shape in expected_tensors(expected.spec).items():
            original = expected.tensor(name).astype(np.float32)
            weights = found.tensor(name)
            assert weights.shape == shape
            if ggml_type == "Q8_0" and len(shape) == 2:
                q8 = gguf.GGMLQuantizationType.Q8_0
                original = gguf.quants.dequantize(gguf.quants.quantize(original, q8), q8)
                assert weights.dtype == np.float32
            elif name in found.changed:
                assert weights.dtype == np.float32
            elif len(shape) == 2:
                types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
                assert weights.dtype == types[ggml_type]
            np.testing.assert_array_equal(weights.astype(np.float32), original)


def test_text_equals_that_of_the_hf_directory(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "qwen2")
    with open_checkpoint(str(path)) as checkpoint:
        text, source = checkpoint.text, checkpoint.source
        assert checkpoint.name == "Tiny-Model"
    with open_checkpoint(str(tmp_path / "hf")) as checkpoint:
        original = checkpoint.text
    assert (source.kind, source.location, source.licence) == ("gguf", "Tiny-Model.gguf", "mit")
    assert text.tokens == original.tokens
    assert text.chat_template == original.chat_template
    # GGUF does not carry the generation config; the template is R1's.
    assert text.sampling == SamplingDefaults(temperature=0.6, top_p=0.95, assumed="DeepSeek-R1")
    ours, theirs = (Tokenizer.from_buffer(t.tokenizer_json) for t in (text, original))
    for sample in (
        "hello world 123",
        "<think>\n\n the</think><|EOT|>",
        "Cafe\u0301 don't\r\n\n  x",
    ):
        for special in (True, False):
            ids = ours.encode(sample, add_special_tokens=special).ids
            assert ids == theirs.encode(sample, add_special_tokens=special).ids
            for skip in (True, False):
                decoded = ours.decode(ids, skip_special_tokens=skip)
                assert decoded == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.get_vocab_size() == theirs.get_vocab_size()


def test_views_outlive_the_checkpoint_and_a_closed_one_says_so(tmp_path: Path) -> None:
    with open_checkpoint(str(write_tiny(tmp_path, "qwen2"))) as checkpoint:
        table = checkpoint.tensor("model.embed_tokens.weight")
    assert not table.flags.owndata
    assert np.isfinite(table).all()
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.tensor("model.embed_tokens.weight")


def test_tied_where_there_is_no_head(tmp_path: Path) -> None:
    with open_checkpoint(str(write_tiny(tmp_path, "qwen2", {"output.weight": ...}))) as found:
        assert found.spec.tied_embeddings


def test_attention_biases_of_llama(tmp_path: Path) -> None:
    f32 = gguf.GGMLQuantizationType.F32
    biases = {"q": np.arange(64.0), "k": np.arange(32.0), "v": np.arange(32.0) / 2}
    stored: dict[str, Any] = {}
    for layer in range(2):
        for part, bias in biases.items():
            column = bias.astype(np.float32)[:, None]
            column = column if part == "v" else permute(column, len(bias) // 16)
            stored[f"blk.{layer}.attn_{part}.bias"] = (column[:, 0], f32)
        stored[f"blk.{layer}.attn_output.bias"] = (np.zeros(64, np.float32), f32)
    with open_checkpoint(str(write_tiny(tmp_path, "llama", stored))) as checkpoint:
        assert dense(checkpoint.spec).qkv_bias
        for part, bias in biases.items():
            found = checkpoint.tensor(f"model.layers.1.self_attn.{part}_proj.bias")
            np.testing.assert_array_equal(found, bias)
    stored["blk.1.attn_output.bias"] = (np.ones(64, np.float32), f32)
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_output\.bias \[64\] is not part"):
        open_checkpoint(str(write_tiny(tmp_path, "llama", stored)))


def test_yarn_of_gguf_multiplies_by_attn_factor(tmp_path: Path) -> None:
    scale = 1 / (0.1 * math.log(4) + 1)
    path = write_tiny(tmp_path, "qwen3", {"qwen3.rope.scaling.attn_factor": scale})
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.spec.ropes[0].attention_factor == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"scaling.factor": 4.0}, RopeSpec(theta=10_000.0, kind="linear", factor=4.0)),
        ({"scale_linear": 2.0}, RopeSpec(theta=10_000.0, kind="linear", factor=2.0)),
        (
            {"scaling.factor": 4.0, "scale_linear": 2.0},
            RopeSpec(theta=10_000.0, kind="linear", factor=4.0),
        ),
        ({"scaling.factor": 4.0, "scaling.type": "none"}, RopeSpec(theta=10_000.0)),
        ({"scale_linear": 1.0}, RopeSpec(theta=10_000.0)),
        ({"scaling.factor": 0.0}, RopeSpec(theta=10_000.0)),
    ],
)
def test_a_factor_alone_is_linear_as_in_llama_cpp(
    scaling: dict[str, Any], rope: RopeSpec, tmp_path: Path
) -> None:
    changes = {f"qwen2.rope.{key}": value for key, value in scaling.items()}
    with open_checkpoint(str(write_tiny(tmp_path, "qwen2", changes))) as checkpoint:
        assert checkpoint.spec.ropes[0] == rope


@settings(deadline=None, max_examples=60)
@given(
    factor=st.floats(2, 64),
    high=st.floats(2, 16),
    original=st.integers(1024, 32768),
    head_dim=st.sampled_from([64, 128]),
)
@example(factor=8.0, high=4.0, original=8192, head_dim=128)  # R1-Distill-Llama-8B
@example(factor=32.0, high=4.0, original=8192, head_dim=64)  # Llama-3.2-1B
def test_llama3_parameters_from_the_stored_factors(factor, high, original, head_dim) -> None:
    scaling = {
        "factor": float(np.float32(factor)),
        "low_freq_factor": 1.0,
        "high_freq_factor": round(high, 2),
        "original_max_position_embeddings": original,
    }
    factors = llama3_factors(scaling, 500_000.0, head_dim)
    if ((factors > 1) & (factors < factors.max())).sum() < 2:
        return
    spec = derive_llama3(factors.astype(np.float64), 500_000.0, head_dim)
    assert spec == RopeSpec(
        theta=500_000.0,
        kind="llama3",
        factor=scaling["factor"],
        original_max_positions=original,
        high_freq_factor=round(high, 2),
    )


@pytest.mark.parametrize(
    "factors", [np.ones(64), np.linspace(1, 8, 64), np.ones(3), [math.nan] * 64]
)
def test_factors_that_are_no_llama3(factors) -> None:
    with pytest.raises(CheckpointError, match="holds no llama3 scaling"):
        derive_llama3(np.array(factors, np.float64), 500_000.0, 128)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "gemma3"}, "'gemma3' is not supported; supported: qwen2"),
        ({"general.architecture": "qwen3moe"}, "qwen3moe' is not supported; .*; Qwen3 MoE is n"),
        ({"llama.block_count": ...}, r"llama\.block_count is missing"),
        ({"llama.block_count": 3}, r"blk\.2\.attn_norm\.weight must have shape \[64\], found none"),
        ({"llama.block_count": 4_000_000_000}, "block_count must be at most 1000"),
        ({"llama.attention.head_count": 0}, "head_count must be at least 1, found 0"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv must be an integer"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple"),
        ({"llama.feed_forward_length": 96}, r"ffn_gate\.weight must have shape \[96, 64\]"),
        ({"llama.feed_forward_length": 1.5}, "feed_forward_length must be an integer"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"llama.vocab_size": 7}, "vocab_size is 7"),
        (
            {"llama.expert_count": 8},
            "expert_count is 8: not supported; llama needs .* a mixture of experts",
        ),
        ({"llama.attention.scale": 1.0}, "attention.scale is 1.0, which changes the arithmetic"),
        ({"llama.attention.causal": False}, "attention.causal is false: tokens that see those aft"),
        ({"llama.rope.scaling.type": "yarn"}, "beside rope_freqs.weight"),
        ({"llama.rope.scaling.factor": 4.0}, "'linear' beside rope_freqs.weight"),
        ({"llama.rope.scale_linear": 0.5, "rope_freqs.weight": ...}, "scale_linear must be at l"),
        ({"llama.rope.scaling.type": "longrope", "rope_freqs.weight": ...}, "'longrope' is not s"),
        ({"split.count": 2}, "llama-gguf-split --merge"),
        ({"split.count": 2, "general.architecture": "none"}, "llama-gguf-split --merge"),
        ({"tokenizer.ggml.model": "t5"}, "'t5'; only byte-level BPE .* and sentencepiece's BPE"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores must be a list of float"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
        ({"tokenizer.ggml.pre": ...}, "tokenizer.ggml.pre is None"),
        ({"tokenizer.ggml.tokens": ...}, "tokenizer.ggml.tokens must be a list of str"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "'a b c' is no pair"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
        ({"tokenizer.ggml.eos_token_id": ...}, "eos_token_id: no token ends"),
        ({"tokenizer.ggml.bos_token_id": 320}, "bos_token_id is 320, expected 0..319"),
        ({"general.sampling.top_p": 3.0}, "top_p must be in"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "llama", changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(str(path))
    assert "Tiny-Model.gguf" in str(caught.value)


def test_surplus_and_unreadable_tensors(tmp_path: Path) -> None:
    f32 = gguf.GGMLQuantizationType.F32
    extra = {"blk.0.ffn_down.bias": (np.zeros(64, np.float32), f32)}
    with pytest.raises(CheckpointError, match=r"ffn_down\.bias \[64\] is not part of llama"):
        open_checkpoint(str(write_tiny(tmp_path, "llama", extra)))
    integers = {"output.weight": (np.zeros((320, 64), np.int8), gguf.GGMLQuantizationType.I8)}
    with open_checkpoint(str(write_tiny(tmp_path, "llama", integers))) as checkpoint:
        assert checkpoint.tensor("model.norm.weight").shape == (64,)
        with pytest.raises(CheckpointError, match=r"output\.weight is of type I8"):
            checkpoint.tensor("lm_head.weight")


def test_types_that_ggml_removed(tmp_path: Path) -> None:
    content = bytearray(write_tiny(tmp_path, "llama").read_bytes())
    name = b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8  # its number of dimensions, and the one
    content[at : at + 4] = (31).to_bytes(4, "little")
    (tmp_path / "arm.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"output_norm.* removed \(Q4_0_4_4\); use the Q4_0"):
        open_checkpoint(str(tmp_path / "arm.gguf"))


def test_tokens_and_sampling_of_the_metadata(tmp_path: Path) -> None:
    path = write_tiny(
        tmp_path,
        "llama",
        {
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.add_bos_token": ...,
            "tokenizer.ggml.eot_token_id": 308,
            "general.sampling.temp": 0.6,
            "general.sampling.top_k": 20,
            "general.sampling.penalty_repeat": 1.05,
        },
    )
    with open_checkpoint(str(path)) as checkpoint:
        text = checkpoint.text
    # llama.cpp adds bos for this pre-tokenizer unless told otherwise.
    assert text.tokens == Tokens(
        bos=tiny.BOS_ID, bos_text=tiny.BOS, eos=(tiny.EOS_ID, 308), eos_text=tiny.EOS, add_bos=True
    )
    assert text.sampling == SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.05)


def test_ends_that_the_keys_do_not_name(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    metadata = tokenizer_metadata(tmp_path / "hf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    free = [number for number, kind in enumerate(types) if kind == UNUSED][:3]
    for number, text in zip(free, ("<|endoftext|>", "<|im_end|>", "<|eom_id|>"), strict=True):
        tokens[number], types[number] = text, CONTROL
    types[free[2]] = NORMAL  # text that looks like one
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eom_token_id": 308,
    }
    with open_checkpoint(str(write_tiny(tmp_path, "llama", changes))) as checkpoint:
        found = checkpoint.text.tokens
    assert found.eos == (tiny.EOS_ID, 308, free[1], free[0])
    assert found.eos_text == tiny.EOS


def test_r1s_first_template_opens_the_reasoning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = (
        "{{'<｜Assistant｜>' + messages[0].content}}{% if add %}{{'<｜Assistant｜>'}}{% endif %}"
    )
    path = write_tiny(tmp_path, "llama", {"tokenizer.chat_template": first})
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.text.chat_template == first
    digest = hashlib.sha256(first.encode()).hexdigest()
    monkeypatch.setattr(checkpoint_text, "R1_WITHOUT_THINK", digest)
    expected = first.replace("<｜Assistant｜>'}}{%", r"<｜Assistant｜><think>\n'}}{%")
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.text.chat_template == expected
    assert "opens <think>" in caplog.text
    (tmp_path / "hf" / "chat_template.jinja").write_text(first + "\n")
    with open_checkpoint(str(tmp_path / "hf")) as checkpoint:
        assert checkpoint.text.chat_template == expected + "\n"


@pytest.mark.parametrize(("context", "warns"), [(131072, True), (8192, False)], ids=["3.1", "3"])
def test_llama31_without_its_rope_factors_is_warned_of(
    context: int, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {
        "llama.rope.freq_base": 500_000.0,
        "llama.context_length": context,
        "rope_freqs.weight": ...,
    }
    with open_checkpoint(str(write_tiny(tmp_path, "llama", changes))) as checkpoint:
        assert checkpoint.spec.ropes[0].kind == "default"
    assert ("converter of July 2024" in caplog.text) is warns


# Written down from the regular expressions of the original tokenizers.
SPLITS = {
    "gpt-2": "It 's Ġ12345 ! ĊĊĠ Ġx ĠDON ' T",
    "smollm": "It 's Ġ 1 2 3 4 5 ! ĊĊĠ Ġx ĠDON ' T",
    "qwen2": "It 's Ġ 1 2 3 4 5 !ĊĊ Ġ Ġx ĠDON 'T",
    "deepseek-r1-qwen": "It 's Ġ 1 2 3 4 5 !ĊĊ Ġ Ġx ĠDON 'T",
    "llama-bpe": "It 's Ġ 123 45 !ĊĊ Ġ Ġx ĠDON 'T",
    "smaug-bpe": "It 's Ġ 123 45 !ĊĊ Ġ Ġx ĠDON 'T",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_pre_tokenizers(pre: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "llama", {"tokenizer.ggml.pre": pre})
    with open_checkpoint(str(path)) as checkpoint:
        tokenizer = Tokenizer.from_buffer(checkpoint.text.tokenizer_json)
        content = json.loads(checkpoint.text.tokenizer_json)
    words = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345!\n\n  x DON'T")
    assert [word for word, _ in words] == SPLITS[pre].split()
    assert content["model"]["ignore_merges"] is (pre in ("llama-bpe", "smaug-bpe"))
    assert (content["normalizer"] is not None) is ("qwen" in pre)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("small"), "llama", ggml_type="Q8_0").read_bytes()


@pytest.mark.slow
@settings(deadline=None, max_examples=120)
@given(st.data())
def test_damaged_files_are_read_or_refused(small_file: bytes, tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    content = bytearray(small_file)
    # The interesting bytes are in front: counts, lengths, types, shapes, offsets.
    for position in data.draw(st.lists(st.integers(0, 3000) | st.integers(0, 14_000), max_size=4)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    # Anything but a CheckpointError fails the test.
    with contextlib.suppress(CheckpointError), open_checkpoint(str(path)) as checkpoint:
        for name in expected_tensors(checkpoint.spec):
            checkpoint.tensor(name)


def test_truncated_files_are_refused(small_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for size in [0, 3, 4, 7, 23, 100, 5000, 20_000, len(small_file) // 2, len(small_file) - 64]:
        path.write_bytes(small_file[:size])
        with pytest.raises(CheckpointError, match=r"x\.gguf is not a valid GGUF file"):
            open_checkpoint(str(path))


def test_lengths_that_lie_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little")
    one_key = head + bytes(8) + (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + b"k"
    huge = (1 << 62).to_bytes(8, "little")
    key_k = (1).to_bytes(8, "little") + b"k" + (4).to_bytes(4, "little") + bytes(4)  # a uint32
    for content, words in [
        (head + huge + bytes(8), "tensors and 0 keys"),
        (head + bytes(8) + huge, "it has 0 tensors and"),
        (one_key + (8).to_bytes(4, "little") + huge, "bytes are due"),
        (one_key + (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + huge, "more than"),
        (one_key + (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + huge, "bytes are due"),
        (one_key + (9).to_bytes(4, "little") * 2 + huge, "value type 9 .* unknown"),
        (one_key + (77).to_bytes(4, "little"), "value type 77 .* unknown"),
        (head + bytes(8) + (2).to_bytes(8, "little") + 2 * key_k, "key k occurs twice"),
        (b"GGML" + head, "does not begin with GGUF"),
        (b"GGUF" + (3).to_bytes(4, "big"), "version 50331648"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ((0, 16), "tensor b overlaps another or is not aligned"),
        ((0, 0), "tensor b overlaps another or is not aligned"),
        ((0, 40), "tensor b overlaps another or is not aligned"),
        ((0, 64), "tensor b ends at byte"),
        ((0, 32), None),
    ],
)
def test_offsets_of_tensors(offsets, words, tmp_path: Path) -> None:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    content = b"GGUF" + number(3, 4) + number(2, 8) + number(0, 8)
    for name, offset in zip(b"ab", offsets, strict=True):
        content += number(1, 8) + bytes([name]) + number(1, 4)  # one dimension
        content += number(8, 8) + number(0, 4) + number(offset, 8)  # of 8 weights in F32
    content += bytes(-len(content) % 32) + np.arange(16, dtype="<f4").tobytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    if words is None:
        np.testing.assert_array_equal(gguf_file.GgufFile(path).tensor("b"), np.arange(8, 16))
    else:
        with pytest.raises(CheckpointError, match=words):
            gguf_file.GgufFile(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "x.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        open_checkpoint(str(path))

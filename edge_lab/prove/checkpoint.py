"""Writes a checkpoint of a real model's shape with random weights: for speed and memory, not text.

``python -m edge_lab.prove.checkpoint DIRECTORY [--shape 1.5b] [--layers N]`` writes the dimensions
of DeepSeek-R1-Distill-Qwen-1.5B in bf16 (3.5 GB), of the 7B (15 GB) or of Distill-Llama-8B (16 GB):
config.json, model.safetensors, and a tokenizer.json of made-up tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_make.checkpoint_tensors import expected_tensors
from edge_make.model_config import parse_config
from edge_make.safetensors_writer import TensorSource, write_safetensors

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {},
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "bos_token_id": 400,
        "eos_token_id": 400,
    },
    "8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000,
        "vocab_size": 151936,  # the real one, 128,256, is smaller than the made-up tokenizer
    },
}
"""Differences from `CONFIG` by the name of a shape; tiny is no real one, and takes a second."""
_CONTROL = (
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<|EOT|>",
    "<think>",
    "</think>",
)
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
_ONE = np.uint16(0x3F80)
_POOL = 1 << 24
_CHUNK = 1 << 22


def write_checkpoint(directory: Path, layers: int | None, shape: str = "1.5b") -> None:
    """Write the whole checkpoint, or some layers; memory stays below 100 MB."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **SHAPES[shape]}
    if layers is not None:
        config["num_hidden_layers"] = layers
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    spec = parse_config(config, "config.json")
    random = np.random.default_rng(1234)
    # One pool of numbers, read from a random place each time: 1.8e9 draws would take minutes.
    pool = _bfloat16(random.standard_normal(_POOL, dtype=np.float32) * np.float32(0.02))

    def chunks(name: str, count: int) -> Iterator[NDArray[Any]]:
        for at in range(0, count, _CHUNK):
            size = min(_CHUNK, count - at)
            if "norm" in name:
                yield np.full(size, _ONE)
            else:
                start = int(random.integers(0, _POOL - size + 1))
                yield pool[start : start + size]

    sources = {
        name: TensorSource("BF16", shape, chunks(name, int(np.prod(shape))))
        for name, shape in expected_tensors(spec).items()
    }
    write_safetensors(directory / "model.safetensors", sources)
    _write_tokenizer(directory, config["bos_token_id"])


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Cut floats to the upper half of their bits, which is bf16; NumPy has no such type."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_tokenizer(directory: Path, first_control: int) -> None:
    printable = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters = printable + [chr(256 + i) for i in range(256 - len(printable))]
    vocab = {letter: i for i, letter in enumerate(letters)}
    for i in range(len(vocab), first_control):
        vocab[f"Ġw{i:x}"] = i
    added = [
        {
            "id": first_control + i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": i in (0, 3),
        }
        for i, text in enumerate(_CONTROL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "bos_token": _CONTROL[3],
                "eos_token": _CONTROL[0],
                "chat_template": _TEMPLATE,
            },
            ensure_ascii=False,
        )
    )
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": first_control, "temperature": 0.6, "top_p": 0.95})
    )


def main(arguments: list[str] | None = None) -> None:
    """Write a checkpoint with the options that the module's docstring names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5b")
    parser.add_argument("--layers", type=int, help="default: all")
    given = parser.parse_args(arguments)
    write_checkpoint(given.directory, given.layers, given.shape)


if __name__ == "__main__":
    main()

"""Tiny checkpoints that embed and that judge documents, in the form of the published ones.

Of Qwen3-Embedding: sentence-transformers' files, no lm_head, tensors without the prefix ``model.``,
and a tokenizer that appends the end token. Of Qwen3-Reranker: nothing but the tokens of its prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tiny_models import EOS, EOS_ID, write_checkpoint

TEXTS = (
    "hello world",
    "what",
    "the hello of the other world, and all of it in a line that is longer than the others",
    "Instruct: find\nQuery:is it so?",
    "0123456789 " * 6,
)
PROMPTS = {"query": "Instruct: find\nQuery:", "document": ""}
PAIRS = (
    ("hello", "world", "x"),
    ("hello", "what", "x"),
    ("hello", "the other", "x"),
    ("what is the other", "the other is in the world", None),
)
_KIND = "sentence_transformers.models"


def write_embedder(directory: Path, *, dimensions: int | None = 16, **changes: Any) -> Path:
    """Write a checkpoint that embeds.

    Args:
        directory: made if missing.
        dimensions: the fewest that its vectors may be cut to; None says nothing of it.
        changes: keys of config.json.
    """
    listed = {} if dimensions is None else {"matryoshka_dimensions": [64, 32, dimensions]}
    write_checkpoint(directory, "qwen3", **{"architectures": ["Qwen3Model"], **listed, **changes})
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = {
        name.removeprefix("model."): entry
        for name, entry in json.loads(data[8 : 8 + length]).items()
    }
    head = json.dumps(entries).encode()
    weights.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    modules = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    _write(
        directory / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"{_KIND}.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    write_pooling(directory, "lasttoken")
    _write(
        directory / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    tokenizer = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    end = {"SpecialToken": {"id": EOS, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
            {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end],
                "special_tokens": {EOS: {"id": EOS, "ids": [EOS_ID], "tokens": [EOS]}},
            },
        ],
    }
    _write(directory / "tokenizer.json", tokenizer)
    _change(directory / "tokenizer_config.json", add_bos_token=False)
    return directory


def write_pooling(directory: Path, mode: str) -> None:
    """Write the pooling module's config with one mode on."""
    (directory / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    _write(
        directory / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": 64,
            **{f"pooling_mode_{each}": each == mode for each in modes},
            "include_prompt": True,
        },
    )


def write_judge(directory: Path, **changes: Any) -> Path:
    """Write a checkpoint that judges documents: its tokenizer has what the prompt is made of."""
    write_checkpoint(directory, "qwen3", **changes)
    path = directory / "tokenizer.json"
    text = path.read_text("utf-8")
    for old, new in {"<｜User｜>": "<|im_start|>", "<｜Assistant｜>": "<|im_end|>"}.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    tokenizer = json.loads(text)
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for old, pair in zip(merges[-3:], (["y", "e"], ["ye", "s"], ["n", "o"]), strict=True):
        vocab["".join(pair)] = vocab.pop("".join(old))
        old[:] = pair
    _write(path, tokenizer)
    _change(directory / "tokenizer_config.json", add_bos_token=False, chat_template=None)
    return directory


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _change(path: Path, **changes: Any) -> None:
    _write(path, {**json.loads(path.read_text("utf-8")), **changes})

"""Rebuilds ``tokenizer.json`` from GGUF metadata, so that it encodes as the original does.

A sentencepiece vocabulary is complete (`gguf_sentencepiece`). Of a byte-level one, GGUF stores the
tokens and the merges but only a *name* for how text is split before them (``tokenizer.ggml.pre``).
Each known name stands for the normalizer and pre-tokenizer of the
original ``tokenizer.json``. An unknown name is refused, since a wrong split causes no error, only a
worse model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge.bundle.manifest import Tokens
from edge.errors import CheckpointError

from .assumed_sampling import assume_sampling
from .checkpoint_text import CheckpointText, sampling_defaults, settle_template
from .gguf_sentencepiece import Vocabulary

# Values of tokenizer.ggml.token_type (llama.cpp: enum llama_token_type).
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_ADDED = {_CONTROL: True, _USER_DEFINED: False}  # added token: whether it is special

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": use_regex,
    }


def _sequence(first: dict[str, Any], use_regex: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex)]}


def _split(pattern: str) -> dict[str, Any]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return _sequence(split, use_regex=False)


@dataclass(frozen=True)
class _Pre:
    """Settings that one value of ``tokenizer.ggml.pre`` stands for.

    Attributes:
        pre_tokenizer: the entry of ``tokenizer.json``.
        nfc: whether text is brought to Unicode's composed form first.
        ignore_merges: whether a word in the vocabulary becomes one token without merges.
        add_bos: llama.cpp's default if the file has no ``add_bos_token``.
    """

    pre_tokenizer: dict[str, Any]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = _Pre(_byte_level(use_regex=True))
_SMOLLM = _Pre(_sequence({"type": "Digits", "individual_digits": True}, use_regex=True))
_QWEN2 = _Pre(_split(_QWEN2_SPLIT), nfc=True)
_LLAMA3 = _Pre(_split(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
_PRES = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "refact": _SMOLLM,  # Granite 3
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    # Llama 3 again, by the hash of a tokenizer that put no BOS before the converter's test.
    "smaug-bpe": replace(_LLAMA3, add_bos=False),
}
# Ends that the originals' generation_config.json names besides eos. GGUF has keys for at most
# three, so llama.cpp goes by the text, too.
_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
)


def read_gguf_text(metadata: Mapping[str, Any], path: Path, vocab_size: int) -> CheckpointText:
    """Rebuild everything textual from the metadata of a GGUF file.

    Args:
        metadata: metadata of the whole file.
        path: the file, for error messages.
        vocab_size: rows of the token table.

    Raises:
        CheckpointError: the tokenizer is missing, damaged or of a kind that is not supported.
    """
    model = metadata.get("tokenizer.ggml.model")
    pre = None if model == "llama" else _pre(metadata, path)
    vocab = _list(metadata, path, "tokens", str)
    types = _list(metadata, path, "token_type", int)
    if len(types) != len(vocab) or len(vocab) > vocab_size:
        raise CheckpointError(
            f"{path}: found {len(vocab)} tokens, {len(types)} token types and {vocab_size} rows of "
            "token_embd.weight; convert the model again"
        )
    tokens = _tokens(metadata, path, vocab, types, pre is None or pre.add_bos)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: tokenizer.chat_template must be text")
    if template is not None:
        template = settle_template(template, str(path))
    generation = {
        name: metadata[key] for name, key in _SAMPLING_KEYS.items() if key in metadata
    } | {"eos_token_id": list(tokens.eos)}
    if pre is None:
        scores = _list(metadata, path, "scores", float)
        if len(scores) != len(vocab):
            raise CheckpointError(
                f"{path}: found {len(vocab)} tokens and {len(scores)} scores; convert the model "
                "again"
            )
        pieces = Vocabulary(metadata, vocab, types, scores, path)
        bos = _bos_template(tokens) if tokens.add_bos else None
        content = pieces.tokenizer_json(_added_tokens(vocab, pieces.added), bos)
    else:
        added = {id_: _ADDED[kind] for id_, kind in enumerate(types) if kind in _ADDED}
        merges = _merges(metadata, path)
        content = _tokenizer_json(vocab, types, merges, pre, tokens, added)
    return CheckpointText(
        tokenizer_json=json.dumps(content, ensure_ascii=False).encode(),
        chat_template=template,
        tokens=tokens,
        sampling=assume_sampling(
            sampling_defaults(generation, str(path)),
            generation,
            [_text(metadata, "general.name"), _text(metadata, "general.basename"), path.stem],
            template,
        ),
        generation_config=generation,
    )


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _pre(metadata: Mapping[str, Any], path: Path) -> _Pre:
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') and "
            "sentencepiece's BPE ('llama') can be rebuilt; export from the original Hugging Face "
            "checkpoint"
        )
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PRES:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {name!r}, so it is not known how the original splits "
            f"text; supported: {', '.join(_PRES)}; export from the original Hugging Face checkpoint"
        )
    return _PRES[name]


def _list(metadata: Mapping[str, Any], path: Path, key: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be a list of {kind.__name__}")
    return values


def _merges(metadata: Mapping[str, Any], path: Path) -> list[list[str]]:
    merges = [merge.split(" ") for merge in _list(metadata, path, "merges", str)]
    for merge in merges:
        if len(merge) != 2:  # a byte-level token never holds a space
            raise CheckpointError(f"{path}: {' '.join(merge)!r} is no pair of tokens to merge")
    return merges


def _tokens(
    metadata: Mapping[str, Any], path: Path, vocab: list[str], types: list[int], adds_bos: bool
) -> Tokens:
    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < len(vocab)):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{name}_token_id is {value!r}, expected 0..{len(vocab) - 1}"
            )
        return value

    bos = token_id("bos")
    # eot ends a turn if it is another token than eos; eom ends a message to a tool (Llama 3).
    named = [token_id(name) for name in ("eos", "eot", "eom")]
    eos = [number for number in named if number is not None]
    if not eos:
        raise CheckpointError(
            f"{path} has no tokenizer.ggml.eos_token_id: no token ends an answer; convert the "
            "model again"
        )
    controls = {text: number for number, text in enumerate(vocab) if types[number] == _CONTROL}
    eos += [controls[text] for text in _ENDS if text in controls]
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    return Tokens(
        bos=bos,
        bos_text="" if bos is None else vocab[bos],
        eos=tuple(dict.fromkeys(eos)),
        eos_text=vocab[eos[0]],
        add_bos=add_bos is True and bos is not None,
    )


def _tokenizer_json(
    vocab: list[str],
    types: list[int],
    merges: list[list[str]],
    pre: _Pre,
    tokens: Tokens,
    added: Mapping[int, bool],
) -> dict[str, Any]:
    # Padding rows ("[PAD151936]") have the type UNUSED and are no tokens of the original.
    ids = {text: index for index, text in enumerate(vocab) if types[index] != _UNUSED}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocab, added),
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": pre.pre_tokenizer,
        "post_processor": _bos_template(tokens) if tokens.add_bos else _byte_level(True),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": ids,
            "merges": merges,
        },
    }


def _added_tokens(vocab: list[str], added: Mapping[int, bool]) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "content": vocab[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": is_special,
        }
        for index, is_special in added.items()
    ]


def _bos_template(tokens: Tokens) -> dict[str, Any]:
    bos = tokens.bos_text
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {bos: {"id": bos, "ids": [tokens.bos], "tokens": [bos]}},
    }

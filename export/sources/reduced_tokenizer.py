"""Reduces a ``tokenizer.json`` to fewer tokens: finds which belong together, and writes the file.

Only byte-pair tokenizers can be reduced. Two facts make it safe, and the tests check both:

- Tokens of single bytes always stay, so any text still encodes and decodes.
- A token stays together with every token that its own merges pass through. So a text that the old
  tokenizer wrote with kept tokens only is written with the same tokens. Merges are applied in the
  order of their ranks, every one that was applied is still there, and none was added.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from edge.errors import CheckpointError

_BYTE_FALLBACK = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Keys of generation_config.json that hold ids in other forms than "*_token_id".
_KEYS_WITH_IDS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
    "suppress_tokens",
)
_SPACE = "▁"  # stands for a space in the vocabularies of sentencepiece


class BpeTokenizer:
    """The parts of a ``tokenizer.json`` that a choice of tokens depends on.

    Args:
        tokenizer_json: content of the file.

    Raises:
        CheckpointError: not a byte-pair tokenizer, or one with prefixes or suffixes.

    Attributes:
        texts: text of every id, added tokens included.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        self._content: dict[str, Any] = json.loads(tokenizer_json)
        model = self._content["model"]
        self._vocab: dict[str, int] = model["vocab"]
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise CheckpointError(
                    f"--vocab-keep: the tokenizer has {key} {model[key]!r}; only tokenizers "
                    "without can be reduced"
                )
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(
                f"--vocab-keep: the tokenizer is of type {model['type']!r}, only BPE can be reduced"
            )
        self._added: list[dict[str, Any]] = self._content.get("added_tokens") or []
        self._added_ids = {token["id"] for token in self._added}
        self.texts = {number: text for text, number in self._vocab.items()}
        self.texts.update((token["id"], token["content"]) for token in self._added)
        self._merges = [_pair(merge) for merge in model["merges"]]
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(self._merges)))}

    @property
    def indispensable(self) -> set[int]:
        """Return ids without which a text could not be encoded or a control token would be lost."""
        model = self._content["model"]
        kept = set(self._added_ids)
        if (unknown := model.get("unk_token")) in self._vocab:
            kept.add(self._vocab[unknown])
        falls_back = model.get("byte_fallback") and all(b in self._vocab for b in _BYTE_FALLBACK)
        if falls_back:
            kept.update(
                self._vocab[text] for text in (*_BYTE_FALLBACK, _SPACE) if text in self._vocab
            )
        else:  # byte-level stand-ins are one character each
            kept.update(number for text, number in self._vocab.items() if len(text) == 1)
        return kept

    def parts(self, token_id: int) -> set[int]:
        """Return the ids of all tokens that a token's merges pass through, the token included.

        An added token is matched whole, before any merge.
        """
        found = {token_id}
        if token_id in self._added_ids:
            return found
        symbols = list(self.texts.get(token_id, ""))
        found.update(self._vocab[char] for char in symbols if char in self._vocab)
        unranked = len(self._merges)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, unranked) for pair in pairwise(symbols)]
            rank = min(ranks)
            if rank == unranked:
                break
            at = ranks.index(rank)
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
            found.add(self._vocab[symbols[at]])
        return found

    def reduce(self, new_ids: Mapping[int, int]) -> bytes:
        """Return the file with only the tokens of ``new_ids`` (old id to new id).

        Raises:
            CheckpointError: a post-processor whose ids cannot be renumbered.
        """
        model = self._content["model"]
        vocab = {text: new_ids[number] for text, number in self._vocab.items() if number in new_ids}
        merges = [
            merge
            for merge, (left, right) in zip(model["merges"], self._merges, strict=True)
            if left in vocab and right in vocab and left + right in vocab
        ]
        content = {
            **self._content,
            "added_tokens": [{**token, "id": new_ids[token["id"]]} for token in self._added],
            "post_processor": _post_processor(self._content.get("post_processor"), new_ids),
            "model": {**model, "vocab": vocab, "merges": merges},
        }
        padding = self._content.get("padding")
        if padding is not None:
            content["padding"] = {**padding, "pad_id": new_ids.get(padding["pad_id"], 0)}
        return json.dumps(content, ensure_ascii=False).encode()


def reduce_generation_config(
    config: Mapping[str, Any], new_ids: Mapping[int, int]
) -> dict[str, Any]:
    """``generation_config.json`` with new ids in every ``*_token_id``.

    Raises:
        CheckpointError: another key that holds token ids.
    """
    for key in _KEYS_WITH_IDS:
        if config.get(key):
            raise CheckpointError(
                f"--vocab-keep: generation_config.json has {key}, whose token ids are not "
                "renumbered; remove the key from a local copy"
            )
    return {
        key: _renumber(value, new_ids) if key.endswith("_token_id") else value
        for key, value in config.items()
    }


def ids_of_generation_config(config: Mapping[str, Any], vocab_size: int) -> Collection[int]:
    """Return every id under a ``*_token_id``.

    Raises:
        CheckpointError: a value that is no id below ``vocab_size``, e.g. -1 for "none".
    """
    found: set[int] = set()
    for key, value in config.items():
        if key.endswith("_token_id") and value is not None:
            for number in value if isinstance(value, list) else [value]:
                if type(number) is not int or not 0 <= number < vocab_size:
                    raise CheckpointError(
                        f"--vocab-keep: generation_config.json: {key} is {value!r:.80}, no id of "
                        f"the {vocab_size} tokens; correct or remove the key in a local copy"
                    )
                found.add(number)
    return found


def _renumber(value: Any, new_ids: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_renumber(item, new_ids) for item in value]
    return None if value is None else new_ids[value]


def _pair(merge: Any) -> tuple[str, str]:
    """Both spellings of the file: ``"a b"`` and ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _post_processor(processor: Any, new_ids: Mapping[int, int]) -> Any:
    kind = None if processor is None else processor.get("type")
    if kind in (None, "ByteLevel"):
        return processor
    if kind == "Sequence":
        steps = [_post_processor(step, new_ids) for step in processor["processors"]]
        return {**processor, "processors": steps}
    if kind == "TemplateProcessing":
        tokens = {
            text: {**token, "ids": _renumber(token["ids"], new_ids)}
            for text, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    raise CheckpointError(
        f"--vocab-keep: the tokenizer has a post-processor of type {kind!r}, whose ids cannot be "
        "renumbered"
    )

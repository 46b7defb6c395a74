"""Reduces a vocabulary: a smaller token table and lm_head with the tokens a deployment needs.

On a small model the lm_head is a good part of the bytes that each token reads. Kept rows are
untouched: in float, the logits of kept tokens are those of the whole model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import ReducedVocabulary
from edge.errors import ConfigError, RequestError
from edge.files import MALFORMED, read_file
from edge.model.names import TOKEN_TABLE
from edge.text.chat_template import encode_chat
from edge.text.tokenizer import Tokenizer

from .checkpoint import Checkpoint, Transformed
from .checkpoint_text import CheckpointText
from .documents import MAX_TEXT_BYTES, CalibrationText, read_calibration_text
from .quantized_weight import QuantizedWeight
from .reduced_tokenizer import BpeTokenizer, ids_of_generation_config, reduce_generation_config

MULTIPLE = 64
"""The number of tokens is rounded up to a multiple of this: kernels tile the lm_head by 64 rows."""
VOCABULARY_NAME = "vocabulary.json"
_TABLES = (TOKEN_TABLE, "lm_head.weight")
# A template may write other text beside the messages for other roles.
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Hi"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Hi"},
    ],
)


@dataclass(frozen=True)
class KeepList:
    """Tokens that ``--vocab-keep`` names.

    Attributes:
        name: the file's name.
        sha256: hash of the file's bytes.
        ids: the token ids themselves, or None for a text.
        text: the text whose tokens are to be kept, or None for ids.
    """

    name: str
    sha256: str
    ids: frozenset[int] | None = None
    text: CalibrationText | None = None


def read_keep_list(path: Path) -> KeepList:
    """Read a JSON list of token ids (``*.json``), or a text or JSONL as calibration takes it.

    Raises:
        ConfigError: the file cannot be read or is neither; the message names it.
    """
    if path.suffix.lower() != ".json":
        text = read_calibration_text(path, "--vocab-keep")
        return KeepList(text.name, text.sha256, text=text)
    try:
        data = read_file(path, MAX_TEXT_BYTES)
    except OSError as error:
        raise ConfigError(f"--vocab-keep {path} cannot be read: {error.strerror}") from error
    try:
        ids = msgspec.json.decode(data, type=list[int])
    except MALFORMED as error:
        raise ConfigError(
            f"--vocab-keep {path} is no JSON list of token ids ({error}); for a text, use another "
            "ending than .json"
        ) from error
    if not ids:
        raise ConfigError(f"--vocab-keep {path} is an empty list; name the token ids to keep")
    return KeepList(path.name, hashlib.sha256(data).hexdigest(), ids=frozenset(ids))


class ReducedCheckpoint(Transformed):
    """A model with only some of its tokens, renumbered from 0 in their old order.

    Args:
        checkpoint: the whole model; see `Transformed`.
        path: file of the tokens to keep, as for `read_keep_list`.
        size: number of tokens to keep, a multiple of `MULTIPLE`: the most frequent ones of the
            text, then the first ones of the vocabulary. None keeps every token of the text or the
            list, rounded up to a multiple of `MULTIPLE` with the first ones of the vocabulary.

    Raises:
        ConfigError: a file or size that does not fit the model.
        CheckpointError: a tokenizer that cannot be reduced.

    Attributes:
        kept: old id of every new id, int64 ``[vocab]``, ascending.
        vocabulary: description for the manifest.
    """

    def __init__(self, checkpoint: Checkpoint, path: Path, size: int | None = None) -> None:
        super().__init__(checkpoint)
        keep = read_keep_list(path)
        total, text = checkpoint.spec.vocab_size, checkpoint.text
        _check_size(keep, size, total)
        bpe = BpeTokenizer(text.tokenizer_json)
        whole = text.tokenizer()
        documents = _encode_all(whole, text, keep)
        required = _required(bpe, whole, text, total)
        wanted = _wanted(keep, documents, bpe.texts.keys() | required, total)
        self.kept = np.array(choose(bpe, required, wanted, size), dtype=np.int64)
        new_ids = {int(old): new for new, old in enumerate(self.kept)}
        self.text = _reduced_text(text, bpe, new_ids)
        self.spec = msgspec.structs.replace(checkpoint.spec, vocab_size=len(self.kept))
        reduced = self.text.tokenizer()
        after = _encode_all(reduced, self.text, keep)
        self.vocabulary = ReducedVocabulary(
            original_size=total,
            size=len(self.kept),
            file=keep.name,
            sha256=keep.sha256,
            text_tokens_original=None if documents is None else sum(map(len, documents)),
            text_tokens=None if after is None else sum(map(len, after)),
        )

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor; the token table and the lm_head have only the kept rows."""
        tensor = super().tensor(name)
        return tensor[self.kept] if name in _TABLES else tensor

    def quantized_weight(self, name: str) -> QuantizedWeight | None:
        """Read integers; the lm_head has only the kept rows."""
        weight = self.original.quantized_weight(name)
        return weight.take_rows(self.kept) if weight is not None and name in _TABLES else weight


def choose(
    bpe: BpeTokenizer, required: Collection[int], wanted: Mapping[int, int], size: int | None
) -> list[int]:
    """Choose the old ids to keep, ascending; closed under `BpeTokenizer.parts`.

    Args:
        bpe: the whole tokenizer.
        required: ids that stay in any case.
        wanted: how often each id is wanted.
        size: number of tokens to keep; None keeps all that are wanted, rounded up to `MULTIPLE`.

    Raises:
        ConfigError: ``size`` is less than the number that must stay.
    """
    kept: set[int] = set().union(*map(bpe.parts, required))
    if size is not None and len(kept) > size:
        raise ConfigError(
            f"--vocab-size {size} is too small: control tokens, single bytes and the chat template "
            f"alone take {len(kept)}; give at least {_rounded(len(kept))}"
        )
    for token in sorted(wanted, key=lambda token: (-wanted[token], token)):
        parts = bpe.parts(token) - kept
        if size is None or len(kept) + len(parts) <= size:
            kept |= parts
    target = _rounded(len(kept)) if size is None else size
    for token in sorted(bpe.texts):
        if len(kept) >= target:
            break
        # Ids follow the order of the merges. So the first ones are the most frequent in the text
        # that the tokenizer was made from, and their parts come before them.
        if token not in kept and len(bpe.parts(token) - kept) == 1:
            kept.add(token)
    return sorted(kept)


def _rounded(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE


def _check_size(keep: KeepList, size: int | None, total: int) -> None:
    if size is None:
        return
    if keep.ids is not None:
        raise ConfigError(
            f"--vocab-size {size} has no effect with a list of token ids ({keep.name}); leave it "
            "out, or give a text"
        )
    if size % MULTIPLE or size >= total:
        raise ConfigError(
            f"--vocab-size {size} must be a multiple of {MULTIPLE} and less than the {total} "
            "tokens of the model"
        )


def _encode_all(
    tokenizer: Tokenizer, text: CheckpointText, keep: KeepList
) -> list[list[int]] | None:
    if keep.text is None:
        return None
    template = text.template()
    count = len(keep.text.documents)
    return [keep.text.encode(tokenizer, template, index) for index in range(count)]


def _wanted(
    keep: KeepList, documents: list[list[int]] | None, known: Collection[int], total: int
) -> Mapping[int, int]:
    if documents is not None:
        return Counter(token for ids in documents for token in ids)
    ids = keep.ids or frozenset()
    if wrong := sorted(number for number in ids if not 0 <= number < total):
        raise ConfigError(
            f"--vocab-keep {keep.name} has the id {wrong[0]!s:.30}, the model's end at "
            f"{total - 1}; the list is for another model"
        )
    # Rows of the table that no token leads to, e.g. padding.
    if strangers := sorted(ids.difference(known)):
        raise ConfigError(
            f"--vocab-keep {keep.name} has the id {strangers[0]}, which no token of the tokenizer "
            "has; leave it out"
        )
    return dict.fromkeys(ids, 1)


def _required(
    bpe: BpeTokenizer, tokenizer: Tokenizer, text: CheckpointText, total: int
) -> set[int]:
    """Return ids that stay in any case: bytes, control tokens, ends, and the template's words."""
    required = bpe.indispensable | set(text.tokens.eos)
    required.update(ids_of_generation_config(text.generation_config, total))
    if text.tokens.bos is not None:
        required.add(text.tokens.bos)
    if (template := text.template()) is not None:
        for messages in _CHATS:
            try:
                required.update(encode_chat(tokenizer, template, messages))
            except RequestError:  # a template may refuse a role, e.g. system
                continue
    return required


def _reduced_text(
    text: CheckpointText, bpe: BpeTokenizer, new_ids: Mapping[int, int]
) -> CheckpointText:
    tokens = msgspec.structs.replace(
        text.tokens,
        bos=None if text.tokens.bos is None else new_ids[text.tokens.bos],
        eos=tuple(new_ids[number] for number in text.tokens.eos),
    )
    return replace(
        text,
        tokenizer_json=bpe.reduce(new_ids),
        tokens=tokens,
        generation_config=reduce_generation_config(text.generation_config, new_ids),
    )


def encode_kept(kept: NDArray[np.int64]) -> bytes:
    """Encode `VOCABULARY_NAME`: old id of every new id, which ``--vocab-keep`` reads again."""
    return json.dumps(kept.tolist(), separators=(",", ":")).encode()

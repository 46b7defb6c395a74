"""Rebuilds ``tokenizer.json`` from a sentencepiece vocabulary in GGUF.

Sentencepiece's BPE, and llama.cpp's copy of it, join the two neighbours whose joint piece has the
highest score, the leftmost first. The library tokenizers joins by a list of pairs. So the list has
each way to cut a piece into two, in the order of the pieces' scores. A vocabulary that no list
reproduces is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge.errors import CheckpointError

# Values of tokenizer.ggml.token_type (llama.cpp: enum llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
SPACE = "▁"
_RUNS = f"{SPACE}\n\t\r"  # characters of which a run is text, and no control token
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_REMEDY = "export from the original Hugging Face checkpoint"


class Vocabulary:
    """The pieces of a file, after a check that a list of merges can stand for them.

    Attributes:
        added: ids of the control tokens, which are never made of text, and whether each is special.
        adds_space: whether a text begins with a space that is not written.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        vocab: list[str],
        types: list[int],
        scores: list[float],
        path: Path,
    ) -> None:
        """Check the vocabulary.

        Raises:
            CheckpointError: no tokenizer of the library does the same.
        """
        for key in (
            "remove_extra_whitespaces",
            "precompiled_charsmap",
            "treat_whitespace_as_suffix",
        ):
            if metadata.get(f"tokenizer.ggml.{key}"):
                raise CheckpointError(
                    f"{path}: tokenizer.ggml.{key} changes the text in a way that is not "
                    f"supported; {_REMEDY}"
                )
        self.adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
        # llama.cpp's converter writes the spaces of these as they are in a text.
        vocab = [
            text.replace(" ", SPACE) if kind == _USER_DEFINED and not text.strip() else text
            for text, kind in zip(vocab, types, strict=True)
        ]
        self._ids = {text: id_ for id_, text in enumerate(vocab) if types[id_] != _UNUSED}
        named = sum(kind != _UNUSED for kind in types)
        if len(self._ids) != named:
            raise CheckpointError(
                f"{path}: {named - len(self._ids)} of {named} tokens have the text of another; "
                f"{_REMEDY}"
            )
        if missing := _BYTES - {vocab[i] for i, kind in enumerate(types) if kind == _BYTE}:
            raise CheckpointError(
                f"{path}: {len(missing)} of 256 bytes have no token, such as {min(missing)}, so "
                f"characters without a token would be lost; {_REMEDY}"
            )
        self._unknown = next((vocab[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
        users = [text for text, id_ in self._ids.items() if types[id_] == _USER_DEFINED]
        runs = [text for text in users if not text.strip(_RUNS)]
        self.added = {
            id_: types[id_] != _USER_DEFINED
            for text, id_ in self._ids.items()
            if types[id_] in (_UNKNOWN, _CONTROL)
            or (types[id_] == _USER_DEFINED and text not in runs)
        }
        ranks = {text: scores[id_] for text, id_ in self._ids.items() if types[id_] == _NORMAL}
        _check_ranks(ranks, path)
        self._merges = [*_join_runs(runs, path), *_join_pieces(ranks)]

    def tokenizer_json(self, added: list[dict[str, Any]], post_processor: Any) -> dict[str, Any]:
        """Write the content of ``tokenizer.json``.

        Args:
            added: its added tokens.
            post_processor: what puts bos before a text, or None.
        """
        space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prepend = {"type": "Prepend", "prepend": SPACE}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        back = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        first = [prepend] if self.adds_space else []
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [*first, space]},
            "pre_tokenizer": None,
            "post_processor": post_processor,
            "decoder": {"type": "Sequence", "decoders": [*back, *([strip] if first else [])]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self._unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": self._ids,
                "merges": self._merges,
            },
        }


def _check_ranks(ranks: Mapping[str, float], path: Path) -> None:
    """Refuse scores that are no order of merges, and pieces that begin with an unknown letter."""
    long = [score for text, score in ranks.items() if len(text) > 1]
    if not all(map(float.is_integer, long)):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.scores are probabilities, so this is a unigram vocabulary, "
            f"and only sentencepiece's BPE can be rebuilt; {_REMEDY}"
        )
    if len(set(long)) != len(long):
        raise CheckpointError(
            f"{path}: {len(long) - len(set(long))} of {len(long)} tokens have the score of another "
            f"in tokenizer.ggml.scores, so it is not known which is joined first; {_REMEDY}"
        )
    for text in ranks:
        for letter in text:
            if letter not in ranks:
                raise CheckpointError(
                    f"{path}: the token {text!r} has the character {letter!r}, which is no token: "
                    f"not supported; {_REMEDY}"
                )


def _join_runs(runs: list[str], path: Path) -> list[list[str]]:
    """Return merges that take the longest run from the left, before anything else is joined.

    Sentencepiece cuts these pieces out of a text first. A run that grows by one letter goes before
    a new one, and the longest grows first.
    """
    merges = []
    for letter in dict.fromkeys(text[0] for text in runs):
        if mixed := [text for text in runs if letter in text and text.strip(letter)]:
            raise CheckpointError(
                f"{path}: the user-defined token {mixed[0]!r} mixes white space: not supported; "
                f"{_REMEDY}"
            )
        lengths = sorted(len(text) for text in runs if text[0] == letter and len(text) > 1)
        if lengths != list(range(2, len(lengths) + 2)):
            raise CheckpointError(
                f"{path}: there are tokens for runs of {lengths} times {letter!r}, with gaps: not "
                f"supported; {_REMEDY}"
            )
        merges += [[letter * (length - 1), letter] for length in reversed(lengths)]
    return merges


def _join_pieces(ranks: Mapping[str, float]) -> list[list[str]]:
    """Return each way to join two pieces to a third, in the order of their scores.

    Of two ways to the same piece, the one with the longer left part goes first, as a run is joined
    from the left.
    """
    found = [
        (-score, -cut, text)
        for text, score in ranks.items()
        for cut in range(1, len(text))
        if text[:cut] in ranks and text[cut:] in ranks
    ]
    return [[text[:-cut], text[-cut:]] for _, cut, text in sorted(found)]

"""Finds where two ``tokenizer.json`` differ in the meaning of ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edge.errors import BundleError
from edge.files import MALFORMED


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | list[str]] = []


class _File(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []


def tokenizer_difference(ours: Path, theirs: Path) -> str | None:
    """Compare tokens and merges of two ``tokenizer.json``.

    Tokens that only one file has count as a difference, since an id or a token would have no
    counterpart. Added tokens do not (control tokens, such as those that a later version of a family
    adds). How a text is cut before it is merged is not compared, since ids are never made of the
    other's text.

    Args:
        ours: one file.
        theirs: the other file.

    Returns:
        The first difference as a clause, by id and text; None if there is none.

    Raises:
        BundleError: a file is not a ``tokenizer.json`` of byte pairs.
    """
    data = _read(ours), _read(theirs)
    if data[0] == data[1]:
        return None
    a, b = (_decode(part, path) for part, path in zip(data, (ours, theirs), strict=True))
    return _token_difference(a, b) or _merge_difference(a.model.merges, b.model.merges)


def _token_difference(a: _File, b: _File) -> str | None:
    texts = _texts(a), _texts(b)
    for id_ in sorted(texts[0].keys() & texts[1].keys()):
        if texts[0][id_] != texts[1][id_]:
            return f"id {id_} is {texts[0][id_]!r} here and {texts[1][id_]!r} there"
    ids = tuple({text: id_ for id_, text in side.items()} for side in texts)
    for text, id_ in ids[0].items():
        if ids[1].get(text, id_) != id_:
            return f"the token {text!r} has the id {id_} here and {ids[1][text]} there"
    added = {token.id for file in (a, b) for token in file.added_tokens}
    for id_ in sorted(texts[0].keys() ^ texts[1].keys()):
        if id_ not in added:
            where = ("here", "there") if id_ in texts[0] else ("there", "here")
            only = texts[0].get(id_, texts[1].get(id_))
            return f"id {id_} is {only!r} {where[0]} and nothing {where[1]}"
    return None


def _merge_difference(a: list[str | list[str]], b: list[str | list[str]]) -> str | None:
    # Older versions of the library write "a b", newer ones ["a", "b"].
    pairs = [[tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in x] for x in (a, b)]
    for index, (ours, theirs) in enumerate(zip(*pairs, strict=False)):
        if ours != theirs:
            return f"merge {index} is {ours} here and {theirs} there"
    if len(a) != len(b):
        return f"there are {len(a)} merges here and {len(b)} there"
    return None


def _texts(file: _File) -> dict[int, str]:
    texts = {id_: text for text, id_ in file.model.vocab.items()}
    return texts | {token.id: token.content for token in file.added_tokens}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"cannot read {path} ({error.strerror}); copy or export the bundle again"
        ) from error


def _decode(data: bytes, where: Any) -> _File:
    try:
        return msgspec.json.decode(data, type=_File)
    except MALFORMED as error:
        raise BundleError(
            f"{where} is not a tokenizer.json of byte pairs ({error}); copy or export the bundle "
            "again"
        ) from error

"""Turns text into token ids and back: `Tokenizer`.

Control tokens are *all* ``added_tokens`` of an HF ``tokenizer.json``, special or not. The R1
distills list ``<｜User｜>`` and ``<think>`` as ``special: false``, yet they steer the model as much
as the end-of-sentence token does. Text is plain unless the caller says otherwise, so a control
token that a user types never acts as one.
"""

from __future__ import annotations

import math
import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.errors import BundleError, DependencyError, EdgeError, RequestError

from .tokenizer_file import MAX_ID, TokenizerFile, parse_tokenizer

if TYPE_CHECKING:
    from edge.bundle.manifest import Tokens

_LONG_CHARS = 1 << 14  # encoding a longer text takes at least about 10 ms
_PIECE_CHARS = 1 << 15  # the library takes about 200 bytes per character while it encodes
_NFC_RATIO = 4.0  # NFC shortens text at most from 7 bytes to 2 (see `_is_bounded`)
_MAX_ID = 2**31 - 1  # ids are int32 in engines
# Written before a text, it takes the space that a sentencepiece vocabulary would put there. No word
# and no run of spaces contains it, so the tokens after it are those of the text alone (CodeLlama's
# own code uses the same character).
_STANDS_ALONE = "☺"


class Tokenizer:
    """A byte-pair tokenizer read from the bytes of an HF ``tokenizer.json``.

    Encoding is done by the ``tokenizers`` library; decoding works on bytes here, because a token
    may hold half a character. Safe to share between threads.
    """

    def __init__(self, data: bytes, tokens: Tokens, where: str = "tokenizer.json") -> None:
        """Use `from_bytes`.

        Raises:
            BundleError: the file is malformed, of an unsupported kind, or contradicts
                ``tokens``.
            DependencyError: the ``tokenizers`` library is missing.
        """
        file = parse_tokenizer(data, where)
        self._byte_level, self._strips_space = _decoder_kind(file.decoder, where)
        self._library = _load_library(file, where)
        self._switch = _ControlSwitch(self._library)
        self._cuts = _finds_cuts(file)
        self._control_tokens = {token.content: token.id for token in file.added_tokens}
        self._control_texts = {token.id: token.content for token in file.added_tokens}
        # Longest first, since the library takes the longest of the tokens that start together.
        longest_first = sorted(self._control_tokens, key=len, reverse=True)
        self._longest_control = max(map(len, longest_first), default=0)
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._token_bytes: dict[int, bytes] = {}
        self.tokens = tokens
        vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        if self.vocab_size > MAX_ID + 1:
            raise BundleError(f"{where} has the id {self.vocab_size - 1}, the most is {MAX_ID}")
        """One more than the highest id; the model's vocabulary may be padded beyond it."""
        known = set(vocabulary)
        plain = vocabulary.keys() - self._control_tokens.keys()
        self.longest_token = max(map(len, vocabulary), default=1)
        """Length of the longest token in characters, as ``tokenizer.json`` spells it."""
        self._composes = file.normalizer is not None
        self._byte_weights = (
            _byte_weights(plain, known) if _is_bounded(file, self._byte_level) else None
        )
        unknown = self._library.model.unk_token
        self._unknown_id = None if unknown is None else self.id_of(unknown)
        bos_id = self._control_tokens.get(tokens.bos_text)
        if tokens.bos is not None and tokens.bos != bos_id:
            raise BundleError(
                f"the manifest says that bos is {tokens.bos_text!r} with id {tokens.bos}, but in "
                f"{where} that control token has the id {bos_id}; export the bundle again"
            )

    @classmethod
    def from_bytes(cls, data: bytes, tokens: Tokens) -> Tokenizer:
        """Make a tokenizer from the content of a ``tokenizer.json``."""
        return cls(data, tokens)

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Return the id of every control token, by its text."""
        return MappingProxyType(self._control_tokens)

    def id_of(self, text: str) -> int | None:
        """Return the id of the token that ``tokenizer.json`` spells exactly like this, or None."""
        found: int | None = self._library.token_to_id(text)
        return found

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        control: bool = False,
        goes_on: bool = False,
        on_piece: Callable[[], None] | None = None,
    ) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any Unicode text.
            add_bos: start with the model's begin-of-sequence token.
            goes_on: whether the text is the rest of a longer one, so a sentencepiece vocabulary
                gets no space before it.
            control: whether the text of a control token becomes that token (for a rendered chat
                template); else everything is plain text and no id of a control token comes out.
            on_piece: called before each piece of a long text; an error it raises ends the work.

        Raises:
            RequestError: the text has lone surrogates, needs a token that the vocabulary lacks, or
                ``add_bos`` is set for a model without bos.
        """
        try:
            text.encode()  # some versions of the library replace lone surrogates silently
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate at character {error.start}; send valid Unicode"
            ) from error
        goes_on = goes_on and self._strips_space and bool(text)
        ids: list[int] = []
        for piece in self._pieces(_STANDS_ALONE + text if goes_on else text):
            if on_piece is not None:
                on_piece()
            ids += self._encode_piece(piece, control)
        if goes_on:
            ids = ids[len(self._encode_piece(_STANDS_ALONE, control)) :]
        if not control and not self._control_texts.keys().isdisjoint(ids):
            # The vocabulary itself may contain the text of a control token (SmolLM2's does).
            ids = [piece for id_ in ids for piece in self._spelled(id_)]
        if add_bos:
            if self.tokens.bos is None:
                raise RequestError("add_bos was asked for, but the model has no bos token")
            ids.insert(0, self.tokens.bos)
        return ids

    def _encode_piece(self, text: str, control: bool) -> list[int]:
        # If no control token is in the text, both settings give the same ids, and with this one no
        # thread waits.
        with self._switch.held(plain=False):
            ids = self._call_library(text)
        if not control and not self._control_texts.keys().isdisjoint(ids):
            with self._switch.held(plain=True):
                ids = self._call_library(text)
        return ids

    def _call_library(self, text: str) -> list[int]:
        # The library releases the interpreter to other threads only for a batch.
        with _panics("the library tokenizers panics at this text", RequestError):
            if len(text) > _LONG_CHARS:
                encoding = self._library.encode_batch_fast([text], add_special_tokens=False)[0]
            else:
                encoding = self._library.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a long text where its ids are the same as without the cut, if there is such a place.

        While the library encodes a piece it takes memory for it, and blocks threads that want the
        other setting for control tokens.
        """
        start = 0
        while self._cuts and len(text) - start > _PIECE_CHARS:
            steps = range(start + _PIECE_CHARS, len(text), _PIECE_CHARS)
            # In steps, between which other threads get the interpreter; a cut looks 2 ahead.
            cuts = (_CUT.search(text, at, at + _PIECE_CHARS + 2) for at in steps)
            found = next(filter(None, cuts), None)
            if found is None:
                break
            yield text[start : found.start()]
            start = found.start()
        yield text[start:] if start else text

    def least_tokens(self, text: str) -> int:
        """Return the fewest tokens that a plain text can have, without encoding it; 0 if unknown.

        A byte that occurs in no token of more than k bytes takes at least 1/k of a token. NFC keeps
        ASCII before ASCII as it is; the other bytes may become anything, in a quarter of the bytes.
        """
        weights = self._byte_weights
        if weights is None:
            return 0
        data = text.encode("utf-8", "surrogatepass")
        composes = self._composes and not text.isascii()
        counts, num_changing = np.zeros(256, np.int64), 0
        for start in range(0, len(data), _PIECE_CHARS):  # NumPy makes an int64 of each byte
            part = np.frombuffer(data[start : start + _PIECE_CHARS], np.uint8)
            if composes:
                stays = part < 0x80
                stays[:-1] &= stays[1:]
                stays[-1] = False  # the next byte is in another part
                num_changing += len(part) - int(stays.sum())
                part = part[stays]
            counts += np.bincount(part, minlength=256)
        least = float(counts @ weights) + num_changing * float(weights.min()) / _NFC_RATIO
        return math.ceil(least - 1e-6)

    def split_control(self, text: str) -> list[tuple[str, bool]]:
        """Cut text into non-empty pieces, and say of each whether it is a control token."""
        if not self._control_tokens:
            return [(text, False)] if text else []
        pieces: list[tuple[str, bool]] = []
        start = at = 0
        while at < len(text):  # in steps, between which other threads get the interpreter
            end = at + _PIECE_CHARS
            found = self._control_pattern.search(text, at, end + self._longest_control)
            if found is None or found.start() >= end:
                at = end
                continue
            if found.start() > start:
                pieces.append((text[start : found.start()], False))
            pieces.append((found[0], True))
            start = at = found.end()
        if start < len(text):
            pieces.append((text[start:], False))
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text.

        Control tokens appear as their text, and invalid UTF-8 as U+FFFD; ids beyond the tokenizer
        (a padded vocabulary) give no text.

        Raises:
            RequestError: an id is negative or exceeds 31 bits.
        """
        return self.without_first_space(
            b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; not always whole UTF-8 characters.

        Raises:
            RequestError: the id is negative or exceeds 31 bits.
        """
        known = self._token_bytes.get(token_id)
        if known is not None:
            return known
        if not 0 <= token_id <= _MAX_ID:
            raise RequestError(f"token id {token_id} is not in 0..{_MAX_ID}")
        text = self._control_texts.get(token_id)
        if text is not None:
            found = text.encode()
        else:
            token: str | None = self._library.id_to_token(token_id)
            if token is None:
                return b""  # not cached, since a client may send any number of such ids
            found = _from_byte_level(token) if self._byte_level else _from_sentencepiece(token)
        self._token_bytes[token_id] = found
        return found

    def without_first_space(self, text: str) -> str:
        """Drop the space that some tokenizers write before a text and that `decode` drops."""
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def _spelled(self, token_id: int) -> list[int]:
        """Return the token itself; if it is a control token, the ids of its single bytes."""
        if token_id not in self._control_texts:
            return [token_id]
        names = (
            _BYTE_TO_CHAR[byte] if self._byte_level else f"<0x{byte:02X}>"
            for byte in self.token_bytes(token_id)
        )
        ids = [self.id_of(name) for name in names]
        spelled = [id_ for id_ in ids if id_ is not None and id_ not in self._control_texts]
        if len(spelled) != len(ids) or token_id == self._unknown_id:
            raise RequestError(
                f"the vocabulary has no plain tokens for a part of the text (it would become the "
                f"control token {self._control_texts[token_id]!r}); remove unusual characters"
            )
        return spelled


def _load_library(file: TokenizerFile, where: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DependencyError(
            "encoding text needs the package tokenizers; pip install 'tokenizers>=0.20'"
        ) from error
    try:
        with _panics(f"{where} makes the library tokenizers panic", BundleError):
            library = tokenizers.Tokenizer.from_buffer(msgspec.json.encode(file))
    except (ValueError, UnicodeError) as error:
        raise BundleError(
            f"{where} was refused by tokenizers {tokenizers.__version__} ({error}); "
            "upgrade tokenizers or export the bundle again"
        ) from error
    for token in file.added_tokens:
        found = library.token_to_id(token.content)
        if found != token.id:
            raise BundleError(
                f"{where}: the added token {token.content!r} has the id {token.id}, but the "
                f"vocabulary leads to {found}; repair the source's tokenizer.json"
            )
    return library


def _decoder_kind(decoder: Any, where: str) -> tuple[bool, bool]:
    """Whether a vocabulary is byte-level (else sentencepiece), and drops its first space."""
    kinds = decoder.get("decoders") if _kind(decoder) == "Sequence" else [decoder]
    names = [_kind(kind) for kind in kinds] if isinstance(kinds, list) else []
    if names == ["ByteLevel"]:
        return True, False
    if names == ["Metaspace"] and kinds[0].get("replacement") == "▁":
        return False, kinds[0].get("prepend_scheme", "always") != "never"
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[0] == replace:
        if not kinds[3:]:
            return False, False
        if kinds[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return False, True
    raise BundleError(
        f"{where} has the decoder {decoder!r:.300}; supported are ByteLevel, Metaspace with '▁', "
        "and the sequence Replace('▁', ' '), ByteFallback, Fuse, Strip"
    )


def _is_bounded(file: TokenizerFile, byte_level: bool) -> bool:
    """Whether each token stands for its own bytes and no other part of the text is dropped.

    NFC is allowed: over all of Unicode 14 it shortens 7 bytes to 2 at most (U+1FBE U+0308 U+0301 to
    U+0390), and keeps ASCII.
    """
    if not byte_level or "Removed" in repr(file.pre_tokenizer):
        return False
    normalizer = file.normalizer
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    return all(part.get("type") == "NFC" for part in parts)


def _byte_weights(vocabulary: Collection[str], known: Collection[str]) -> NDArray[np.float64]:
    """Return the least part of a token that each byte takes: 1 over the longest that has it.

    It is 0 for bytes without a token, which are dropped or become part of an unknown token.

    Args:
        vocabulary: tokens that plain text may become, in GPT-2's stand-ins for bytes.
        known: all tokens.

    Returns:
        Weights by byte, ``[256]``.
    """
    by_length: dict[int, list[str]] = {}
    for token in filter(None, vocabulary):  # an empty token stands for nothing
        by_length.setdefault(len(token), []).append(token)
    weights = np.zeros(256)
    for length in sorted(by_length):  # the longest comes last and wins
        chars = set().union(*by_length[length])
        weights[[_CHAR_TO_BYTE[char] for char in chars if char in _CHAR_TO_BYTE]] = 1 / length
    weights[[byte for byte, char in enumerate(_BYTE_TO_CHAR) if char not in known]] = 0
    return weights


def _finds_cuts(file: TokenizerFile) -> bool:
    """Whether words end at every place that `_CUT` finds, whatever surrounds it.

    This holds for the pre-tokenizers of Qwen2, Llama 3 and GPT-2 (also after Digits), with tokens
    that contain no space and take none from their neighbours.
    """
    if file.normalizer not in (None, {"type": "NFC"}):
        return False
    if any(
        " " in token.content or token.lstrip or token.rstrip or token.single_word
        for token in file.added_tokens
    ):
        return False
    pre = file.pre_tokenizer or {}
    steps = pre.get("pretokenizers") if _kind(pre) == "Sequence" else [pre]
    if not isinstance(steps, list) or not steps or _kind(steps[-1]) != "ByteLevel":
        return False
    if len(steps) == 1 or (len(steps) == 2 and _kind(steps[0]) == "Digits"):
        return bool(steps[-1].get("use_regex", True))
    pattern = steps[0].get("pattern") if _kind(steps[0]) == "Split" else None
    return (
        len(steps) == 2
        and isinstance(pattern, dict)
        and pattern.get("Regex") in _WORDS
        and steps[0].get("behavior") == "Isolated"
        and not steps[0].get("invert")
    )


@contextmanager
def _panics(what: str, kind: type[EdgeError]) -> Iterator[None]:
    """Turn a panic of the library, which is not an `Exception`, into an error of this kind."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt, or another error that ends the program
        raise kind(f"{what}: {str(error)[:200]}; change it or upgrade tokenizers") from error


class _ControlSwitch:
    """Guards a setting of the library's object: whether it recognizes control tokens.

    Threads that want the same setting encode at the same time. A thread that wants the other one
    waits until they are done, and later ones wait for it: first come, first served. A second object
    for the other setting would double its 80 MB (128,000 tokens).
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._plain = library.encode_special_tokens = False
        self._active = 0
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def held(self, *, plain: bool) -> Iterator[None]:
        """Keep the setting while the block runs; ``plain`` recognizes no control tokens."""
        place = object()
        with self._changed:
            self._line.append(place)
            try:
                self._changed.wait_for(
                    lambda: self._line[0] is place and (self._plain == plain or not self._active)
                )
            finally:  # also after an interrupt, the next thread gets its turn
                self._line.remove(place)
                self._changed.notify_all()
            if self._plain != plain:
                self._plain = self._library.encode_special_tokens = plain
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()


def _kind(decoder: Any) -> Any:
    return decoder.get("type") if isinstance(decoder, dict) else None


def _byte_chars() -> list[str]:
    """Return GPT-2's printable stand-in for every byte (openai/gpt-2, ``encoder.py``)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


_BYTE_TO_CHAR = _byte_chars()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(_BYTE_TO_CHAR)}
# Pre-tokenizers of Qwen2 and Llama 3, as their tokenizer.json spells them.
_WORDS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
# None of their words continues over a space, or from a Chinese letter to a punctuation mark.
_CUT = re.compile(r"(?<=[!-~])(?= [A-Za-z])|(?<=[\u4e00-\u9fff])(?=[，。、；：？！])")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_CHAR_TO_BYTE[char] for char in token])
    except KeyError:
        return token.encode()  # not in stand-ins, so it is text; the library does the same


def _from_sentencepiece(token: str) -> bytes:
    byte = _BYTE_FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

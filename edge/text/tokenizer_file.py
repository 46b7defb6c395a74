"""Reads an HF ``tokenizer.json`` and accepts only parts that are known to be bounded.

The library runs any pipeline that the file describes. Nine replacements of a letter by ten ask for
gigabytes at once and kill the process, a regular expression can take forever, and some values make
it panic. So each part must be of a type in this module, with values in range, and text must pass
through it in a time that grows with its length (`is_linear`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from edge.errors import BundleError
from edge.files import MALFORMED

MAX_FILE_BYTES = 64 << 20
"""Limits the file; Qwen's has 11 MB, Gemma's 33."""
MAX_ID = (1 << 22) - 1
"""Limits the id of a token; vocabularies have about 150,000."""
_MAX_ADDED_TOKENS = 1 << 14
_MAX_REGEX_CHARS = 4096

_Part = Annotated[str, msgspec.Meta(min_length=1, max_length=16)]
_Parts = msgspec.Meta(max_length=8)


class _Tagged(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A part of a pipeline, by its ``type``; a key that is not checked is refused."""


class _NFC(_Tagged, tag="NFC"):
    """Composes characters of equal meaning."""


class _NFD(_Tagged, tag="NFD"):
    """Takes characters of equal meaning apart."""


class _NFKC(_Tagged, tag="NFKC"):
    """Composes characters of similar meaning."""


class _NFKD(_Tagged, tag="NFKD"):
    """Takes characters of similar meaning apart."""


class _Lowercase(_Tagged, tag="Lowercase"):
    """Writes small letters."""


class _Strip(_Tagged, tag="Strip"):
    strip_left: bool
    strip_right: bool


class _Prepend(_Tagged, tag="Prepend"):
    prepend: _Part


class _Text(msgspec.Struct):
    String: _Part


class _Replace(_Tagged, tag="Replace"):
    """Replaces text by text that is not longer, so that no chain of them blows a text up."""

    pattern: _Text
    content: Annotated[str, msgspec.Meta(max_length=16)]

    def __post_init__(self) -> None:
        if len(self.content) > len(self.pattern.String):
            raise ValueError("Replace makes text longer")


class _Normalizers(_Tagged, tag="Sequence"):
    normalizers: Annotated[list[_Normalizer], _Parts]


_Normalizer = _NFC | _NFD | _NFKC | _NFKD | _Lowercase | _Strip | _Prepend | _Replace | _Normalizers


class _ByteLevel(_Tagged, tag="ByteLevel"):
    add_prefix_space: bool = True
    trim_offsets: bool = True
    use_regex: bool = True


class _Digits(_Tagged, tag="Digits"):
    individual_digits: bool = False


class _Metaspace(_Tagged, tag="Metaspace"):
    replacement: Annotated[str, msgspec.Meta(min_length=1, max_length=1)]
    prepend_scheme: Literal["always", "never", "first"] = "always"
    split: bool = True
    add_prefix_space: bool | None = None  # until tokenizers 0.15
    str_rep: str | None = None


class _SplitPattern(msgspec.Struct):
    Regex: str | None = None
    String: _Part | None = None

    def __post_init__(self) -> None:
        if (self.Regex is None) == (self.String is None):
            raise ValueError("a pattern is either a Regex or a String")
        if self.Regex is not None and not is_linear(self.Regex):
            raise ValueError(
                f"it is not known that the regular expression {self.Regex!r:.200} ends in time"
            )


class _Split(_Tagged, tag="Split"):
    pattern: _SplitPattern
    behavior: Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    invert: bool = False


class _PreTokenizers(_Tagged, tag="Sequence"):
    pretokenizers: Annotated[list[_PreTokenizer], _Parts]


_PreTokenizer = _ByteLevel | _Digits | _Metaspace | _Split | _PreTokenizers


class AddedToken(msgspec.Struct):
    """A control token, special or not."""

    id: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
    content: Annotated[str, msgspec.Meta(max_length=256)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Model(msgspec.Struct):
    """A byte-pair model; a prefix or suffix of words makes the library panic at some letters."""

    type: str = "BPE"
    dropout: Annotated[float, msgspec.Meta(ge=0, le=0)] | None = None
    unk_token: str | None = None
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False
    vocab: msgspec.Raw = msgspec.Raw(b"{}")
    merges: msgspec.Raw = msgspec.Raw(b"[]")


class TokenizerFile(msgspec.Struct):
    """The parts of a ``tokenizer.json`` that matter; the vocabulary is never parsed in Python.

    Post-processor, truncation and padding are left out on purpose: this program decides about bos
    and about cutting a prompt, not the file.
    """

    model: msgspec.Raw
    added_tokens: Annotated[list[AddedToken], msgspec.Meta(max_length=_MAX_ADDED_TOKENS)] = []
    normalizer: Any = None
    pre_tokenizer: Any = None
    decoder: Any = None


def parse_tokenizer(data: bytes, where: str) -> TokenizerFile:
    """Parse a ``tokenizer.json``.

    Args:
        data: its bytes.
        where: path for error messages.

    Returns:
        The file. Its ``model`` holds only what was checked, each key once. Its added tokens are all
        special: then one switch of the library turns all of them off and on.

    Raises:
        BundleError: the file is malformed, or has a part that is not known to be bounded.
    """
    if len(data) > MAX_FILE_BYTES:
        raise BundleError(
            f"{where} has {len(data)} bytes, at most {MAX_FILE_BYTES} are taken; is it a "
            "tokenizer.json?"
        )
    try:
        file = msgspec.json.decode(data, type=TokenizerFile)
        kind = msgspec.json.decode(file.model, type=_Kind).type
        if kind != "BPE":
            raise BundleError(f"{where} has a tokenizer of type {kind!r:.80}; supported is 'BPE'")
        model = msgspec.json.decode(file.model, type=_Model)
        msgspec.convert(file.normalizer, type=_Normalizer | None)
        msgspec.convert(file.pre_tokenizer, type=_PreTokenizer | None)
        # Encoded anew, because of two equal keys the library may read the other one.
        file.model = msgspec.Raw(msgspec.json.encode(model))
    except MALFORMED as error:
        raise BundleError(
            f"{where} is not a tokenizer.json of a kind that is known ({error}); known are BPE "
            "models with the normalizers and pre-tokenizers of Qwen, Llama, DeepSeek, SmolLM and "
            "GPT-2; copy or export the bundle again"
        ) from error
    for token in file.added_tokens:
        if not token.content:
            raise BundleError(f"{where}: the added token with id {token.id} has no text")
        token.special = True
    return file


class _Kind(msgspec.Struct):
    type: str = "BPE"


# ------------------------------------------------------------------------------- expressions

_ATOM = (
    r"(?:\\[pP]\{\^?\w{1,32}\}|\\[sSdDwWrnt]|\\[^\w\s]|[^\\\[\](){}|*+?^$.]|\."
    r"|\[\^?(?:\\[pP]\{\^?\w{1,32}\}|\\[sSdDwWrnt]|\\[^\w\s]|[^\\\[\]&]|&(?!&))+\])"
)
_COUNT = r"(?:\?|\{\d?,?[1-9]\})"  # at most nine, and never followed by another count
_GROUP = rf"\((?:\?i?:){_ATOM}+(?:\|{_ATOM}+)*\)"
# Once a branch has reached an unbounded part, it cannot fail any more.
_BRANCH = re.compile(
    rf"(?:(?:{_GROUP}|{_ATOM}){_COUNT}?){{0,64}}(?:{_ATOM}[+*](?:{_ATOM}[*?])*)?\Z"
)
_SPLITS = re.compile(rf"({_GROUP}|{_ATOM}|[*+?]|{_COUNT})")
_MAX_COUNTS = 4
# A run of white space is taken by one of these, so none of its places is looked at often.
_SPACES = re.compile(r"(?:^|\|)(?:\\s\*\[\\r\\n\]\+?\|)?\\s\+\(\?!\\S\)\|\\s\+\Z")


def is_linear(pattern: str) -> bool:
    r"""Tell whether finding all matches takes a time that grows linearly with the text's length.

    Accepted are alternations whose branches have single characters or classes, few of them counted,
    and end in an unbounded part, e.g. ``[^\r\n\p{L}]?\p{L}+``. The way in which GPT-2's descendants
    split white space is accepted if it comes last.
    """
    if len(pattern) > _MAX_REGEX_CHARS:
        return False
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    pattern = _SPACES.sub("", pattern)
    branches, branch, at = [], "", 0
    while at < len(pattern):
        if pattern[at] == "|":
            branches.append(branch)
            branch, at = "", at + 1
            continue
        found = _SPLITS.match(pattern, at)
        if found is None:
            return False
        branch, at = branch + found[0], found.end()
    branches.append(branch)
    return all(
        branch and _BRANCH.match(branch) and len(re.findall(_COUNT, branch)) <= _MAX_COUNTS
        for branch in branches
    )

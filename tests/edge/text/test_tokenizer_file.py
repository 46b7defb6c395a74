from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.manifest import Tokens
from edge.errors import BundleError, EdgeError, RequestError
from edge.text import tokenizer as module
from edge.text import tokenizer_file
from edge.text.tokenizer import Tokenizer
from edge.text.tokenizer_file import is_linear, parse_tokenizer
from tests.makers.tiny_models import write_tokenizer

TOKENS = Tokens(bos=None, bos_text="", eos=(), eos_text="", add_bos=False)


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    parsed: dict[str, Any] = json.loads((directory / "tokenizer.json").read_bytes())
    return parsed


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


def replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def sequence(*parts: Any, kind: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


# Each took gigabytes, or for ever, or ended in a panic or an abort, with the library alone.
HOSTILE = [
    ({"normalizer": sequence(*[replace(".", "." * 10)] * 8)}, "makes text longer"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "a"}}, "String"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAA="}}, "Precomp"),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 1000}}, "length <= 16"),
    ({"normalizer": sequence(*[{"type": "NFC"}] * 1000)}, "length <= 8"),
    ({"normalizer": [{"type": "NFC"}]}, "normalizer|got `array`"),
    ({"pre_tokenizer": split(r"(a+)+b")}, "ends in time"),
    ({"pre_tokenizer": sequence(split(r"(?:a|a)*b"), kind="pretokenizers")}, "ends in time"),
    ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "BertPreTokenizer"),
    ({"added_tokens": [{"id": 2**40, "content": "a"}]}, "4194303"),
    ({"added_tokens": [{"id": -1, "content": "a"}]}, ">= 0"),
    ({"added_tokens": [{"id": 1, "content": "a" * 10**5}]}, "length <= 256"),
]
HOSTILE_MODELS = [
    ({"continuing_subword_prefix": "é"}, "continuing_subword_prefix"),
    ({"end_of_word_suffix": "é"}, "end_of_word_suffix"),
    ({"dropout": 0.5}, "dropout"),
    ({"vocab": {"a": 2**32 - 1}, "merges": []}, "the most is"),
    ({"vocab": []}, "refused by tokenizers"),
    ({"merges": ["a"]}, "refused by tokenizers"),
    ({"type": "Unigram"}, "supported is 'BPE'"),
]


@pytest.mark.parametrize(("changes", "why"), HOSTILE)
def test_unbounded_pipelines_are_refused(content, changes, why):
    with pytest.raises(BundleError, match=why):
        Tokenizer.from_bytes(json.dumps(content | changes).encode(), TOKENS)


@pytest.mark.parametrize(("changes", "why"), HOSTILE_MODELS)
def test_models_that_break_the_library_are_refused(content, changes, why):
    data = content | {"added_tokens": [], "model": content["model"] | changes}
    with pytest.raises(BundleError, match=why):
        Tokenizer.from_bytes(json.dumps(data).encode(), TOKENS)


def test_of_two_equal_keys_the_library_gets_the_one_that_was_looked_at(content):
    good = json.dumps(content)
    hostile = json.dumps({"normalizer": sequence(*[replace(".", "." * 10)] * 8)})
    twice = f"{hostile[:-1]}, {good[1:]}".encode()
    expected = Tokenizer.from_bytes(good.encode(), TOKENS).encode("...")
    assert Tokenizer.from_bytes(twice, TOKENS).encode("...") == expected


def test_too_large_files_are_not_parsed(content, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "MAX_FILE_BYTES", 1000)
    with pytest.raises(BundleError, match="at most 1000 are taken"):
        parse_tokenizer(b" " * 1001, "x")


def test_panics_are_errors():
    """`PanicException` of Rust is no `Exception`; this one is real."""
    slow = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "isolated")
    with pytest.raises(RequestError, match=r"panics here: .*; change it"):  # noqa: SIM117
        with module._panics("panics here", RequestError):
            slow.pre_tokenize_str("a" * 40)
    for other in (KeyboardInterrupt, ValueError):
        with pytest.raises(other), module._panics("", RequestError):
            raise other


# ------------------------------------------------------------------------------- generated files

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.sampled_from(["", "a", "é", "▁", " ", "\x00", "Sequence", "NFC", "BPE", "(a+)+", "a" * 300]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "pattern", "Regex", "String", "normalizers", "content", "id"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=6,
)
parts = st.sampled_from(
    [
        {"type": "NFC"},
        {"type": "Lowercase"},
        replace("a", ""),
        replace("aa", "é"),
        {"type": "Prepend", "prepend": "▁"},
        {"type": "ByteLevel"},
        {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "▁"},
        split(r"\p{L}+"),
        {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ]
)


# Places in the file, as numbers for each level, and what is put there.
mutations = st.lists(
    st.tuples(
        st.lists(st.integers(0, 20), min_size=1, max_size=4),
        st.one_of(
            values,
            parts,
            st.builds(
                lambda parts, kind: sequence(*parts, kind=kind),
                st.lists(parts, max_size=3),
                st.sampled_from(["normalizers", "pretokenizers"]),
            ),
        ),
    ),
    min_size=1,
    max_size=3,
)


def put(node: Any, place: list[int], value: Any) -> None:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = keys[place[0] % len(keys)]
    if len(place) == 1 or not isinstance(node[key], dict | list):
        node[key] = copy.deepcopy(value)
    else:
        put(node[key], place[1:], value)


@settings(deadline=None, max_examples=200)
@given(mutations, st.text(st.sampled_from("a bé1\n▁<"), max_size=20))
def test_any_file_is_a_tokenizer_or_an_error(content, changes, text):
    hostile = copy.deepcopy(content)
    for place, value in changes:
        put(hostile, place, value)
    try:
        opened = Tokenizer.from_bytes(json.dumps(hostile).encode(), TOKENS)
        ids = opened.encode(text)
        opened.encode(text, control=True)
        opened.decode(ids)
        opened.least_tokens(text)
    except EdgeError:
        return  # nothing else may come out
    assert opened.vocab_size > 0


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_tokenizer_or_an_error(data):
    for whole in (data, b'{"model": {"vocab": {}, "merges": []}, ' + data):
        with pytest.raises(BundleError):
            Tokenizer.from_bytes(whole, TOKENS)


# ------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    "pattern",
    [
        *sorted(module._WORDS),  # workers of one run must agree on the order
        r"\w+|\W+",
        r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",  # DeepSeek-V3
        r"[\r\n]",
        r"\s?\p{L}+",
    ],
)
def test_the_expressions_of_known_models_are_linear(pattern):
    assert is_linear(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["", "a|", "(((a", "(a+)+", "(a|a)*b", "a+b", "a*a*b", r"\s*\s*x", r"(\w+\s?)+$", r"(a)\1",
     "a{1,3}+", "a{9}{9}", "(?:a?){9}", "a+?b", "(?<=a+)b", "[a&&b]+", "a++b", r"\s+(?!\S)|\s+x",
     "a{0,9}a{0,9}a{0,9}a{0,9}a{0,9}b", r"\s+$", r"\s+(?!\S)|\s+|a+b", "a{1,999999}", "a" * 5000,
     "(?~a)", r"\G", r"(?i)a+b", "(?:a+|b)c"],
)  # fmt: skip
def test_others_are_not(pattern):
    assert not is_linear(pattern)


atoms = st.sampled_from(
    ["a", "b", "[ab]", "[^b]", ".", r"\w", r"\p{L}", r"\s", "(?:a|b)", "(?i:a)"]
)
counts = st.sampled_from(["", "", "?", "{1,9}", "{9}", "+", "*"])
branches = st.lists(st.tuples(atoms, counts).map("".join), min_size=1, max_size=7).map("".join)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.lists(branches, min_size=1, max_size=4).map("|".join).filter(is_linear),
    st.text(st.sampled_from("ab "), min_size=1, max_size=3),
)
def test_linear_expressions_end_in_time(pattern, text):
    """50,000 characters: a quadratic one looks at more than a billion places."""
    library = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    before_s = time.process_time()
    library.pre_tokenize_str((text * 25_000)[:25_000] + "b" + (text * 25_000)[:25_000])
    assert time.process_time() - before_s < 3

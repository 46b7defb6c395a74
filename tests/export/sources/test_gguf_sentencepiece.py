"""Sentencepiece's vocabularies from GGUF, against the sentencepiece library itself."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.errors import CheckpointError
from edge.text.streamed_text import Detokenizer
from edge.text.tokenizer import Tokenizer
from export.sources.gguf_tokenizer import read_gguf_text
from export.sources.opening import open_checkpoint
from tests.export.sources.test_gguf import gguf, write_tiny

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ROOT = Path(__file__).parents[3]
# Runs of white space as in Gemma's vocabulary, and a control token that is user-defined there.
RUNS = [*("\n" * count for count in range(1, 9)), *("▁" * count for count in range(2, 9))]
USERS = [*RUNS, "<start_of_turn>"]
TEXTS = [
    "",
    " ",
    "Hello, world",
    "  two leading spaces, and trailing ones   ",
    "a  b   c    d" + " " * 40 + "e",
    "lines\n\nand\n\n\n\n  more\n" + "\n" * 20 + "\ttabs\t\t\r\n",
    "emoji 😀, 🧑‍🚀 and 👩🏽‍💻 between words",
    "漢字 and 汉字，标点。繁體；かな カナ 한국어",
    "unknown: \x00 \x7f \u0378 \U0010ffff é ß ﬁ",
    "a ▁ that is written, <0x41> and <s> as text",
    "aaaaaaaaaaaaaaaaaaaaa " + "=" * 77 + "-" * 33 + "abababababab",
]
Variant = tuple[bool, bool]  # whether a space is put first, whether runs are user-defined
VARIANTS: list[Variant] = [(True, False), (False, False), (True, True), (False, True)]


@cache
def library(variant: Variant) -> sentencepiece.SentencePieceProcessor:
    """A vocabulary that is trained on this project's pages, some of them in Chinese."""
    adds_space, has_users = variant
    names = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")
    lines = [line for name in names for line in (ROOT / name).read_text("utf-8").split("\n")]
    lines += ["    if the  code   has:\n        spaces", "aaaa bbbb ===== ----- abab"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=adds_space,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=USERS if has_users else [],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(variant: Variant) -> dict[str, Any]:
    """What llama.cpp's converter writes of it, with real spaces in what is user-defined."""
    theirs = library(variant)
    tokens, types, scores = [], [], []
    for number in range(theirs.get_piece_size()):
        piece = theirs.id_to_piece(number)
        kind = NORMAL
        if theirs.is_unknown(number):
            kind = UNKNOWN
        elif theirs.is_control(number):
            kind = CONTROL
        elif theirs.is_byte(number):
            kind = BYTE
        elif variant[1] and piece in USERS:
            kind, piece = USER_DEFINED, piece.replace("▁", " ")
        tokens.append(piece)
        types.append(kind)
        scores.append(theirs.get_score(number))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.merges": ...,
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        "tokenizer.ggml.add_space_prefix": variant[0],
    }


@cache
def ours(variant: Variant) -> Tokenizer:
    metadata = metadata_of(variant)
    text = read_gguf_text(metadata, Path("x.gguf"), len(metadata["tokenizer.ggml.tokens"]))
    return Tokenizer.from_bytes(text.tokenizer_json, text.tokens)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_ids_and_the_text_of_the_library(text: str, variant: Variant) -> None:
    ids = library(variant).encode(text)
    assert ours(variant).encode(text) == ids
    assert ours(variant).decode(ids) == library(variant).decode(ids) == text.replace("▁", " ")


PIECES = st.sampled_from(
    [" ", "\n", "▁", "the", "a", "b", "ab", "=", "-", "é", "漢", "😀", ".", "\t"]
)
TEXT = st.lists(st.builds(str.__mul__, PIECES, st.integers(1, 20)), max_size=8).map("".join)


@settings(deadline=None, max_examples=200)
@given(TEXT | st.text(max_size=40), st.sampled_from(VARIANTS))
@example(" " * 19 + "the" + "\n" * 21 + " a", (False, True))
def test_any_text_has_the_ids_of_the_library(text: str, variant: Variant) -> None:
    assert ours(variant).encode(text) == library(variant).encode(text)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_shows_the_text(text: str, variant: Variant) -> None:
    """An emoji of four bytes, which are tokens, appears with the last of them."""
    tokenizer = ours(variant)
    stream = Detokenizer(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join([*parts, stream.flush()]) == text.replace("▁", " ")
    assert "\ufffd" not in "".join(parts)


def test_an_emoji_without_a_token_comes_out_whole() -> None:
    tokenizer = ours(VARIANTS[0])
    ids = tokenizer.encode("x😀")[-4:]
    assert [tokenizer.token_bytes(token) for token in ids] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    stream = Detokenizer(tokenizer, goes_on=True)
    assert [stream.push(token) for token in ids] == ["", "", "", "😀"]


def test_a_user_defined_token_that_is_no_white_space_is_a_control_token() -> None:
    tokenizer = ours((False, True))
    assert set(tokenizer.control_tokens) == {"<unk>", "<s>", "</s>", "<start_of_turn>"}
    turn = "<start_of_turn>user\n\nhello"
    assert tokenizer.encode(turn, control=True) == library((False, True)).encode(turn)
    assert tokenizer.control_tokens["<start_of_turn>"] not in tokenizer.encode(turn)


def tiny_file(folder: Path, variant: Variant, **changes: Any) -> Path:
    metadata = {**metadata_of(variant), **changes}
    table = np.random.default_rng(0).normal(size=(1024, 64)).astype(np.float32)
    rows = (table, gguf.GGMLQuantizationType.F32)
    tensors = {"token_embd.weight": rows, "output.weight": rows}
    return write_tiny(folder, "llama", {**metadata, **tensors})


def test_a_llama_with_such_a_vocabulary_is_read(tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_file(tmp_path, VARIANTS[0]))) as checkpoint:
        assert checkpoint.spec.vocab_size == 1024  # padded
        text = checkpoint.text
    assert text.tokens.add_bos  # what llama.cpp assumes where the file does not say
    tokenizer = Tokenizer.from_bytes(text.tokenizer_json, text.tokens)
    found = tokenizer.encode(TEXTS[2], add_bos=True)
    assert found == [library(VARIANTS[0]).bos_id(), *library(VARIANTS[0]).encode(TEXTS[2])]


def changed(key: str, *edits: tuple[int, Any]) -> dict[str, Any]:
    values = list(metadata_of((False, True))[f"tokenizer.ggml.{key}"])
    for index, value in edits:
        values[index] = value
    return {f"tokenizer.ggml.{key}": values}


def place(text: str) -> int:
    tokens: list[str] = metadata_of((False, True))["tokenizer.ggml.tokens"]
    return tokens.index(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda: changed("scores", (-200, -1.5), (-700, -0.25)), "is a unigram vocabulary"),
        (lambda: changed("scores", (300, -7.0), (301, -7.0)), "2 of .* have the score of another"),
        (lambda: changed("token_type", (place("<0x0A>"), UNUSED)), "1 of 256 bytes .* <0x0A>"),
        (lambda: changed("tokens", (300, "th"), (301, "th")), "2 of 1000 tokens have the text"),
        (lambda: changed("tokens", (place("e"), "鿿")), "the character 'e', which is no token"),
        (lambda: changed("token_type", (place("   "), UNUSED)), "times '▁', with gaps"),
        (lambda: changed("tokens", (place("   "), "\n ")), "mixes white space"),
        (lambda: {"tokenizer.ggml.scores": [0.0]}, "1000 tokens and 1 scores"),
        (lambda: {"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        (lambda: {"tokenizer.ggml.precompiled_charsmap": [1]}, "precompiled_charsmap"),
    ],
)
def test_what_no_list_of_merges_reproduces_is_refused(changes: Any, words: str) -> None:
    metadata = {**metadata_of((False, True)), **changes()}
    with pytest.raises(CheckpointError, match=rf"^x\.gguf: .*{words}"):
        read_gguf_text(metadata, Path("x.gguf"), 1000)

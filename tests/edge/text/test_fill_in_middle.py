"""The tokens that frame a gap: which they are, and that the texts beside it stay what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle.manifest import Tokens
from edge.errors import RequestError
from edge.text.fill_in_middle import fill_in_middle
from edge.text.tokenizer import Tokenizer
from edge_make.read_tokenizer import read_tokenizer
from tests.edge.text.test_tokenizer import NO_BOS, TOKENS, added, sentencepiece, texts
from tests.makers.tiny_models import BOS_ID, FIRST_CONTROL_ID, write_tokenizer

FAMILIES = {
    "Qwen2.5-Coder": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"),
    "StarCoder2": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"),
    "DeepSeek-Coder": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|EOT|>"),
    "CodeLlama": ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
}
LLAMA = Tokens(bos=1, bos_text="<s>", eos=(), eos_text="", add_bos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory / "tokenizer.json"


def marked(data: bytes, family: str, tokens: Tokens) -> tuple[Tokenizer, list[int]]:
    """A tokenizer with the marks of a family, in an order that says nothing, and their ids."""
    file = json.loads(data)
    known = {token["content"]: token["id"] for token in file["added_tokens"]}
    new = [text for text in reversed(FAMILIES[family]) if text not in known]
    for id_, text in enumerate(new, 1 + max(*file["model"]["vocab"].values(), *known.values())):
        file["added_tokens"].append(added(id_, text))
        known[text] = id_
    ids = [known[text] for text in FAMILIES[family]]
    return Tokenizer.from_bytes(json.dumps(file).encode(), tokens), ids


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_found_by_its_own_spelling(path: Path, family: str):
    tokenizer, ids = marked(path.read_bytes(), family, NO_BOS)
    fill = fill_in_middle(tokenizer)
    assert [fill.before, fill.after, fill.middle] == ids[:3]
    assert set(ids) <= fill.ends


def test_a_model_without_all_the_marks_is_refused(path: Path):
    message = r"^suffix: this model has no tokens .*<\|fim_prefix\|>"
    with pytest.raises(RequestError, match=message):
        fill_in_middle(read_tokenizer(path, TOKENS))
    data = path.read_text("utf-8").replace('"<think>"', '"<|fim_prefix|>"')
    data = data.replace('"</think>"', '"<|fim_suffix|>"')
    with pytest.raises(RequestError, match=message):
        fill_in_middle(Tokenizer.from_bytes(data.encode(), TOKENS))


def test_a_plain_token_of_that_text_is_no_mark(path: Path):
    """Whoever types it would open a gap."""
    file = json.loads(path.read_bytes())
    file["added_tokens"] = []
    for text in FAMILIES["StarCoder2"]:
        file["model"]["vocab"][text] = len(file["model"]["vocab"])
    with pytest.raises(RequestError, match="no tokens"):
        fill_in_middle(Tokenizer.from_bytes(json.dumps(file).encode(), NO_BOS))


@given(texts, texts)
def test_the_texts_are_framed_and_stay_text(path: Path, prefix: str, suffix: str):
    tokenizer, (before, after, middle, _) = marked(path.read_bytes(), "Qwen2.5-Coder", TOKENS)
    fill = fill_in_middle(tokenizer)
    mark = "<|fim_middle|>"
    ids = fill.encode(tokenizer, prefix + mark, suffix + mark)
    first, second = tokenizer.encode(prefix + mark), tokenizer.encode(suffix + mark)
    assert ids == [BOS_ID, before, *first, after, *second, middle]
    assert not [id_ for id_ in first + second if id_ >= FIRST_CONTROL_ID]


@given(st.text("ab é☺你\n", max_size=9), st.text("ab é☺你\n", max_size=9))
def test_sentencepiece_puts_no_space_before_continued_text(prefix: str, suffix: str):
    """Text before and after a gap, joined, is the text that there was."""
    tokenizer, (before, after, middle, _) = marked(sentencepiece(), "CodeLlama", LLAMA)
    ids = fill_in_middle(tokenizer).encode(tokenizer, prefix, suffix)
    assert ids[:2] == [1, before]
    assert ids[-1] == middle
    cut = ids.index(after)
    assert ids[2:cut] == tokenizer.encode(prefix)  # as CodeLlama's own code: with its space
    assert b"".join(map(tokenizer.token_bytes, ids[cut + 1 : -1])) == suffix.encode()

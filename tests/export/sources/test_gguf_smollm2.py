"""SmolLM2's real GGUF file: its numbers, its weights and, above all, its token ids."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge.bundle.manifest import SamplingDefaults, Tokens
from edge.model.spec import RopeSpec
from export.sources import gguf_file
from export.sources.opening import open_checkpoint
from tools.models.smollm2 import smollm2_gguf

gguf = pytest.importorskip("gguf")

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = smollm2_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with open_checkpoint(str(path)) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Tokenizer:
    return Tokenizer.from_buffer(smollm2.text.tokenizer_json)


def test_smollm2(smollm2) -> None:
    spec = smollm2.spec
    assert (spec.architecture, spec.num_layers, spec.hidden_size) == ("llama", 30, 576)
    (attention,) = set(spec.attentions())
    assert (attention.heads, attention.kv_heads, attention.dim) == (9, 3, 64)
    assert (spec.rms_norm_eps, spec.ropes[0], spec.tied_embeddings) == (
        1e-5,
        RopeSpec(theta=100_000.0),
        True,
    )
    assert smollm2.text.tokens == Tokens(
        bos=1, bos_text="<|im_start|>", eos=(2, 0), eos_text="<|im_end|>", add_bos=False
    )
    assert smollm2.text.sampling == SamplingDefaults(
        temperature=0.2, top_p=0.9, assumed="SmolLM2-Instruct"
    )
    assert "SmolLM" in smollm2.text.chat_template
    assert smollm2.source.licence == "apache-2.0"
    assert smollm2.source.sha256 == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )


@pytest.mark.slow
def test_parses_what_the_gguf_package_parses(smollm2) -> None:
    path = smollm2_gguf()
    theirs, ours = gguf.GGUFReader(path), gguf_file.GgufFile(path)
    assert ours.metadata.keys() == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        if isinstance(value, float):
            expected = pytest.approx(expected, rel=1e-7)
        assert value == expected, key
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (found.begin, found.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        if tensor.name in ("blk.7.attn_v.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(ours.tensor(tensor.name), expected)


def test_smollm2_ids_equal_those_of_llama_cpp(tokenizer: Tokenizer) -> None:
    """The file says how it was made: by llama.cpp, another implementation, from the same GGUF."""
    golden = json.loads((DATA / "smollm2_token_ids.json").read_bytes())
    for case in golden["cases"]:
        ids = tokenizer.encode(case["text"], add_special_tokens=True).ids
        assert ids == case["ids"], case["text"]


class ReferenceTokenizer:
    """SmolLM2's tokenizer as its specification reads, with nothing of the tokenizers library.

    Split into single digits and the rest, the rest by GPT-2's regular expression, then merge the
    adjacent pair of the lowest rank until none is left.
    """

    SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
        map(chr, range(0x2000, 0x200B))
    )

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = metadata["tokenizer.ggml.merges"]
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = (byte for byte in range(256) if byte not in printable)
        self.alphabet = {byte: chr(byte) for byte in printable}
        self.alphabet |= {byte: chr(256 + i) for i, byte in enumerate(others)}

    def kind(self, character: str) -> str:
        if character in self.SPACES:
            return " " if character == " " else "s"
        return {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], "o")

    def words(self, text: str) -> list[str]:
        kinds = "".join(map(self.kind, text))
        pieces = [match.span() for match in re.finditer("N|[^N]+", kinds)]
        found = []
        for start, end in pieces:
            while start < end:
                match = re.match("'s|'t|'re|'ve|'m|'ll|'d", text[start:end]) or re.match(
                    r" ?L+| ?N+| ?o+|[s ]+(?![^s ])|[s ]+", kinds[start:end]
                )
                assert match is not None
                found.append(text[start : start + match.end()])
                start += match.end()
        return found

    @functools.cache  # noqa: B019 - one object per test run
    def merge(self, word: str) -> list[str]:
        # A byte that the vocabulary lacks (control characters) is dropped before merging.
        parts = [self.alphabet[byte] for byte in word.encode() if self.alphabet[byte] in self.ids]
        while True:
            ranks = [self.ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
            best = min(ranks, default=math.inf)
            if best == math.inf:
                return parts
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def encode(self, text: str) -> list[int]:
        return [self.ids[part] for word in self.words(text) for part in self.merge(word)]


@pytest.fixture(scope="module")
def reference() -> ReferenceTokenizer:
    return ReferenceTokenizer(gguf_file.GgufFile(smollm2_gguf()).metadata)


# Unassigned characters would only compare the Unicode versions of Python and the library.
CHARACTERS = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cn", "Cs", "Co"])
LATIN = ["don't", "'LL", "'ll", "naïve", "e\u0301", " 2024", "½", "<|", "|>", "…"]
SPACES = ["  ", "\n\n", "\t\t", "  x", "\u3000", " " * 40]
SCRIPTS = ["日本語", "العربية", "हिन्दी", "한국", "Ωμέγα", "٣٤", "👩‍👩‍👧", "😀"]
CODE = ["x**2==3.14", "def f():\n    return", "https://a.b/c?d=1"]
WORDS = st.sampled_from([*LATIN, *SPACES, *SCRIPTS, *CODE])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(CHARACTERS, max_size=6) | WORDS, max_size=8).map("".join))
def test_smollm2_ids_equal_those_of_the_reference(tokenizer, reference, text: str) -> None:
    if re.search(r"<\|?[a-z_]+\|?>", text):  # a control token: the golden ids cover those
        return
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference.encode(text)

"""Vocabulary reduction: any text still goes through, kept tokens keep their logits."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge import LLM
from edge.backends.step import all_tokens, prefill
from edge.bundle.manifest import Manifest, Tokens, read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import CheckpointError, ConfigError
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.tokenizer import Tokenizer
from export.cli import export as export_verb
from export.pipeline import ExportConfig, export_checkpoint
from export.sources import vocabulary
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint
from export.sources.reduced_tokenizer import BpeTokenizer, reduce_generation_config
from export.sources.vocabulary import VOCABULARY_NAME, ReducedCheckpoint, choose, read_keep_list
from tests.conftest import RUNNABLE
from tests.makers.goldens import assert_close
from tests.makers.tiny_models import CONTROL_IDS, EOS_ID, write_checkpoint, write_tokenizer
from tools.models.smollm2 import smollm2_gguf

TEXT = "hello world, what is the other thing?\n"
PROSE = (
    "The station is quiet at night. A train of forty wagons stops at platform 7 for 12 minutes; "
    "the driver writes the numbers of the wagons into a book and drinks a cup of tea.\n\n"
    "What is 12 + 7? It is 19.\n"
)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny vocabulary has 311 tokens, 263 of which must stay."""
    monkeypatch.setattr(vocabulary, "MULTIPLE", 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-R1", "qwen2")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.txt"
    path.write_text(TEXT)
    return path


def reduce(source: Path, path: Path, size: int | None = None) -> ReducedCheckpoint:
    return ReducedCheckpoint(open_checkpoint(str(source)), path, size)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_bytes(checkpoint.text.tokenizer_json, checkpoint.text.tokens)


# ------------------------------------------------------------------------------- the tokenizer


@functools.cache
def tiny_tokenizer() -> tuple[BpeTokenizer, Tokenizer]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        data = (Path(folder) / "tokenizer.json").read_bytes()
    tokens = Tokens(bos=None, bos_text="", eos=(EOS_ID,), eos_text="", add_bos=False)
    return BpeTokenizer(data), Tokenizer.from_bytes(data, tokens)


def without(bpe: BpeTokenizer, kept: list[int]) -> Tokenizer:
    tokens = Tokens(bos=None, bos_text="", eos=(0,), eos_text="", add_bos=False)
    return Tokenizer.from_bytes(bpe.reduce({old: new for new, old in enumerate(kept)}), tokens)


words = st.lists(
    st.sampled_from(
        ["hello", " world", " the", "the", " what", " and", "ing", "\n", "  ", "é", "🙂"]
    )
    | st.text(max_size=6),
    max_size=12,
).map("".join)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=words | st.text(), chosen=st.sets(st.integers(0, 303)))
def test_any_text_goes_through_any_reduction(text: str, chosen: set[int]):
    bpe, whole = tiny_tokenizer()
    kept = choose(bpe, bpe.indispensable, dict.fromkeys(chosen, 1), None)
    reduced = without(bpe, kept)
    old = whole.encode(text)
    new = reduced.encode(text)
    assert reduced.decode(new) == whole.decode(old)
    if set(old) <= set(kept):  # then the very same tokens
        assert [kept[token] for token in new] == old


@settings(max_examples=100, deadline=None)
@given(chosen=st.sets(st.integers(0, 303)), size=st.none() | st.integers(66, 77))
def test_chosen_tokens_are_closed_ordered_and_as_many_as_asked_for(
    chosen: set[int], size: int | None
):
    bpe, _ = tiny_tokenizer()
    size = None if size is None else 4 * size
    kept = choose(bpe, bpe.indispensable, dict.fromkeys(chosen, 1), size)
    assert kept == sorted(set(kept))
    assert bpe.indispensable <= set(kept)
    for token in kept:
        assert bpe.parts(token) <= set(kept)
    if size is None:
        assert chosen <= set(kept)
        assert len(kept) % 4 == 0 or len(kept) == 311
    else:
        assert len(kept) == size


def test_every_merged_token_can_be_reached():
    """`parts` follows the library's own merges: each token's text encodes to it alone."""
    bpe, whole = tiny_tokenizer()
    for token in range(256, 304):
        assert whole.encode(whole.decode([token])) == [token]
        kept = choose(bpe, bpe.indispensable, {token: 1}, None)
        assert kept[without(bpe, kept).encode(whole.decode([token]))[0]] == token


def test_frequent_tokens_win_and_the_first_of_the_vocabulary_follow():
    bpe, whole = tiny_tokenizer()
    world = whole.id_of("Ġworld")
    assert world is not None
    must = len(choose(bpe, bpe.indispensable, {}, None))
    assert must == 264  # 263 rounded up by the first merge
    kept = choose(bpe, bpe.indispensable, {world: 5, 303: 1}, 268)
    assert world in kept
    assert 303 not in kept  # five more parts did not fit behind it
    assert 256 in choose(bpe, bpe.indispensable, {}, 264)


SENTENCEPIECE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "</s>",
    },
    "added_tokens": [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, text in enumerate(["<unk>", "<s>", "</s>"])
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
    "post_processor": {
        "type": "Sequence",
        "processors": [
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {
            text: number
            for number, text in enumerate(
                [
                    *("<unk>", "<s>", "</s>"),
                    *(f"<0x{byte:02X}>" for byte in range(256)),
                    *("▁", "h", "e", "l", "o", "w", "he", "ll", "llo", "hello", "▁hello"),
                ]
            )
        },
        "merges": ["h e", "l l", "ll o", "he llo", "▁ hello"],
    },
}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="helow ▁é🙂x") | st.text(), chosen=st.sets(st.integers(0, 269)))
def test_byte_fallback_carries_what_was_dropped(text: str, chosen: set[int]):
    data = json.dumps(SENTENCEPIECE).encode()
    bpe = BpeTokenizer(data)
    tokens = Tokens(bos=1, bos_text="<s>", eos=(2,), eos_text="</s>", add_bos=True)
    whole = Tokenizer.from_bytes(data, tokens)
    kept = choose(bpe, bpe.indispensable, dict.fromkeys(chosen, 1), None)
    new_ids = {old: new for new, old in enumerate(kept)}
    reduced = Tokenizer.from_bytes(bpe.reduce(new_ids), tokens)
    assert reduced.decode(reduced.encode(text)) == whole.decode(whole.encode(text))


def test_ids_in_other_places_of_the_file_move_too():
    bpe = BpeTokenizer(json.dumps(SENTENCEPIECE).encode())
    assert 260 not in bpe.indispensable  # "h": a byte can stand for it
    new_ids = {old: old + 7 for old in range(270)}
    content = json.loads(bpe.reduce(new_ids))
    (template,) = content["post_processor"]["processors"]
    assert template["special_tokens"]["<s>"] == {"id": "<s>", "ids": [8], "tokens": ["<s>"]}
    assert [token["id"] for token in content["added_tokens"]] == [7, 8, 9]
    assert content["padding"]["pad_id"] == 9
    assert content["model"]["merges"] == SENTENCEPIECE["model"]["merges"]


def test_a_word_that_is_looked_up_whole_needs_no_merges():
    """``ignore_merges`` (Llama 3): a word of the vocabulary is one token, whatever the merges."""
    content = json.loads(json.dumps(tiny_tokenizer()[0]._content))
    content["model"]["ignore_merges"] = True
    del content["model"]["vocab"]["Ġwhat"]
    content["model"]["merges"].pop()
    content["model"]["vocab"]["zebra"] = 303
    bpe = BpeTokenizer(json.dumps(content).encode())
    kept = choose(bpe, bpe.indispensable, {303: 1}, None)
    reduced = without(bpe, kept)
    assert [kept[token] for token in reduced.encode("zebra")] == [303]
    assert reduced.decode(reduced.encode("a zebra hello")) == "a zebra hello"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix '##'"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix '</w>'"),
        ({"type": "WordPiece"}, "type 'WordPiece', only BPE"),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be_reduced_are_refused(change: dict[str, str], message: str):
    content = {**SENTENCEPIECE, "model": {**SENTENCEPIECE["model"], **change}}
    with pytest.raises(CheckpointError, match=message):
        BpeTokenizer(json.dumps(content).encode())


def test_ids_that_cannot_be_renumbered_are_refused():
    with pytest.raises(CheckpointError, match="suppress_tokens"):
        reduce_generation_config({"suppress_tokens": [1]}, {1: 0})
    found = reduce_generation_config(
        {"eos_token_id": [5, 3], "pad_token_id": None, "bos_token_id": 5, "top_k": 5}, {3: 0, 5: 1}
    )
    assert found == {"eos_token_id": [1, 0], "pad_token_id": None, "bos_token_id": 1, "top_k": 5}
    content = {**SENTENCEPIECE, "post_processor": {"type": "BertProcessing"}}
    with pytest.raises(CheckpointError, match="BertProcessing"):
        BpeTokenizer(json.dumps(content).encode()).reduce({0: 0, 1: 1, 2: 2})


# ------------------------------------------------------------------------------- the checkpoint


def test_control_tokens_bos_and_eos_stay_and_are_renumbered(source: Path, text_file: Path):
    with open_checkpoint(str(source)) as whole, reduce(source, text_file) as reduced:
        kept = reduced.kept.tolist()
        assert set(CONTROL_IDS.values()) <= set(kept)
        old, new = whole.text.tokens, reduced.text.tokens
        assert [kept[number] for number in new.eos] == list(old.eos)
        assert new.bos is not None
        assert kept[new.bos] == old.bos
        assert kept[reduced.text.generation_config["eos_token_id"]] == EOS_ID
        before, after = tokenizer_of(whole), tokenizer_of(reduced)
        assert {text: kept[number] for text, number in after.control_tokens.items()} == dict(
            before.control_tokens
        )
        chat = [{"role": "user", "content": "hello"}]
        assert whole.text.chat_template is not None
        ids = encode_chat(after, ChatTemplate(whole.text.chat_template, new), chat)
        expected = encode_chat(before, ChatTemplate(whole.text.chat_template, old), chat)
        assert [kept[token] for token in ids] == expected


def test_tokens_of_the_template_stay(tmp_path: Path, text_file: Path):
    directory = write_checkpoint(tmp_path / "model", "qwen2")
    (directory / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "the other and{{ messages[0]['content'] }}"
    )
    (tmp_path / "x.txt").write_text("x")
    with reduce(directory, tmp_path / "x.txt") as reduced, open_checkpoint(str(directory)) as whole:
        tokenizer = tokenizer_of(whole)
        assert set(tokenizer.encode("the other and")) <= set(reduced.kept.tolist())
        assert set(tokenizer.encode(" what")) - set(reduced.kept.tolist())


@pytest.mark.parametrize("tied", [False, True])
def test_kept_tokens_keep_their_logits(tmp_path: Path, text_file: Path, tied: bool):
    kind: Any = "llama" if tied else "qwen2"
    source = write_checkpoint(tmp_path / "model", kind, tie_word_embeddings=tied)
    whole = export(source, tmp_path / "whole")
    reduced = export(source, tmp_path / "reduced", vocab_keep=text_file)
    kept = np.array(json.loads((tmp_path / "reduced" / VOCABULARY_NAME).read_bytes()))
    assert reduced.vocabulary is not None
    assert reduced.model.vocab_size == reduced.vocabulary.size == len(kept) < 311
    assert reduced.vocabulary.original_size == whole.model.vocab_size == 320
    assert reduced.model.tied_embeddings == tied
    verify_files(tmp_path / "reduced", reduced)
    with LLM(tmp_path / "whole", num_threads=1) as llm:
        ids = np.array(llm.tokenizer.encode(TEXT))
        expected = logits(llm, ids)
    with LLM(tmp_path / "reduced", num_threads=1) as llm:
        new = np.array(llm.tokenizer.encode(TEXT))
        np.testing.assert_array_equal(kept[new], ids)
        found = logits(llm, new)
    assert_close(found, expected[:, kept], atol=1e-6, what="logits of kept tokens")


def test_the_list_in_the_bundle_makes_the_same_bundle(
    source: Path, text_file: Path, tmp_path: Path
):
    first = export(source, tmp_path / "first", vocab_keep=text_file, quant="int4", group_size=32)
    again = export(
        source,
        tmp_path / "again",
        vocab_keep=tmp_path / "first" / VOCABULARY_NAME,
        quant="int4",
        group_size=32,
    )
    assert first.files == again.files
    assert again.vocabulary is not None
    assert again.vocabulary.file == VOCABULARY_NAME
    assert again.vocabulary.text_tokens is None


def test_calibrated_and_rotated_with_a_reduced_vocabulary(
    source: Path, text_file: Path, tmp_path: Path
):
    manifest = export(
        source,
        tmp_path / "bundle",
        vocab_keep=text_file,
        quant="int8-w8a8",
        calibration_tokens=512,
    )
    assert manifest.quantization.calibration is not None
    with LLM(tmp_path / "bundle", num_threads=1) as llm:
        assert llm.generate(TEXT).finish_reason in ("length", "stop")


def test_documents_of_jsonl_count_like_calibration(source: Path, tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": " world"}]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "hello"}))
    with reduce(source, path) as reduced, open_checkpoint(str(source)) as whole:
        tokenizer = tokenizer_of(whole)
        for word in ("hello", " world"):
            assert set(tokenizer.encode(word)) <= set(reduced.kept.tolist())
        assert reduced.vocabulary.text_tokens == reduced.vocabulary.text_tokens_original


def test_a_size_costs_tokens_and_the_manifest_says_how_many(
    source: Path, text_file: Path, tmp_path: Path
):
    output = tmp_path / "bundle"
    arguments = [str(source), "-o", str(output), "--vocab-keep", str(text_file)]
    arguments += ["--vocab-size", "268", "--method", "rtn", "--no-verify"]
    result = CliRunner().invoke(export_verb, arguments)
    assert result.exit_code == 0, result.output
    found = read_manifest(output).vocabulary
    assert found is not None
    assert (found.size, found.original_size, found.file) == (268, 320, "deployment.txt")
    assert found.text_tokens is not None
    assert found.text_tokens_original is not None
    assert found.text_tokens > found.text_tokens_original
    assert (
        f"vocabulary: 268 of 320 tokens; deployment.txt takes {found.text_tokens} of them, "
        f"{found.text_tokens_original} before" in result.stdout
    )
    assert str(tmp_path) not in (output / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("name", "content", "size", "message"),
    [
        ("ids.json", "{", None, "is no JSON list of token ids"),
        ("ids.json", '["a"]', None, "is no JSON list of token ids"),
        ("ids.json", "[1.5]", None, "is no JSON list of token ids"),
        ("ids.json", "[]", None, "is an empty list"),
        ("ids.json", "[320]", None, "has the id 320, the model's end at 319"),
        ("ids.json", "[-1]", None, "has the id -1"),
        ("ids.json", "[" + 40 * "9" + "]", None, "has the id 9{30}, the model's end at 319"),
        ("ids.json", "[true]", None, "is no JSON list of token ids"),
        ("ids.json", "\ufeff[1]", None, "is no JSON list of token ids"),
        ("ids.json", "[315]", None, "has the id 315, which no token of the tokenizer has"),
        ("ids.json", "[1]", 268, "--vocab-size 268 has no effect with a list"),
        ("text.txt", "", None, "--vocab-keep .*text.txt is empty"),
        ("text.jsonl", "{}", None, "--vocab-keep .*line 1 must be"),
        ("text.jsonl", r'{"text": "\ud800"}', None, "document 1 of the text text.jsonl: .* lone"),
        (
            "text.jsonl",
            '{"text": "a"}\n{"messages": [{"content": "a"}]}',
            None,
            r"document 2 of the text text\.jsonl: messages\[0\]\.role: must be one of",
        ),
        ("text.txt", "hello", 267, "must be a multiple of 4 and less than the 320"),
        ("text.txt", "hello", 320, "must be a multiple of 4 and less than the 320"),
        ("text.txt", "hello", 128, "is too small: .* alone take 263; give at least 264"),
    ],
    ids=str,
)
def test_files_and_sizes_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, name: str, content: str, size: int | None, message: str
):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        reduce(source, path, size)


def test_ids_that_occur_twice_count_once_and_a_byte_order_mark_is_no_text(
    source: Path, tmp_path: Path
):
    kept = {}
    for name, content in (("a.json", "[7, 9]"), ("b.json", "[9, 7, 9]")):
        (tmp_path / name).write_text(content)
        kept[name] = reduce(source, tmp_path / name).kept.tolist()
    assert kept["a.json"] == kept["b.json"]
    for name, mark in (("a.jsonl", ""), ("b.jsonl", "\ufeff")):
        (tmp_path / name).write_text(mark + '{"text": "hello"}', encoding="utf-8")
        kept[name] = reduce(source, tmp_path / name).kept.tolist()
    assert kept["a.jsonl"] == kept["b.jsonl"]


@pytest.mark.parametrize("value", [-1, 320, "x", True, 1.5, [1, [2]]], ids=str)
def test_a_generation_config_that_names_no_token_is_refused(
    value: Any, source: Path, text_file: Path, tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": value}))
    with pytest.raises(CheckpointError, match=r"pad_token_id is .*, no id of the 320 tokens"):
        reduce(copy, text_file)


def test_missing_files_and_a_size_alone_are_refused(source: Path, tmp_path: Path):
    for name in ("absent.json", "absent.txt"):
        with pytest.raises(ConfigError, match=f"--vocab-keep .*{name} cannot be read"):
            read_keep_list(tmp_path / name)
    with pytest.raises(ConfigError, match="--vocab-size 64 needs --vocab-keep FILE"):
        ExportConfig(source=str(source), output=tmp_path / "bundle", vocab_size=64)


# ------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return smollm2_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2_reduced(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("keep") / "prose.txt"
    path.write_text(PROSE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "MULTIPLE", 64)
        with open_checkpoint(str(smollm2)) as whole:
            reduced = ReducedCheckpoint(open_checkpoint(str(smollm2)), path, 4096)
            yield tokenizer_of(whole), tokenizer_of(reduced), reduced.kept
            reduced.close()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=words | st.text())
def test_any_text_goes_through_a_real_tokenizer(smollm2_reduced: Any, text: str):
    whole, reduced, kept = smollm2_reduced
    old = whole.encode(text)
    # As far as the original goes: it has no tokens for some bytes of rare characters.
    assert reduced.decode(reduced.encode(text)) == whole.decode(old)
    if set(old) <= set(kept.tolist()):
        assert kept[reduced.encode(text)].tolist() == old


def test_a_real_text_keeps_its_tokens(smollm2_reduced: Any):
    whole, reduced, kept = smollm2_reduced
    assert len(kept) == 4096
    assert kept[reduced.encode(PROSE)].tolist() == whole.encode(PROSE)


@pytest.mark.slow
@pytest.mark.once
def test_smollm2_keeps_its_logits_in_fewer_bytes(
    smollm2: Path, smollm2_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vocabulary, "MULTIPLE", 64)
    keep = tmp_path / "prose.txt"
    keep.write_text(PROSE)
    options: dict[str, Any] = {"dialect": RUNNABLE, "vocab_keep": keep, "vocab_size": 4096}
    whole = read_manifest(smollm2_bundle)
    reduced = export(smollm2, tmp_path / "reduced", **options)
    with LLM(smollm2_bundle, kv_capacity=128) as llm:
        ids = np.array(llm.tokenizer.encode(PROSE))
        expected = logits(llm, ids)
    with LLM(tmp_path / "reduced", kv_capacity=128) as llm:
        new = np.array(llm.tokenizer.encode(PROSE))
        found = logits(llm, new)
    kept = np.array(json.loads((tmp_path / "reduced" / VOCABULARY_NAME).read_bytes()))
    np.testing.assert_array_equal(kept[new], ids)
    # Sums of 576 products in another order; logits reach 30.
    assert_close(found, expected[:, kept], atol=1e-4, what="logits of kept tokens")
    dropped = (whole.model.vocab_size - 4096) * whole.model.hidden_size
    saved = total(whole) - total(reduced)
    assert saved > 4 * dropped  # an fp16 row of each table
    # Any integers take as many bytes, so nobody looks for the best ones.
    int4 = export(smollm2, tmp_path / "int4", quant="int4", clip="absmax", **options)
    head = int4.quantization.linears["lm_head"]
    assert head.shape == (576, 4096)
    assert total(int4) < 0.5 * total(reduced)


def export(source: Path, output: Path, **options: Any) -> Manifest:
    values = {"quant": "fp16", "dialect": "portable", "kv_capacity": 64, **options}
    values.setdefault("method", "rtn")
    return export_checkpoint(ExportConfig(source=str(source), output=output, **values))


def logits(llm: LLM, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    [(_, found)] = prefill(llm.backend, llm.embeddings, ids, wanted=all_tokens)
    return np.array(found)


def total(manifest: Manifest) -> int:
    return sum(file.num_bytes for file in manifest.files.values())

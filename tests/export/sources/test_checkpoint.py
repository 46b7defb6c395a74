"""Checkpoint directories: every weight bit for bit, every fault by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.library import CATALOGUE
from edge.bundle.manifest import SamplingDefaults
from edge.errors import CheckpointError, ConfigError
from edge_make.checkpoint_tensors import expected_tensors
from edge_make.published import REVISIONS
from export.pipeline import ExportConfig, export_checkpoint
from export.sources.checkpoint import Checkpoint
from export.sources.checkpoint_text import read_licence, sampling_defaults
from export.sources.opening import Hub, open_checkpoint
from export.sources.safetensors_file import SafetensorsFile
from tests.makers import tiny_models as tiny
from tests.makers.dense import dense

NUMPY_TYPE = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("hf") / "tiny-qwen2", "qwen2")


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny-qwen2"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... removes one."""
    values = {**(json.loads(path.read_bytes()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def read_weights(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_weights(path: Path, header: Any, data: bytes) -> None:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def add_tensor(directory: Path, name: str, dtype: str, shape: list[int], content: bytes) -> None:
    header, data = read_weights(directory / "model.safetensors")
    offsets = [len(data), len(data) + len(content)]
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    write_weights(directory / "model.safetensors", header, data + content)


# 1.5 / 0.75 of the tiny Granite's multipliers, and what undoes it for the tied head.
GRANITE = {"model.embed_tokens.weight": 2.0, "model.norm.weight": 1 / (0.9 * 2)}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_weight_bit_for_bit(kind, dtype, num_shards, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, kind, dtype=dtype, num_shards=num_shards)
    weights = tiny.make_weights(json.loads((tmp_path / "config.json").read_bytes()), seed=2)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.spec.architecture == kind
        assert expected_tensors(checkpoint.spec).keys() == weights.keys()
        for name, weight in weights.items():
            found = checkpoint.tensor(name)
            if name in checkpoint.changed:
                np.testing.assert_array_equal(found, weight * np.float32(GRANITE[name]))
                continue
            assert found.dtype == NUMPY_TYPE[dtype]
            np.testing.assert_array_equal(found.astype(np.float32), weight)


def test_tensors_are_views_that_outlive_the_checkpoint(pristine: Path) -> None:
    with open_checkpoint(str(pristine)) as checkpoint:
        table = checkpoint.tensor("model.embed_tokens.weight")
        assert not table.flags.owndata
        assert not table.flags.writeable
        before = table.copy()
    np.testing.assert_array_equal(table, before)
    with pytest.raises(CheckpointError, match="or it was closed"):
        checkpoint.tensor("model.embed_tokens.weight")


def test_text_and_tokens(pristine: Path) -> None:
    checkpoint: Checkpoint
    with open_checkpoint(str(pristine)) as checkpoint:
        text = checkpoint.text
    assert checkpoint.name == "tiny-qwen2"
    assert text.tokenizer_json == (pristine / "tokenizer.json").read_bytes()
    assert text.chat_template == tiny.CHAT_TEMPLATE
    # config.json says that bos is the eos id; the tokenizer knows better.
    assert (text.tokens.bos, text.tokens.bos_text) == (tiny.BOS_ID, tiny.BOS)
    assert (text.tokens.eos, text.tokens.eos_text) == ((tiny.EOS_ID,), tiny.EOS)
    assert text.tokens.add_bos
    assert text.sampling == SamplingDefaults(temperature=0.6, top_p=0.95)
    assert text.generation_config["do_sample"] is True


def test_source_is_what_sha256sum_says(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "m", "llama", num_shards=2)
    (tmp_path / "m" / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    with open_checkpoint(str(tmp_path / "m")) as checkpoint:
        source = checkpoint.source
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted((tmp_path / "m").glob("*.safetensors"))
    )
    assert lines.count("\n") == 2
    assert source.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert (source.kind, source.location, source.licence) == ("directory", "m", "mit")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: 'apache-2.0' # sic\n---\ntext", "apache-2.0"),
        ("---\r\nlicense: other\r\nlicense_name: llama3\r\n---\r\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("license: mit\n", None),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
    ],
)
def test_licence_of_the_model_card(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert read_licence(tmp_path) == licence


def test_a_model_card_is_not_read_whole(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(b"---\nlicense: mit\n---\n")
    os.truncate(card, 1 << 25)  # sparse
    tracemalloc.start()
    try:
        assert read_licence(tmp_path) == "mit"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    card.unlink()
    os.mkfifo(card)  # nobody will ever write into it
    assert read_licence(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("generation_config.json", {"eos_token_id": [5, tiny.EOS_ID]}, (5, tiny.EOS_ID)),
        ("generation_config.json", {"eos_token_id": 5}, (5, tiny.EOS_ID)),
        ("generation_config.json", {"eos_token_id": ...}, (tiny.EOS_ID,)),
        ("tokenizer_config.json", {"eos_token": "<|EOT|>"}, (tiny.EOS_ID, 308)),
        ("tokenizer_config.json", {"eos_token": {"content": "<|EOT|>"}}, (tiny.EOS_ID, 308)),
    ],
)
def test_eos_is_the_union(file, changes, expected, directory: Path) -> None:
    edit(directory / file, **changes)
    with open_checkpoint(str(directory)) as checkpoint:
        assert checkpoint.text.tokens.eos == expected


def test_without_generation_config_the_eos_of_config_json_counts(directory: Path) -> None:
    (directory / "generation_config.json").unlink()
    edit(directory / "tokenizer_config.json", eos_token=...)
    edit(directory / "config.json", eos_token_id=308)
    with open_checkpoint(str(directory)) as checkpoint:
        assert checkpoint.text.tokens.eos == (308,)
        assert checkpoint.text.tokens.eos_text == "<|EOT|>"
        assert checkpoint.text.sampling.assumed == "DeepSeek-R1"
    edit(directory / "config.json", eos_token_id=...)
    with pytest.raises(CheckpointError, match="no token that ends an answer"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("flag", "in_post_processor", "add_bos"),
    [(True, False, True), (False, True, False), (..., True, True), (..., False, False)],
)
def test_add_bos(flag, in_post_processor, add_bos, directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_bytes())
    template = tokenizer["post_processor"]
    byte_level = {"type": "ByteLevel", "trim_offsets": False, "add_prefix_space": False}
    # Llama 3 wraps its template into a sequence.
    nested = {"type": "Sequence", "processors": [byte_level, template]}
    edit(directory / "tokenizer.json", post_processor=nested if in_post_processor else byte_level)
    edit(directory / "tokenizer_config.json", add_bos_token=flag)
    with open_checkpoint(str(directory)) as checkpoint:
        assert checkpoint.text.tokens.add_bos is add_bos


def test_a_model_without_bos(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", bos_token=None)
    with open_checkpoint(str(directory)) as checkpoint:
        tokens = checkpoint.text.tokens
    assert (tokens.bos, tokens.bos_text, tokens.add_bos) == (None, "", False)


def test_chat_template_sources_in_order(directory: Path) -> None:
    def found() -> str | None:
        with open_checkpoint(str(directory)) as checkpoint:
            return checkpoint.text.chat_template

    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (directory / "chat_template.jinja").write_text("J", encoding="utf-8")
    edit(directory / "chat_template.json", chat_template="C")
    edit(directory / "tokenizer_config.json", chat_template=named)
    assert found() == "J"
    (directory / "chat_template.jinja").unlink()
    assert found() == "D"
    edit(directory / "tokenizer_config.json", chat_template=...)
    assert found() == "C"
    (directory / "chat_template.json").unlink()
    assert found() is None
    edit(directory / "tokenizer_config.json", chat_template=named[:1])
    with pytest.raises(CheckpointError, match=r"none .* named 'default', found \['rag'\]"):
        found()


def test_sampling_takes_what_is_stated_only() -> None:
    assert sampling_defaults({"do_sample": False}, "g") == SamplingDefaults()
    stated = {"temperature": 0, "top_k": -1, "top_p": None, "min_p": 0.1, "repetition_penalty": 2}
    assert sampling_defaults(stated, "g") == SamplingDefaults(
        temperature=0.0, top_k=0, min_p=0.1, repetition_penalty=2.0
    )
    for key, value in [("top_p", 1.5), ("temperature", "hot"), ("top_k", 2.5), ("min_p", True)]:
        with pytest.raises(CheckpointError, match=f"g: {key}"):
            sampling_defaults({key: value}, "g")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.py"}}, "config.json: auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "x"}}, "tokenizer_config.json: a"),
        ("tokenizer_config.json", {"bos_token": "<s>"}, "bos_token '<s>' is not in tokenizer.json"),
        ("config.json", {"vocab_size": 300}, "token id 310 .*, but vocab_size"),
        ("generation_config.json", {"eos_token_id": [999]}, "eos_token_id must be"),
        ("tokenizer.json", {"model": ...}, r"no model\.vocab"),
        ("tokenizer.json", {"added_tokens": [{"content": "x"}]}, "no text or no integer id"),
        ("tokenizer.json", {"added_tokens": [{"id": 1, "content": []}]}, "no text or no integer"),
        ("tokenizer.json", {"model": {"vocab": [[[], 0]]}}, "no text or no integer id"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": [], "template": "x"}]},
            r"named 'default', found \['\[\]'\]",
        ),
        # Shapes and names against config.json.
        (
            "config.json",
            {"intermediate_size": 120},
            r"0\.mlp\.gate_proj\.weight has shape \[128, 64\], config.json says \[120, 64\]",
        ),
        ("config.json", {"num_hidden_layers": 3}, r"no tensor model\.layers\.2\.input_layernorm"),
        ("config.json", {"num_hidden_layers": 1}, r"tensor model\.layers\.1\..* is not part of"),
        (
            "config.json",
            {"architectures": ["LlamaForCausalLM"]},
            r"k_proj\.bias is not part of llama .* where attention_bias is true; elsewhere",
        ),
        ("config.json", {"tie_word_embeddings": True}, r"lm_head\.weight differs"),
    ],
)
def test_what_is_refused_is_named(file, changes, words, directory: Path) -> None:
    edit(directory / file, **changes)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(directory))


def test_qwen2_under_a_config_that_says_attention_bias(directory: Path) -> None:
    edit(directory / "config.json", attention_bias=True)
    with open_checkpoint(str(directory)) as checkpoint:
        assert dense(checkpoint.spec).qkv_bias
    name = "model.layers.1.self_attn.o_proj.bias"
    add_tensor(directory, name, "BF16", [64], b"\x80\x3f" * 64)
    words = rf"tensor {name} is not part .* found BF16 \[64\].* biases are read of q, k and v"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(directory))


def test_qwen2_saved_as_llama_is_the_same_model(directory: Path, tmp_path: Path) -> None:
    """Such files have a bias of o that is 0, as the class makes one."""
    graphs = []
    for name in ("qwen2", "llama"):
        if name == "llama":
            edit(directory / "config.json", architectures=["LlamaForCausalLM"], attention_bias=True)
            for layer in range(2):
                bias = f"model.layers.{layer}.self_attn.o_proj.bias"
                add_tensor(directory, bias, "BF16", [64], bytes(128))
        output = tmp_path / name
        export_checkpoint(ExportConfig(source=str(directory), output=output, quant="fp16"))
        graphs.append([(output / f"decoder.onnx{end}").read_bytes() for end in ("", ".data")])
    assert graphs[0] == graphs[1]


def test_a_llama_without_the_biases_that_its_config_names(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "llama", attention_bias=True)
    words = r"no tensor .*q_proj\.bias, expected \[64\] since attention_bias in config.json is true"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(tmp_path))


def test_missing_files(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled .* never opened"):
        open_checkpoint(str(directory))
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no .*index\.json"):
        open_checkpoint(str(directory))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; make one"):
        open_checkpoint(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        open_checkpoint(str(directory))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3554214752\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "is a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"\r\n<!DOCTYPE html>\n<html><title>Log in</title>", "is a web page"),
        (b"\xef\xbb\xbf<HTML lang=en>", "is a web page"),
    ],
)
def test_a_pointer_or_web_page_in_place_of_a_file_is_named(
    directory: Path, name: str, content: bytes, words: str
) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} {words}"):
        open_checkpoint(str(directory))


def test_a_download_that_was_cut_off_after_the_config(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != "config.json":
            path.unlink()
    with pytest.raises(CheckpointError, match="no file of a tokenizer: the download is incomplete"):
        open_checkpoint(str(directory))
    (directory / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; make one"):
        open_checkpoint(str(directory))


def test_harmless_surplus(directory: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    add_tensor(directory, name, "F32", [8], bytes(32))
    with open_checkpoint(str(directory)) as checkpoint:
        assert name not in expected_tensors(checkpoint.spec)
    add_tensor(directory, "model.layers.0.extra", "F32", [8], bytes(32))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.extra is not part of qwen2"):
        open_checkpoint(str(directory))


def test_a_tied_head_may_be_stored_if_it_is_the_same(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    header, data = read_weights(tmp_path / "model.safetensors")
    entry = header["model.embed_tokens.weight"]
    table = bytearray(data[slice(*entry["data_offsets"])])
    add_tensor(tmp_path, "lm_head.weight", "BF16", entry["shape"], bytes(table))
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.spec.tied_embeddings
    write_weights(tmp_path / "model.safetensors", header, data)
    table[-1] ^= 1
    add_tensor(tmp_path, "lm_head.weight", "BF16", entry["shape"], bytes(table))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        open_checkpoint(str(tmp_path))


def test_shards(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "llama", num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_bytes())["weight_map"]
    first = next(iter(good))
    for shard in ("../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", 3):
        edit(index, weight_map={**good, first: shard})
        with pytest.raises(CheckpointError, match="expected the plain name") as caught:
            open_checkpoint(str(tmp_path))
        assert first in str(caught.value)
    for changed, words in [
        ({name: shard for name, shard in good.items() if name != first}, "in the file only"),
        ({**good, "ghost": good[first]}, "tensor ghost is in the index only"),
        ({**good, first: "model-9.safetensors"}, r"has no model-9\.safetensors"),
    ]:
        edit(index, weight_map=changed)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(str(tmp_path))
    edit(index, weight_map=...)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(str(tmp_path))


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":1,"a":2}', "a key occurs twice"),
        (b"[]", "no JSON object"),
        ({"a": {**GOOD, "data_offsets": [0, 12]}}, "needs 8 bytes"),
        ({"a": {**GOOD, "data_offsets": [8, 16]}}, "begins at byte"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "data_offsets"),
        ({"a": {**GOOD, "shape": [-2]}}, "has shape"),
        ({"a": {**GOOD, "shape": [2.0]}}, "has shape"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "has shape"),
        ({"a": {**GOOD, "dtype": "F8_E4M3"}}, "tensor a has type 'F8_E4M3', expected one of"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "no dtype, shape and data_offsets"),
        ({"a": GOOD, "b": GOOD}, "tensor b begins at byte"),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}}, "tensors end at byte"),
        ({"a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}}, "tensors end at byte"),
    ],
)
def test_safetensors_headers_that_lie(header: Any, words: str, tmp_path: Path) -> None:
    write_weights(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 8, (9).to_bytes(8, "little") + b"{}"]
)
def test_safetensors_files_without_a_header(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        SafetensorsFile(tmp_path / "x.safetensors")


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["float32", "float16"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_reads_what_the_safetensors_library_writes(tmp_path_factory, tensors) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=shape).astype(dtype) for name, (dtype, shape) in tensors.items()
    }
    numpy.save_file(arrays, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.entries.keys() == arrays.keys()
    for name, array in arrays.items():
        found = file.tensor(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damaged_safetensors_are_refused(pristine: Path, tmp_path_factory, data) -> None:
    content = bytearray((pristine / "model.safetensors").read_bytes()[:9000])
    for position in data.draw(st.lists(st.integers(0, 4000), max_size=4)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        SafetensorsFile(path)


def test_sources_that_are_none(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no directory, no \.gguf file and no hub id"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="give the checkpoint's directory"):
        open_checkpoint(str(directory / "model.safetensors"))
    with pytest.raises(ConfigError, match="--revision is for hub ids"):
        open_checkpoint(str(directory), revision="main")
    with pytest.raises(ConfigError, match="--cache-dir is for hub ids"):
        open_checkpoint(str(directory), cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "hub", "revision", "expected"),
    [
        ("r1-qwen-7b", "huggingface", None, REVISIONS[CATALOGUE["deepseek-r1:7b"]]),
        ("deepseek-r1:7b", None, "main", "main"),
        ("7b", "modelscope", None, None),  # which has commits of its own
        (CATALOGUE["deepseek-r1:7b"], None, None, None),
    ],
)
def test_a_name_of_a_model_means_one_commit(
    source: str,
    hub: Hub | None,
    revision: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(source: str, revision: str | None, *_: object) -> None:
        asked.append((source, revision))
        raise CheckpointError("enough")

    monkeypatch.delenv("EDGE_LLM_HUB", raising=False)
    monkeypatch.setattr("export.sources.opening.download", download)
    monkeypatch.setattr("export.sources.modelscope.download", download)
    with pytest.raises(CheckpointError, match="enough"):
        open_checkpoint(source, revision=revision, hub=hub)
    assert asked == [(CATALOGUE["deepseek-r1:7b"], expected)]


def test_a_wrong_name_of_a_model_says_the_nearest() -> None:
    with pytest.raises(CheckpointError, match=r"did you mean deepseek-r1:1\.5b\?"):
        open_checkpoint("deepsek-r1:1.5b")
    with pytest.raises(CheckpointError, match=r"Gemma 3 needs .*: edge-llm pull qwen3:4b"):
        open_checkpoint("gemma3:4b")
    with pytest.raises(ConfigError, match="'8b' could be"):
        open_checkpoint("8b")

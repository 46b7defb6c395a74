"""Rivals' files: all from one float file, an adapter merged where it is asked for, bits counted."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edge.text.chat_template import ChatTemplate
from edge.text.tokenizer import Tokenizer
from export.sources.documents import BUILT_IN_TOKENS, calibration_batches, read_calibration_text
from export.sources.lora import LoraCheckpoint
from export.sources.opening import open_checkpoint
from tests.export.sources.test_gguf import write_tiny
from tests.makers.tiny_adapters import CASES, write_adapter
from tests.makers.tiny_models import Kind

from . import gguf_rivals
from .gguf_rivals import file_bits, quantize_command, write_calibration_text, write_floats

pytestmark = pytest.mark.once
LINEARS = CASES["qwen2 all linears"].config


def write_source(path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "tiny")
    for name, kind, *shape in (
        ("token_embd.weight", "Q8_0", 32, 64),
        ("blk.0.attn_norm.weight", "F32", 64),
        ("blk.0.attn_q.weight", "Q4_0", 64, 64),
        ("blk.0.attn_q.bias", "F32", 64),
        ("blk.0.ffn_down.weight", "F16", 64, 32),
    ):
        stored = gguf.GGMLQuantizationType[kind]
        values = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_float_file_with_an_adapter_is_the_merged_model(kind: Kind, tmp_path: Path):
    """Of ``llama`` too, where the file has q's and k's rows in an order of its own."""
    source = write_tiny(tmp_path, kind, ggml_type="Q8_0")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "hf", LINEARS)
    moved = write_floats(source, tmp_path / "merged.gguf", adapter)
    assert moved is not None
    assert moved > 0
    changed = 0
    with (
        open_checkpoint(str(source)) as base,
        open_checkpoint(str(tmp_path / "merged.gguf")) as found,
    ):
        merged = LoraCheckpoint(base, adapter)
        for name in found._gguf_names:  # type: ignore[attr-defined]
            expected = merged.tensor(name).astype(np.float16)
            np.testing.assert_array_equal(found.tensor(name).astype(np.float16), expected, name)
            changed += not np.array_equal(expected, base.tensor(name).astype(np.float16))
    assert changed == 2 * 7  # every linear of two layers


def test_without_an_adapter_it_has_the_sources_weights(tmp_path: Path):
    source = write_tiny(tmp_path, "qwen2", {"general.file_type": 7}, ggml_type="Q8_0")
    output = tmp_path / "floats.gguf"
    assert write_floats(source, output) is None
    for mine, old in zip(
        gguf.GGUFReader(output).tensors, gguf.GGUFReader(source).tensors, strict=True
    ):
        assert mine.name == old.name
        wanted = gguf.quants.dequantize(old.data, old.tensor_type)
        if len(old.shape) == 2:
            assert mine.tensor_type == gguf.GGMLQuantizationType.F16
            wanted = wanted.astype(np.float16)
        np.testing.assert_array_equal(mine.data, wanted)
    kind = gguf.GGUFReader(output).fields["general.file_type"].contents()
    assert kind == gguf.LlamaFileType.MOSTLY_F16


def test_how_far_weights_move_is_told_in_steps_of_their_grid():
    moved = gguf_rivals._Moved()
    grid = np.tile(np.arange(16, dtype=np.float32), (4, 2))  # from 0 to 15: a step is 1
    moved.add(grid * 0.25, np.full_like(grid, 0.125))
    assert moved.steps == pytest.approx(0.5)
    moved.add(grid * 8, np.zeros_like(grid))
    assert moved.steps == pytest.approx((0.25 / 2) ** 0.5)


def test_bits_are_counted_in_the_file(tmp_path: Path):
    write_source(tmp_path / "source.gguf")
    bits = file_bits(tmp_path / "source.gguf")
    layers = 64 * 64 * 4.5 + 64 * 32 * 16
    assert bits.layers == pytest.approx(layers / (64 * 64 + 64 * 32))
    head = 32 * 64  # the token table, which is the head where there is no other
    assert bits.with_lm_head == pytest.approx((layers + head * 8.5) / (64 * 96 + head))
    assert bits.types == {"Q4_0": 1, "F16": 1}


def test_a_matrix_is_given_where_the_name_says_so():
    place = Path("bin"), Path("floats"), Path("out")
    for rival in gguf_rivals.RIVALS:
        command = list(map(str, quantize_command(*place, rival, Path("matrix"), 3)))
        assert command[-4:] == ["floats", "out", rival.removesuffix("+imatrix"), "3"]
        assert ("matrix" in command) == rival.endswith("+imatrix")


def test_the_matrix_sees_as_much_of_the_same_text_as_int4(tmp_path: Path):
    source = write_tiny(tmp_path, "qwen2")
    tokens = write_calibration_text(source, tmp_path / "text.txt")
    with open_checkpoint(str(source)) as checkpoint:
        text = checkpoint.text
    tokenizer = Tokenizer.from_bytes(text.tokenizer_json, text.tokens)
    template = ChatTemplate(text.chat_template, text.tokens) if text.chat_template else None
    mixed = read_calibration_text(None, mixed=True)
    ids = calibration_batches(tokenizer, template, mixed, BUILT_IN_TOKENS)
    body = ids[:, 1:] if text.tokens.add_bos else ids
    assert tokens == body.size > 1000
    assert (tmp_path / "text.txt").read_text("utf-8") == tokenizer.decode(body.reshape(-1).tolist())

"""A rival's file: the same model with its linear layers in another type, all else as it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from scripts.gguf_rivals import bits_per_weight, requantize

pytestmark = pytest.mark.once


def write_source(path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    for name, kind, *shape in (
        ("token_embd.weight", "Q8_0", 3, 64),
        ("blk.0.attn_norm.weight", "F32", 64),
        ("blk.0.attn_q.weight", "Q4_1", 64, 64),
        ("blk.0.attn_q.bias", "F32", 64),
        ("blk.0.ffn_down.weight", "F16", 64, 96),
        ("blk.1.ffn_gate.weight", "Q8_0", 96, 64),
        ("output.weight", "F16", 3, 64),
    ):
        stored = gguf.GGMLQuantizationType[kind]
        values = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_linear_layers_are_requantized_and_all_else_is_copied(tmp_path: Path):
    source, output = tmp_path / "source.gguf", tmp_path / "q4_0.gguf"
    write_source(source)
    requantize(source, output, "Q4_0")
    ours, theirs = gguf.GGUFReader(output), gguf.GGUFReader(source)
    counted = {"GGUF.kv_count", "GGUF.tensor_count", "GGUF.version"}
    assert {n: f.contents() for n, f in ours.fields.items() if n not in counted} == {
        n: f.contents() for n, f in theirs.fields.items() if n not in counted
    }
    changed = []
    for mine, old in zip(ours.tensors, theirs.tensors, strict=True):
        assert mine.name == old.name
        assert list(mine.shape) == list(old.shape)
        if mine.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            changed.append(mine.name)
            before = gguf.quants.dequantize(old.data, old.tensor_type)
            after = gguf.quants.dequantize(mine.data, mine.tensor_type)
            error = np.linalg.norm(after - before) / np.linalg.norm(before)
            assert 0.01 < error < 0.15, mine.name
        else:
            assert mine.tensor_type == old.tensor_type
            np.testing.assert_array_equal(mine.data, old.data)
    assert changed == [f"blk.{x}.weight" for x in ("0.attn_q", "0.ffn_down", "1.ffn_gate")]
    assert not list(tmp_path.glob("*.part"))


def test_types_without_a_quantizer_are_refused(tmp_path: Path):
    for name in ("Q4_K", "Q9_9"):
        with pytest.raises(SystemExit, match=f"no quantizer for {name}"):
            requantize(tmp_path / "source.gguf", tmp_path / "out.gguf", name)
    assert not list(tmp_path.iterdir())


def test_bits_by_hand():
    assert bits_per_weight("Q4_0") == (16 + 2) * 8 / 32
    assert bits_per_weight("Q8_0") == (32 + 2) * 8 / 32

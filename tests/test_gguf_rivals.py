"""A rival's file: the same model with its linear layers in another type, all else as it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from scripts.gguf_rivals import bits_per_weight, requantize
from tests.conftest import SMOLLM2_LAYERS

pytestmark = pytest.mark.once


def test_linear_layers_are_requantized_and_all_else_is_copied(short_smollm2: Path, tmp_path: Path):
    source, output = short_smollm2, tmp_path / "q4_0.gguf"
    requantize(source, output, "Q4_0")
    ours, theirs = gguf.GGUFReader(output), gguf.GGUFReader(source)
    counted = {"GGUF.kv_count", "GGUF.tensor_count", "GGUF.version"}
    assert {n: f.contents() for n, f in ours.fields.items() if n not in counted} == {
        n: f.contents() for n, f in theirs.fields.items() if n not in counted
    }
    changed = 0
    for mine, old in zip(ours.tensors, theirs.tensors, strict=True):
        assert mine.name == old.name
        assert list(mine.shape) == list(old.shape)
        if mine.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            changed += 1
            if changed > 3:
                continue
            before = gguf.quants.dequantize(old.data, old.tensor_type)
            after = gguf.quants.dequantize(mine.data, mine.tensor_type)
            error = np.linalg.norm(after - before) / np.linalg.norm(before)
            assert 0.01 < error < 0.15, mine.name
        else:
            assert mine.tensor_type == old.tensor_type
            np.testing.assert_array_equal(mine.data, old.data)
    assert changed == 7 * SMOLLM2_LAYERS  # q, k, v, o, gate, up and down of each layer
    assert not list(tmp_path.glob("*.part"))


def test_types_without_a_quantizer_are_refused(tmp_path: Path):
    for name in ("Q4_K", "Q9_9"):
        with pytest.raises(SystemExit, match=f"no quantizer for {name}"):
            requantize(tmp_path / "source.gguf", tmp_path / "out.gguf", name)
    assert not list(tmp_path.iterdir())


def test_bits_by_hand():
    assert bits_per_weight("Q4_0") == (16 + 2) * 8 / 32
    assert bits_per_weight("Q8_0") == (32 + 2) * 8 / 32

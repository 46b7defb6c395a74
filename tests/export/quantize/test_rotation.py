"""Rotations and folded factors change every weight and not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle.io_spec import EMBEDDINGS_NAME
from edge.bundle.manifest import Manifest
from edge.errors import CheckpointError
from edge.model.parts import Add, AnyPart, Norm
from edge.model.spec import Task
from edge_make.checkpoint_tensors import expected_tensors
from export.pipeline import ExportConfig, export_checkpoint
from export.quantize.rotation import RotatedCheckpoint, Rotation
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints
from tests.export.quantize.layers import run_layers
from tests.export.quantize.made_layers import OfOtherLayers, without_rope
from tests.makers.tiny_models import KINDS, Kind, write_checkpoint
from tests.makers.tiny_pooling import write_embedder


def float_logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    ids = np.random.RandomState(0).randint(0, 300, (2, 24)).astype(np.int64)
    last = run_layers(checkpoint, ids)[-1]
    tied = checkpoint.spec.tied_embeddings
    head = checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
    logits: NDArray[np.float32] = last.inputs["lm_head"] @ head.astype(np.float32).T
    return logits


def matrix_of(size: int, seed: int) -> NDArray[np.float64]:
    return Rotation(size, seed)(np.eye(size, dtype=np.float32)).astype(np.float64)


@pytest.mark.parametrize("size", [1, 3, 16, 64, 576, 1536])
def test_the_matrix_is_orthogonal_and_no_entry_stands_out(size: int):
    matrix = matrix_of(size, 0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=2e-6)
    assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6
    if size > 1:
        assert not np.array_equal(matrix, matrix_of(size, 1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rotation_keeps_the_logits(kind: Kind, tied: bool, tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", kind, tie_word_embeddings=tied)
    with open_checkpoint(str(path)) as checkpoint:
        wanted = float_logits(checkpoint)
        rotated = RotatedCheckpoint(checkpoint)
        assert not rotated.spec.tied_embeddings
        np.testing.assert_allclose(
            float_logits(rotated), wanted, atol=2e-4 * float(np.abs(wanted).max())
        )
        for name, shape in expected_tensors(rotated.spec).items():
            tensor = rotated.tensor(name)
            assert tensor.shape == shape
            if name.endswith("norm.weight") and "self_attn" not in name:
                assert (tensor == 1).all()
        assert not np.allclose(
            rotated.tensor("model.embed_tokens.weight").astype(np.float32),
            checkpoint.tensor("model.embed_tokens.weight").astype(np.float32),
        )


def of(layer: tuple[AnyPart, ...], kind: type[AnyPart]) -> int:
    return next(i for i, part in enumerate(layer) if isinstance(part, kind))


def test_a_norm_between_a_linear_and_its_add_is_refused(tiny_checkpoints: Checkpoints):
    with open_checkpoint(str(tiny_checkpoints("llama"))) as checkpoint:
        layer = checkpoint.spec.layer(0)
        at = of(layer, Add)
        after = (*layer[:at], Norm("post_norm", checkpoint.spec.hidden_size), *layer[at:])
        message = r"layers\.1\.attention_residual: .* --no-rotate"
        with pytest.raises(CheckpointError, match=message):
            RotatedCheckpoint(OfOtherLayers(checkpoint, layer, after))


def test_a_linear_that_reads_the_stream_without_a_norm_is_refused(tiny_checkpoints: Checkpoints):
    with open_checkpoint(str(tiny_checkpoints("llama"))) as checkpoint:
        layer = checkpoint.spec.layer(0)
        with pytest.raises(CheckpointError, match=r"layers\.0\.qkv\.out: .* --no-rotate"):
            RotatedCheckpoint(OfOtherLayers(checkpoint, layer[1:]))


def test_rotation_and_folding_keep_the_logits_of_a_layer_without_rope(
    tiny_checkpoints: Checkpoints,
):
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        plain = without_rope(checkpoint)
        wanted = float_logits(plain)
        size = float(np.abs(wanted).max())
        assert np.abs(wanted - float_logits(checkpoint)).max() > 1e-2 * size
        np.testing.assert_allclose(float_logits(RotatedCheckpoint(plain)), wanted, atol=2e-4 * size)
        factors = {"layers.1.down": np.linspace(0.5, 2, 128, dtype=np.float32)}
        np.testing.assert_allclose(
            float_logits(ScaledCheckpoint(plain, factors)), wanted, atol=2e-4 * size
        )


def export(source: Path, output: Path, **options: Any) -> tuple[Manifest, list[str]]:
    lines: list[str] = []
    config = ExportConfig(str(source), output, kv_capacity=64, **options)
    return export_checkpoint(config, announce=lines.append), lines


def test_int8_is_rotated_for_no_byte_more(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    rotated, lines = export(source, tmp_path / "rotated", quant="int8")
    plain, _ = export(source, tmp_path / "plain", quant="int8", rotate=False)
    assert rotated.quantization.rotated
    assert not plain.quantization.rotated
    assert not any("not rotated" in line for line in lines)
    data = rotated.graphs.decoder + ".data"
    assert rotated.files[data].sha256 != plain.files[data].sha256
    assert rotated.files[data].num_bytes == plain.files[data].num_bytes
    assert rotated.files[EMBEDDINGS_NAME].num_bytes == plain.files[EMBEDDINGS_NAME].num_bytes


def test_the_vectors_of_a_model_that_embeds_stay_as_they_are(tmp_path: Path):
    write_embedder(tmp_path / "model")
    manifest, lines = export(tmp_path / "model", tmp_path / "bundle", quant="int8")
    assert not manifest.quantization.rotated
    assert [line for line in lines if line.startswith("not rotated, since its vectors must stay")]
    asked = export(tmp_path / "model", tmp_path / "asked", quant="int8", rotate=False)[1]
    assert not any(line.startswith("not rotated") for line in asked)


@pytest.mark.parametrize(
    ("options", "task", "rotates"),
    [
        ({"quant": "int8"}, "generate", True),
        ({"quant": "int8"}, "rerank", True),
        ({"quant": "int8", "eagle3": Path("head")}, "generate", False),
        ({"quant": "int8-w8a8"}, "generate", True),
        ({"quant": "int4"}, "generate", False),
        ({"quant": "fp16"}, "generate", False),
        ({}, "generate", False),
        ({"quant": "int4", "rotate": True}, "generate", True),
    ],
)
def test_int8_is_rotated_where_the_model_can_be(options: dict[str, Any], task: Task, rotates: bool):
    config = ExportConfig("model", Path("out"), **options)
    assert config.rotates(task, drafts=config.eagle3 is not None) == rotates

"""Rotations and folded factors change every weight and not the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle.linears import expected_tensors
from export.quantize.rotation import RotatedCheckpoint, orthogonal_matrix
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint
from tests.export.quantize.layers import run_layers
from tests.tiny_models import KINDS, Kind, write_checkpoint


def float_logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    ids = np.random.RandomState(0).randint(0, 300, (2, 24)).astype(np.int64)
    last = run_layers(checkpoint, ids)[-1]
    tied = checkpoint.spec.tied_embeddings
    head = checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
    logits: NDArray[np.float32] = last.inputs["lm_head"] @ head.astype(np.float32).T
    return logits


@pytest.mark.parametrize("size", [1, 3, 16, 64, 576, 1536])
def test_the_matrix_is_orthogonal_and_no_entry_stands_out(size: int):
    matrix = orthogonal_matrix(size, 0).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=2e-6)
    assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6
    if size > 1:
        assert not np.array_equal(matrix, orthogonal_matrix(size, 1))


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

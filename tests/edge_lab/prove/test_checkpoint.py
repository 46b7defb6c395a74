"""A checkpoint of random weights: the shapes of the real one, in bf16 that others read."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_lab.prove.checkpoint import CONFIG, SHAPES, main
from edge_make.model_config import parse_config


def test_safetensors_reads_random_weights_of_the_size_of_a_models(tmp_path: Path):
    main([str(tmp_path), "--shape", "tiny", "--layers", "2"])
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], 64)
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    assert layers == {"0", "1"}
    for name, values in tensors.items():
        assert values.dtype == ml_dtypes.bfloat16
        floats = values.astype(np.float32)
        if "norm" in name:
            assert (floats == 1).all()
        else:
            assert floats.std() == pytest.approx(0.02, rel=0.3), name
            assert np.isfinite(floats).all()


def test_every_id_of_the_tokenizer_is_a_row_of_the_table(tmp_path: Path):
    main([str(tmp_path), "--shape", "tiny", "--layers", "1"])
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = [*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])]
    assert len(ids) == len(set(ids))
    assert max(ids) < 512


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_is_a_model_that_is_known(shape: str):
    spec = parse_config({**CONFIG, **SHAPES[shape]}, "config.json")
    assert spec.vocab_size > CONFIG["bos_token_id"] or shape == "tiny"

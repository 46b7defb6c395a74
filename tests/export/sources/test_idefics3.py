"""A checkpoint of SmolVLM is read whole: its decoder, its encoder, what its processor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import CheckpointError
from edge_make.model_config import parse_config
from export.sources.documents import encode_document
from export.sources.hf_directory import HfDirectory
from export.sources.opening import open_checkpoint
from tests.makers.tiny_vision import (
    CONTROL_IDS,
    IMAGE,
    ModelType,
    vision_weights,
    write_vision_checkpoint,
)

_TOWER = "model.vision_model."


def _edit(directory: Path, name: str, **changes: Any) -> Path:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_decoder_and_encoder_are_read_under_their_names(tmp_path: Path, model_type: ModelType):
    directory = write_vision_checkpoint(tmp_path / "vlm", model_type=model_type)
    config = json.loads((directory / "config.json").read_text())
    weights = vision_weights(config, 5)
    with open_checkpoint(str(directory)) as checkpoint:
        assert checkpoint.spec.architecture == "llama"
        assert not checkpoint.spec.tied_embeddings
        for name, weight in weights.items():
            own = name.replace("model.text_model.", "model.")
            assert np.array_equal(checkpoint.tensor(own).astype(np.float32), weight), name
        assert checkpoint.vision is not None
        section = checkpoint.vision.section
        assert (section.tile_px, section.rows_per_tile, section.max_tiles) == (32, 4, 17)
        assert (section.longest_edge_px, section.resample) == (128, 1)
        assert section.mean == section.std == (0.5, 0.5, 0.5)
        assert section.tile_text(4, 2) == "<row_4_col_2>"
        assert checkpoint.vision.weights == sum(
            weight.size
            for name, weight in weights.items()
            if name.startswith((_TOWER, "model.connector."))
        )


def test_the_single_file_of_transformers_5_is_read_too(tmp_path: Path):
    directory = write_vision_checkpoint(tmp_path / "vlm")
    path = directory / "preprocessor_config.json"
    _edit(directory, "processor_config.json", image_processor=json.loads(path.read_text()))
    path.unlink()
    with HfDirectory(directory) as checkpoint:
        assert checkpoint.vision is not None
        assert checkpoint.vision.section.longest_edge_px == 128


def test_numbers_that_published_configs_leave_out_are_transformers_own(tmp_path: Path):
    directory = write_vision_checkpoint(tmp_path / "vlm")
    config = json.loads((directory / "config.json").read_text())
    for key in ("num_channels", "hidden_act", "layer_norm_eps"):
        del config["vision_config"][key]
    (directory / "config.json").write_text(json.dumps(config))
    with HfDirectory(directory) as checkpoint:
        assert checkpoint.vision is not None
        assert checkpoint.vision.spec.eps == 1e-6


@pytest.mark.parametrize(
    ("drop", "extra", "said"),
    [
        ((f"{_TOWER}encoder.layers.1.mlp.fc2.bias",), {}, r"no tensor \S+layers.1.mlp.fc2.bias"),
        (("model.text_model.norm.weight",), {}, "no tensor model.norm.weight"),
        ((), {f"{_TOWER}head.weight": (64, 64)}, r"model.vision_model.head.weight is not part"),
        (
            (),
            {"model.connector.modality_projection.proj.weight": (64, 64)},
            r"shape \[64, 64\], config.json says \[64, 256\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, drop: tuple[str, ...], extra: dict[str, tuple[int, ...]], said: str
):
    more = {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    directory = write_vision_checkpoint(tmp_path / "vlm", drop=drop, extra=more)
    with pytest.raises(CheckpointError, match=said):
        HfDirectory(directory)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("preprocessor_config.json", {"do_image_splitting": False}, "do_image_splitting is False"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 64}}, "image_size, 32"),
        ("preprocessor_config.json", {"size": {"longest_edge": 5000}}, "at most 4096"),
        ("preprocessor_config.json", {"size": {"height": 9}}, "longest_edge is 0"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5]}, "expected three numbers"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "expected a positive number"),
        ("processor_config.json", {"image_seq_len": 64}, r"64 rows a tile \(image_seq_len\)"),
        ("config.json", {"image_token_id": 300}, "image_token_id in config.json is 300"),
        ("config.json", {"scale_factor": 3}, "a multiple of patch_size 8 x 3"),
        ("config.json", {"text_config": None}, "text_config must be an object"),
        ("config.json", {"vision_config": 3}, "vision_config must be an object"),
    ],
)
def test_files_that_do_not_fit_are_named(
    tmp_path: Path, file: str, changes: dict[str, Any], said: str
):
    directory = _edit(write_vision_checkpoint(tmp_path / "vlm"), file, **changes)
    with pytest.raises(CheckpointError, match=said):
        HfDirectory(directory)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ({"vision_config": {"num_attention_heads": 7}}, r"num_attention_heads \(7\)"),
        ({"vision_config": {"num_channels": 4}}, "num_channels is 4"),
        # 25 patches a side: float32 fractions give ten of them the position before.
        ({"vision_config": {"image_size": 200}, "scale_factor": 5}, "a side of 2"),
        ({"text_config": {"model_type": "gemma"}}, "text_config: model_type 'gemma'"),
        ({"text_config": {"qk_layer_norms": True}}, "qk_layer_norms is true"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config: hidden_act must be silu"),
    ],
)
def test_arithmetic_that_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], said: str
):
    directory = write_vision_checkpoint(tmp_path / "vlm", **changes)
    with pytest.raises(CheckpointError, match=said):
        HfDirectory(directory)


def test_a_tokenizer_without_the_placeholder_is_refused(tmp_path: Path):
    directory = write_vision_checkpoint(tmp_path / "vlm")
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [
        token for token in tokenizer["added_tokens"] if token["content"] != IMAGE
    ]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="has no token <image>"):
        HfDirectory(directory)


def test_calibration_reads_the_words_that_a_template_takes_as_parts_alone(tmp_path: Path):
    document = {
        "messages": [
            {"role": "user", "content": "hello the world"},
            {"role": "assistant", "content": "what"},
        ]
    }
    with HfDirectory(write_vision_checkpoint(tmp_path / "vlm")) as checkpoint:
        tokenizer = checkpoint.text.tokenizer()
        read = tokenizer.decode(encode_document(tokenizer, checkpoint.template(), document))
        without = tokenizer.decode(encode_document(tokenizer, checkpoint.text.template(), document))
    wanted = "<|im_start|>User: hello the world<end_of_utterance>\nAssistant:what<end_of_utterance>"
    assert read == wanted
    assert without == wanted.replace("hello the world", "")


def test_a_plan_reads_the_decoder_of_such_a_config(tmp_path: Path):
    directory = write_vision_checkpoint(tmp_path / "vlm", tie_word_embeddings=True)
    config = json.loads((directory / "config.json").read_text())
    spec = parse_config(config)
    assert (spec.architecture, spec.vocab_size, spec.tied_embeddings) == ("llama", 352, True)
    assert CONTROL_IDS[IMAGE] == config["image_token_id"]

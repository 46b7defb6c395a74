"""A checkpoint of InternVL is read whole, by either naming of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edge.errors import CheckpointError
from export.sources.hf_directory import HfDirectory
from tests.makers.tiny_internvl import internvl_weights, write_internvl_checkpoint

_VISION = ("vision_tower.", "multi_modal_projector.")


@pytest.mark.parametrize("decoder", ["qwen2", "qwen3"])
@pytest.mark.parametrize("old_names", [False, True])
def test_decoder_and_encoder_are_read_by_either_naming(
    tmp_path: Path, decoder: Literal["qwen2", "qwen3"], old_names: bool
):
    directory = write_internvl_checkpoint(tmp_path / "vlm", decoder, old_names=old_names)
    weights = internvl_weights(json.loads((directory / "config.json").read_text()), 5)
    with HfDirectory(directory) as checkpoint:
        assert checkpoint.spec.architecture == decoder
        for name, weight in weights.items():
            own = name.replace("language_model.model.", "model.").removeprefix("language_model.")
            assert np.array_equal(checkpoint.tensor(own).astype(np.float32), weight), name
        assert checkpoint.vision is not None
        section = checkpoint.vision.section
        assert (section.family, section.tile_px, section.rows_per_tile) == ("internvl", 32, 4)
        assert section.max_tiles == 13
        assert checkpoint.vision.weights == sum(
            weight.size for name, weight in weights.items() if name.startswith(_VISION)
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_config": {"norm_type": "rms_norm"}}, "norm_type is 'rms_norm'"),
        ({"vision_config": {"use_qk_norm": True}}, "use_qk_norm is True"),
        ({"vision_config": {"hidden_act": "silu"}}, "hidden_act is 'silu'"),
        ({"vision_config": {"image_size": [32, 64]}}, "image_size"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ({"image_token_id": 300}, "image_token_id in config.json is 300"),
        ({"text_config": {"model_type": "gpt_oss"}}, "text_config: model_type 'gpt_oss'"),
    ],
)
def test_unsupported_features_are_named(tmp_path: Path, changes: dict[str, Any], said: str):
    directory = write_internvl_checkpoint(tmp_path / "vlm", **changes)
    with pytest.raises(CheckpointError, match=said):
        HfDirectory(directory)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"height": 64, "width": 64}}, "height and width 32"),
        ({"min_patches": 2}, "min_patches is 2"),
        ({"max_patches": 65}, "at most 64"),
        ({"do_normalize": False}, "do_normalize is False"),
    ],
)
def test_a_processor_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], said: str):
    directory = write_internvl_checkpoint(tmp_path / "vlm")
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=said):
        HfDirectory(directory)

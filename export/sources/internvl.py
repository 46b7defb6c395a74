"""Reads what InternVL3 and InternVL3.5 have beside their decoder, in transformers' layout.

The encoder is InternViT: a class token comes before the patches, and a factor for each channel
multiplies what a layer adds. The projector joins neighbouring patches to one row, which then passes
a LayerNorm and an MLP. Two namings of the tensors are published, that of transformers from 4.53 on
and the one before it; the older one is used here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec, fuse
from edge.vision.section import VisionSection

from .picture_encoder import (
    PROJECTOR_NORM,
    EncoderSpec,
    Keys,
    Vision,
    check_tokens,
    read_processor,
    read_spec,
)

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_TOWER, _PROJECTOR = "vision_tower", "multi_modal_projector"
_CLASS, _POSITIONS = (
    f"{_TOWER}.embeddings.{name}" for name in ("cls_token", "position_embeddings")
)
IMAGE, BEGIN, END = "<IMG_CONTEXT>", "<img>", "</img>"
_STEPS = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
_DEFAULTS = {
    "image_size": 448,
    "patch_size": 14,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "intermediate_size": 4096,
}
_FIXED = {
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "use_qk_norm": False,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
}
_FIXED_ABOVE = {
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_NAMES = (
    (re.compile(r"(?:model\.language_model|language_model\.model)\."), "model."),
    (re.compile(r"language_model\.lm_head\."), "lm_head."),
    (re.compile(rf"model\.(?={_TOWER}\.|{_PROJECTOR}\.)"), ""),
)


@dataclass(frozen=True)
class InternVision(Vision):
    """InternViT and the MLP after it; see `Vision`.

    Attributes:
        qkv_bias: whether q, k and v have biases.
        final_norm: whether a LayerNorm follows the last layer.
    """

    qkv_bias: bool
    final_norm: bool

    patches = f"{_TOWER}.embeddings.patch_embeddings.projection"
    projector = f"{_PROJECTOR}.linear_2"

    def linears(self) -> list[LinearSpec]:
        """List the linear layers; see `Vision.linears`."""
        spec, hidden, wide = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        layers = [fuse("patches", 3 * spec.patch_px**2, {self.patches: hidden}, has_bias=True)]
        for i in range(spec.num_layers):
            name, source = f"layers.{i}", f"{_TOWER}.encoder.layer.{i}"
            attention = f"{source}.attention"
            qkv = {f"{attention}.{part}_proj": hidden for part in "qkv"}
            layers += [
                fuse(f"{name}.qkv", hidden, qkv, has_bias=self.qkv_bias),
                fuse(f"{name}.o", hidden, {f"{attention}.projection_layer": hidden}, has_bias=True),
                fuse(f"{name}.up", hidden, {f"{source}.mlp.fc1": wide}, has_bias=True),
                fuse(f"{name}.down", wide, {f"{source}.mlp.fc2": hidden}, has_bias=True),
            ]
        first = {f"{_PROJECTOR}.linear_1": spec.width}
        return [
            *layers,
            fuse("projector.up", spec.joined, first, has_bias=True),
            fuse("projector", spec.width, {self.projector: spec.width}, has_bias=True),
        ]

    def norms(self) -> dict[str, str]:
        """Name the LayerNorms; see `Vision.norms`."""
        named = {PROJECTOR_NORM: f"{_PROJECTOR}.layer_norm"}
        if self.final_norm:
            named["final_norm"] = f"{_TOWER}.layernorm"
        for i in range(self.spec.num_layers):
            for place, name in (("before", "input_norm"), ("after", "post_norm")):
                named[f"layers.{i}.{name}"] = f"{_TOWER}.encoder.layer.{i}.layernorm_{place}"
        return named

    def scales(self) -> dict[str, str]:
        """Name the factors of what layers add; see `Vision.scales`."""
        return {
            f"layers.{i}.{name}": f"{_TOWER}.encoder.layer.{i}.lambda_{number}"
            for i in range(self.spec.num_layers)
            for number, name in ((1, "o"), (2, "down"))
        }

    def tables(self) -> dict[str, tuple[int, ...]]:
        """Name class token and positions; see `Vision.tables`."""
        rows, hidden = self.spec.side**2 + 1, self.spec.hidden_size
        return {_CLASS: (1, 1, hidden), _POSITIONS: (1, rows, hidden)}

    def positions(self, checkpoint: Checkpoint) -> NDArray[Any]:
        """Read the positions, with the class token in the first one; see `Vision.positions`."""
        rows: NDArray[Any] = checkpoint.tensor(_POSITIONS)[0].astype(np.float32)
        rows[0] += checkpoint.tensor(_CLASS)[0, 0].astype(np.float32)
        return rows

    def decoder_name(self, stored: str) -> str:
        """Rename tensors of either naming; see `Vision.decoder_name`."""
        for pattern, name in _NAMES:
            if found := pattern.match(stored):
                return name + stored[found.end() :]
        return stored


def read_internvl(directory: Path, config: Mapping[str, Any], width: int) -> Vision:
    """Read the encoder's numbers and the processor's; see `picture_encoder.read_vision`."""
    where = str(directory / "config.json")
    above, vision = (
        Keys(config, where),
        Keys(config.get("vision_config"), f"{where}: vision_config"),
    )
    for keys, fixed in ((above, _FIXED_ABOVE), (vision, _FIXED)):
        for key, expected in fixed.items():
            if (found := keys.get(key, expected)) != expected:
                raise keys.error(key, found, repr(expected))
    ratio = above.number("downsample_ratio", 0.5)
    scale = int(1 / ratio)
    if scale * ratio != 1:
        raise above.error("downsample_ratio", ratio, "1 divided by a whole number")
    spec = read_spec(vision, _DEFAULTS, scale, width, classes=True, exact=True)
    section = _read_section(directory, config, spec)
    qkv_bias, mean = vision.get("attention_bias", False), vision.get("use_mean_pooling", True)
    return InternVision(spec, section, bool(qkv_bias), final_norm=not mean)


def _read_section(directory: Path, config: Mapping[str, Any], spec: EncoderSpec) -> VisionSection:
    keys = read_processor(directory, _STEPS, spec.rows, 256)
    tile_px, size = spec.side * spec.patch_px, keys.get("size", {"height": 384, "width": 384})
    if size != {"height": tile_px, "width": tile_px}:
        raise keys.error("size", size, f"height and width {tile_px}, the encoder's image_size")
    # `crop_to_patches` is not read: transformers' processor of this family sets it to true.
    for key, expected in (("do_center_crop", False), ("min_patches", 1)):
        if (found := keys.get(key, expected)) != expected:
            raise keys.error(key, found, repr(expected))
    most = keys.integer("max_patches", 12)
    if most > 64:
        raise keys.error("max_patches", most, "at most 64")
    check_tokens(directory, config, IMAGE, BEGIN, END)
    return VisionSection(
        family="internvl",
        tile_px=tile_px,
        rows_per_tile=spec.rows,
        longest_edge_px=tile_px,
        max_tiles=1 if most == 1 else most + 1,
        mean=keys.channels("image_mean", _CLIP_MEAN),
        std=keys.channels("image_std", _CLIP_STD),
        resample=keys.integer("resample", 3),
        rescale=keys.number("rescale_factor", 1 / 255),
        image_token=IMAGE,
        begin_token=BEGIN,
        end_token=END,
        whole_token="",
        tile_token="",
        quant="fp16",
    )

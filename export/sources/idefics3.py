"""Reads what SmolVLM and SmolVLM2 have beside their decoder, in the layout of Idefics3.

The encoder is SigLIP's, and its position table is read in order. The connector joins
``scale_factor x scale_factor`` neighbouring patches to one row and projects it to the decoder's
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec, fuse
from edge.vision.section import VisionSection

from .picture_encoder import EncoderSpec, Keys, Vision, check_tokens, read_processor, read_spec

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_TOWER = "model.vision_model"
_TEXT = "model.text_model."
_POSITIONS = f"{_TOWER}.embeddings.position_embedding.weight"
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
_TILE = "<row_{row}_col_{col}>"
_MOST_PX = 4096  # transformers shrinks a picture to this whatever its config says
_EXACT_SIDES = (26, 27)
_STEPS = ("do_convert_rgb", "do_image_splitting", "do_normalize", "do_rescale", "do_resize")
_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 1152,
    "num_attention_heads": 16,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
}


class Idefics3Vision(Vision):
    """SigLIP's encoder and the connector; see `Vision`."""

    patches = f"{_TOWER}.embeddings.patch_embedding"
    projector = "model.connector.modality_projection.proj"

    def linears(self) -> list[LinearSpec]:
        """List the linear layers; see `Vision.linears`."""
        spec, hidden, wide = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        layers = [fuse("patches", 3 * spec.patch_px**2, {self.patches: hidden}, has_bias=True)]
        for i in range(spec.num_layers):
            name, source = f"layers.{i}", f"{_TOWER}.encoder.layers.{i}"
            attention = f"{source}.self_attn"
            qkv = {f"{attention}.{part}_proj": hidden for part in "qkv"}
            layers += [
                fuse(f"{name}.qkv", hidden, qkv, has_bias=True),
                fuse(f"{name}.o", hidden, {f"{attention}.out_proj": hidden}, has_bias=True),
                fuse(f"{name}.up", hidden, {f"{source}.mlp.fc1": wide}, has_bias=True),
                fuse(f"{name}.down", wide, {f"{source}.mlp.fc2": hidden}, has_bias=True),
            ]
        return [*layers, fuse("projector", spec.joined, {self.projector: spec.width})]

    def norms(self) -> dict[str, str]:
        """Name the LayerNorms; see `Vision.norms`."""
        named = {"final_norm": f"{_TOWER}.post_layernorm"}
        for i in range(self.spec.num_layers):
            for number, name in ((1, "input_norm"), (2, "post_norm")):
                named[f"layers.{i}.{name}"] = f"{_TOWER}.encoder.layers.{i}.layer_norm{number}"
        return named

    def tables(self) -> dict[str, tuple[int, ...]]:
        """Name the position table; see `Vision.tables`."""
        return {_POSITIONS: (self.spec.side**2, self.spec.hidden_size)}

    def positions(self, checkpoint: Checkpoint) -> NDArray[Any]:
        """Read the position table; see `Vision.positions`."""
        return checkpoint.tensor(_POSITIONS)

    def decoder_name(self, stored: str) -> str:
        """Rename the decoder's tensors; see `Vision.decoder_name`."""
        return stored.replace(_TEXT, "model.", 1) if stored.startswith(_TEXT) else stored


def read_idefics3(directory: Path, config: Mapping[str, Any], width: int) -> Vision:
    """Read the encoder's numbers and the processor's; see `picture_encoder.read_vision`."""
    where = str(directory / "config.json")
    vision = Keys(config.get("vision_config"), f"{where}: vision_config")
    activation = vision.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise vision.error("hidden_act", activation, "gelu_pytorch_tanh")
    scale = Keys(config, where).integer("scale_factor", 2)
    spec = read_spec(vision, _DEFAULTS, scale, width, classes=False, exact=False)
    side, image_px = spec.side, vision.square("image_size", _DEFAULTS["image_size"])
    # transformers finds a patch's position by a fraction in float32; other sides than these
    # would give some patches a neighbour's position.
    if side & (side - 1) and side not in _EXACT_SIDES:
        raise vision.error("image_size", image_px, "a side of 2**n, 26 or 27 patches")
    return Idefics3Vision(spec, _read_section(directory, config, spec, image_px))


def _read_section(
    directory: Path, config: Mapping[str, Any], spec: EncoderSpec, image_px: int
) -> VisionSection:
    keys = read_processor(directory, _STEPS, spec.rows, spec.rows)
    tile, longest = keys.edge("max_image_size", image_px), keys.edge("size", 4 * image_px)
    if tile != image_px:
        raise keys.error("max_image_size", tile, f"the encoder's image_size, {image_px}")
    if longest > _MOST_PX:
        raise keys.error("size", longest, f"at most {_MOST_PX}")
    check_tokens(directory, config, IMAGE, AROUND)
    across = -(-longest // tile)
    return VisionSection(
        family="idefics3",
        tile_px=tile,
        rows_per_tile=spec.rows,
        longest_edge_px=longest,
        max_tiles=1 if across == 1 else across**2 + 1,
        mean=keys.channels("image_mean", [0.5] * 3),
        std=keys.channels("image_std", [0.5] * 3),
        resample=keys.integer("resample", 1),
        rescale=keys.number("rescale_factor", 1 / 255),
        image_token=IMAGE,
        begin_token=AROUND,
        end_token=AROUND,
        whole_token=WHOLE,
        tile_token=_TILE,
        quant="fp16",
    )

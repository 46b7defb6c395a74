"""What a checkpoint of SmolVLM or SmolVLM2 has beside its decoder, in the layout of Idefics3.

The encoder is SigLIP's, its position table read in order. The connector joins
``scale_factor x scale_factor`` neighbouring patches to one row and projects it to the decoder's
width. What the processor's files say of pictures becomes the manifest's section ``vision``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.bundle.linears import LinearSpec, fuse
from edge.errors import CheckpointError
from edge.vision.section import VisionSection
from edge_lab.picture_models import reads_pictures

from .checkpoint_text import read_json, read_optional

TOWER = "model.vision_model"
"""Begins the name of every tensor of the encoder."""
_TEXT = "model.text_model."
PATCHES = f"{TOWER}.embeddings.patch_embedding.weight"
"""The convolution ``[hidden, 3, patch, patch]`` that makes patches of pixels."""
POSITIONS = f"{TOWER}.embeddings.position_embedding.weight"
"""``[patches, hidden]``."""
PROJECTOR = "model.connector.modality_projection.proj.weight"
"""Writes the rows of ``inputs_embeds``; ``[decoder's hidden, in]``."""
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
_TILE = "<row_{row}_col_{col}>"
_MOST_PX = 4096  # to which transformers shrinks a picture whatever its config says
_EXACT_SIDES = (26, 27)
_STEPS = ("do_convert_rgb", "do_image_splitting", "do_normalize", "do_rescale", "do_resize")


@dataclass(frozen=True)
class EncoderSpec:
    """Every number of a vision encoder that its graph needs.

    Attributes:
        hidden_size, intermediate_size, num_layers, num_heads: of its transformer.
        patch_px: edge of a patch in pixels.
        side: patches along the edge of a tile.
        eps: of the LayerNorms.
        scale_factor: patches along the edge of the square that becomes one row.
        width: of a row, the decoder's hidden size.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_px: int
    side: int
    eps: float
    scale_factor: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return (self.side // self.scale_factor) ** 2


@dataclass(frozen=True)
class Vision:
    """A checkpoint's vision encoder and what its processor does to a picture.

    Attributes:
        spec: the encoder's numbers.
        section: for the manifest, but for how the weights are stored.
    """

    spec: EncoderSpec
    section: VisionSection

    def linears(self) -> list[LinearSpec]:
        """List the encoder's linear layers in the order of the graph, the projector last."""
        spec, hidden, wide = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        patch = {PATCHES.removesuffix(".weight"): hidden}
        layers = [fuse("patches", 3 * spec.patch_px**2, patch, has_bias=True)]
        for i in range(spec.num_layers):
            name, source = f"layers.{i}", f"{TOWER}.encoder.layers.{i}"
            attention = f"{source}.self_attn"
            qkv = {f"{attention}.{part}_proj": hidden for part in "qkv"}
            layers += [
                fuse(f"{name}.qkv", hidden, qkv, has_bias=True),
                fuse(f"{name}.o", hidden, {f"{attention}.out_proj": hidden}, has_bias=True),
                fuse(f"{name}.up", hidden, {f"{source}.mlp.fc1": wide}, has_bias=True),
                fuse(f"{name}.down", wide, {f"{source}.mlp.fc2": hidden}, has_bias=True),
            ]
        joined = hidden * spec.scale_factor**2
        return [*layers, fuse("projector", joined, {PROJECTOR.removesuffix(".weight"): spec.width})]

    def norms(self) -> dict[str, str]:
        """HF module of each LayerNorm by its name in the graph."""
        named = {"final_norm": f"{TOWER}.post_layernorm"}
        for i in range(self.spec.num_layers):
            for number, name in ((1, "input_norm"), (2, "post_norm")):
                named[f"layers.{i}.{name}"] = f"{TOWER}.encoder.layers.{i}.layer_norm{number}"
        return named

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """HF name and shape of every tensor of encoder and projector."""
        spec = self.spec
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.linears():
            for names, tail in ((layer.weights, layer.shape[:1]), (layer.biases, ())):
                for name, rows in zip(names, layer.rows, strict=False):
                    shapes[name] = (rows, *tail)
        for module in self.norms().values():
            shapes[f"{module}.weight"] = shapes[f"{module}.bias"] = (spec.hidden_size,)
        shapes[PATCHES] = (spec.hidden_size, 3, spec.patch_px, spec.patch_px)
        shapes[POSITIONS] = (spec.side**2, spec.hidden_size)
        return shapes

    @property
    def weights(self) -> int:
        """Number of weights, as `tensors` has them."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def decoder_name(stored: str) -> str:
    """Return the name that a tensor of the decoder has where it is published alone."""
    return stored.replace(_TEXT, "model.", 1) if stored.startswith(_TEXT) else stored


def read_vision(directory: Path, config: Mapping[str, Any], width: int) -> Vision | None:
    """Read the encoder's numbers and the processor's; None for a model of text alone.

    Args:
        directory: of the checkpoint.
        config: its ``config.json``.
        width: the decoder's hidden size.

    Raises:
        CheckpointError: a file or a key is missing, or asks for what is not supported.
    """
    if not reads_pictures(config):
        return None
    where = directory / "config.json"
    vision = _Keys(config.get("vision_config"), f"{where}: vision_config")
    activation = vision.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise vision.error("hidden_act", activation, "gelu_pytorch_tanh")
    if (channels := vision.integer("num_channels", 3)) != 3:
        raise vision.error("num_channels", channels, "3")
    image, patch = vision.square("image_size", 224), vision.square("patch_size", 32)
    scale = _Keys(config, str(where)).integer("scale_factor", 2)
    hidden, heads = vision.integer("hidden_size", 1152), vision.integer("num_attention_heads", 16)
    side = image // patch
    if side % scale:
        raise vision.error("image_size", image, f"a multiple of patch_size {patch} x {scale}")
    if hidden % heads:
        raise vision.error("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
    # transformers looks a patch's position up by a fraction in float32, which for other sides
    # gives some patches the position of a neighbour.
    if side & (side - 1) and side not in _EXACT_SIDES:
        raise vision.error("image_size", image, "a side of 2**n, 26 or 27 patches")
    spec = EncoderSpec(
        hidden_size=hidden,
        intermediate_size=vision.integer("intermediate_size", 3072),
        num_layers=vision.integer("num_hidden_layers", 12),
        num_heads=heads,
        patch_px=patch,
        side=side,
        eps=vision.number("layer_norm_eps", 1e-6),
        scale_factor=scale,
        width=width,
    )
    return Vision(spec, _read_processor(directory, config, spec, image))


def _read_processor(
    directory: Path, config: Mapping[str, Any], spec: EncoderSpec, image_px: int
) -> VisionSection:
    """Read how a picture is prepared, of either layout that transformers writes."""
    whole = read_optional(directory / "processor_config.json")
    path = directory / "preprocessor_config.json"
    if path.exists() or "image_processor" not in whole:
        values: Any = read_json(path)
    else:  # transformers 5 writes one file
        path, values = directory / "processor_config.json", whole["image_processor"]
    keys = _Keys(values, str(path))
    for step in _STEPS:
        if not keys.get(step, True):
            raise keys.error(step, False, "true")
    tile, longest = keys.edge("max_image_size", image_px), keys.edge("size", 4 * image_px)
    if tile != image_px:
        raise keys.error("max_image_size", tile, f"the encoder's image_size, {image_px}")
    if longest > _MOST_PX:
        raise keys.error("size", longest, f"at most {_MOST_PX}")
    beside = _Keys(whole, str(directory / "processor_config.json"))
    rows = beside.integer("image_seq_len", spec.rows)
    if rows != spec.rows:
        raise CheckpointError(
            f"{directory}: processor_config.json says {rows} rows a tile (image_seq_len), "
            f"config.json {spec.rows}; the files are of different models"
        )
    ids = _added_tokens(directory)
    for token in (IMAGE, AROUND):
        if token not in ids:
            raise CheckpointError(
                f"{directory / 'tokenizer.json'} has no token {token} among its added tokens; take "
                "the tokenizer of the same checkpoint"
            )
    if (named := config.get("image_token_id", ids[IMAGE])) != ids[IMAGE]:
        raise CheckpointError(
            f"{directory}: image_token_id in config.json is {named!r}, but {IMAGE} is token "
            f"{ids[IMAGE]} of tokenizer.json; the files are of different models"
        )
    across = -(-longest // tile)
    return VisionSection(
        family="idefics3",
        tile_px=tile,
        rows_per_tile=spec.rows,
        longest_edge_px=longest,
        max_tiles=1 if across == 1 else across**2 + 1,
        mean=keys.channels("image_mean", 0.5),
        std=keys.channels("image_std", 0.5),
        resample=keys.integer("resample", 1),
        rescale=keys.number("rescale_factor", 1 / 255),
        image_token=IMAGE,
        begin_token=AROUND,
        end_token=AROUND,
        whole_token=WHOLE,
        tile_token=_TILE,
        quant="fp16",
    )


def _added_tokens(directory: Path) -> dict[str, int]:
    """Ids of the added tokens by their text; `read_text` has judged the file."""
    added = read_json(directory / "tokenizer.json").get("added_tokens") or []
    return {token["content"]: token["id"] for token in added}


class _Keys:
    """Typed access to a JSON object; every error names the file and the key."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"{where} must be an object, found {values!r:.80}; copy the file of the original "
                "model"
            )
        self._values = values
        self._where = where

    def get(self, key: str, default: Any) -> Any:
        """Return a value; ``null`` is as if it were not there."""
        value = self._values.get(key)
        return default if value is None else value

    def error(self, key: str, found: Any, expected: str) -> CheckpointError:
        """Say what a key must be."""
        return CheckpointError(f"{self._where}: {key} is {found!r}, expected {expected}")

    def integer(self, key: str, default: int) -> int:
        """Return a positive integer."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value <= 1 << 20:
            raise self.error(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a positive number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= 1e6:
            raise self.error(key, value, "a positive number")
        return float(value)

    def square(self, key: str, default: int) -> int:
        """Return the edge of a square, which may be given as both of its edges."""
        value = self.get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return _Keys({key: value[0]}, self._where).integer(key, default)
        return self.integer(key, default)

    def edge(self, key: str, default: int) -> int:
        """Return ``longest_edge`` of an object."""
        inner = _Keys(self.get(key, {"longest_edge": default}), f"{self._where}: {key}")
        return inner.integer("longest_edge", 0)

    def channels(self, key: str, default: float) -> tuple[float, float, float]:
        """Return a number for each of three channels."""
        value = self.get(key, [default] * 3)
        if not isinstance(value, list) or len(value) != 3:
            raise self.error(key, value, "three numbers")
        red, green, blue = (_Keys({key: each}, self._where).number(key, 1) for each in value)
        return red, green, blue

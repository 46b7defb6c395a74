"""Describes what a model that reads pictures has beside its decoder, in any published layout.

Each family has a module that names the tensors of its encoder and reads its configs; `read_vision`
finds it. What the processor's files say about pictures becomes the manifest's section ``vision``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec
from edge.errors import CheckpointError
from edge.vision.section import VisionSection
from edge_make.picture_models import IDEFICS3_TYPES, reads_pictures

from .checkpoint_text import read_json, read_optional

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

PROJECTOR_NORM = "projector.norm"
"""Key in `Vision.norms` of the LayerNorm of joined patches, which not every family has."""
_ROWS_KEYS = ("image_seq_len", "image_seq_length")


@dataclass(frozen=True)
class EncoderSpec:
    """Every number of a vision encoder that its graph needs.

    Attributes:
        hidden_size, intermediate_size, num_layers, num_heads: dimensions of its transformer.
        patch_px: edge of a patch in pixels.
        side: patches along the edge of a tile.
        eps: epsilon of the LayerNorms.
        scale_factor: patches along the edge of the square that becomes one row.
        width: width of a row, the decoder's hidden size.
        class_token: whether a tile has a row before its patches that is no patch; it is dropped
            after the last layer.
        exact_gelu: whether the activation is GELU by erf, not its form with tanh.
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
    class_token: bool = False
    exact_gelu: bool = False

    @property
    def joined(self) -> int:
        """Width of the patches that become one row, side by side."""
        return self.hidden_size * self.scale_factor**2

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return (self.side // self.scale_factor) ** 2


@dataclass(frozen=True)
class Vision(ABC):
    """A checkpoint's vision encoder and what its processor does to a picture.

    Attributes:
        spec: the encoder's numbers.
        section: section for the manifest, except for how the weights are stored.
        patches: HF module of the convolution ``[hidden, 3, patch, patch]`` that makes patches of
            pixels.
        projector: HF module that writes the rows of ``inputs_embeds``.
    """

    spec: EncoderSpec
    section: VisionSection
    patches: ClassVar[str]
    projector: ClassVar[str]

    @abstractmethod
    def linears(self) -> list[LinearSpec]:
        """List the encoder's linear layers in the order of the graph, the projector last."""

    @abstractmethod
    def norms(self) -> dict[str, str]:
        """Map each LayerNorm's name in the graph to its HF module."""

    @abstractmethod
    def tables(self) -> dict[str, tuple[int, ...]]:
        """Map HF names to shapes, for the tensors that `positions` reads."""

    @abstractmethod
    def positions(self, checkpoint: Checkpoint) -> NDArray[Any]:
        """Read the rows to add to a tile's ``[rows, hidden]``, the class token included."""

    @abstractmethod
    def decoder_name(self, stored: str) -> str:
        """Return a stored tensor's name here; a decoder's is the one it has if published alone."""

    def scales(self) -> dict[str, str]:
        """Map each factor of a layer's sums, by its name here, to its HF tensor ``[hidden]``."""
        return {}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Map HF names to shapes, for every tensor of encoder and projector."""
        spec, shapes = self.spec, self.tables()
        for layer in self.linears():
            for names, tail in ((layer.weights, layer.shape[:1]), (layer.biases, ())):
                for name, rows in zip(names, layer.rows, strict=False):
                    shapes[name] = (rows, *tail)
        for name, module in self.norms().items():
            width = spec.joined if name == PROJECTOR_NORM else spec.hidden_size
            shapes[f"{module}.weight"] = shapes[f"{module}.bias"] = (width,)
        shapes |= dict.fromkeys(self.scales().values(), (spec.hidden_size,))
        shapes[f"{self.patches}.weight"] = (spec.hidden_size, 3, spec.patch_px, spec.patch_px)
        return shapes

    @property
    def weights(self) -> int:
        """Number of weights in `tensors`."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def read_vision(directory: Path, config: Mapping[str, Any], width: int) -> Vision | None:
    """Read the encoder's numbers and the processor's; None for a model of text alone.

    Args:
        directory: directory of the checkpoint.
        config: its ``config.json``.
        width: the decoder's hidden size.

    Raises:
        CheckpointError: a file or a key is missing, or asks for what is not supported.
    """
    if not reads_pictures(config):
        return None
    if config["model_type"] in IDEFICS3_TYPES:
        from .idefics3 import read_idefics3

        return read_idefics3(directory, config, width)
    from .internvl import read_internvl

    return read_internvl(directory, config, width)


def read_spec(
    keys: Keys, defaults: Mapping[str, int], scale: int, width: int, *, classes: bool, exact: bool
) -> EncoderSpec:
    """Read the numbers of a ``vision_config``.

    Args:
        keys: the object.
        defaults: the integers to read, and the values that transformers takes for missing ones.
        scale: patches along the edge of the square that becomes one row.
        width: the decoder's hidden size.
        classes: value of `EncoderSpec.class_token`.
        exact: value of `EncoderSpec.exact_gelu`.
    """
    if (channels := keys.integer("num_channels", 3)) != 3:
        raise keys.error("num_channels", channels, "3")
    number = {key: keys.square(key, default) for key, default in defaults.items()}
    image, patch = number["image_size"], number["patch_size"]
    hidden, heads = number["hidden_size"], number["num_attention_heads"]
    if image // patch % scale:
        raise keys.error("image_size", image, f"a multiple of patch_size {patch} x {scale}")
    if hidden % heads:
        raise keys.error("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
    return EncoderSpec(
        hidden_size=hidden,
        intermediate_size=number["intermediate_size"],
        num_layers=number["num_hidden_layers"],
        num_heads=heads,
        patch_px=patch,
        side=image // patch,
        eps=keys.number("layer_norm_eps", 1e-6),
        scale_factor=scale,
        width=width,
        class_token=classes,
        exact_gelu=exact,
    )


def read_processor(directory: Path, steps: Sequence[str], rows: int, default_rows: int) -> Keys:
    """Read how a picture is prepared, from either layout that transformers writes.

    Args:
        directory: directory of the checkpoint.
        steps: keys that must be true; transformers takes missing ones as true.
        rows: rows of a tile, by ``config.json``.
        default_rows: the processor's value if its file does not say.
    """
    path = directory / "processor_config.json"
    whole, image = read_optional(path), directory / "preprocessor_config.json"
    if image.exists() or "image_processor" not in whole:
        keys = Keys(read_json(image), str(image))
    else:  # transformers 5 writes one file
        keys = Keys(whole["image_processor"], str(path))
    for step in steps:
        if not keys.get(step, True):
            raise keys.error(step, False, "true")
    name = next((each for each in _ROWS_KEYS if each in whole), _ROWS_KEYS[0])
    if (found := Keys(whole, str(path)).integer(name, default_rows)) != rows:
        raise CheckpointError(
            f"{directory}: processor_config.json says {found} rows a tile ({name}), "
            f"config.json {rows}; the files are of different models"
        )
    return keys


def check_tokens(directory: Path, config: Mapping[str, Any], image: str, *others: str) -> None:
    """Refuse a tokenizer without a placeholder, or with another id of that of a row."""
    added = read_json(directory / "tokenizer.json").get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in added}  # `read_text` has judged the file
    for token in (image, *others):
        if token not in ids:
            raise CheckpointError(
                f"{directory / 'tokenizer.json'} has no token {token} among its added tokens; take "
                "the tokenizer of the same checkpoint"
            )
    if (named := config.get("image_token_id", ids[image])) != ids[image]:
        raise CheckpointError(
            f"{directory}: image_token_id in config.json is {named!r}, but {image} is token "
            f"{ids[image]} of tokenizer.json; the files are of different models"
        )


class Keys:
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
            return Keys({key: value[0]}, self._where).integer(key, default)
        return self.integer(key, default)

    def edge(self, key: str, default: int) -> int:
        """Return ``longest_edge`` of an object."""
        inner = Keys(self.get(key, {"longest_edge": default}), f"{self._where}: {key}")
        return inner.integer("longest_edge", 0)

    def channels(self, key: str, default: list[float]) -> tuple[float, float, float]:
        """Return a number for each of three channels."""
        value = self.get(key, default)
        if not isinstance(value, list) or len(value) != 3:
            raise self.error(key, value, "three numbers")
        red, green, blue = (Keys({key: each}, self._where).number(key, 1) for each in value)
        return red, green, blue

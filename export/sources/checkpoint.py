"""Defines a checkpoint: a model's float weights by name, as stored or transformed on each read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from numpy.typing import NDArray

from edge.bundle.manifest import Embedding, Reranking, Source
from edge.model.spec import ModelSpec
from edge.text.chat_template import ChatTemplate

from .checkpoint_text import CheckpointText
from .picture_encoder import Vision
from .quantization_config import WeightFormat
from .quantized_weight import QuantizedWeight

_Self = TypeVar("_Self", bound="Checkpoint")


class Checkpoint(ABC):
    """An open model; a context manager. Weights are read tensor by tensor, never all at once.

    Attributes:
        name: the model's short name, e.g. ``DeepSeek-R1-Distill-Qwen-1.5B``.
        spec: the decoder's numbers.
        text: tokenizer, chat template and generation defaults.
        embedding: how the model embeds; None if that is not its task.
        reranking: how it judges documents; None if that is not its task.
        vision: the encoder of a model that reads pictures; None for one of text alone.
        changed: HF names of weights that the family changes on their way into the graph: what was
            trained beside the original ones, such as adapters of these, does not fit.
    """

    name: str
    spec: ModelSpec
    text: CheckpointText
    embedding: Embedding | None = None
    reranking: Reranking | None = None
    vision: Vision | None = None
    changed: frozenset[str] = frozenset()

    def template(self) -> ChatTemplate | None:
        """Open the chat template, for messages of text; None if the model has none.

        SmolVLM's template reads contents that are lists of parts, and ignores a plain text.

        Raises:
            BundleError: the template is refused.
        """
        template = self.text.template()
        if template is None or self.vision is None:
            return template
        from edge.vision.prompt import PictureTemplate

        return PictureTemplate(template, self.vision.section)

    @property
    @abstractmethod
    def source(self) -> Source:
        """Describe the weights' origin; hash every weight file on first use (seconds per GB)."""

    @abstractmethod
    def tensor(self, name: str) -> NDArray[Any]:
        """Read one tensor under its HF name (`edge_make.checkpoint_tensors.expected_tensors`).

        Returns:
            fp32, fp16 or ``ml_dtypes.bfloat16``, ``[out, in]`` for linears: a read-only view of the
            mapped file where that holds one of these types in HF's order of rows, else a new array
            (fp32 if dequantized).

        Raises:
            CheckpointError: the model has no such tensor, the checkpoint was closed, or the type
                cannot be dequantized.
        """

    def weight_format(self, name: str) -> WeightFormat | None:
        """Tell how a linear's weight is stored in integers or 8-bit floats; None if it is float.

        Args:
            name: HF name of the weight, as for `tensor`.
        """
        return None

    def quantized_weight(self, name: str) -> QuantizedWeight | None:
        """Read a weight as the integers that the checkpoint stores.

        Args:
            name: HF name of a weight whose `weight_format` has integers.

        Returns:
            The integers; None if the weight was changed since, so that they no longer hold.

        Raises:
            CheckpointError: a value is not as the config says, or the checkpoint was closed.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Release the files; each stays mapped until the last view of it is gone."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Transformed(Checkpoint):
    """Another checkpoint, forwarded as a whole; a subclass overrides what it changes.

    Args:
        checkpoint: the original; stays open as long as this one, and is closed with it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.original = checkpoint
        self.name = checkpoint.name
        self.spec = checkpoint.spec
        self.text = checkpoint.text
        self.embedding = checkpoint.embedding
        self.reranking = checkpoint.reranking
        self.vision = checkpoint.vision
        self.changed = checkpoint.changed

    @property
    def source(self) -> Source:
        """Describe the origin of the original's weights."""
        return self.original.source

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor of the original; see `Checkpoint.tensor`."""
        return self.original.tensor(name)

    def weight_format(self, name: str) -> WeightFormat | None:
        """Tell how the original stores a weight; see `Checkpoint.weight_format`.

        A subclass forwards `quantized_weight` for the weights that it leaves alone.
        """
        return self.original.weight_format(name)

    def close(self) -> None:
        """Close the original."""
        self.original.close()

"""A checkpoint: the float weights of a model by name, as found or transformed on each read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from numpy.typing import NDArray

from edge.bundle.manifest import Embedding, ModelSpec, Reranking, Source
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
    """

    name: str
    spec: ModelSpec
    text: CheckpointText
    embedding: Embedding | None = None
    reranking: Reranking | None = None
    vision: Vision | None = None

    def template(self) -> ChatTemplate | None:
        """Open the chat template, for messages of text; None if the model has none.

        SmolVLM's reads contents that are lists of parts, and writes nothing of a plain text.

        Raises:
            BundleError: it is refused.
        """
        template = self.text.template()
        if template is None or self.vision is None:
            return template
        from edge.vision.prompt import template_of_text

        return template_of_text(template, self.vision.section)

    @property
    @abstractmethod
    def source(self) -> Source:
        """Where the weights came from; hashes every weight file on first use (seconds per GB)."""

    @abstractmethod
    def tensor(self, name: str) -> NDArray[Any]:
        """Read one tensor under its HF name (`edge.bundle.linears.expected_tensors`).

        Returns:
            fp32, fp16 or ``ml_dtypes.bfloat16``, ``[out, in]`` for linears: a read-only view of the
            mapped file where that holds one of these types in HF's order of rows, else a new array
            (fp32 if dequantized).

        Raises:
            CheckpointError: the model has no such tensor, the checkpoint was closed, or the type
                cannot be dequantized.
        """

    def weight_format(self, name: str) -> WeightFormat | None:
        """How the checkpoint stores a linear's weight in integers or 8-bit floats; None if float.

        Args:
            name: HF name of the weight, as for `tensor`.
        """
        return None

    def quantized_weight(self, name: str) -> QuantizedWeight | None:
        """Read a weight as the integers that the checkpoint stores.

        Args:
            name: HF name of a weight whose `weight_format` is of integers.

        Returns:
            None if the weights are no longer the ones that are stored.

        Raises:
            CheckpointError: a value is not what the config says, or the checkpoint was closed.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; each stays mapped until the last view of it is gone."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Transformed(Checkpoint):
    """Another checkpoint, forwarded whole; a subclass replaces what it changes.

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

    @property
    def source(self) -> Source:
        """Where the original's weights came from."""
        return self.original.source

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor of the original; see `Checkpoint.tensor`."""
        return self.original.tensor(name)

    def weight_format(self, name: str) -> WeightFormat | None:
        """How the original stores a weight; see `Checkpoint.weight_format`.

        A subclass forwards `quantized_weight` for what it leaves alone.
        """
        return self.original.weight_format(name)

    def close(self) -> None:
        """Close the original."""
        self.original.close()

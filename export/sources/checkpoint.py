"""A checkpoint: the float weights of a model by name, as found or transformed on each read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from numpy.typing import NDArray

from edge.bundle.manifest import ModelSpec, Source

from .checkpoint_text import CheckpointText

_Self = TypeVar("_Self", bound="Checkpoint")


class Checkpoint(ABC):
    """An open model; a context manager. Weights are read tensor by tensor, never all at once.

    Attributes:
        name: the model's short name, e.g. ``DeepSeek-R1-Distill-Qwen-1.5B``.
        spec: the decoder's numbers.
        text: tokenizer, chat template and generation defaults.
    """

    name: str
    spec: ModelSpec
    text: CheckpointText

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

    @property
    def source(self) -> Source:
        """Where the original's weights came from."""
        return self.original.source

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor of the original; see `Checkpoint.tensor`."""
        return self.original.tensor(name)

    def close(self) -> None:
        """Close the original."""
        self.original.close()

"""Opens the model to export, with every change to it that is exact in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edge.errors import ConfigError
from edge.model.spec import Task
from edge_make.progress import Progress

from .config import ExportSource
from .quantize.from_source import is_quantized
from .sources.checkpoint import Checkpoint
from .sources.download import Preview
from .sources.eagle3 import Eagle3Head
from .sources.lora import LoraCheckpoint
from .sources.opening import open_checkpoint
from .sources.picture_encoder import Vision
from .sources.vocabulary import ReducedCheckpoint


@dataclass(frozen=True)
class OpenModel:
    """A model that can be quantized.

    Attributes:
        name: its source, as the user wrote it.
        is_quantized: whether the source is quantized already.
        checkpoint: the source, its adapter merged in and its vocabulary reduced.
        reduced: the checkpoint whose vocabulary is reduced; None if it is whole.
        head: head that drafts for the model; None without one.
        vision: the model's vision encoder; None if it reads text alone.
    """

    name: str
    is_quantized: bool
    checkpoint: Checkpoint
    reduced: ReducedCheckpoint | None
    head: Eagle3Head | None
    vision: Vision | None = None


@contextmanager
def open_model(
    source: ExportSource, progress: Progress, before_download: Callable[[Preview], None]
) -> Iterator[OpenModel]:
    """Open a source, and merge what is to be merged into it.

    Args:
        source: the source to open.
        progress: told of a download, as in `open_checkpoint`.
        before_download: called before a download, as in `open_checkpoint`.

    Raises:
        CheckpointError, ConfigError, DependencyError: `open_checkpoint` or a checkpoint refuses.
    """
    with open_checkpoint(
        source.source,
        revision=source.revision,
        cache_dir=source.cache_dir,
        hub=source.hub,
        progress=progress,
        task=source.task,
        before_download=before_download,
    ) as original:
        check_generates(
            source.source,
            original.spec.task,
            (f"--eagle3 {source.eagle3}", source.eagle3 is not None, "it drafts tokens"),
            (f"--vocab-keep {source.vocab_keep}", source.vocab_keep is not None, "it is not tried"),
        )
        checkpoint, reduced, head = original, None, None
        if source.lora is not None:
            checkpoint = LoraCheckpoint(checkpoint, source.lora)
        if source.vocab_keep is not None:
            checkpoint = reduced = ReducedCheckpoint(
                checkpoint, source.vocab_keep, source.vocab_size
            )
        if source.eagle3 is not None:
            head = Eagle3Head(checkpoint, source.eagle3)
        opened = (source.source, is_quantized(original), checkpoint, reduced, head)
        yield OpenModel(*opened, checkpoint.vision)


def check_generates(source: str, task: Task, *options: tuple[str, bool, str]) -> None:
    """Refuse options that only a model that generates can have.

    Args:
        source: the model, for messages.
        task: task of the model.
        options: name of each, whether it is given, and why it is refused.

    Raises:
        ConfigError: an option is given to another model; the message names it.
    """
    for option, given, why in options:
        if given and task != "generate":
            raise ConfigError(
                f"{option} is for models that generate, and {source} is to {task}: {why}; leave "
                "it out"
            )

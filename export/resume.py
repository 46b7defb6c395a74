"""Keeps the finished part of a calibrated export, so that the next export resumes there.

``.r1.edge-llm-calibration``, beside the target ``r1``, holds the data files as far as written.
``layer-N.npz`` has the hidden states after N layers, and the factors folded into the weights.
``state.json`` is replaced when a layer is done; the lm_head counts as one. All of it is bound to a
key: the hash of everything that decides a byte of the data files up to there. The bundle's data
files are hard links to these. So all of it can stay until the bundle is in place, and no file takes
room twice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge._version import __version__
from edge.bundle.linears import linear_layers
from edge.bundle.manifest import LinearInfo
from edge.bundle.update import fsync
from edge_make.target import write_durably

from .config import ExportRecipe
from .graph.data_file import DataFile, open_data_file
from .graph.linear_nodes import StoredLinear
from .quantize.calibration import runtime_version
from .quantize.plan import BlockPlan
from .sources.checkpoint import Checkpoint

STATE_NAME = "state.json"
Array = NDArray[np.float32]
_log = logging.getLogger(__name__)


def calibration_key(
    recipe: ExportRecipe, checkpoint: Checkpoint, ids: NDArray[np.int64], *, wide: bool
) -> str:
    """Hash the model, the recipe, the calibration tokens and the libraries' versions.

    Args:
        recipe: how the numbers are stored.
        checkpoint: the model to quantize.
        ids: the calibration tokens, int64 ``[sequences, length]``.
        wide: value of ``wide_input_scales`` of `targets.Target`.
    """
    source = checkpoint.source
    facts = {
        "edge-llm": __version__,
        "numpy": np.__version__,
        "onnxruntime": runtime_version(),
        "source": source.sha256,
        # The same bytes of a quantized checkpoint mean other weights under another config.json.
        "formats": [
            repr(checkpoint.weight_format(name))
            for layer in linear_layers(checkpoint.spec)
            for name in layer.weights
        ],
        "adapter": source.adapter.sha256 if source.adapter else None,
        "model": msgspec.to_builtins(checkpoint.spec),
        "tokenizer": hashlib.sha256(checkpoint.text.tokenizer_json).hexdigest(),
        "tokens": hashlib.sha256(ids.tobytes()).hexdigest(),
        "shape": ids.shape,
        "recipe": [recipe.quant, recipe.group_size, recipe.keep, recipe.clip, recipe.rounding],
        # An older edge-llm of the same version carried only one model's state from layer to layer.
        "carries_rounded": "gptq" in recipe.rounding,
        # An older one flipped no channels, and searched AWQ's factors on more rows and tokens.
        "awq": 3,
        # An older one kept channels in float, and down out of int8-w8a8.
        "ranges_per_token": True,
        "rotate": recipe.rotate,
        "dtype": recipe.float_type,
        "wide_input_scales": wide,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    """Content of ``state.json``; floats are written in hex, since JSON has no infinity."""

    key: str
    finished: int
    lengths: dict[str, int]
    linears: dict[str, list[StoredLinear]]
    infos: dict[str, LinearInfo]
    peaks: dict[str, str]


@dataclass(frozen=True)
class Finished:
    """Results of the blocks that are planned, converted and stored.

    Attributes:
        blocks: number of finished blocks of `quantize.plan.linear_blocks`.
        linears: the stored linears, by name, as each graph reads them.
        infos: the manifest's descriptions of the linears, by name.
        factors: factors of all plans, by linear.
        peaks: peaks of all plans, by value.
        hidden: `BlockPlan.hidden` of the last of these blocks; None before the first and without
            calibration.
    """

    blocks: int = 0
    linears: Mapping[str, list[StoredLinear]] = field(default_factory=dict)
    infos: Mapping[str, LinearInfo] = field(default_factory=dict)
    factors: Mapping[str, Array] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    hidden: Array | None = None

    def after(
        self,
        plan: BlockPlan,
        linears: Mapping[str, list[StoredLinear]],
        infos: Mapping[str, LinearInfo],
    ) -> Finished:
        """Add one more block: its plan, and its linears as they were stored."""
        return Finished(
            self.blocks + 1,
            {**self.linears, **linears},
            {**self.infos, **infos},
            {**self.factors, **plan.factors},
            {**self.peaks, **plan.peaks},
            plan.hidden,
        )


@dataclass(frozen=True)
class Work:
    """Where an export writes its weights, and from which block on.

    Attributes:
        files: a data file for each graph, positioned after the finished blocks.
        finished: blocks that an earlier export finished before it was interrupted; empty if new.
        save: called after each block with everything finished so far.
    """

    files: list[DataFile]
    finished: Finished
    save: Callable[[Finished], None]


@contextlib.contextmanager
def fresh_work(targets: Sequence[Path]) -> Iterator[Work]:
    """Write data files in place and keep nothing of an export that fails."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_data_file(target)) for target in targets]
        yield Work(files, Finished(), _keep_nothing)


@contextlib.contextmanager
def resumable_work(directory: Path, key: str, targets: Sequence[Path]) -> Iterator[Work]:
    """Write data files in a directory and link them to their targets when the block ends.

    The finished blocks stay there, after an exception too, and the next export resumes after
    them. If they are damaged or have another key, it begins anew. Whoever puts the targets in place
    removes the directory.

    Args:
        directory: keeps everything until then.
        key: key of this export, from `calibration_key`.
        targets: paths of the data files, which do not exist yet.
    """
    finished, lengths = _read_or_begin(directory, key)
    saved = finished.blocks
    try:
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(
                    open_data_file(directory / target.name, lengths.get(target.name))
                )
                for target in targets
            ]

            def save(now: Finished) -> None:
                nonlocal saved
                _save(directory, key, now, files)
                saved = now.blocks

            yield Work(files, finished, save)
    except BaseException:
        if saved == 0:
            shutil.rmtree(directory)
        raise
    _link(directory, targets)


def _keep_nothing(finished: Finished) -> None:
    """Save nothing: an export without calibration is soon done again."""


def _read_or_begin(directory: Path, key: str) -> tuple[Finished, Mapping[str, int]]:
    """Read the finished blocks and the data files' lengths then, or clear the directory."""
    if (directory / STATE_NAME).is_file():
        try:
            finished, lengths = _read(directory, key)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("beginning the calibration again: %s (%s)", directory, error)
        else:
            _log.warning(
                "going on with an interrupted calibration: %d layers are done", finished.blocks
            )
            return finished, lengths
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
    directory.mkdir()
    return Finished(), {}


def _read(directory: Path, key: str) -> tuple[Finished, Mapping[str, int]]:
    stored = msgspec.json.decode((directory / STATE_NAME).read_bytes(), type=_Stored)
    if stored.key != key:
        raise ValueError("it is of another model, recipe or text")
    # Open it here, since np.load leaves a file open that is no archive.
    with (directory / _arrays_name(stored.finished)).open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        hidden = arrays["hidden"]
        factors = {
            name.removeprefix("factors."): arrays[name] for name in arrays.files if name != "hidden"
        }
    for name, length in stored.lengths.items():
        found = (directory / name).stat()
        if found.st_size < length:
            raise ValueError(f"{name} is shorter than it was")
        if found.st_nlink > 1:  # it will be truncated and written on
            raise ValueError(f"{name} is part of a bundle that is in place")
    peaks = {name: float.fromhex(value) for name, value in stored.peaks.items()}
    finished = Finished(stored.finished, stored.linears, stored.infos, factors, peaks, hidden)
    return finished, stored.lengths


def _save(directory: Path, key: str, finished: Finished, files: Sequence[DataFile]) -> None:
    """Replace the state; after the return it survives a power cut."""
    assert finished.hidden is not None
    lengths = {file.path.name: file.sync() for file in files}
    arrays = {f"factors.{name}": values for name, values in finished.factors.items()}
    saved = directory / _arrays_name(finished.blocks)
    temp = directory / f"{STATE_NAME}.tmp"
    try:
        with saved.open("wb") as file:
            np.savez(file, hidden=finished.hidden, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        write_durably(temp, _encode(key, finished, lengths))
        temp.replace(directory / STATE_NAME)
    except OSError:  # a full disk would stay full
        temp.unlink(missing_ok=True)
        saved.unlink(missing_ok=True)
        raise
    fsync(directory)
    (directory / _arrays_name(finished.blocks - 1)).unlink(missing_ok=True)


def _encode(key: str, finished: Finished, lengths: dict[str, int]) -> bytes:
    stored = _Stored(
        key=key,
        finished=finished.blocks,
        lengths=lengths,
        linears=dict(finished.linears),
        infos=dict(finished.infos),
        peaks={name: value.hex() for name, value in finished.peaks.items()},
    )
    return msgspec.json.encode(stored)


def _link(directory: Path, targets: Sequence[Path]) -> None:
    """Link the closed data files to their targets, and keep everything where that is possible."""
    try:
        for target in targets:
            os.link(directory / target.name, target)
        return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        _log.info("no hard links in %s (%s): moving the files", directory, error)
    # Remove the state first, so that a kill between the moves leaves no state that lacks a file.
    (directory / STATE_NAME).unlink(missing_ok=True)
    for target in targets:
        (directory / target.name).replace(target)
    shutil.rmtree(directory)


def _arrays_name(finished: int) -> str:
    return f"layer-{finished}.npz"

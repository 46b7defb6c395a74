"""What a calibrated export has finished, kept beside the target so that the next one goes on there.

In ``.r1.edge-llm-calibration`` lie the weights' data files as far as they are written,
``layer-N.npz`` (the hidden states after N layers, and the factors folded into the weights) and
``state.json``, which is replaced when a layer is done. All of it is bound to a key: the hash of
whatever decides a byte of the data files up to there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge._version import __version__
from edge.bundle.manifest import LinearInfo
from edge.bundle.update import fsync, write_durably

from .config import ExportConfig
from .graph.data_file import DataFile
from .graph.decoder import StoredLinear
from .quantize.calibration import runtime_version
from .sources.checkpoint import Checkpoint

STATE_NAME = "state.json"
Array = NDArray[np.float32]
_log = logging.getLogger(__name__)


def calibration_key(config: ExportConfig, checkpoint: Checkpoint, ids: NDArray[np.int64]) -> str:
    """Hash of the model, the recipe, the calibration tokens and the libraries' versions."""
    source = checkpoint.source
    facts = {
        "edge-llm": __version__,
        "numpy": np.__version__,
        "onnxruntime": runtime_version(),
        "source": source.sha256,
        "adapter": source.adapter.sha256 if source.adapter else None,
        "model": msgspec.to_builtins(checkpoint.spec),
        "tokenizer": hashlib.sha256(checkpoint.text.tokenizer_json).hexdigest(),
        "tokens": hashlib.sha256(ids.tobytes()).hexdigest(),
        "shape": ids.shape,
        "recipe": [config.quant, config.group_size, config.keep, config.clip, config.rounding],
        "rotate": config.rotate,
        "dtype": config.float_type,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    """Content of ``state.json``; floats are written in hex, since JSON has no infinity."""

    key: str
    finished: int
    lengths: dict[str, int]
    linears: list[dict[str, StoredLinear]]
    infos: dict[str, LinearInfo]
    peaks: dict[str, str]
    input_scales: dict[str, str]


class CalibrationState:
    """Layers that are done. A context manager: an exception inside it tells where the rest lies.

    Args:
        directory: where it is kept; None keeps nothing (an export without calibration).
        num_graphs: graphs of the bundle.
        key: see `calibration_key`.

    Attributes:
        finished: decoder layers that are done.
        linears: of the finished layers, for each graph.
        infos: of the finished layers.
        hidden: after the finished layers, float32 ``[sequences, seq_len, hidden]``.
        factors: folded into the weights, by linear.
        peaks, input_scales: of the finished layers.
    """

    def __init__(self, directory: Path | None, num_graphs: int, key: str = "") -> None:
        self._directory = directory
        self._key = key
        self.finished = 0
        self._lengths: dict[str, int] = {}
        self.linears: list[dict[str, StoredLinear]] = [{} for _ in range(num_graphs)]
        self.infos: dict[str, LinearInfo] = {}
        self.hidden: Array | None = None
        self.factors: dict[str, Array] = {}
        self.peaks: dict[str, float] = {}
        self.input_scales: dict[str, float] = {}

    @classmethod
    def open(cls, directory: Path, key: str, num_graphs: int) -> CalibrationState:
        """Read what is there, or begin anew if there is nothing of this key or it is damaged."""
        state = cls(directory, num_graphs, key)
        if (directory / STATE_NAME).is_file():
            try:
                state._read(directory)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                _log.warning("beginning the calibration again: %s (%s)", directory, error)
                state = cls(directory, num_graphs, key)
            else:
                _log.warning(
                    "going on with an interrupted calibration: %d layers are done", state.finished
                )
                return state
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
        directory.mkdir()
        return state

    def data_file(self, target: Path) -> DataFile:
        """Open a data file behind the finished layers; `finish` moves it to ``target``."""
        if self._directory is None:
            return DataFile(target)
        return DataFile(self._directory / target.name, self._lengths.get(target.name))

    def save(
        self,
        hidden: Array | None,
        peaks: dict[str, float],
        input_scales: dict[str, float],
        files: list[DataFile],
    ) -> None:
        """Count one more layer as done; when this returns, a power cut does not take it back.

        Args:
            hidden: float32 ``[sequences, seq_len, hidden]``, after the layer.
            peaks: of all layers so far.
            input_scales: of all layers so far.
            files: the data files, with everything of the layer in them.
        """
        assert self._directory is not None
        assert hidden is not None
        self.finished += 1
        lengths = {file.path.name: file.sync() for file in files}
        arrays = {f"factors.{name}": values for name, values in self.factors.items()}
        with (self._directory / _arrays_name(self.finished)).open("wb") as file:
            np.savez(file, hidden=hidden, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        stored = _Stored(
            key=self._key,
            finished=self.finished,
            lengths=lengths,
            linears=self.linears,
            infos=self.infos,
            peaks={name: value.hex() for name, value in peaks.items()},
            input_scales={name: value.hex() for name, value in input_scales.items()},
        )
        temp = self._directory / f"{STATE_NAME}.tmp"
        write_durably(temp, msgspec.json.encode(stored))
        temp.replace(self._directory / STATE_NAME)
        fsync(self._directory)
        (self._directory / _arrays_name(self.finished - 1)).unlink(missing_ok=True)

    def finish(self, targets: Sequence[Path]) -> None:
        """Move the closed data files to where they belong and forget the rest."""
        if self._directory is None:
            return
        # First, so that a kill between the two moves is no state with half of its files.
        (self._directory / STATE_NAME).unlink(missing_ok=True)
        for target in targets:
            (self._directory / target.name).replace(target)
        shutil.rmtree(self._directory)

    def __enter__(self) -> CalibrationState:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._directory is None or kind is None:
            return
        if self.finished == 0:
            shutil.rmtree(self._directory)
        else:
            _log.warning(
                "%d calibrated layers are kept in %s: the same export goes on there; delete it "
                "otherwise",
                self.finished,
                self._directory,
            )

    def _read(self, directory: Path) -> None:
        stored = msgspec.json.decode((directory / STATE_NAME).read_bytes(), type=_Stored)
        if stored.key != self._key:
            raise ValueError("it is of another model, recipe or text")
        # Opened here: np.load leaves a file open that is no archive.
        with (directory / _arrays_name(stored.finished)).open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            self.hidden = arrays["hidden"]
            self.factors = {
                name.removeprefix("factors."): arrays[name]
                for name in arrays.files
                if name != "hidden"
            }
        for name, length in stored.lengths.items():
            if (directory / name).stat().st_size < length:
                raise ValueError(f"{name} is shorter than it was")
        self.finished = stored.finished
        self._lengths = stored.lengths
        self.linears, self.infos = stored.linears, stored.infos
        self.peaks = {name: float.fromhex(value) for name, value in stored.peaks.items()}
        self.input_scales = {
            name: float.fromhex(value) for name, value in stored.input_scales.items()
        }


def _arrays_name(finished: int) -> str:
    return f"layer-{finished}.npz"

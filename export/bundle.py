"""Writes a bundle so that its path never holds half of one.

While a target ``r1`` is written, up to four entries are beside it. ``.r1.edge-llm-lock`` is an
flock, held by the one process that writes. ``.r1.edge-llm-staging`` is the unfinished bundle.
``.r1.edge-llm-scratch`` has what an export needs until it ends. On file systems that cannot
exchange two directories there is ``.r1.edge-llm-old``. Whoever holds the lock owns the others: if
they exist when it takes the lock, a killed export left them, and they are removed. Only
``.r1.edge-llm-calibration`` outlives an export that failed or was killed, at any step: the next
export continues there, and putting a bundle in place removes it.

The finished staging directory and the old bundle trade places (`edge_make.atomic_swap`): whenever
the process is killed, the target is the whole old bundle or the whole new one.

A process that has the old bundle's files open or mapped keeps them. A process that is just opening
the bundle by name may get an old manifest and a new file: the hashes reveal that, and opening it
again works.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import stat
from pathlib import Path
from types import TracebackType

import msgspec

from edge.bundle.manifest import MANIFEST_NAME, FileInfo, Manifest, decode_manifest, is_file_name
from edge.bundle.update import fsync
from edge.errors import BundleError, ConfigError, ResourceError
from edge_make.atomic_swap import (
    check_free_space,
    check_replaceable,
    put_in_place,
    recover,
    remove,
    sweep,
)
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from edge_make.target import beside, locked, resolve_target, write_durably

_log = logging.getLogger(__name__)


class BundleWriter:
    """A context manager that writes one bundle and puts it in place with `commit`.

    Leaving the block without `commit`, or by an exception, removes everything written and leaves
    the target as it was. The old bundle's ``engines/`` were built from its ONNX, so they go with
    it. A target that is a symbolic link stays one: the directory it points to is replaced.

    Attributes:
        target: where the bundle will be, symbolic links resolved.
        calibration_directory: the directory of `resume.resumable_work`.
    """

    def __init__(
        self,
        target: Path,
        *,
        required_bytes: int,
        overwrite: bool = False,
        calibrates: bool = False,
        what: str = "the bundle",
    ) -> None:
        """Remember the target; only `__enter__` touches it.

        Args:
            target: the bundle's directory: missing, empty, or with ``overwrite`` a bundle.
            required_bytes: estimated size of all files.
            overwrite: whether to replace an existing bundle (``--force``).
            calibrates: whether `resume.resumable_work` will continue in the calibration directory
                or clear it; what it holds then counts as room for ``required_bytes``.
            what: name of what takes ``required_bytes``, for the message.
        """
        self.target = resolve_target(target)
        self._required_bytes = required_bytes
        self._overwrite = overwrite
        self._calibrates = calibrates
        self._what = what
        self._staging = beside(self.target, "staging")
        self.calibration_directory = beside(self.target, "calibration")
        self._scratch = beside(self.target, "scratch")
        self._staged: Manifest | None = None
        self._committed = False
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> BundleWriter:
        """Lock the target, remove what a killed export left, and check that it can be written.

        Raises:
            ConfigError: the target is not ours to replace, cannot be written, or another export
                is writing it.
            ResourceError: the disk is too full.
        """
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(locked(self.target))
                recover(self.target)
                check_replaceable(self.target, self._overwrite)
                self._sweep()
                required = max(self._required_bytes - self._calibrated_bytes(), 0)
                check_free_space(self.target.parent, required, self._what)
                stack.callback(self._sweep)
                stack.callback(recover, self.target)
                self._staging.mkdir()
                self._cleanup = stack.pop_all()
        except OSError as error:
            raise ConfigError(
                f"cannot write a bundle at {self.target}: {error.strerror} ({error.filename}); "
                "choose another directory"
            ) from error
        return self

    def path(self, name: str) -> Path:
        """Return the path to which to write the file ``name`` of the bundle.

        Raises:
            ValueError: the name is not a plain file name; see `edge.bundle.manifest.is_file_name`.
            RuntimeError: `stage` or `commit` was called before.
        """
        if not is_file_name(name):
            raise ValueError(f"{name!r} is no name for a file of a bundle")
        if self._committed:
            raise RuntimeError("the bundle is already in place")
        if self._staged is not None:
            raise RuntimeError("the bundle's files are already hashed")
        return self._staging / name

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file."""
        self.path(name).write_bytes(data)

    def scratch(self) -> Path:
        """Make a directory beside the target that is removed when the block ends."""
        self._scratch.mkdir(exist_ok=True)
        return self._scratch

    def stage(self, manifest: Manifest) -> Path:
        """Hash and fsync every file and write ``manifest.json``: a bundle, but not in place yet.

        Every file must be closed, and none may be written afterwards.

        Args:
            manifest: the manifest; its ``files`` are replaced here.

        Returns:
            The directory, which `commit` moves.

        Raises:
            BundleError: a graph that the manifest names was not written, or something that is not
                a plain file is among the files.
        """
        self._staged = self._write_manifest(manifest)
        return self._staging

    def commit(self, manifest: Manifest) -> Manifest:
        """Hash and fsync every file, write ``manifest.json``, put the bundle in place.

        Every file must be closed; after `stage` only the manifest is written again. The old bundle
        is deleted when the block ends.

        Args:
            manifest: the manifest; its ``files`` are replaced here.

        Returns:
            The manifest as it was written.

        Raises:
            BundleError: a graph that the manifest names was not written, or something that is not
                a plain file is among the files.
            ConfigError: something else was put at the target meanwhile.
        """
        if self._committed:
            raise RuntimeError("the bundle is already in place")
        written = self._write_manifest(manifest)
        check_replaceable(self.target, self._overwrite)
        put_in_place(self._staging, self.target)
        self._committed = True
        fsync(self.target.parent)
        remove(self.calibration_directory)
        return written

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()
        kept = not self._committed and self.calibration_directory.exists()
        if kept:
            _log.warning(
                "calibrated layers are kept in %s: the export that wrote them continues there; "
                "delete it otherwise",
                self.calibration_directory,
            )
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            layers = f", but for the layers in {self.calibration_directory}," if kept else ""
            raise ResourceError(
                f"the disk filled up while {self.target} was written ({exc.strerror}); what was "
                f"written{layers} is removed again; free some space or choose another directory"
            ) from exc

    def _write_manifest(self, manifest: Manifest) -> Manifest:
        if self._staged is None:
            files = {path.name: _seal(path) for path in sorted(self._staging.iterdir())}
        else:
            files = self._staged.files
        absent = {manifest.graphs.decoder, manifest.graphs.cpu} - files.keys()
        if absent:
            raise BundleError(f"the bundle is incomplete: {sorted(absent)} not written")
        data = encode_manifest(msgspec.structs.replace(manifest, files=files))
        written = decode_manifest(data)  # refuse here what nobody could load
        write_durably(self._staging / MANIFEST_NAME, data)
        fsync(self._staging)
        return written

    def _calibrated_bytes(self) -> int:
        """Return the bytes on disk of the calibration directory that this export uses again."""
        if not self._calibrates or not self.calibration_directory.exists():
            return 0
        files = [path.stat() for path in self.calibration_directory.iterdir()]
        # Files shared with a bundle in place stay when the directory goes, so they free no room.
        return sum(file.st_blocks * 512 for file in files if file.st_nlink <= 1)

    def _sweep(self) -> None:
        remove(self._scratch)
        sweep(self.target, self._staging)


def _seal(path: Path) -> FileInfo:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise BundleError(f"{path} is not a plain file; a bundle holds nothing else")
    info = sha256_file(path)
    fsync(path)
    return info

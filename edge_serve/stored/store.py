"""Keeps stored responses in a directory, one file each that is always whole."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from edge.bundle.kv_scales import Scales
from edge.bundle.update import fsync, replace_durably, sweep_temp, try_lock
from edge.errors import ConfigError, ResourceError
from edge.model.slot_rows import SlotRows

from .bounded import BoundedStore, Bounds, Entry
from .record import Record, UnusableError, head_of, read_record, read_rows

_log = logging.getLogger("edge_serve")
_ID = re.compile(r"resp_[0-9a-f]{24}\Z")
_SUFFIX = ".response"
_MARK = ".starts"


class ResponseStore(BoundedStore):
    """The stored responses of one server in a directory; those unfinished can go on later.

    A file that is damaged or something else is left alone, with one line in the log.

    Args:
        directory: directory of the files; made if it is missing. One server at a time may use it.
        bounds: limits of the store.
        clock: returns Unix seconds; by default those of the system.

    Raises:
        ConfigError: the directory cannot be made or read, others may read it, or another server
            uses it.
    """

    def __init__(
        self,
        directory: Path,
        bounds: Bounds | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(bounds or Bounds(), clock)
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = _open_locked(directory)
            for temp in directory.glob(f".*{_SUFFIX}.tmp"):
                sweep_temp(temp)
            paths = sorted(directory.iterdir())
        except OSError as error:
            raise ConfigError(
                f"responses_dir {directory} cannot be used: {error.strerror}; name a directory in "
                "which this user may write"
            ) from error
        for path in paths:
            if path.suffix == _MARK and _ID.match(path.stem):
                continue
            try:
                if path.suffix != _SUFFIX:
                    raise UnusableError(f"its name does not end in {_SUFFIX}")
                record = read_record(path)
                if not _ID.match(record.id) or path != self._path(record.id):
                    raise UnusableError("it has the name of another")
                self._entries[record.id] = Entry.of(record, path.stat().st_size)
            except (OSError, UnusableError) as error:
                _log.warning("%s is no stored response and is left alone: %s", path, error)
        for id_ in {path.stem for path in paths if path.suffix == _MARK} - {*self.unfinished()}:
            self.end_start(id_)

    def close(self) -> None:
        """Let another server use the directory."""
        os.close(self._descriptor)

    def unfinished(self) -> list[str]:
        """Return the ids of the responses that have not ended, oldest first."""
        found = [(e.created_at, id_) for id_, e in self._entries.items() if not e.has_ended]
        return [id_ for _, id_ in sorted(found)]

    def begin_start(self, id_: str) -> int:
        """Note that a response is about to be read in order to continue it.

        Returns:
            How many servers have noted the same and were killed before `end_start`.
        """
        try:
            with self._mark(id_).open("ab") as file:  # a byte for each; a kill leaves them
                starts = file.tell()
                file.write(b".")
        except OSError as error:
            _log.warning("the start of response %s is not noted: %s", id_, error)
            return 0
        return starts

    def end_start(self, id_: str) -> None:
        """Note that a start has ended, in whatever way."""
        with contextlib.suppress(OSError):
            self._mark(id_).unlink(missing_ok=True)

    def load_rows(self, id_: str, scales: Scales) -> SlotRows | None:
        """Read the rows that were saved with a response; None if there are none."""
        path = self._path(id_)
        try:
            return read_rows(path, scales)
        except (OSError, UnusableError) as error:
            _log.warning("the rows in %s are not used: %s", path, error)
            return None

    def save_with_rows(self, record: Record, rows: NDArray[np.uint8]) -> None:
        """Write an unfinished response with the packed rows that it names.

        If they do not fit, it is written without.

        Raises:
            ResourceError: the disk is full, or unfinished responses fill the store.
        """
        with self._lock:
            self._expire()
            others = sum(e.rows_bytes for i, e in self._entries.items() if i != record.id)
            if others + rows.nbytes <= self._bounds.rows_bytes:
                try:
                    self._write(record, rows)
                except ResourceError as error:
                    _log.warning("%s", error)
                else:
                    return
            _log.warning(
                "the %d MiB of cache rows of response %s have no room and are not kept",
                rows.nbytes >> 20,
                record.id,
            )
            assert record.unfinished is not None
            self._write(replace(record, unfinished=replace(record.unfinished, rows=None)))

    # ------------------------------------------------------------------ under the lock

    def _path(self, id_: str) -> Path:
        return self._directory / f"{id_}{_SUFFIX}"

    def _mark(self, id_: str) -> Path:
        return self._directory / f"{id_}{_MARK}"

    def _read(self, id_: str) -> Record:
        return read_record(self._path(id_))

    def _write(self, record: Record, rows: NDArray[np.uint8] | None = None) -> None:
        head = head_of(record)
        self._make_room(record, len(head))
        path = self._path(record.id)

        def write(file: BinaryIO) -> None:
            file.write(head)
            if rows is not None:
                file.write(rows.data)

        try:
            # Only its owner may read it: it has the client's request.
            replace_durably(path, write, mode=0o600)
        except OSError as error:
            raise ResourceError(
                f"cannot write {path}: {error.strerror}; free disk space, or name another "
                "responses_dir"
            ) from error
        num_bytes = len(head) + (0 if rows is None else rows.nbytes)
        self._entries[record.id] = Entry.of(record, num_bytes)

    def _remove(self, id_: str) -> None:
        path = self._path(id_)
        try:
            path.unlink(missing_ok=True)
            fsync(self._directory)
        except OSError as error:
            raise ResourceError(f"cannot remove {path}: {error.strerror}") from error
        del self._entries[id_]


def _open_locked(directory: Path) -> int:
    """Open a directory that belongs to this process; it is locked until it is closed.

    Raises:
        OSError: it cannot be opened.
        ConfigError: others may read it, or another server uses it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"responses_dir {directory} is open to other users (mode {mode:04o}), and it is to "
                f"hold what clients ask; run: chmod 700 {directory}"
            )
        if not try_lock(descriptor):
            raise ConfigError(
                f"another server uses responses_dir {directory}; name another directory for this "
                "one"
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

"""Reads the file of requests, and writes the files of answers so that a batch can resume.

An answer is appended as one line. If a killed process or a power cut left torn lines at the end,
they are cut off and their requests are asked again. So no row is lost, and none appears twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge.errors import ConfigError, RequestError, ResourceError
from edge.files import MALFORMED, open_file
from edge_make.progress import Progress, silent

from .rows import PREFIX, Row, RowError, key_of, read_answer, read_lines, read_row

_BLOCK = 1 << 16
_TODO, _DONE, _BLANK = 0, 1, 2
_CHUNK = 1 << 20  # rows to compare at once
_REPORT_ROWS = 20_000


class Journal:
    """A file of answers, which one process at a time appends to.

    Args:
        path: the file; it is made if it is missing, and repaired if its last line is torn.

    Attributes:
        num_rows: number of its lines, once `Requests.mark_done` has read them.

    Raises:
        ConfigError: it cannot be opened, is no plain file, is in use by another process, or is not
            a file of answers of a batch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; name another file"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise ConfigError(
                    f"{path} is no plain file, so a run could not be gone on with; name a file"
                )
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"another process writes {path}; wait for it, or name another file"
                ) from error
            self.num_rows = 0
            self._size = self._mend()
        except BaseException:
            os.close(self._fd)
            raise
        self._is_synced = True

    def _mend(self) -> int:
        """Cut off a torn last line, and everything from the first zero byte on; return the size.

        After a power cut a file system may have zeros where the last lines were not on the disk.
        """
        end = at = number = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            while piece := file.readline(_BLOCK):
                text = piece.partition(b"\0")[0]
                is_ours = text.startswith(PREFIX) or (PREFIX.startswith(text) and (text or end))
                if at == end and not is_ours:
                    raise self._foreign(f"line {number + 1} begins with {piece[:40]!r}")
                at += len(piece)
                if text != piece:
                    break
                if piece.endswith(b"\n"):
                    end, number = at, number + 1
        if at != end:
            os.ftruncate(self._fd, end)
        return end

    def answered(self) -> Iterator[tuple[str | None, int | None]]:
        """Read which rows have an answer here, each as `read_answer` returns it.

        Raises:
            ConfigError: a line is not an answer.
        """
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for number, line in enumerate(read_whole_lines(file), 1):
                try:
                    found = read_answer(line)
                except MALFORMED as error:
                    raise self._foreign(f"line {number}: {error}") from error
                yield found

    def append(self, line: bytes) -> None:
        """Write a line; it is on the disk after the next `sync`, or `close`.

        Raises:
            ResourceError: the disk is full, or fails.
        """
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise ResourceError(
                f"cannot write {self.path}: {what}; make room, and the same command goes on"
            ) from error
        self._size += len(line)
        self.num_rows += 1
        self._is_synced = False

    def sync(self) -> None:
        """Flush written lines to the disk."""
        if not self._is_synced:
            os.fdatasync(self._fd)
            self._is_synced = True

    def close(self, *, remove_empty: bool = False) -> None:
        """Flush written lines to the disk and close the file."""
        self.sync()
        if remove_empty and not self._size:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _foreign(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self.path} has something else than answers of a batch ({what}); name another file"
        )


def read_whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Read the lines of a file that this module wrote, however long they are."""
    for line in file:
        yield line.rstrip(b"\n")


class Requests:
    """A file of requests; only numbers are kept in memory, about 9 bytes a line.

    Args:
        path: the file.
        progress: called with the bytes read (step ``read``).

    Attributes:
        num_rows: number of its lines, without blank ones.

    Raises:
        RequestError: it cannot be read, or has no line.
    """

    def __init__(self, path: Path, progress: Progress = silent) -> None:
        self.path = path
        try:
            self._file = open_file(path)
        except OSError as error:
            raise RequestError(
                f"cannot read {path}: {error.strerror}; name a JSONL file"
            ) from error
        self._state_of_file = self._stat()
        keys, blank = array("Q"), bytearray()
        size, done = self._state_of_file[0], 0
        progress("read", 0, size, "bytes")
        for number, line in enumerate(read_lines(self._file), 1):
            done += len(line) + 1
            blank.append(not line.strip())
            try:
                keys.append(0 if blank[-1] else key_of(read_row(line, number).custom_id))
            except RowError:
                keys.append(0)  # reported when its turn comes
            if number % _REPORT_ROWS == 0:
                progress("read", min(done, size - 1), size, "bytes")
        progress("read", size, size, "bytes")
        self._keys: NDArray[np.uint64] = np.frombuffer(keys, np.uint64)
        self._state = np.frombuffer(blank, np.uint8) * np.uint8(_BLANK)
        self.num_rows = int((self._state != _BLANK).sum())
        if not self.num_rows:
            self._file.close()
            raise RequestError(f"{path} has no request; write one JSON object a line")
        self._first = self._first_lines()

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _first_lines(self) -> dict[int, int]:
        """Find repeated ids: the line of each one's first row, by key."""
        keys = np.sort(self._keys)
        again = np.unique(keys[1:][(keys[1:] == keys[:-1]) & (keys[1:] != 0)])
        del keys
        firsts: dict[int, int] = {}
        if again.size:
            for line in np.flatnonzero(np.isin(self._keys, again)):
                firsts.setdefault(int(self._keys[line]), int(line) + 1)
        return firsts

    def mark_done(self, journal: Journal) -> None:
        """Mark the rows that have an answer as done.

        Raises:
            ConfigError: an answer belongs to a row that is not here.
        """
        done, lines = array("Q"), array("Q")
        for custom_id, line in journal.answered():
            if line is None:
                assert custom_id is not None
                done.append(key_of(custom_id))
            else:
                lines.append(line)
        journal.num_rows = len(done) + len(lines)
        for line in lines:
            known = 1 <= line <= len(self._state) and self._state[line - 1] == _TODO
            if not known:
                raise self._other(journal, f"line {line}")
            key = int(self._keys[line - 1])
            if key and self._first.get(key, line) == line:
                raise ConfigError(
                    f"{journal.path} says that line {line} of {self.path} is no request, and it is "
                    "one now; remove that file, and its rows are asked again"
                )
            self._state[line - 1] = _DONE
        if not done:
            return
        answered = np.sort(np.frombuffer(done, np.uint64))
        found = 0
        for start in range(0, len(self._keys), _CHUNK):
            keys = self._keys[start : start + _CHUNK]
            state = self._state[start : start + _CHUNK]
            places = np.minimum(np.searchsorted(answered, keys), len(answered) - 1)
            here = (answered[places] == keys) & (keys != 0) & (state == _TODO)
            here &= self._is_first(start, keys)
            state[here] = _DONE
            found += int(here.sum())
        if found < len(answered):
            raise self._other(journal, self._describe(journal, answered))

    def _is_first(self, start: int, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell rows from those that repeat an earlier row's id."""
        first = np.ones(len(keys), bool)
        if self._first:
            again = np.flatnonzero(np.isin(keys, np.array(list(self._first), np.uint64)))
            for place in again:
                first[place] = self._first[int(keys[place])] == start + place + 1
        return first

    def _describe(self, journal: Journal, answered: NDArray[np.uint64]) -> str:
        """Describe one answer that belongs to no row here, or to one with another answer."""
        twice = answered[1:][answered[1:] == answered[:-1]]
        strange = answered[~np.isin(answered, self._keys)]
        for key in (*strange[:1], *twice[:1]):
            for custom_id, line in journal.answered():
                if line is None and custom_id is not None and key_of(custom_id) == key:
                    return f"custom_id {custom_id!r}"
        return "a row"

    def _other(self, journal: Journal, what: str) -> ConfigError:
        return ConfigError(
            f"{journal.path} answers {what}, which {self.path} does not have, or has answered "
            "already; name another file for the answers, or remove this one"
        )

    def rows(self, refuse: Callable[[int, RowError], None]) -> Iterator[Row]:
        """Read the rows that have no answer, in the file's order.

        Args:
            refuse: called with the number and the fault of every line that is not a request.

        Raises:
            RequestError: the file has changed since it was first read.
        """
        self._file.seek(0)
        for index, line in enumerate(read_lines(self._file)):
            if index >= len(self._state):
                raise self._changed()
            if self._state[index] != _TODO:
                continue
            number, key = index + 1, int(self._keys[index])
            try:
                row = read_row(line, number)
                first = self._first.get(key, number)
                if key and first != number:
                    raise RowError(
                        "duplicate_custom_id", f"custom_id is that of line {first}", None
                    )
            except RowError as error:
                if key and error.code != "duplicate_custom_id":
                    raise self._changed() from error
                refuse(number, error)
                continue
            if key_of(row.custom_id) != key:
                raise self._changed()
            yield row
        if self._stat() != self._state_of_file:
            raise self._changed()

    def _changed(self) -> RequestError:
        return RequestError(
            f"{self.path} was changed while it was answered; leave it as it is, and run the same "
            "command again"
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

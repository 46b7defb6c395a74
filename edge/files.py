"""Reads untrusted files: plain files of a limited size, or in chunks."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)
"""Lists the errors that parsers of JSON and TOML raise, also for text that is not UTF-8, numbers of
5,000 digits and brackets 100,000 deep."""
_CHUNK_BYTES = 1 << 22


def is_file(path: Path) -> bool:
    """Whether a plain file is there; False if it is impossible or forbidden to look.

    `Path.is_file` raises if a name is too long or a directory is closed to this user.
    """
    return stat.S_ISREG(_mode(path))


def is_directory(path: Path) -> bool:
    """Whether a directory is there; False in the cases that `is_file` names."""
    return stat.S_ISDIR(_mode(path))


def exists(path: Path) -> bool:
    """Whether anything is there; False in the cases that `is_file` names."""
    return _mode(path) != 0


def list_directory(path: Path) -> list[Path]:
    """Return the entries of a directory, in order; empty if it cannot be listed."""
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def open_file(path: Path) -> BinaryIO:
    """Open a plain file for reading.

    Anything else is refused: a pipe would block, and a device may have no end. A symbolic link is
    followed.

    Raises:
        OSError: it cannot be opened or is not a plain file; ``strerror`` says which.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return file


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a whole plain file, opened by `open_file`.

    Args:
        path: the file.
        max_bytes: size of the largest file that is read.

    Raises:
        OSError: it cannot be opened or read, is not a plain file, or is larger; ``strerror`` says
            which.
    """
    with open_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {_size(max_bytes)}", str(path))
    return data


def read_guarded_file(path: Path, max_bytes: int, owners: Collection[int] = ()) -> bytes:
    """Read a plain file that only root, this user and ``owners`` can change, as `read_file` does.

    The rule is sshd's. Links are followed; then the file and every directory above it must belong
    to one of these, and others must not write to it. A sticky directory such as ``/tmp`` passes.

    Raises:
        OSError: `read_file` fails, or somebody else can change the file.
    """
    path = Path(os.path.realpath(path))
    data = read_file(path, max_bytes)
    for each in (path, *path.parents):
        found = each.stat()
        is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        whose = None if found.st_uid in (0, os.geteuid(), *owners) else f"user {found.st_uid}"
        if found.st_mode & 0o022 and not is_sticky:
            whose = f"others (mode {stat.S_IMODE(found.st_mode):04o})"
        if whose is not None:
            raise OSError(
                errno.EPERM,
                f"{whose} can change {each}; keep it where root and this user alone can write, as "
                "in /etc/edge-llm (chown, chmod go-w)",
                str(path),
            )
    return data


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether this machine is a Jetson, on which CPU and GPU share one memory."""
    return exists(root / "dev/nvmap")


def drop_cached(descriptor: int, root: Path = Path("/")) -> None:
    """On a Jetson, drop the cached pages of an open file that this process has not mapped.

    TensorRT tries no kernel that needs more memory than is free at once. Since Jetson Linux 36.4.7
    the driver is reported to allocate no more either (llama.cpp, pull request 23732). Files that
    were just hashed fill that memory. On other machines the page cache is wanted.
    """
    if is_jetson(root):
        with contextlib.suppress(OSError):  # a read-only file system has no sync
            os.fdatasync(descriptor)  # pages that are not written yet could not be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_chunks(descriptor: int) -> Iterator[bytes]:
    """Read an open file from its start to its end, whatever its position."""
    at = 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, at):
        yield chunk
        at += len(chunk)


def decode_text(data: bytes) -> str:
    """Decode UTF-8 as `Path.read_text` does: every kind of line end becomes a newline.

    A byte-order mark, which editors on Windows write, is dropped.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    text = data.decode("utf-8").removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # ValueError: the path has a null character
        return 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"

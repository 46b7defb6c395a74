"""Replaces files so that a kill or a power failure leaves the old file or the new one, whole."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from edge.errors import ConfigError


def replace_durably(path: Path, write: Callable[[BinaryIO], object], *, mode: int) -> None:
    """Write a file beside ``path`` and swap; whenever this ends, ``path`` is whole, old or new.

    A failure leaves nothing behind. A kill leaves one file (`temp_path`), which the next call or
    `sweep_temp` removes.

    Args:
        path: the file; its directory exists.
        write: writes the content.
        mode: permissions of the file.

    Raises:
        ConfigError: another process is writing the same file.
        OSError: it cannot be written.
    """
    temp = temp_path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temp, flags, 0o600), "wb") as file:
        if not try_lock(file.fileno(), temp):
            raise ConfigError(f"another process is writing {path}; wait until it ends")
        try:
            file.truncate(0)
            write(file)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            temp.replace(path)
        except BaseException:
            temp.unlink(missing_ok=True)  # otherwise a full disk would stay full
            raise
    fsync(path.parent)


def temp_path(path: Path) -> Path:
    """Return the hidden file beside ``path`` that `replace_durably` writes first."""
    return path.with_name(f".{path.name}.tmp")  # a fixed name: a killed process leaves one at most


def sweep_temp(temp: Path) -> None:
    """Remove the file of a killed `replace_durably`, unless a living one is writing it.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        descriptor = os.open(temp, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # there is none, or it is not our file
    try:
        if try_lock(descriptor, temp):
            temp.unlink()
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, path: Path | None = None) -> bool:
    """Lock an open file or directory; the kernel unlocks it when it is closed, also by a kill.

    Args:
        descriptor: the file's descriptor.
        path: path at which it must still be; None if nobody renames it.

    Returns:
        Whether it is locked now; False if another process has it.

    Raises:
        OSError: its file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock the last holder may have renamed it to the real file.
        return path is None or os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False


def fsync(path: Path) -> None:
    """Write a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some FUSE and shared-folder mounts have no fsync for directories; nothing can be done.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)

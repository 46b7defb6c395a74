"""What changes a bundle that others may read or replace meanwhile: its lock, and durable writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from edge.errors import ConfigError


def resolve_target(target: Path) -> Path:
    """Follow every symbolic link.

    Raises:
        ConfigError: a loop of links, or the root directory.
    """
    try:
        resolved = target.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links; Python < 3.13 says RuntimeError
        raise ConfigError(f"{target} cannot be resolved: {error}") from error
    if not resolved.name:
        raise ConfigError(f"{target} is the root directory; name a directory for the bundle")
    return resolved


def beside(target: Path, role: str) -> Path:
    """The hidden path next to ``target`` that plays ``role`` (lock, staging, old)."""
    return target.with_name(f".{target.name}.edge-llm-{role}")


@contextlib.contextmanager
def locked(target: Path, what: str = "export") -> Iterator[None]:
    """Hold the target's lock; the kernel lets go of it however the process ends.

    Args:
        target: what is held.
        what: work of this kind holds it, as another one is told.

    Raises:
        ConfigError: another process holds it, or it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = beside(target, "lock")
    descriptor = _acquire(path, target, what)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, target: Path, what: str) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ConfigError(
                f"cannot write in {target.parent}: {error.strerror}; choose another directory"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have unlinked this very file before we locked it.
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except FileNotFoundError:
            pass  # unlinked: take the next one
        except BlockingIOError as error:
            writer = os.read(descriptor, 20).decode("ascii", "replace") or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"another {what} (process {writer}) is writing {target}; wait until it ends"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(
                f"cannot lock {path}: {error.strerror}; choose a directory on another file system"
            ) from error
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file whose content a power cut cannot take back.

    It is a new one: what was at ``path``, such as a link that a bundle came with, is taken away.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, write: Callable[[BinaryIO], object], *, mode: int) -> None:
    """Write a file beside ``path`` and swap: whenever this ends, ``path`` is whole, old or new.

    What fails leaves nothing behind. What is killed leaves one file (`temp_path`), which the next
    call or `sweep_temp` takes away.

    Args:
        path: the file; its directory is there.
        write: writes the content.
        mode: rights of the file.

    Raises:
        ConfigError: another process is writing the same file.
        OSError: it cannot be written.
    """
    temp = temp_path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temp, flags, 0o600), "wb") as file:
        if not _lock(file.fileno(), temp):
            raise ConfigError(f"another process is writing {path}; wait until it ends")
        try:
            file.truncate(0)
            write(file)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            temp.replace(path)
        except BaseException:
            temp.unlink(missing_ok=True)  # a full disk would stay full
            raise
    fsync(path.parent)


def temp_path(path: Path) -> Path:
    """The hidden file beside ``path`` that `replace_durably` writes first."""
    return path.with_name(f".{path.name}.tmp")  # a fixed name: a killed process leaves one at most


def sweep_temp(temp: Path) -> None:
    """Remove what a killed `replace_durably` left, if no living one is writing it.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        descriptor = os.open(temp, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # none is there, or it is no file of ours
    try:
        if _lock(descriptor, temp):
            temp.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Lock an open file, if it is still the one at ``path``; the kernel unlocks what is killed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock the last holder may have renamed it to the real file.
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False


def fsync(path: Path) -> None:
    """Make a file, or the names in a directory, last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some FUSE and shared-folder mounts have no fsync for directories: nothing to be done.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)

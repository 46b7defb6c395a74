"""Locks a bundle's directory, which others may read or replace meanwhile, and writes its files."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

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
    """Return the hidden path next to ``target`` that plays ``role`` (lock, staging, old)."""
    return target.with_name(f".{target.name}.edge-llm-{role}")


@contextlib.contextmanager
def locked(target: Path, what: str = "export") -> Iterator[None]:
    """Hold the target's lock; the kernel releases it however the process ends.

    Args:
        target: the directory to lock.
        what: the kind of work, which another process that wants the lock is told.

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
            pass  # it was unlinked: lock the new one
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
    """Write a file that survives a power cut.

    It is always a new file: whatever was at ``path``, such as a link from a bundle, is removed.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

"""Puts a finished bundle in its place: whole, old or new, whenever a process is killed.

On Linux two directories trade places in one step (``renameat2(2)`` with ``RENAME_EXCHANGE``). Where
the file system refuses that (some network and FUSE mounts), the old bundle is renamed aside first.
A kill between these two renames leaves no target until `recover` puts the old bundle back; whoever
holds the target's lock calls `recover` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.manifest import (
    ENGINES_DIR,
    MANIFEST_NAME,
    Manifest,
    decode_manifest,
    read_manifest,
)
from edge.bundle.trust import SIGNATURE_NAME
from edge.bundle.update import fsync, temp_path
from edge.errors import BundleError, ConfigError, ResourceError
from edge.files import MALFORMED, read_file
from edge_make.manifest_bytes import encode_manifest
from edge_make.target import beside, locked, resolve_target, write_durably

_log = logging.getLogger(__name__)

ORIGIN_NAME = ".origin.json"
"""File in a bundle from a registry: the registry's own manifest, which lists the pieces."""
_MANIFEST_TEMP = f".{MANIFEST_NAME}.tmp"
_MARGIN_BYTES = 64 << 20  # for block sizes, directories and manifest, which estimates leave out
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def put_in_place(staging: Path, target: Path) -> None:
    """Make ``staging`` the new ``target`` and put the old bundle, if any, aside.

    The old bundle is then at ``staging``, or at `aside` where the file system cannot exchange.

    Raises:
        OSError: it failed; `recover` undoes a first half.
    """
    try:
        staging.rename(target)  # works if nothing or an empty directory is there
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    try:
        exchange(staging, target)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _log.info("%s cannot exchange directories: renaming twice", target.parent)
        target.rename(aside(target))
        staging.rename(target)  # if this fails, `recover` puts the old one back


def aside(target: Path) -> Path:
    """Return the hidden path beside ``target`` that holds the old bundle between two renames."""
    return beside(target, "old")


def recover(target: Path) -> None:
    """Put the old bundle back if a swap by two renames was cut off between them."""
    try:
        aside(target).rename(target)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return  # there is a target: the swap was finished
        raise
    fsync(target.parent)
    _log.warning("put back %s, which an interrupted export had moved aside", target)


def sweep(target: Path, staging: Path) -> None:
    """Remove a staging directory, what a swap left aside, and what earlier sweeps left.

    A half removed directory must not be where `recover` finds a whole bundle, nor where a pull
    resumes, which would write into files that a server still reads. So each is renamed first.
    """
    for directory in (staging, aside(target)):
        with contextlib.suppress(FileNotFoundError):
            directory.rename(beside(target, f"gone-{secrets.token_hex(3)}"))
    prefix = beside(target, "gone-").name
    for path in list(target.parent.iterdir()):
        if path.name.startswith(prefix):
            remove(path)


def remove(directory: Path) -> None:
    """Remove a directory, if it exists; log what cannot be removed."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("cannot remove %s: %s", directory, error)


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse everything except a missing or empty directory and, with ``overwrite``, a bundle.

    Raises:
        ConfigError: the target is not ours to replace.
    """
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{target} exists and is not a directory; choose another path")
    if target.is_mount():
        raise ConfigError(
            f"{target} is a mount point and cannot be replaced; name a directory inside it, "
            f"e.g. {target / 'bundle'}"
        )
    entries = {path.name for path in target.iterdir()}
    if not entries:
        return
    strangers = sorted(entries - own_entries(target))
    if strangers:
        shown = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
        raise ConfigError(
            f"{target} holds files that are not part of a bundle ({shown}) and would be lost; "
            "move them away or choose another directory"
        )
    if not overwrite:
        raise ConfigError(
            f"{target} already holds a bundle; replace it with --force or choose another directory"
        )


class _AnyManifest(msgspec.Struct):
    """The keys that make a directory a bundle of any schema version, damaged or not."""

    schema_version: int
    producer: str
    files: dict[str, Any]


def own_entries(bundle: Path) -> set[str]:
    """Name the entries that an export or a build wrote; empty if this is not a bundle."""
    try:
        manifest = msgspec.json.decode(
            read_file(bundle / MANIFEST_NAME, 1 << 24), type=_AnyManifest
        )
    except (OSError, *MALFORMED):
        return set()
    added = (SIGNATURE_NAME, ORIGIN_NAME)
    temps = (temp_path(Path(name)).name for name in added)
    return {*manifest.files, MANIFEST_NAME, _MANIFEST_TEMP, ENGINES_DIR, *added, *temps}


def update_manifest(bundle: Path, manifest: Manifest) -> Manifest:
    """Replace only ``manifest.json`` of a bundle, atomically (to add a quality report, say).

    Call it after the `BundleWriter` block: both take the same lock.

    Args:
        bundle: the bundle's directory.
        manifest: the new manifest; ``files`` must be those of the bundle.

    Returns:
        The manifest as written.

    Raises:
        BundleError: no bundle is there, or its files are not those of ``manifest``.
        ConfigError: an export is writing to the same path, or this user may not.
        ResourceError: the disk is full; the old manifest stays.
    """
    bundle = resolve_target(bundle)
    data = encode_manifest(manifest)
    written = decode_manifest(data)
    with locked(bundle):
        if read_manifest(bundle).files != manifest.files:
            raise BundleError(
                f"{bundle} holds other files than the manifest that was to be written; "
                "was it exported again meanwhile?"
            )
        temp = bundle / _MANIFEST_TEMP
        try:
            write_durably(temp, data)
            temp.replace(bundle / MANIFEST_NAME)
            fsync(bundle)
        except OSError as error:
            path = bundle / MANIFEST_NAME
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"the disk filled up while {path} was written ({error.strerror}); free some "
                    "space and run it again (the old one is as it was)"
                ) from error
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        finally:
            temp.unlink(missing_ok=True)
    return written


def check_free_space(directory: Path, required_bytes: int, what: str = "the bundle") -> None:
    """Refuse a disk that is too full for a bundle.

    Args:
        directory: a directory on it.
        required_bytes: room that is needed.
        what: name of what needs it, for the message.

    Raises:
        ResourceError: there is less room.
    """
    free = shutil.disk_usage(directory).free
    if free < required_bytes + _MARGIN_BYTES:
        raise ResourceError(
            f"{directory} has {human(free)} free, but {what} takes {human(required_bytes)} "
            f"and {human(_MARGIN_BYTES)} must be spare; free some space or choose another disk"
        )


def human(num_bytes: int) -> str:
    """Write a size for a person."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB"


def exchange(one: Path, other: Path) -> None:
    """Let two paths trade places atomically.

    Raises:
        OSError: `_NOT_SUPPORTED` where the system or the file system cannot do it.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc >= 2.28
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))

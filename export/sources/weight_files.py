"""Knows weight files: their usual name, their hash, and those that are never opened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from edge.errors import CheckpointError
from edge_make.file_hash import sha256_file

WEIGHTS_NAME = "model.safetensors"
HEAD_BYTES = 256
"""Number of first bytes that `refuse_stand_in` must see."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def hash_files(paths: Iterable[Path]) -> str:
    """Hash files as ``sha256sum NAME ... | sha256sum`` does in their directory."""
    lines = "".join(f"{sha256_file(path).sha256}  {path.name}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def no_weights(
    problem: str, directory: Path, convert: str, otherwise: str, patterns: Sequence[str] = _PICKLED
) -> CheckpointError:
    """Say that weights are missing, and what to do.

    Args:
        problem: the missing files and their place.
        directory: directory in which to look for pickled weights.
        convert: how to convert them; a format in which ``name`` is the first.
        otherwise: advice if there are none.
        patterns: patterns of their names.
    """
    pickled = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
    if not pickled:
        return CheckpointError(f"{problem}; {otherwise}")
    return CheckpointError(
        f"{problem}, only {pickled[0]}: pickled weights can run code and are never opened; convert "
        f"them where you trust them: {convert.format(name=pickled[0])}"
    )


def refuse_stand_in(path: Path, head: bytes) -> None:
    """Refuse what a download leaves in place of a file: a pointer of Git LFS, or a web page.

    Args:
        path: the file.
        head: its first `HEAD_BYTES`, or all of it.

    Raises:
        CheckpointError: it is one of these.
    """
    if head.startswith(b"version https://git-lfs.github.com/"):  # github.com/git-lfs, docs/spec.md
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its directory"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path} is a web page, not the file itself; download it again")

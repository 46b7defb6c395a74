"""Hashes a file for a manifest."""

from __future__ import annotations

from pathlib import Path

from edge.bundle.manifest import FileInfo
from edge.bundle.verified_files import sha256_descriptor


def sha256_file(path: Path) -> FileInfo:
    """Hash a file in chunks; memory stays constant."""
    with path.open("rb") as file:
        return sha256_descriptor(file.fileno())

"""Writes the records that `edge` reads of engines that this machine built, and hashes engines.

A record is what ``sha256sum`` writes, so ``sha256sum -c /var/lib/edge-llm/engine-records/*`` tells
which engines are unchanged since their build. Removing a record ends the trust in its engine.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from contextlib import suppress
from pathlib import Path

from edge.bundle.engine_file import EngineInfo, open_plan, read_outside
from edge.bundle.engine_records import RECORDS_VARIABLE, record_directories
from edge.bundle.update import replace_durably
from edge.errors import ConfigError
from edge.files import read_guarded_file

_PROBE = f"probe-{os.getpid()}"


def record_engine(path: Path, data: bytes) -> None:
    """Vouch for an ``engine.json`` that this machine wrote; it has the hashes of the other files.

    Args:
        path: where it is, or is about to be; the record tells it to its readers.
        data: its bytes.

    Raises:
        ConfigError: no record can be written, or it would not count, as where others may write.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    _write(sha256, f"{sha256}  ".encode() + os.fsencode(path.resolve()) + b"\n")


def check_recording() -> None:
    """Check that a build could be recorded.

    Raises:
        ConfigError: it could not; `record_engine` would raise the same.
    """
    _write(_PROBE, b"")
    forget_engine(_PROBE)


def forget_engine(sha256: str) -> None:
    """Stop vouching for the file with this hash, if a build of this user wrote it."""
    with suppress(OSError):
        (record_directories()[0] / sha256).unlink()


def _write(name: str, line: bytes) -> None:
    directory = record_directories()[0]
    try:
        missing = [each for each in (directory, *directory.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
            each.chmod(0o755)  # the server runs as another user than the builder
        replace_durably(directory / name, lambda file: file.write(line), mode=0o644)
        read_guarded_file(directory / name, len(line))
    except OSError as error:
        forget_engine(name)
        raise ConfigError(
            f"no record of an engine can be kept in {directory}: {error.strerror}; "
            f"{RECORDS_VARIABLE} names another directory, such as one on a volume of the container"
        ) from error


def verify_plan(directory: Path, info: EngineInfo) -> Path:
    """Hash the plan, and the weights outside it, before anything loads them.

    Returns:
        The plan's path.

    Raises:
        IntegrityError: one is missing, or has another size or hash than ``engine.json`` says.
    """
    with open_plan(directory, info):
        if info.outside:
            buffer = memoryview(bytearray(1 << 21))
            deque(read_outside(directory, info, info.outside, buffer), maxlen=0)
        return directory / info.plan

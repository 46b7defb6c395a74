"""Reads files of API keys, and makes keys: one ``NAME:KEY`` or ``NAME:sha256:HEX`` per line.

A key of `make_key` has 256 random bits, so a plain SHA-256 is enough to store: slow hashes of
passwords guard against guessing, and such a key cannot be guessed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge.errors import ConfigError
from edge.files import open_file

MIN_KEY_CHARS = 16
MAX_FILE_BYTES = 1 << 20
_KEY_BYTES = 32
_HASHED = re.compile(r"(?:(.*):)?sha256:([0-9a-f]{64})")
_FORM = (
    "NAME:KEY, or NAME:sha256: and 64 lower-case hexadecimal digits (edge-llm key NAME makes both)"
)
_NAME = re.compile(r"[!-9;-~]{1,64}")  # printable ASCII without a colon


@dataclass(frozen=True)
class KeyEntry:
    """One key of a file.

    Attributes:
        name: its name.
        digest: SHA-256 of the key.
        key: the key itself; None where the file has only its hash.
    """

    name: str
    digest: bytes
    key: str | None = field(default=None, repr=False)


def read_key_file(path: Path, environ: Mapping[str, str] | None = None) -> list[KeyEntry]:
    """Read the keys of a file; empty lines and those that begin with ``#`` are skipped.

    The file must be readable by its owner alone. Credentials of systemd are exempt: their directory
    is closed to others, and the access list that lets the service in shows as rights of the group.

    Args:
        path: the file.
        environ: used instead of ``os.environ``; systemd sets ``CREDENTIALS_DIRECTORY`` in it.

    Raises:
        ConfigError: it cannot be read, others can read it, it is too large or has no key. Or a
            line has no name or a blank within it, or a key is short or repeated.
    """
    entries: dict[bytes, KeyEntry] = {}
    variables = os.environ if environ is None else environ
    for number, line in enumerate(_read(path, variables).splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        # Never show the line: a key may be in it.
        if " " in text or not text.isprintable():
            raise ConfigError(
                f"line {number} of {path} has a blank or a control character in it, which neither "
                f"a name nor a key may have; write {_FORM}"
            )
        entry = _parse(text)
        if entry is not None and not entry.name:
            raise ConfigError(f"line {number} of {path} has no name before a colon; write {_FORM}")
        if entry is None or entry.digest in entries:
            raise ConfigError(
                f"line {number} of {path} has no new key of at least {MIN_KEY_CHARS} ASCII "
                f"characters (shorter ones can be guessed); write {_FORM}"
            )
        entries[entry.digest] = entry
    if not entries:
        raise ConfigError(f"{path} has no API key; write one per line, as NAME:KEY")
    return list(entries.values())


def make_key() -> str:
    """Make a new key: 43 characters of URL-safe base64, 256 random bits."""
    return secrets.token_urlsafe(_KEY_BYTES)


def hashed_line(name: str, key: str) -> str:
    """Write the line of a key file that holds only the hash of a key.

    Raises:
        ConfigError: the name or the key cannot be written in a key file.
    """
    if not _NAME.fullmatch(name) or name.startswith("#"):
        raise ConfigError(
            f"the name {name!r} is not 1 to 64 printable ASCII characters without spaces and colons"
        )
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"the key is not at least {MIN_KEY_CHARS} ASCII characters in one line without spaces; "
            "without --stdin a good one is made"
        )
    return f"{name}:sha256:{key_digest(key.encode()).hex()}"


def key_digest(key: bytes) -> bytes:
    """Hash a key as it is hashed in a key file."""
    return hashlib.sha256(key).digest()


def _parse(text: str) -> KeyEntry | None:
    """Read a line; None if it has no key, and an empty name if it has none."""
    hashed = _HASHED.fullmatch(text)
    if hashed is not None:
        return KeyEntry(hashed[1] or "", bytes.fromhex(hashed[2]))
    name, _, key = text.rpartition(":")
    # Otherwise a mistyped hash would become a key that anybody who reads the file can use.
    damaged = f"{name}:".lower().endswith("sha256:")
    if damaged or len(key) < MIN_KEY_CHARS or not key.isascii():
        return None
    return KeyEntry(name, key_digest(key.encode()), key)


def _read(path: Path, environ: Mapping[str, str]) -> str:
    try:
        with open_file(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077 and not _is_credential(path, environ):
                raise ConfigError(
                    f"other users can use the API keys of {path} (mode {mode:04o}); run: "
                    f"chmod 600 {path}"
                )
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path} has more than {MAX_FILE_BYTES >> 20} MiB, which no list of API keys has; "
                "name another file"
            )
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys of {path} ({error})") from error


def _is_credential(path: Path, environ: Mapping[str, str]) -> bool:
    """Whether systemd handed this file to the service."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    return bool(directory) and path.resolve().parent == Path(str(directory)).resolve()

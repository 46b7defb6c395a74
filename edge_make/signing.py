"""Makes keys and signs with the program ``minisign``; `edge.bundle.minisign` checks."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge.bundle.minisign import MAX_COMMENT, PublicKey, parse_public_keys
from edge.bundle.update import replace_durably
from edge.errors import ConfigError, DependencyError


@dataclass(frozen=True)
class Signer:
    """A secret key, and the password that opens it.

    Attributes:
        path: the key's file.
        password: empty if the key is not encrypted; left out of the repr.
        public_key: the half that devices get.
    """

    path: Path
    password: str = field(repr=False)
    public_key: PublicKey

    def sign(self, data: bytes, comment: str) -> bytes:
        """Sign bytes and a comment; return the content of the signature's file.

        Raises:
            ConfigError: the comment is not one line of printable text, or minisign refuses.
            DependencyError: minisign is not installed.
        """
        if not comment.isprintable() or not 0 < len(comment.encode()) <= MAX_COMMENT:
            raise ConfigError(
                f"the comment {comment[:50]!r} of a signature is not one line of at most "
                f"{MAX_COMMENT} bytes"
            )
        with tempfile.TemporaryDirectory(prefix="edge-llm-") as place:
            file, signature = Path(place, "signed"), Path(place, "signature")
            file.write_bytes(data)
            what = ("-S", "-s", self.path, "-m", file, "-x", signature)
            comments = ("-c", "signature of edge-llm", "-t", comment)
            _check(_minisign(*what, *comments, text=f"{self.password}\n"), self.path)
            return signature.read_bytes()


def open_signer(path: Path, ask_password: Callable[[], str]) -> Signer:
    """Open a secret key of minisign, and check that it signs.

    Args:
        path: its file.
        ask_password: called if the key is encrypted.

    Raises:
        ConfigError: the file cannot be read or is no key, or the password is wrong.
        DependencyError: minisign is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="edge-llm-") as place:
        public, password = Path(place, "public"), ""
        command = ("-R", "-s", path, "-p", public)
        done = _minisign(*command)
        if done.returncode and "Password" in done.stderr:
            password = ask_password()
            done = _minisign(*command, text=f"{password}\n")
        _check(done, path)
        (key,) = parse_public_keys(public.read_text("utf-8"), str(path))
    return Signer(path, password, key)


def make_key_pair(secret: Path, public: Path, password: str) -> PublicKey:
    """Write both halves of a new key; the secret one is readable by its owner only.

    Args:
        secret: file of the half that signs.
        public: file of the half that checks.
        password: encrypts the secret half, which takes 1 GiB of memory for a moment; not encrypted
            if it is empty.

    Raises:
        ConfigError: one file exists already, or cannot be written.
        DependencyError: minisign is not installed.
    """
    for path in (secret, public):
        if os.path.lexists(path):
            raise ConfigError(f"cannot write {path}: it is there already; choose another name")
    how = () if password else ("-W",)
    done = _minisign("-G", *how, "-s", secret, "-p", public, text=f"{password}\n" * 2)
    _check(done, secret)
    (key,) = parse_public_keys(public.read_text("utf-8"), str(public))
    return key


def write_signature(path: Path, signature: bytes) -> None:
    """Write a signature; an existing one is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        replace_durably(path, lambda file: file.write(signature), mode=0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _minisign(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["minisign", *map(str, arguments)],
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise DependencyError("keys need minisign; run: apt-get install minisign") from error


def _check(done: subprocess.CompletedProcess[str], key: Path) -> None:
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(f"the secret key {key} cannot be used; minisign says: {lines[-1]}")

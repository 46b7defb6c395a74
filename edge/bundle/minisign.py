"""Checks signatures in minisign's format: Ed25519 over a file's BLAKE2b-512.

The format is that of https://jedisct1.github.io/minisign/, so Debian's ``minisign`` makes the
signatures; `edge_make.signing` runs it. The arithmetic is that of `cryptography` and `hashlib`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from edge.errors import ConfigError, DependencyError, IntegrityError, install_command
from edge.files import read_file, read_guarded_file

MAX_BYTES = 1 << 16
"""Limits a file of keys, and a signature."""
_COMMENT = "untrusted comment: "
_TRUSTED = "trusted comment: "
MAX_COMMENT = 1024  # minisign reads no longer comment
_PUBLIC = struct.Struct("<2s8s32s")
_SIGNATURE = struct.Struct("<2s8s64s")
_PLAIN, _PREHASHED = b"Ed", b"ED"
_NAMES = "names:"
_PATTERN = re.compile(r"[a-z0-9*?][a-z0-9*?._-]*(/[a-z0-9*?][a-z0-9*?._-]*)*")
_FIELD = 2**255 - 19
_ORDER_8 = int.from_bytes(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
)
# The y of the eight points of small order: for such a key anybody can forge a signature.
# Chalkias et al. 2020, "Taming the many EdDSAs", table 1; libsodium's ge25519_has_small_order.
_SMALL_ORDER = (0, 1, _FIELD - 1, _ORDER_8, _FIELD - _ORDER_8)


@dataclass(frozen=True)
class PublicKey:
    """A key that checks signatures.

    Attributes:
        id: its eight bytes, which a signature names.
        key: the Ed25519 key, 32 bytes.
        comment: the comment above it in its file; nothing vouches for it.
        names: patterns of the names that it vouches for; if empty, it vouches for everything that
            it has signed.
    """

    id: bytes
    key: bytes
    comment: str = ""
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the id as minisign prints it."""
        return key_name(self.id)

    def covers(self, name: str) -> bool:
        """Whether the key vouches for a name; ``*`` and ``?`` of a pattern match no slash."""
        parts = name.split("/")
        patterns = (pattern.split("/") for pattern in self.names)
        return not self.names or any(
            len(own) == len(parts) and all(map(fnmatchcase, parts, own)) for own in patterns
        )


@dataclass(frozen=True)
class Signature:
    """A signature of a file.

    Attributes:
        key_id: the id of the key that made it.
        prehashed: whether the file's BLAKE2b-512 was signed, else the file itself.
        signature: 64 bytes.
        comment: the trusted comment, which is signed too.
        comment_signature: signature of ``signature`` and ``comment``, 64 bytes.
    """

    key_id: bytes
    prehashed: bool
    signature: bytes
    comment: str
    comment_signature: bytes


def check_signature(data: bytes, signature: Signature, keys: Iterable[PublicKey]) -> PublicKey:
    """Find the key that signed these bytes and the comment.

    Raises:
        IntegrityError: the key is not among ``keys``, or the signature is of other bytes.
        DependencyError: cryptography is not installed.
    """
    trusted = list(keys)
    for key in trusted:
        if hmac.compare_digest(key.id, signature.key_id):
            _check(data, signature, key)
            return key
    names = ", ".join(key.name for key in trusted)
    raise IntegrityError(
        f"signed with the key {key_name(signature.key_id)}, which is none of the trusted ones "
        f"({names})"
    )


def parse_signature(data: bytes, where: str) -> Signature:
    """Read the content of a signature's file.

    Raises:
        IntegrityError: it is not a signature.
    """
    try:
        lines = data.decode("utf-8").rstrip("\n").split("\n")
        first, line, trusted, last = (line.removesuffix("\r") for line in lines)
        if not first.startswith(_COMMENT) or not trusted.startswith(_TRUSTED):
            raise ValueError("the comments are missing")
        algorithm, key_id, signature = _SIGNATURE.unpack(_decode(line))
        if algorithm not in (_PLAIN, _PREHASHED):
            raise ValueError(f"the algorithm {algorithm!r} is unknown")
        own = _decode(last)
        if len(own) != 64:
            raise ValueError("the comment's signature has not 64 bytes")
    except (ValueError, struct.error) as error:
        raise IntegrityError(
            f"{where} is no signature of minisign ({error}); sign again with: edge-llm bundle sign"
        ) from error
    comment = trusted.removeprefix(_TRUSTED)
    return Signature(key_id, algorithm == _PREHASHED, signature, comment, own)


def parse_public_keys(text: str, where: str) -> list[PublicKey]:
    """Read any number of public keys: files of minisign's, one after the other.

    A line ``names: PATTERN ...`` before a key binds it to these names. Empty lines and lines that
    begin with ``#`` are ignored.

    Raises:
        ConfigError: a line is not a key, or a key whose signatures anybody can forge; an id comes
            twice; names are empty or no key follows them; or there is no key at all.
    """
    keys: dict[bytes, PublicKey] = {}
    comment, names = "", None
    for number, raw in enumerate(text.splitlines(), 1):
        line, place = raw.strip(), f"line {number} of {where}"
        if line.startswith(_COMMENT.strip()):
            comment = line.removeprefix(_COMMENT.strip()).strip()[:MAX_COMMENT]
            continue
        if not line or line.startswith("#"):
            continue
        if line.startswith(_NAMES):
            if names is not None or not all(map(_PATTERN.fullmatch, line.split()[1:] or [""])):
                raise ConfigError(
                    f"{place} does not bind the key after it; write one line such as: "
                    "names: acme/* acme/team/r1-7b"
                )
            names = tuple(line.split()[1:])
            continue
        try:
            algorithm, key_id, key = _PUBLIC.unpack(_decode(line))
            if algorithm != _PLAIN:
                raise ValueError(f"the algorithm {algorithm!r} is unknown")
        except (ValueError, struct.error) as error:
            raise ConfigError(
                f"{place} is no public key of minisign ({error}); a key is the second line of a "
                "file NAME.pub"
            ) from error
        if int.from_bytes(key, "little") % 2**255 % _FIELD in _SMALL_ORDER:
            raise ConfigError(
                f"{place} is a key of small order, whose signatures anybody can forge; take it out"
            )
        if key_id in keys:
            raise ConfigError(f"{place} has the key {key_name(key_id)} again")
        keys[key_id] = PublicKey(key_id, key, comment, names or ())
        comment, names = "", None
    if not keys or names is not None:
        raise ConfigError(
            f"{where} has no public key{'' if names is None else f' after {_NAMES}'}; edge-llm "
            "bundle keygen makes one"
        )
    return list(keys.values())


def read_public_keys(path: Path) -> list[PublicKey]:
    """Read a file of public keys by `parse_public_keys`.

    Whoever can change it decides what this machine runs, so `read_guarded_file` reads it.

    Raises:
        ConfigError: it cannot be read, somebody else can change it, or its content is refused.
    """
    try:
        return parse_public_keys(read_guarded_file(path, MAX_BYTES).decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read public keys of {path}: {error}") from error


def find_signer(path: Path, data: bytes, trusted_keys: Path, what: str) -> PublicKey | str:
    """Find the trusted key that signed bytes which belong to no named release.

    Args:
        path: file of the signature.
        data: the bytes.
        trusted_keys: file of public keys.
        what: the kind of the bytes, in the plural, for messages.

    Returns:
        The key, or why there is none.

    Raises:
        ConfigError: the file of trusted keys cannot be used.
    """
    keys = read_public_keys(trusted_keys)
    try:
        signature = parse_signature(read_file(path, MAX_BYTES), str(path))
        key = check_signature(data, signature, keys)
        if not key.names:
            return key
        return f"the key {key.name} signs bundles of some names only, and {what} have none"
    except FileNotFoundError:
        return "it is not signed"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (IntegrityError, DependencyError) as error:
        return str(error)


def key_name(key_id: bytes) -> str:
    """Write the id of a key as minisign does: 16 hexadecimal digits, the last byte first."""
    return f"{int.from_bytes(key_id, 'little'):016X}"


def _check(data: bytes, signature: Signature, key: PublicKey) -> None:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise DependencyError(
            f"signatures need cryptography; run: {install_command('registry')}"
        ) from error
    try:
        public = Ed25519PublicKey.from_public_bytes(key.key)
        signed = hashlib.blake2b(data).digest() if signature.prehashed else data
        public.verify(signature.signature, signed)
        public.verify(signature.comment_signature, signature.signature + signature.comment.encode())
    except (InvalidSignature, ValueError) as error:
        raise IntegrityError(
            f"the signature with the key {key.name} is not of these bytes"
        ) from error


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("not base64") from error

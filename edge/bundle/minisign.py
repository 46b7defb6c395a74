"""Signs and checks signatures in minisign's format: Ed25519 over a file's BLAKE2b-512.

The format is that of https://jedisct1.github.io/minisign/, so Debian's ``minisign`` checks what is
signed here and the other way round. The arithmetic is that of `cryptography` and `hashlib`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.errors import ConfigError, DependencyError, IntegrityError, install_command
from edge.files import read_file

MAX_BYTES = 1 << 16
"""Longest file of keys, and longest signature."""
_COMMENT = "untrusted comment: "
_TRUSTED = "trusted comment: "
_MAX_COMMENT = 1024  # minisign reads no longer one
_PUBLIC = struct.Struct("<2s8s32s")
_SIGNATURE = struct.Struct("<2s8s64s")
_SECRET = struct.Struct("<2s2s2s32sQQ104s")
_PLAIN, _PREHASHED = b"Ed", b"ED"
_SCRYPT, _NO_KDF, _BLAKE2 = b"Sc", b"\0\0", b"B2"
_OPS_LIMIT, _MEMORY_LIMIT = 1 << 25, 1 << 30  # minisign's own for a key with a password


@dataclass(frozen=True)
class PublicKey:
    """A key that checks signatures.

    Attributes:
        id: its eight bytes, which a signature names.
        key: 32 bytes, of Ed25519.
        comment: what stood above it in its file; nothing vouches for it.
    """

    id: bytes
    key: bytes
    comment: str = ""

    @property
    def name(self) -> str:
        """The id as minisign prints it."""
        return key_name(self.id)

    def encode(self) -> str:
        """Write the key as minisign does: a comment and a line of base64."""
        return f"{_COMMENT}{self.comment}\n{self.line}\n"

    @property
    def line(self) -> str:
        """The line of base64."""
        return _base64(_PUBLIC.pack(_PLAIN, self.id, self.key))


@dataclass(frozen=True)
class Signature:
    """A signature of a file.

    Attributes:
        key_id: the id of the key that made it.
        prehashed: whether the file's BLAKE2b-512 was signed, else the file itself.
        signature: 64 bytes.
        comment: the trusted comment, which is signed too.
        comment_signature: 64 bytes, of ``signature`` and ``comment``.
    """

    key_id: bytes
    prehashed: bool
    signature: bytes
    comment: str
    comment_signature: bytes

    def encode(self) -> bytes:
        """Write the file of a signature as minisign does."""
        algorithm = _PREHASHED if self.prehashed else _PLAIN
        line = _base64(_SIGNATURE.pack(algorithm, self.key_id, self.signature))
        text = f"{_COMMENT}signature of edge-llm bundle sign\n{line}\n{_TRUSTED}{self.comment}\n"
        return f"{text}{_base64(self.comment_signature)}\n".encode()


@dataclass(frozen=True)
class SecretKey:
    """A key that signs.

    Attributes:
        id: see `PublicKey`.
        seed: 32 bytes, of Ed25519; they do not show where the key is printed.
        public: the public half, 32 bytes.
    """

    id: bytes
    seed: bytes
    public: bytes

    def __repr__(self) -> str:
        return f"SecretKey({key_name(self.id)})"

    @property
    def public_key(self) -> PublicKey:
        """The half that devices get."""
        return PublicKey(self.id, self.public, f"minisign public key {key_name(self.id)}")

    def sign(self, data: bytes, comment: str) -> Signature:
        """Sign bytes and a comment.

        Raises:
            ConfigError: the comment is not one line of printable text.
            DependencyError: cryptography is not installed.
        """
        if not comment.isprintable() or len(comment.encode()) > _MAX_COMMENT:
            raise ConfigError(
                f"the comment {comment[:50]!r} of a signature is not one line of at most "
                f"{_MAX_COMMENT} bytes"
            )
        key = _ed25519().Ed25519PrivateKey.from_private_bytes(self.seed)
        signature: bytes = key.sign(_digest(data))
        own: bytes = key.sign(signature + comment.encode())
        return Signature(self.id, True, signature, comment, own)

    def encode(self, password: str = "") -> str:
        """Write the key as minisign does.

        Args:
            password: encrypts it, which takes 1 GiB of memory for a moment; without one it is as
                ``minisign -W`` writes it.

        Raises:
            DependencyError: cryptography is not installed.
        """
        secret = self.id + self.seed + self.public
        secret += _checksum(secret) if password else bytes(32)  # as minisign does
        kind, salt, ops, memory = _NO_KDF, bytes(32), 0, 0
        if password:
            kind, salt = _SCRYPT, secrets.token_bytes(32)
            ops, memory = _OPS_LIMIT, _MEMORY_LIMIT
            secret = _xor(secret, _stretch(password, salt, ops, memory))
        packed = _SECRET.pack(_PLAIN, kind, _BLAKE2, salt, ops, memory, secret)
        how = "encrypted" if password else "unencrypted"
        return f"{_COMMENT}minisign {how} secret key\n{_base64(packed)}\n"


def make_key() -> SecretKey:
    """Make a new key, with a random id.

    Raises:
        DependencyError: cryptography is not installed.
    """
    seed = secrets.token_bytes(32)
    return SecretKey(secrets.token_bytes(8), seed, _public_half(seed))


def check_signature(data: bytes, signature: Signature, keys: Iterable[PublicKey]) -> PublicKey:
    """Find the key that signed bytes, comment included.

    Raises:
        IntegrityError: the key is none of ``keys``, or the signature is not of these bytes.
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
    """Read the file of a signature.

    Raises:
        IntegrityError: it is none.
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
    """Read public keys, as many as there are: files of minisign's, one after the other.

    Empty lines and lines that begin with ``#`` count for nothing.

    Raises:
        ConfigError: a line is no key, an id comes twice, or there is no key at all.
    """
    keys: dict[bytes, PublicKey] = {}
    comment = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith(_COMMENT.strip()):
            comment = line.removeprefix(_COMMENT.strip()).strip()[:_MAX_COMMENT]
            continue
        if not line or line.startswith("#"):
            continue
        try:
            algorithm, key_id, key = _PUBLIC.unpack(_decode(line))
            if algorithm != _PLAIN:
                raise ValueError(f"the algorithm {algorithm!r} is unknown")
        except (ValueError, struct.error) as error:
            raise ConfigError(
                f"line {number} of {where} is no public key of minisign ({error}); a key is the "
                "second line of a file NAME.pub"
            ) from error
        if key_id in keys:
            raise ConfigError(f"line {number} of {where} has the key {key_name(key_id)} again")
        keys[key_id] = PublicKey(key_id, key, comment)
        comment = ""
    if not keys:
        raise ConfigError(f"{where} has no public key; edge-llm bundle keygen makes one")
    return list(keys.values())


def read_public_keys(path: Path) -> list[PublicKey]:
    """Read a file of public keys; see `parse_public_keys`.

    Raises:
        ConfigError: it cannot be read, or see there.
    """
    return parse_public_keys(_read(path, "public keys"), str(path))


def read_secret_key(path: Path, ask_password: Callable[[], str]) -> SecretKey:
    """Read a secret key of minisign's or ours.

    Args:
        path: its file.
        ask_password: asked where the key is encrypted.

    Raises:
        ConfigError: it cannot be read, is none, or the password is wrong.
        DependencyError: cryptography is not installed.
    """
    lines = [line for line in _read(path, "the secret key").splitlines() if line.strip()]
    try:
        if len(lines) != 2:
            raise ValueError(f"it has {len(lines)} lines, not 2")
        fields = _SECRET.unpack(_decode(lines[1].strip()))
        algorithm, kind, check, salt, ops, memory, secret = fields
        if algorithm != _PLAIN or check != _BLAKE2 or kind not in (_SCRYPT, _NO_KDF):
            raise ValueError("its algorithms are unknown")
    except (ValueError, struct.error) as error:
        raise ConfigError(
            f"{path} is no secret key of minisign ({error}); edge-llm bundle keygen makes one"
        ) from error
    if kind == _SCRYPT:
        if ops > _OPS_LIMIT or memory > _MEMORY_LIMIT:
            raise ConfigError(f"{path} asks for more work than any key of minisign's")
        secret = _xor(secret, _stretch(ask_password(), salt, ops, memory))
        if not hmac.compare_digest(_checksum(secret[:72]), secret[72:]):
            raise ConfigError(f"{path} cannot be used: the password is wrong")
    key = SecretKey(secret[:8], secret[8:40], secret[40:72])
    if _public_half(key.seed) != key.public:
        raise ConfigError(f"{path} cannot be used: it is damaged")
    return key


def key_name(key_id: bytes) -> str:
    """Write the id of a key as minisign does: 16 hexadecimal digits, the last byte first."""
    return f"{int.from_bytes(key_id, 'little'):016X}"


def write_key_pair(secret: Path, public: Path, key: SecretKey, password: str) -> None:
    """Write both halves of a new key; the secret one is readable by its owner only.

    Raises:
        ConfigError: one is there already, or cannot be written.
    """
    for path, text, mode in (
        (secret, key.encode(password), 0o600),
        (public, key.public_key.encode(), 0o644),
    ):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; choose another name"
            ) from error
        with os.fdopen(descriptor, "w") as file:
            file.write(text)


def _check(data: bytes, signature: Signature, key: PublicKey) -> None:
    exceptions, ed25519 = _exceptions(), _ed25519()
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(key.key)
        public.verify(signature.signature, _digest(data) if signature.prehashed else data)
        public.verify(signature.comment_signature, signature.signature + signature.comment.encode())
    except (exceptions.InvalidSignature, ValueError) as error:
        raise IntegrityError(
            f"the signature with the key {key.name} is not of these bytes"
        ) from error


def _public_half(seed: bytes) -> bytes:
    key = _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
    public: bytes = key.public_key().public_bytes_raw()
    return public


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise _missing() from error
    return ed25519


def _exceptions() -> Any:
    try:
        from cryptography import exceptions
    except ImportError as error:
        raise _missing() from error
    return exceptions


def _missing() -> DependencyError:
    return DependencyError(f"signatures need cryptography; run: {install_command('registry')}")


def _stretch(password: str, salt: bytes, ops: int, memory: int) -> bytes:
    """Derive 104 bytes from a password by scrypt, with libsodium's way from limits to costs."""
    try:
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise _missing() from error
    rounds = 8
    ops = max(ops, 32768)
    if ops < memory // 32:
        cost, lanes = _power_above(ops // (rounds * 4) // 2), 1
    else:
        cost = _power_above(memory // (rounds * 128) // 2)
        lanes = max(min(ops // 4 // cost, 0x3FFFFFFF) // rounds, 1)
    kdf = Scrypt(salt=salt, length=104, n=cost, r=rounds, p=lanes)
    derived: bytes = kdf.derive(password.encode())
    return derived


def _power_above(bound: int) -> int:
    """The least power of two, from 2 on, that exceeds a bound."""
    return int(max(2, 1 << bound.bit_length()))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=64).digest()


def _checksum(secret: bytes) -> bytes:
    return hashlib.blake2b(_PLAIN + secret, digest_size=32).digest()


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(left ^ right for left, right in zip(one, other, strict=True))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("not base64") from error


def _read(path: Path, what: str) -> str:
    try:
        return read_file(path, MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} of {path}: {error}") from error

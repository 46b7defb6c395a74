"""Makes keys and signs files, in minisign's format; `edge.bundle.minisign` checks.

Debian's ``minisign`` checks what is signed here, and reads the keys that are written here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge.bundle.minisign import (
    COMMENT,
    MAX_BYTES,
    MAX_COMMENT,
    PLAIN,
    PREHASHED,
    SIGNATURE,
    TRUSTED,
    PublicKey,
    Signature,
    decode,
    digest_of,
    ed25519,
    encode,
    key_name,
    missing_library,
)
from edge.bundle.update import replace_durably
from edge.errors import ConfigError
from edge.files import read_file

_SECRET = struct.Struct("<2s2s2s32sQQ104s")
_SCRYPT, _NO_KDF, _BLAKE2 = b"Sc", b"\0\0", b"B2"
_OPS_LIMIT, _MEMORY_LIMIT = 1 << 25, 1 << 30  # minisign's own for a key with a password


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
        if not comment.isprintable() or len(comment.encode()) > MAX_COMMENT:
            raise ConfigError(
                f"the comment {comment[:50]!r} of a signature is not one line of at most "
                f"{MAX_COMMENT} bytes"
            )
        key = ed25519().Ed25519PrivateKey.from_private_bytes(self.seed)
        signature: bytes = key.sign(digest_of(data))
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
        packed = _SECRET.pack(PLAIN, kind, _BLAKE2, salt, ops, memory, secret)
        how = "encrypted" if password else "unencrypted"
        return f"{COMMENT}minisign {how} secret key\n{encode(packed)}\n"


def make_key() -> SecretKey:
    """Make a new key, with a random id.

    Raises:
        DependencyError: cryptography is not installed.
    """
    seed = secrets.token_bytes(32)
    return SecretKey(secrets.token_bytes(8), seed, _public_half(seed))


def write_signature(path: Path, signature: Signature) -> Signature:
    """Write a signature; one that was there is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        replace_durably(path, lambda file: file.write(encode_signature(signature)), mode=0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    return signature


def sign_file(path: Path, key: SecretKey, comment: str) -> Signature:
    """Sign a file as ``minisign -S`` does, into a file beside it with ``.minisig`` at its end.

    Raises:
        ConfigError: the file cannot be read, the comment is no line, or the signature cannot be
            written.
        DependencyError: cryptography is not installed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return write_signature(path.with_name(f"{path.name}.minisig"), key.sign(data, comment))


def encode_signature(signature: Signature) -> bytes:
    """Write the file of a signature as minisign does; `parse_signature` reads it."""
    algorithm = PREHASHED if signature.prehashed else PLAIN
    line = encode(SIGNATURE.pack(algorithm, signature.key_id, signature.signature))
    own = encode(signature.comment_signature)
    first = f"{COMMENT}signature of edge-llm"
    return f"{first}\n{line}\n{TRUSTED}{signature.comment}\n{own}\n".encode()


def read_secret_key(path: Path, ask_password: Callable[[], str]) -> SecretKey:
    """Read a secret key of minisign's or ours.

    Args:
        path: its file.
        ask_password: asked where the key is encrypted.

    Raises:
        ConfigError: it cannot be read, is none, or the password is wrong.
        DependencyError: cryptography is not installed.
    """
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the secret key of {path}: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if len(lines) != 2:
            raise ValueError(f"it has {len(lines)} lines, not 2")
        fields = _SECRET.unpack(decode(lines[1].strip()))
        algorithm, kind, check, salt, ops, memory, secret = fields
        if algorithm != PLAIN or check != _BLAKE2 or kind not in (_SCRYPT, _NO_KDF):
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


def _public_half(seed: bytes) -> bytes:
    key = ed25519().Ed25519PrivateKey.from_private_bytes(seed)
    public: bytes = key.public_key().public_bytes_raw()
    return public


def _stretch(password: str, salt: bytes, ops: int, memory: int) -> bytes:
    """Derive 104 bytes from a password by scrypt, with libsodium's way from limits to costs."""
    try:
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise missing_library() from error
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


def _checksum(secret: bytes) -> bytes:
    return hashlib.blake2b(PLAIN + secret, digest_size=32).digest()


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(left ^ right for left, right in zip(one, other, strict=True))

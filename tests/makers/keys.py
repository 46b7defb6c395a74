"""Keys in memory that sign in minisign's format, for tests of what checks signatures.

What signs for users is the program minisign: `tests/edge_make/test_signing.py` has both.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.bundle.minisign import PublicKey, Signature
from edge_make.signing import Signer


@dataclass(frozen=True)
class Key(Signer):
    """A key that needs no file and no program."""

    private: Ed25519PrivateKey = field(repr=False)

    @property
    def public_line(self) -> str:
        return encode_public_key(self.public_key).splitlines()[1]

    @property
    def public_text(self) -> str:
        return encode_public_key(self.public_key)

    def sign(self, data: bytes, comment: str) -> bytes:
        signature = self.private.sign(hashlib.blake2b(data).digest())
        own = self.private.sign(signature + comment.encode())
        return encode_signature(Signature(self.public_key.id, True, signature, comment, own))


def make_key() -> Key:
    private = Ed25519PrivateKey.generate()
    public = PublicKey(secrets.token_bytes(8), private.public_key().public_bytes_raw())
    return Key(Path("in memory"), "", public, private)


def minisign(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    need_minisign()
    command = ["minisign", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def need_minisign() -> None:
    if shutil.which("minisign") is None:
        pytest.skip("needs Debian's package minisign")


def encode_public_key(key: PublicKey) -> str:
    line = base64.b64encode(b"Ed" + key.id + key.key).decode()
    return f"untrusted comment: {key.comment}\n{line}\n"


def encode_signature(signature: Signature) -> bytes:
    head = (b"ED" if signature.prehashed else b"Ed") + signature.key_id
    line = base64.b64encode(head + signature.signature).decode()
    own = base64.b64encode(signature.comment_signature).decode()
    first = "untrusted comment: signature of a test"
    return f"{first}\n{line}\ntrusted comment: {signature.comment}\n{own}\n".encode()

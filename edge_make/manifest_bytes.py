"""Encodes a manifest with the hash that guards it."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from edge.bundle.manifest import NO_HASH, SELF_HASH, Manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Serialize with the self-hash filled in; the inverse of `decode_manifest`."""
    return hash_content(msgspec.to_builtins(manifest))


def hash_content(content: dict[str, Any]) -> bytes:
    """Serialize the object of a manifest with the self-hash filled in."""
    content = {**content, "self_sha256": NO_HASH}
    data = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    match = SELF_HASH.search(data)
    assert match is not None
    digest = hashlib.sha256(data).hexdigest()
    return data[: match.start(1)] + digest.encode() + data[match.end(1) :]

"""Decides which bundles a machine opens: if it has trusted keys, those that one of them signed.

A bundle's signature is ``manifest.json.minisig``. It signs the bytes of ``manifest.json``, which
contain the hash of every other file. So one signature vouches for all files, whoever delivered
them.

The policy is a file of public keys: the option ``trusted_keys``, else the file that
``EDGE_LLM_TRUSTED_KEYS`` names, else ``/etc/edge-llm/trusted-keys`` if it exists. It is read
whenever a bundle is opened, so a removed key vouches for nothing from then on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge.errors import BundleError, IntegrityError
from edge.files import read_file

from .manifest import MANIFEST_NAME, Manifest, decode_manifest, read_manifest_bytes

if TYPE_CHECKING:
    from .minisign import PublicKey, Signature

SIGNATURE_NAME = f"{MANIFEST_NAME}.minisig"
KEYS_VARIABLE = "EDGE_LLM_TRUSTED_KEYS"
DEFAULT_KEYS = Path("/etc/edge-llm/trusted-keys")


def trusted_keys_file(given: Path | None = None) -> Path | None:
    """Find the file of trusted keys; None if this machine opens every bundle.

    Args:
        given: the option; it comes before the machine's own file.
    """
    if given is not None:
        return given
    if named := os.environ.get(KEYS_VARIABLE):
        return Path(named)
    # If it exists but cannot be read, reading it is an error: the policy must not be skipped.
    return DEFAULT_KEYS if os.path.lexists(DEFAULT_KEYS) else None


def open_manifest(bundle: Path, trusted_keys: Path | None = None) -> Manifest:
    """Read the manifest of a bundle that is to be opened, and check it against the policy.

    The bytes that are parsed are those whose signature was checked. Files are not hashed yet.

    Args:
        bundle: directory of the bundle.
        trusted_keys: the option, as `trusted_keys_file` takes it.

    Raises:
        BundleError: `edge.bundle.manifest.read_manifest` refuses it, or it is not signed.
        IntegrityError: the self-hash does not match, or the signature is malformed, of other bytes
            or of a foreign key.
        ConfigError: the file of trusted keys cannot be used.
        DependencyError: there is a policy, and cryptography is not installed.
    """
    data = read_manifest_bytes(bundle)
    check_trusted(data, bundle, trusted_keys)
    return decode_manifest(data, str(bundle / MANIFEST_NAME))


def check_trusted(data: bytes, bundle: Path, trusted_keys: Path | None) -> None:
    """Check the bytes of a manifest that is to be opened against the machine's policy.

    Args:
        data: the bytes that will be parsed.
        bundle: directory that they were read from.
        trusted_keys: the option, as `trusted_keys_file` takes it.

    Raises:
        BundleError, IntegrityError, ConfigError, DependencyError: for the reasons in
            `open_manifest`.
    """
    file = trusted_keys_file(trusted_keys)
    if file is not None:
        signature = read_signature_bytes(bundle)
        check_manifest(data, signature, file, str(bundle))


def check_manifest(
    data: bytes, signature: bytes | None, trusted_keys: Path, where: str
) -> tuple[PublicKey, Signature]:
    """Check a manifest and its signature against a file of trusted keys.

    Args:
        data: bytes of ``manifest.json``.
        signature: bytes of its signature; None if it has none.
        trusted_keys: file of public keys.
        where: name of the bundle, for messages.

    Returns:
        The key that signed, and the signature.

    Raises:
        BundleError, IntegrityError, ConfigError, DependencyError: for the reasons in
            `open_manifest`.
    """
    from .minisign import check_signature, parse_signature, read_public_keys

    keys = read_public_keys(trusted_keys)
    if signature is None:
        raise BundleError(
            f"{where} is not signed, and {trusted_keys} demands it; sign it with: edge-llm bundle "
            "sign BUNDLE --key FILE"
        )
    found = parse_signature(signature, f"{where}: {SIGNATURE_NAME}")
    try:
        key = check_signature(data, found, keys)
    except IntegrityError as error:
        raise IntegrityError(
            f"{where} is refused: {MANIFEST_NAME} is {error} ({trusted_keys}); get the bundle from "
            "who holds a trusted key, or add the key's public half there"
        ) from error
    if key.names:
        from .release import read_release

        release = read_release(decode_manifest(data, where))
        name = release and release.name
        if not name or not key.covers(name):
            raise IntegrityError(
                f"{where} is refused: it is signed as {name or 'a bundle without a name'}, and "
                f"{trusted_keys} trusts the key {key.name} for {' '.join(key.names)} only; sign it "
                "with: edge-llm bundle sign --name NAME, or bind the key to other names there"
            )
    return key, found


def read_signature_bytes(bundle: Path) -> bytes | None:
    """Read the signature of a bundle; None if it is not signed.

    Raises:
        BundleError: it exists but cannot be read.
    """
    from .minisign import MAX_BYTES

    path = bundle / SIGNATURE_NAME
    try:
        return read_file(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); copy or sign the bundle again"
        ) from error

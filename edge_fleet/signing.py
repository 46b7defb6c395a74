"""Signs bundles and engines; `edge_make.signing` has the keys and `edge.bundle.minisign` checks."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge.bundle.engine_file import decode_engine_info, read_engine_bytes
from edge.bundle.engine_records import ENGINE_SIGNATURE
from edge.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    decode_manifest,
    read_manifest,
    read_manifest_bytes,
)
from edge.bundle.release import RELEASE, Release
from edge.bundle.trust import SIGNATURE_NAME
from edge.errors import ConfigError
from edge_make.atomic_swap import update_manifest
from edge_make.engine_record import verify_plan
from edge_make.signing import Signer, write_signature
from edge_make.target import locked, resolve_target


def sign_bundle(bundle: Path, key: Signer, comment: str, release: Release | None = None) -> None:
    """Sign a bundle's manifest; an earlier signature is replaced.

    Args:
        bundle: directory of the bundle.
        key: key to sign with.
        comment: one line that is signed, too.
        release: release to write into the manifest first; None leaves the manifest as it is.

    Raises:
        BundleError, IntegrityError: the manifest is missing, damaged or of another version.
        ConfigError: an export is writing the bundle, the comment is not one line, or the signature
            cannot be written.
        DependencyError: minisign is not installed.
    """
    target = resolve_target(bundle)
    written = None
    if release is not None:
        manifest = read_manifest(target)
        extras = {**manifest.extras, RELEASE: msgspec.to_builtins(release)}
        written = update_manifest(
            target, msgspec.structs.replace(manifest, extras=extras, schema_version=SCHEMA_VERSION)
        )
    with locked(target):
        data = read_manifest_bytes(target)
        if written not in (None, decode_manifest(data, str(target / MANIFEST_NAME))):
            raise ConfigError(f"{target} was changed while it was signed; sign it again")
        write_signature(target / SIGNATURE_NAME, key.sign(data, comment))


def sign_engine(directory: Path, key: Signer, comment: str) -> None:
    """Sign an engine, so that machines that trust the key run it without having built it.

    The signature is of its ``engine.json``, which has the hash of the plan; the plan is checked
    first. An earlier signature is replaced.

    Args:
        directory: the engine's directory.
        key: key to sign with.
        comment: one line that is signed, too.

    Raises:
        BundleError, IntegrityError: the engine is missing or damaged.
        ConfigError: the comment is not one line, or the signature cannot be written.
        DependencyError: minisign is not installed.
    """
    data = read_engine_bytes(directory)
    verify_plan(directory, decode_engine_info(directory, data))
    write_signature(directory / ENGINE_SIGNATURE, key.sign(data, comment))

"""Gets a bundle from a registry: it is checked before it is fetched, and appears only when whole.

While a bundle ``r1`` is fetched, ``.r1.edge-llm-pull`` beside it holds what has arrived. However a
pull ends, the next one checks every piece there by its hash, and fetches only the others. Pieces
that bundles in the same directory have are copied from them. A whole bundle there, recognized by
its manifest, is never written into: the swap may have put it there, and a server may read it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from edge.bundle.manifest import (
    MANIFEST_NAME,
    Manifest,
    decode_manifest,
    read_manifest,
    read_manifest_bytes,
)
from edge.bundle.release import Release, read_release
from edge.bundle.trust import (
    SIGNATURE_NAME,
    check_manifest,
    read_signature_bytes,
    trusted_keys_file,
)
from edge.bundle.update import fsync, replace_durably
from edge.bundle.verified_files import verify_files
from edge.errors import ConfigError, EdgeError, ResourceError
from edge.files import read_file
from edge_make.atomic_swap import (
    ORIGIN_NAME,
    check_free_space,
    check_replaceable,
    put_in_place,
    recover,
    remove,
    sweep,
)
from edge_make.progress import Progress, silent
from edge_make.target import beside, locked, resolve_target, write_durably

from . import artifact as artifacts
from .artifact import Contents, Piece
from .client import MAX_MANIFEST_BYTES, NUM_CONNECTIONS, Registry, digest_of
from .reference import Reference
from .release import check_name

_MAX_SOURCES = 16  # bundles beside the target to search for pieces
_Known: TypeAlias = dict[str, list[tuple[Path, Piece]]]


class Pulled(NamedTuple):
    """The result of a pull.

    Attributes:
        bundle: directory of the bundle.
        digest: digest of the registry's manifest.
        num_bytes: size of the bundle.
        fetched_bytes: bytes that came over the network.
        signer: name of the trusted key that signed it; None if no policy demands one.
        manifest: the bundle's manifest.
    """

    bundle: Path
    digest: str
    num_bytes: int
    fetched_bytes: int
    signer: str | None
    manifest: Manifest


class Offer(NamedTuple):
    """A bundle that a registry offers, checked as far as possible without its files.

    Attributes:
        digest: digest of the registry's manifest.
        origin: bytes of the registry's manifest.
        contents: files of the bundle.
        manifest_bytes: bytes of the bundle's manifest.
        manifest: the bundle's manifest.
        signature: its signature, if it has one.
        signer: name of the trusted key that signed it; None if no policy demands one.
        release: the release that its manifest names; None without a number.
    """

    digest: str
    origin: bytes
    contents: Contents
    manifest_bytes: bytes
    manifest: Manifest
    signature: bytes | None
    signer: str | None
    release: Release | None


def look(reference: Reference, registry: Registry, trusted_keys: Path | None = None) -> Offer:
    """Ask a registry about a reference, and check its manifest by this machine's policy.

    Args:
        reference: reference to look up.
        registry: registry of that reference.
        trusted_keys: file of trusted keys (`edge.bundle.trust.trusted_keys_file`).

    Raises:
        BundleError: it is no bundle, of another version, not signed although it must be, or signed
            for another repository.
        IntegrityError: it contradicts itself, or a key signed it that is not trusted.
        ConfigError, RegistryError: `Registry` fails; or the file of keys cannot be used.
    """
    origin, digest = registry.manifest(reference.wanted)
    where = str(reference)
    _, contents = artifacts.decode(origin, where)
    data = registry.blob(contents.manifest.digest, contents.manifest.size)
    layer = contents.signature
    signature = None if layer is None else registry.blob(layer.digest, layer.size)
    signer = None
    file = trusted_keys_file(trusted_keys)
    if file is not None:
        signer = check_manifest(data, signature, file, where)[0].name
    manifest = decode_manifest(data, f"{where}: {MANIFEST_NAME}")
    artifacts.check_contents(contents, manifest, where)
    release = read_release(manifest)
    check_name(release, reference)
    return Offer(digest, origin, contents, data, manifest, signature, signer, release)


def pull(
    offer: Offer,
    registry: Registry,
    target: Path,
    *,
    overwrite: bool = False,
    near: Path | None = None,
    progress: Progress = silent,
) -> Pulled:
    """Fetch a bundle that `look` has found.

    Until every file has the hash that the manifest says, only the staging directory is written.
    A bundle that is replaced loses its engines, which were built from its own graph.

    Args:
        offer: bundle to fetch.
        registry: registry that has it.
        target: directory of the bundle: missing, empty, the same bundle, or with ``overwrite``
            another.
        overwrite: whether to replace another bundle.
        near: a directory of bundles that may have pieces of it, besides the target's own.
        progress: called with bytes, in the step ``pull``.

    Raises:
        ConfigError: the target is not ours to replace, cannot be written, or is being written.
        ResourceError: the disk is too full.
        IntegrityError: what arrived is damaged; the old bundle stays.
        RegistryError: the registry cannot be reached or fails.
    """
    target = resolve_target(target)
    staging = beside(target, "pull")
    fetched = 0
    with _explained(target), locked(target):
        recover(target)
        if not _is_there(offer, target):
            check_replaceable(target, overwrite)
            if staging.is_symlink():
                staging.unlink()  # no pull makes a link, so its target is not ours
            if not _is_there(offer, staging):
                if (staging / MANIFEST_NAME).exists():
                    sweep(target, staging)  # a bundle that was replaced may still serve
                staging.mkdir(exist_ok=True)
                known = _known_pieces(target, near)
                fetched = _fill(staging, offer, registry, known, progress)
                _finish(staging, offer)
            _write_about(staging, offer)
            fsync(staging)
            check_replaceable(target, overwrite)
            put_in_place(staging, target)
            fsync(target.parent)
        elif read_signature_bytes(target) != offer.signature:
            _write_about(target, offer)  # only the signature may have changed
            fsync(target)
        sweep(target, staging)
    size = len(offer.manifest_bytes) + sum(info.num_bytes for info in offer.manifest.files.values())
    return Pulled(target, offer.digest, size, fetched, offer.signer, offer.manifest)


def origin_digest(bundle: Path) -> str | None:
    """Return the digest under which a registry had a bundle; None if it came from none."""
    try:
        return digest_of(read_file(bundle / ORIGIN_NAME, MAX_MANIFEST_BYTES))
    except OSError:
        return None


def _is_there(offer: Offer, target: Path) -> bool:
    """Whether the target is exactly this bundle, and whole."""
    try:
        if read_manifest_bytes(target) != offer.manifest_bytes:
            return False
        verify_files(target, offer.manifest)
    except EdgeError:
        return False
    return True


def _fill(
    staging: Path, offer: Offer, registry: Registry, known: _Known, progress: Progress
) -> int:
    """Get every piece into the staging directory; return the number of bytes fetched."""
    total = sum(piece.num_bytes for piece in offer.contents.all_pieces())
    for path in staging.iterdir():
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            remove(path)
        elif path.name not in offer.contents.pieces or not _is_own(found):
            path.unlink()
    have = sum(path.stat().st_blocks * 512 for path in staging.iterdir())
    check_free_space(staging.parent, max(total - have, 0))
    fetched = done = 0
    progress("pull", done, total, "bytes")
    with ThreadPoolExecutor(NUM_CONNECTIONS, "pull") as pool:
        waiting: dict[Future[int], int] = {}
        try:
            for piece in offer.contents.all_pieces():
                while len(waiting) >= 2 * NUM_CONNECTIONS:
                    ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in ended:
                        fetched += future.result()
                        done += waiting.pop(future)
                    progress("pull", done, total, "bytes")
                waiting[pool.submit(_bring, staging, piece, known, registry)] = piece.num_bytes
            for future, size in waiting.items():
                fetched += future.result()
                done += size
                progress("pull", done, total, "bytes")
        except BaseException:
            registry.patient = False
            pool.shutdown(cancel_futures=True)
            raise
    return fetched


def _bring(
    staging: Path,
    piece: Piece,
    known: _Known,
    registry: Registry,
) -> int:
    """Write a piece to its place unless it is there; return the number of bytes fetched."""
    if artifacts.read_piece(staging, piece) is not None and piece.num_bytes:
        return 0
    data, fetched = None, 0
    for bundle, same in known.get(piece.digest, ()):
        data = artifacts.read_piece(bundle, same)
        if data is not None:
            break
    if data is None:
        data = registry.blob(piece.digest, piece.num_bytes)
        fetched = len(data)
    descriptor = _open_own(staging / piece.file)
    try:
        at = 0
        while at < len(data):
            at += os.pwrite(descriptor, memoryview(data)[at:], piece.offset + at)
    finally:
        os.close(descriptor)
    return fetched


def _is_own(found: os.stat_result) -> bool:
    """Whether a file is a plain file with this name only: no link, no pipe, no second name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _open_own(path: Path) -> int:
    """Open a file of the staging directory for writing, and make it if it is missing.

    Raises:
        OSError: it has other names, too; `_fill` has removed such files, so somebody put it there.
    """
    # Opening a pipe would block.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o644)
    if not _is_own(os.fstat(descriptor)):
        os.close(descriptor)
        raise OSError(errno.EMLINK, "somebody else has put this file here", str(path))
    return descriptor


def _finish(staging: Path, offer: Offer) -> None:
    """Cut, hash and fsync every file, and write their manifest last."""
    for name, info in offer.manifest.files.items():
        descriptor = _open_own(staging / name)
        try:
            os.ftruncate(descriptor, info.num_bytes)  # an earlier pull's may be longer
        finally:
            os.close(descriptor)
    verify_files(staging, offer.manifest)
    for name in offer.manifest.files:
        fsync(staging / name)
    write_durably(staging / MANIFEST_NAME, offer.manifest_bytes)


def _write_about(bundle: Path, offer: Offer) -> None:
    """Write the registry's manifest and the signature; each is whole, old or new."""
    for name, data in ((ORIGIN_NAME, offer.origin), (SIGNATURE_NAME, offer.signature)):
        if data is None:
            (bundle / name).unlink(missing_ok=True)
        else:
            _replace(bundle / name, data)


def _replace(path: Path, data: bytes) -> None:
    replace_durably(path, lambda file: file.write(data), mode=0o644)


def _known_pieces(target: Path, near: Path | None) -> _Known:
    """Find the pieces that the target's neighbours and bundles in ``near`` claim to have.

    Each claim is checked when the piece is read (`artifacts.read_piece`).
    """
    known: _Known = {}
    for bundle in _neighbours(target, near):
        for piece in _own_pieces(bundle):
            known.setdefault(piece.digest, []).append((bundle, piece))
    return known


def _neighbours(target: Path, near: Path | None) -> list[Path]:
    places = {target.parent} if near is None else {target.parent, near}
    others = [path for place in places for path in place.iterdir() if path.name[0] != "."]
    others.sort(key=lambda path: (path != target, path.name))
    found = [path for path in others if not path.is_symlink() and (path / MANIFEST_NAME).is_file()]
    return found[:_MAX_SOURCES]


def _own_pieces(bundle: Path) -> Iterable[Piece]:
    try:
        origin = read_file(bundle / ORIGIN_NAME, MAX_MANIFEST_BYTES)
        yield from artifacts.decode(origin, str(bundle))[1].all_pieces()
    except (OSError, EdgeError):
        yield from _whole_files(bundle)


def _whole_files(bundle: Path) -> Iterator[Piece]:
    """Yield the small files of a bundle that was exported here: each is a piece of its own."""
    try:
        manifest = read_manifest(bundle)
    except EdgeError:
        return
    for name, info in manifest.files.items():
        if info.num_bytes <= artifacts.WHOLE_BYTES:
            yield Piece(name, 0, info.num_bytes, f"sha256:{info.sha256}")


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk filled up while {target} was pulled ({error.strerror}); what has "
                f"arrived is kept in {beside(target, 'pull')} for the next pull: free some space "
                "and run it again, or remove that directory"
            ) from error
        raise ConfigError(
            f"cannot write a bundle at {target}: {error.strerror} ({error.filename}); choose "
            "another directory"
        ) from error

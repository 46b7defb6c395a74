"""Sends a bundle to a registry without the blobs that are already there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from edge.bundle.manifest import read_manifest, read_manifest_bytes
from edge.bundle.release import read_release
from edge.bundle.trust import read_signature_bytes
from edge.errors import IntegrityError
from edge_make.progress import Progress, silent

from . import artifact as artifacts
from .client import NUM_CONNECTIONS, Registry, digest_of
from .reference import Reference
from .release import check_name


class Pushed(NamedTuple):
    """The result of a push.

    Attributes:
        digest: digest of the registry's manifest; ``NAME@DIGEST`` means this bundle forever.
        num_bytes: size of the bundle.
        sent_bytes: bytes that the registry did not have yet.
        signed: whether the bundle has a signature, by any key.
    """

    digest: str
    num_bytes: int
    sent_bytes: int
    signed: bool


def push(
    bundle: Path, reference: Reference, registry: Registry, progress: Progress = silent
) -> Pushed:
    """Send a bundle after checking the hash of every file; its engines stay here.

    The tag moves last. So however this ends, the registry has the whole bundle, or under this tag
    still the old one; the next push continues.

    Args:
        bundle: directory of the bundle.
        reference: where to send it; without a tag it is stored only under its digest.
        registry: registry of that reference.
        progress: called with bytes, in the steps ``hash`` and ``push``.

    Raises:
        BundleError, IntegrityError: the bundle is missing, damaged, was changed meanwhile, or is
            signed for another repository.
        ConfigError, RegistryError: `Registry` fails; or the reference has another digest.
        DependencyError: pyfastcdc is not installed.
    """
    check_name(read_release(read_manifest(bundle)), reference)
    artifact, _ = artifacts.describe(bundle, progress)
    data = artifacts.encode(artifact)
    digest = digest_of(data)
    if reference.digest not in (None, digest):
        raise IntegrityError(
            f"{bundle} has the digest {digest}, and {reference} asks for another; leave the digest "
            "out"
        )
    blobs = dict(_blobs(bundle, data))
    sent = done = 0
    total = sum(blob.size for blob in blobs.values())
    progress("push", done, total, "bytes")
    with ThreadPoolExecutor(NUM_CONNECTIONS, "push") as pool:
        waiting: dict[Future[int], int] = {}
        try:
            for blob_digest, blob in blobs.items():
                if len(waiting) >= 2 * NUM_CONNECTIONS:
                    ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in ended:
                        sent += future.result()
                        done += waiting.pop(future)
                    progress("push", done, total, "bytes")
                waiting[pool.submit(_send, registry, blob_digest, blob)] = blob.size
            for future, size in waiting.items():
                sent += future.result()
                done += size
                progress("push", done, total, "bytes")
        except BaseException:
            registry.patient = False
            pool.shutdown(cancel_futures=True)
            raise
    registry.put_manifest(data, reference.tag or digest)
    signed = any(layer.media_type == artifacts.SIGNATURE_LAYER for layer in artifact.layers)
    return Pushed(digest, sum(layer.size for layer in artifact.layers), sent, signed)


class _Blob(NamedTuple):
    """A blob's bytes: in memory, or in a file of the bundle."""

    size: int
    data: bytes | None
    bundle: Path
    piece: artifacts.Piece | None

    def read(self) -> bytes:
        data = self.data
        if data is None:
            assert self.piece is not None
            data = artifacts.read_piece(self.bundle, self.piece)
        if data is None:
            raise IntegrityError(
                f"{self.bundle} was changed while it was pushed; push it again when nobody writes "
                "to it"
            )
        return data


def _blobs(bundle: Path, data: bytes) -> Iterator[tuple[str, _Blob]]:
    _, contents = artifacts.decode(data, str(bundle))
    small = [artifacts.EMPTY, read_manifest_bytes(bundle), read_signature_bytes(bundle)]
    for content in small:
        if content is not None:
            yield digest_of(content), _Blob(len(content), content, bundle, None)
    for piece in contents.all_pieces():
        yield piece.digest, _Blob(piece.num_bytes, None, bundle, piece)


def _send(registry: Registry, digest: str, blob: _Blob) -> int:
    """Send a blob unless the registry has it; return the number of bytes sent."""
    if registry.has_blob(digest):
        return 0
    registry.put_blob(blob.read(), digest)
    return blob.size

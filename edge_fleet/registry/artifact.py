"""Defines a bundle as an OCI artifact: its layers, and its manifest in the registry.

A small file is one layer. A large one is cut where its content says (FastCDC), so that two files
that differ in one tensor share all other chunks. A chunk's title is ``NAME.part-00001``: if another
client pulls the chunks, ``cat NAME.part-*`` makes the file again. Engines are not included.

The same bundle always has the same manifest, byte for byte, and so the same digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from edge.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileInfo,
    Manifest,
    decode_manifest,
    is_file_name,
    read_manifest_bytes,
)
from edge.bundle.minisign import MAX_BYTES as MAX_SIGNATURE_BYTES
from edge.bundle.trust import SIGNATURE_NAME, read_signature_bytes
from edge.errors import BundleError, DependencyError, IntegrityError, install_command
from edge.files import MALFORMED
from edge_make.progress import Progress, silent

from .client import MANIFEST_TYPE, digest_of

ARTIFACT_TYPE: Literal["application/vnd.edge-llm.bundle.v1"] = "application/vnd.edge-llm.bundle.v1"
MANIFEST_LAYER = "application/vnd.edge-llm.bundle.manifest.v1+json"
SIGNATURE_LAYER = "application/vnd.edge-llm.bundle.signature.v1.minisign"
FILE_LAYER = "application/vnd.edge-llm.bundle.file.v1"
CHUNK_LAYER = "application/vnd.edge-llm.bundle.chunk.v1"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
TITLE = "org.opencontainers.image.title"
FILE = "vnd.edge-llm.bundle.file"
OFFSET = "vnd.edge-llm.bundle.offset"

WHOLE_BYTES = 4 << 20
"""A file up to this size is one layer."""
MIN_CHUNK_BYTES, AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 4 << 20, 16 << 20
_MAX_LAYERS = 16_000  # some 250 bytes each in a manifest of 4 MiB; 64 GB of weights
_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_CHUNK_BYTES)]
_Digest = Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")]


class Layer(msgspec.Struct, frozen=True, rename="camel"):
    """A descriptor of the OCI image specification 1.1."""

    media_type: str
    digest: _Digest
    size: _Size
    annotations: dict[str, str] = {}


class Artifact(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest of the OCI image specification 1.1 that holds a bundle."""

    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifact_type: Literal["application/vnd.edge-llm.bundle.v1"]
    config: Layer
    layers: Annotated[tuple[Layer, ...], msgspec.Meta(max_length=_MAX_LAYERS)]
    annotations: dict[str, str] = {}


class Piece(NamedTuple):
    """A part of a file, or all of it.

    Attributes:
        file: name of the file in the bundle.
        offset: place in the file where it begins.
        num_bytes: its size.
        digest: digest of its bytes, as a registry writes it.
    """

    file: str
    offset: int
    num_bytes: int
    digest: str


class Contents(NamedTuple):
    """The files of a bundle in an artifact.

    Attributes:
        manifest: layer of ``manifest.json``.
        signature: layer of its signature; None if the bundle is not signed.
        pieces: the pieces of each file, in their order, without gaps.
    """

    manifest: Layer
    signature: Layer | None
    pieces: dict[str, list[Piece]]

    def all_pieces(self) -> Iterator[Piece]:
        """Yield every piece of every file."""
        for pieces in self.pieces.values():
            yield from pieces


def describe(bundle: Path, progress: Progress = silent) -> tuple[Artifact, Manifest]:
    """Cut and hash the files of a bundle without holding them in memory.

    Args:
        bundle: directory of the bundle.
        progress: called with the bytes hashed (step ``hash``).

    Raises:
        BundleError, IntegrityError: the bundle is missing or damaged.
        DependencyError: pyfastcdc is not installed.
    """
    data = read_manifest_bytes(bundle)
    manifest = decode_manifest(data, str(bundle / MANIFEST_NAME))
    layers = [_layer(MANIFEST_LAYER, data, MANIFEST_NAME)]
    signature = read_signature_bytes(bundle)
    if signature is not None:
        layers.append(_layer(SIGNATURE_LAYER, signature, SIGNATURE_NAME))
    done, total = 0, sum(info.num_bytes for info in manifest.files.values())
    progress("hash", done, total, "bytes")
    for name, info in sorted(manifest.files.items()):
        for layer in _file_layers(bundle / name, name, info):
            layers.append(layer)
            done += layer.size
            progress("hash", done, total, "bytes", name)
    if len(layers) > _MAX_LAYERS:
        raise BundleError(f"{bundle} has {len(layers)} pieces; a registry takes {_MAX_LAYERS}")
    config = Layer(EMPTY_TYPE, digest_of(EMPTY), len(EMPTY))
    notes = {
        "org.opencontainers.image.created": manifest.created,
        TITLE: manifest.name,
        "vnd.edge-llm.bundle.producer": manifest.producer,
        "vnd.edge-llm.bundle.quantization": manifest.quantization.name,
    }
    if manifest.source.licence is not None:
        notes["org.opencontainers.image.licenses"] = manifest.source.licence
    return Artifact(2, MANIFEST_TYPE, ARTIFACT_TYPE, config, tuple(layers), notes), manifest


def encode(artifact: Artifact) -> bytes:
    """Serialize for a registry; the inverse of `decode`."""
    return msgspec.json.encode(artifact)


def decode(data: bytes, where: str) -> tuple[Artifact, Contents]:
    """Read the manifest of an artifact and check that it describes whole files.

    Args:
        data: the manifest's bytes, from the registry or from a bundle that came from one.
        where: name of its source, for messages.

    Raises:
        BundleError: it is not a bundle's, or is of another version.
        IntegrityError: it contradicts itself.
    """
    try:
        artifact = msgspec.json.decode(data, type=Artifact)
    except MALFORMED as error:
        raise BundleError(
            f"{where} is no bundle that edge-llm bundle push has sent ({error})"
        ) from error
    manifests, signatures = [], []
    pieces: dict[str, list[Piece]] = {}
    for layer in artifact.layers:
        title = layer.annotations.get(TITLE, "")
        if layer.media_type == MANIFEST_LAYER and title == MANIFEST_NAME:
            manifests.append(layer)
        elif layer.media_type == SIGNATURE_LAYER and layer.size <= MAX_SIGNATURE_BYTES:
            signatures.append(layer)
        elif layer.media_type in (FILE_LAYER, CHUNK_LAYER):
            piece = _piece(layer, title, where)
            own = pieces.setdefault(piece.file, [])
            end = own[-1].offset + own[-1].num_bytes if own else 0
            if piece.offset != end or (own and layer.media_type == FILE_LAYER):
                raise IntegrityError(f"{where} has pieces of {piece.file} that do not join")
            own.append(piece)
        else:
            raise BundleError(
                f"{where} has a layer of the type {layer.media_type[:100]!r}, which this edge-llm "
                "does not know; install the edge-llm that pushed it"
            )
    if len(manifests) != 1 or len(signatures) > 1 or manifests[0].size > MAX_MANIFEST_BYTES:
        raise IntegrityError(
            f"{where} has {len(manifests)} manifests and {len(signatures)} signatures of a bundle"
        )
    return artifact, Contents(manifests[0], signatures[0] if signatures else None, pieces)


def check_contents(contents: Contents, manifest: Manifest, where: str) -> None:
    """Check that an artifact holds exactly the files of its bundle.

    Raises:
        IntegrityError: it does not; the message names a file.
    """
    for name in sorted(contents.pieces.keys() ^ manifest.files.keys()):
        extra = name in contents.pieces
        raise IntegrityError(
            f"{where}: {name} is {'no file of' if extra else 'missing from'} the bundle that "
            f"{MANIFEST_NAME} describes"
        )
    for name, info in manifest.files.items():
        found = sum(piece.num_bytes for piece in contents.pieces[name])
        if found != info.num_bytes:
            raise IntegrityError(
                f"{where}: {name} has {found} bytes, and {MANIFEST_NAME} says {info.num_bytes}"
            )


def read_piece(bundle: Path, piece: Piece) -> bytes | None:
    """Read a piece of a bundle's file; None if the file no longer contains it."""
    try:
        descriptor = os.open(bundle / piece.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        data = os.pread(descriptor, piece.num_bytes, piece.offset)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return data if digest_of(data) == piece.digest else None


def _layer(kind: str, data: bytes, title: str) -> Layer:
    return Layer(kind, digest_of(data), len(data), {TITLE: title})


def _file_layers(path: Path, name: str, info: FileInfo) -> Iterator[Layer]:
    """Cut a file into layers, and check its hash at the same time.

    Raises:
        IntegrityError: the file is missing or differs.
    """
    whole = hashlib.sha256()
    total = 0
    try:
        for number, data in enumerate(_cut(path), 1):
            if info.num_bytes <= WHOLE_BYTES:
                layer = _layer(FILE_LAYER, data, name)
            else:
                layer = _layer(CHUNK_LAYER, data, f"{name}.part-{number:05}")
                layer.annotations.update({FILE: name, OFFSET: str(total)})
            whole.update(data)
            total += len(data)
            yield layer
    except OSError as error:
        raise IntegrityError(
            f"{path} cannot be read ({error.strerror}); copy or export the bundle again"
        ) from error
    if FileInfo(total, whole.hexdigest()) != info:
        raise IntegrityError(
            f"{path} is damaged: it has {total} bytes with SHA-256 {whole.hexdigest()[:16]}…, and "
            f"{MANIFEST_NAME} says {info.num_bytes} with {info.sha256[:16]}…; copy or export the "
            "bundle again"
        )


def _cut(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            yield file.read()
            return
        for chunk in _chunker().cut_stream(file):
            yield bytes(chunk.data)  # its memory is the next chunk's


def _chunker() -> Any:
    try:
        from pyfastcdc import FastCDC
    except ImportError as error:
        raise DependencyError(
            f"cutting files for a registry needs pyfastcdc; run: {install_command('registry')}"
        ) from error
    return FastCDC(avg_size=AVERAGE_CHUNK_BYTES, min_size=MIN_CHUNK_BYTES, max_size=MAX_CHUNK_BYTES)


def _piece(layer: Layer, title: str, where: str) -> Piece:
    """Read which part of which file a layer is.

    Raises:
        IntegrityError: it does not say, or no bundle has such a file.
    """
    notes: Mapping[str, str] = layer.annotations
    name, offset = title, "0"
    if layer.media_type == CHUNK_LAYER:
        name, offset = notes.get(FILE, ""), notes.get(OFFSET, "")
    digits = offset.isascii() and offset.isdigit() and len(offset) <= 15
    if not is_file_name(name) or not digits or name == SIGNATURE_NAME:
        raise IntegrityError(f"{where} has a layer for {name[:100]!r} at {offset[:20]!r}")
    return Piece(name, int(offset), layer.size, layer.digest)

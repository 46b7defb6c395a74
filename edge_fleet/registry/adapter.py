"""Sends and fetches adapters alone: an OCI artifact of its own type, one layer for each file.

The files are the config and the weights as peft saved them, and the signature if there is one. The
same files always have the same manifest, byte for byte, and so the same digest.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge.adapters.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from edge.adapters.peft_file import ITEM_BYTES, adapter_files, parse_adapter_config
from edge.adapters.safetensors_header import read_header
from edge.adapters.trust import SIGNATURE_NAME
from edge.errors import CheckpointError, IntegrityError
from edge.files import MALFORMED, is_file, read_file
from edge_make.atomic_swap import check_free_space
from edge_make.target import write_durably

from .artifact import EMPTY, EMPTY_TYPE, TITLE
from .client import MANIFEST_TYPE, Registry, digest_of
from .push import Pushed
from .reference import Reference

ARTIFACT_TYPE: Literal["application/vnd.edge-llm.adapter.v1"] = (
    "application/vnd.edge-llm.adapter.v1"
)
MAX_BYTES = 1 << 31
"""Largest file; rank 128 over all linears of 8B takes 0.7 GB in bfloat16."""
_KINDS = {
    ADAPTER_CONFIG: "application/vnd.edge-llm.adapter.config.v1+json",
    ADAPTER_WEIGHTS: "application/vnd.edge-llm.adapter.weights.v1.safetensors",
    SIGNATURE_NAME: "application/vnd.edge-llm.adapter.signature.v1.minisign",
}


class Layer(msgspec.Struct, frozen=True, rename="camel"):
    """A descriptor of the OCI image specification 1.1."""

    media_type: str
    digest: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
    annotations: dict[str, str] = {}


class Artifact(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest of the OCI image specification 1.1 that holds an adapter."""

    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifact_type: Literal["application/vnd.edge-llm.adapter.v1"]
    config: Layer
    layers: tuple[Layer, ...]


def push(path: Path, reference: Reference, registry: Registry) -> Pushed:
    """Send an adapter without the blobs that are already there; the tag moves last.

    Args:
        path: the directory that ``peft`` saved, or the file of its weights.
        reference: where to send it; without a tag it is stored only under its digest.
        registry: the registry of that reference.

    Raises:
        CheckpointError: it is no adapter that can be switched at run time.
        IntegrityError: the reference has another digest.
        ConfigError, RegistryError: the registry fails, as `Registry` says.
    """
    config, weights = adapter_files(path)
    signature = weights.with_name(SIGNATURE_NAME)
    paths = (config, weights, signature) if is_file(signature) else (config, weights)
    try:
        files = {
            name: read_file(file, MAX_BYTES) for name, file in zip(_KINDS, paths, strict=False)
        }
        parse_adapter_config(files[ADAPTER_CONFIG], config)
        read_header(io.BytesIO(files[ADAPTER_WEIGHTS]), weights, ITEM_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read the adapter {path}: {error.strerror}") from error
    layers = tuple(_layer(_KINDS[name], data, {TITLE: name}) for name, data in files.items())
    empty = _layer(EMPTY_TYPE, EMPTY, {})
    manifest = msgspec.json.encode(Artifact(2, MANIFEST_TYPE, ARTIFACT_TYPE, empty, layers))
    digest = digest_of(manifest)
    if reference.digest not in (None, digest):
        raise IntegrityError(
            f"{path} has the digest {digest}, and {reference} asks for another; leave it out"
        )
    sent = 0
    for layer, data in zip((empty, *layers), (EMPTY, *files.values()), strict=True):
        if not registry.has_blob(layer.digest):
            registry.put_blob(data, layer.digest)
            sent += layer.size
    registry.put_manifest(manifest, reference.tag or digest)
    return Pushed(digest, sum(map(len, files.values())), sent, SIGNATURE_NAME in files)


def look(reference: Reference, registry: Registry) -> tuple[str, dict[str, Layer]]:
    """Ask a registry about a reference; return the digest, and the layers by file name.

    Raises:
        CheckpointError: it is no adapter.
        ConfigError, IntegrityError, RegistryError: the registry fails, as `Registry` says.
    """
    data, digest = registry.manifest(reference.wanted)
    try:
        artifact = msgspec.json.decode(data, type=Artifact)
    except MALFORMED as error:
        raise CheckpointError(
            f"{reference} is no adapter that edge-llm adapter push has sent ({error})"
        ) from error
    layers = {layer.annotations.get(TITLE, ""): layer for layer in artifact.layers}
    kinds = {name: layer.media_type for name, layer in layers.items()}
    is_whole = kinds.keys() >= {ADAPTER_CONFIG, ADAPTER_WEIGHTS} and kinds.items() <= _KINDS.items()
    if len(kinds) != len(artifact.layers) or not is_whole:
        raise CheckpointError(
            f"{reference} has {len(artifact.layers)} layers that do not make an adapter "
            f"({', '.join(kinds)!r:.200}); push it again with this edge-llm"
        )
    return digest, layers


def fetch(layers: dict[str, Layer], registry: Registry, target: Path) -> None:
    """Fetch the files of an adapter into a new directory, and check the digest of each.

    Raises:
        ResourceError: the disk is too full.
        ConfigError, IntegrityError, RegistryError: the registry fails, as `Registry` says.
        OSError: they cannot be written.
    """
    target.mkdir()
    check_free_space(target, sum(layer.size for layer in layers.values()), "the adapter")
    for name, layer in layers.items():
        write_durably(target / name, registry.blob(layer.digest, layer.size))


def _layer(kind: str, data: bytes, annotations: dict[str, str]) -> Layer:
    return Layer(kind, digest_of(data), len(data), annotations)

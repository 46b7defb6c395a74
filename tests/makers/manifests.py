"""A small, complete manifest to change and write in tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileInfo,
    Graphs,
    LinearInfo,
    Manifest,
    Quantization,
    SamplingDefaults,
    Source,
    TensorScheme,
    Tokens,
    read_manifest,
)
from edge.model.spec import ModelSpec, RopeSpec
from edge_make.manifest_bytes import encode_manifest, hash_content
from tests.makers.dense import Dense, dense

_DENSE = Dense(
    architecture="qwen2",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=300,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope=RopeSpec(theta=10000.0),
    qkv_bias=True,
)
_MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    producer="edge-llm 0.0.0",
    created="2026-01-01T00:00:00Z",
    name="tiny",
    model=_DENSE.model(),
    dialect="native",
    dtype="fp16",
    kv_capacity=256,
    rope_positions=2048,
    quantization=Quantization(
        name="int4",
        method="rtn",
        clip="mse",
        linears={
            "layers.0.qkv": LinearInfo(
                scheme=TensorScheme(kind="int4", group_size=32), shape=(64, 128), num_bytes=4608
            ),
            "lm_head": LinearInfo(
                scheme=TensorScheme(kind="int8"), shape=(64, 300), num_bytes=19800
            ),
        },
    ),
    sampling=SamplingDefaults(temperature=0.6, top_p=0.95),
    tokens=Tokens(bos=1, bos_text="<bos>", eos=(2, 3), eos_text="<eos>", add_bos=True),
    source=Source(kind="directory", location="tiny"),
    graphs=Graphs(),
    files={},
)


def make_manifest(**changes: Any) -> Manifest:
    """The manifest with some top-level fields replaced."""
    return msgspec.structs.replace(_MANIFEST, **changes)


def make_model(**changes: Any) -> ModelSpec:
    """The manifest's model with some fields replaced."""
    return msgspec.structs.replace(_DENSE, **changes).model()


def change_model(model: ModelSpec, **changes: Any) -> ModelSpec:
    """A model whose layers are alike, with some of the fields of `Dense` replaced."""
    return msgspec.structs.replace(dense(model), **changes).model()


def written_before_layers(manifest: Manifest, version: int = 8) -> bytes:
    """The bytes of a manifest before schema 9, with a dense model's numbers instead of layers."""
    older = msgspec.structs.replace(manifest, schema_version=version)
    content = msgspec.to_builtins(older)

    def numbers(model: ModelSpec) -> Any:
        return msgspec.to_builtins(dense(model))

    content["model"] = numbers(manifest.model)
    if manifest.head is not None:
        content["head"]["model"] = numbers(manifest.head.model)
    return hash_content(content)


def as_written_before_scales(bundle: Path) -> None:
    """Give a bundle the manifest of a release that left the cache's scales in the graphs alone."""
    older = msgspec.structs.replace(read_manifest(bundle), extras={})
    (bundle / MANIFEST_NAME).write_bytes(written_before_layers(older, 7))


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Give a file of a bundle another content, and its manifest the hash of that."""
    (bundle / name).write_bytes(data)
    manifest = read_manifest(bundle)
    files = {**manifest.files, name: FileInfo(len(data), hashlib.sha256(data).hexdigest())}
    changed = msgspec.structs.replace(manifest, files=files)
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(changed))

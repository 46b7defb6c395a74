from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileInfo,
    Graphs,
    LinearInfo,
    Manifest,
    Quantization,
    RopeSpec,
    SamplingDefaults,
    Source,
    TensorScheme,
    Tokens,
    decode_manifest,
    encode_manifest,
    is_file_name,
    read_manifest,
    sha256_file,
    verify_files,
)
from edge.errors import BundleError, IntegrityError
from tests.manifests import make_manifest, make_model

counts = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
file_names = st.from_regex(r"[a-z0-9_][A-Za-z0-9._-]{0,20}\Z").filter(is_file_name)
reports = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
schemes = st.builds(
    TensorScheme, kind=st.sampled_from(["float", "int8", "int4"]), group_size=counts
)
manifests = st.builds(
    make_manifest,
    name=st.text(),
    model=st.builds(
        make_model,
        hidden_size=counts,
        rms_norm_eps=floats,
        rope=st.builds(RopeSpec, theta=floats, kind=st.sampled_from(["default", "llama3", "yarn"])),
    ),
    dialect=st.sampled_from(["native", "portable"]),
    dtype=st.sampled_from(["fp16", "bf16"]),
    quantization=st.builds(
        Quantization,
        name=st.text(),
        method=st.sampled_from(["none", "rtn"]),
        clip=st.sampled_from(["none", "absmax", "mse"]),
        linears=st.dictionaries(
            st.text(),
            st.builds(
                LinearInfo, scheme=schemes, shape=st.tuples(counts, counts), num_bytes=counts
            ),
            max_size=3,
        ),
    ),
    sampling=st.builds(SamplingDefaults, temperature=floats, top_k=counts),
    tokens=st.builds(
        Tokens,
        bos=st.none() | counts,
        bos_text=st.text(),
        eos=st.lists(counts, max_size=3).map(tuple),
        eos_text=st.text(),
        add_bos=st.booleans(),
    ),
    source=st.builds(
        Source,
        kind=st.sampled_from(["directory", "hub", "gguf"]),
        location=st.text(),
        revision=st.none() | st.text(),
    ),
    graphs=st.builds(Graphs, decoder=file_names, cpu=file_names),
    files=st.dictionaries(
        file_names,
        st.builds(
            FileInfo, num_bytes=counts, sha256=st.text("0123456789abcdef", min_size=64, max_size=64)
        ),
        max_size=3,
    ),
    quality=st.none() | st.dictionaries(st.text(), reports, max_size=3),
)


def resign(data: bytes) -> bytes:
    """What a forger (or a well-meaning editor with this docstring at hand) would do."""
    field = b'"self_sha256": "'
    head, _, _ = data.rpartition(field)
    blank = head + field + b"0" * 64 + b'"\n}\n'
    return head + field + hashlib.sha256(blank).hexdigest().encode() + b'"\n}\n'


def edit(change: dict[str, Any]) -> bytes:
    """A correctly signed manifest with top-level keys changed behind msgspec's back."""
    tree = json.loads(encode_manifest(make_manifest()))
    del tree["self_sha256"]
    return resign(json.dumps({**tree, **change, "self_sha256": ""}, indent=2).encode())


@settings(deadline=None, max_examples=80)
@given(manifests)
def test_round_trip(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    decoded = decode_manifest(data)
    assert msgspec.structs.replace(decoded, self_sha256=manifest.self_sha256) == manifest
    assert encode_manifest(decoded) == data


def test_the_self_hash_is_found_at_the_end_only() -> None:
    decoy = {"self_sha256": "0" * 64, "deeper": {"self_sha256": "0" * 64}}
    manifest = make_manifest(quality=decoy)
    assert decode_manifest(encode_manifest(manifest)).quality == decoy


def test_the_self_hash_is_what_the_docs_say() -> None:
    data = encode_manifest(make_manifest())
    assert resign(data) == data
    assert json.loads(data)["self_sha256"].encode() in data


def test_every_flipped_bit_is_refused() -> None:
    data = bytearray(encode_manifest(make_manifest()))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(BundleError):
                decode_manifest(bytes(data))
            data[position] ^= 1 << bit
    decode_manifest(bytes(data))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_other_damage_is_refused(draw: st.DataObject) -> None:
    data = encode_manifest(make_manifest())
    start = draw.draw(st.integers(0, len(data)))
    stop = draw.draw(st.integers(start, min(start + 100, len(data))))
    damaged = data[:start] + draw.draw(st.binary(max_size=20)) + data[stop:]
    if damaged != data:
        with pytest.raises(BundleError):
            decode_manifest(damaged)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"\xff",
        b"not json",
        b"[" * 100_000,
        b'{"schema_version":1,"x":' * 50_000,
    ],
    ids=["empty", "object", "null", "not utf-8", "text", "deep list", "deep object"],
)
def test_what_is_no_manifest_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"somewhere.json is not a manifest of edge-llm"):
        decode_manifest(data, "somewhere.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kv_capacty": 1}, "kv_capacty"),
        ({"tokens": {"bos": None, "eos": [], "shape": 1}}, "shape"),
        ({"kv_capacity": "256"}, r"\$\.kv_capacity"),
        ({"dialect": "plugin"}, "plugin"),
        ({"dtype": "fp32"}, "fp32"),
    ],
)
def test_unknown_keys_and_wrong_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=named):
        decode_manifest(edit(change))


def test_missing_key_is_named() -> None:
    data = encode_manifest(make_manifest())
    with pytest.raises(BundleError, match="producer"):
        decode_manifest(resign(data.replace(b'  "producer": "edge-llm 0.0.0",\n', b"")))


def test_forged_text_that_is_not_utf8_is_refused() -> None:
    data = encode_manifest(make_manifest(name="name"))
    with pytest.raises(BundleError, match="utf-8"):
        decode_manifest(resign(data.replace(b'"name"', b'"na\xffe"')))


_BEFORE_4 = [
    b',\n    "quantization": null',
    b',\n        "offsets": false,\n        "reordered": false,\n        "from_source": null',
]


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        (1, [b',\n    "assumed": null', b',\n  "tensorrt": null', *_BEFORE_4]),
        (2, [b',\n  "tensorrt": null', *_BEFORE_4]),
        (3, _BEFORE_4),
    ],
)
def test_a_bundle_of_an_older_schema_still_opens(version: int, lacks: list[bytes]) -> None:
    data = encode_manifest(make_manifest(schema_version=version))
    old = data
    for part in lacks:
        assert part in old
        old = old.replace(part, b"")
    assert decode_manifest(resign(old)) == msgspec.structs.replace(
        decode_manifest(data), self_sha256=decode_manifest(resign(old)).self_sha256
    )


def test_int8_of_a_bundle_of_schema_2_is_not_in_planes() -> None:
    linear = LinearInfo(scheme=TensorScheme(kind="int8", group_size=32), shape=(64, 8), num_bytes=1)
    manifest = make_manifest(schema_version=2)
    quantization = msgspec.structs.replace(manifest.quantization, linears={"lm_head": linear})
    data = encode_manifest(msgspec.structs.replace(manifest, quantization=quantization))
    old = re.sub(rb',\s+"planes": false', b"", data)
    assert old != data
    assert decode_manifest(resign(old)).quantization.linears == {"lm_head": linear}


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_another_schema_version_is_told_from_damage(version: int) -> None:
    # A newer manifest has keys that this version knows nothing of, and perhaps no self-hash.
    data = json.dumps({"schema_version": version, "novelty": True}).encode()
    with pytest.raises(
        BundleError, match=rf"schema version {version}.* reads 1 to {SCHEMA_VERSION}"
    ) as caught:
        decode_manifest(data)
    assert not isinstance(caught.value, IntegrityError)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "a\n", "a\0b"]
)
def test_names_that_leave_the_bundle_are_refused(name: str) -> None:
    assert not is_file_name(name)
    with pytest.raises(BundleError, match="no name for a file"):
        decode_manifest(edit({"files": {name: {"num_bytes": 1, "sha256": "0" * 64}}}))


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "decoder.onnx.data", "embeddings.safetensors", "chat_template.jinja"]
)
def test_names_of_a_bundle_are_accepted(name: str) -> None:
    assert is_file_name(name)
    assert not is_file_name(MANIFEST_NAME)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    contents = {"decoder.onnx": b"graph", "tokenizer.json": b"{}", "empty": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    files = {name: sha256_file(tmp_path / name) for name in contents}
    (tmp_path / MANIFEST_NAME).write_bytes(encode_manifest(make_manifest(files=files)))
    return tmp_path


def test_a_whole_bundle_verifies(bundle: Path) -> None:
    verify_files(bundle, read_manifest(bundle))


@pytest.mark.parametrize("data", [b"grapH", b"grap", b"graphs", b""])
def test_the_damaged_file_is_named(bundle: Path, data: bytes) -> None:
    (bundle / "decoder.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
        verify_files(bundle, read_manifest(bundle))
    verify_files(bundle, read_manifest(bundle), ["tokenizer.json", "empty"])


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"tokenizer\.json cannot be read \(No such file"):
        verify_files(bundle, read_manifest(bundle))


def test_a_directory_in_a_files_place_is_named(bundle: Path) -> None:
    (bundle / "empty").unlink()
    (bundle / "empty").mkdir()
    with pytest.raises(IntegrityError, match="empty"):
        verify_files(bundle, read_manifest(bundle))


def test_a_file_that_the_manifest_does_not_list_is_refused(bundle: Path) -> None:
    (bundle / "decoder.cpu.onnx").write_bytes(b"unknown")
    with pytest.raises(IntegrityError, match=r"decoder\.cpu\.onnx is not listed"):
        verify_files(bundle, read_manifest(bundle), ["decoder.cpu.onnx"])


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="edge-llm export") as caught:
        read_manifest(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)


def test_sha256_over_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.bundle.manifest._HASH_CHUNK_BYTES", 7)
    data = bytes(range(100))
    (tmp_path / "file").write_bytes(data)
    expected = FileInfo(num_bytes=100, sha256=hashlib.sha256(data).hexdigest())
    assert sha256_file(tmp_path / "file") == expected

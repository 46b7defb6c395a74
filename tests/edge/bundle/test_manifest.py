from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Calibration,
    FileInfo,
    Graphs,
    KvCache,
    LinearInfo,
    Manifest,
    Quantization,
    SamplingDefaults,
    Source,
    TensorScheme,
    Tokens,
    decode_manifest,
    is_file_name,
    read_manifest,
)
from edge.bundle.rope import inverse_frequencies
from edge.errors import BundleError, IntegrityError
from edge.model.spec import RopeSpec
from edge.runtime.sampling_params import KNOBS
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from edge_make.manifest_text import describe_kv_cache, describe_sampling
from tests.makers.manifests import make_manifest, make_model, written_before_layers

counts = st.integers(0, 2**50)
rows = st.integers(1, 2**22)
ids = st.integers(0, 299)
floats = st.floats(allow_nan=False, allow_infinity=False)
lines = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=50)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
file_names = st.from_regex(r"[a-z0-9_][A-Za-z0-9._-]{0,20}\Z").filter(is_file_name)
reports = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
schemes = st.builds(
    TensorScheme,
    kind=st.sampled_from(["float", "int8", "int4"]),
    group_size=st.integers(0, 2**20),
)
manifests = st.builds(
    make_manifest,
    name=lines,
    model=st.builds(
        make_model,
        hidden_size=st.integers(1, 2**20),
        rms_norm_eps=st.floats(0, 1, exclude_min=True),
        rope=st.builds(
            RopeSpec,
            theta=st.floats(1, 1e15, exclude_min=True),
            kind=st.sampled_from(["default", "llama3", "yarn"]),
            original_max_positions=st.integers(1, 2**31),
        ),
    ),
    dialect=st.sampled_from(["native", "portable"]),
    dtype=st.sampled_from(["fp16", "bf16"]),
    quantization=st.builds(
        Quantization,
        name=lines,
        method=st.sampled_from(["none", "rtn"]),
        clip=st.sampled_from(["none", "absmax", "mse"]),
        linears=st.dictionaries(
            st.text(),
            st.builds(LinearInfo, scheme=schemes, shape=st.tuples(rows, rows), num_bytes=counts),
            max_size=3,
        ),
    ),
    sampling=st.builds(
        SamplingDefaults, temperature=st.floats(0, 10), top_k=st.integers(0, 2**31 - 1)
    ),
    tokens=st.builds(
        Tokens,
        bos=st.none() | ids,
        bos_text=st.text(),
        eos=st.lists(ids, min_size=1, max_size=3).map(tuple),
        eos_text=st.text(),
        add_bos=st.booleans(),
    ),
    source=st.builds(
        Source,
        kind=st.sampled_from(["directory", "hub", "gguf"]),
        location=lines,
        revision=st.none() | lines,
    ),
    graphs=st.builds(Graphs, decoder=file_names, cpu=file_names),
    files=st.dictionaries(
        file_names, st.builds(FileInfo, num_bytes=counts, sha256=digests), max_size=3
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
def test_a_malformed_manifest_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"somewhere.json is not a manifest of edge-llm"):
        decode_manifest(data, "somewhere.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kv_capacty": 1}, "kv_capacty"),
        ({"tokens": {"bos": None, "eos": [2], "shape": 1}}, "shape"),
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
    with pytest.raises(BundleError, match=r"(?i)utf-8"):  # msgspec 0.23 writes it in capitals
        decode_manifest(resign(data.replace(b'"name"', b'"na\xffe"')))


_BEFORE_4 = [
    b',\n    "quantization": null',
    b',\n        "offsets": false,\n        "reordered": false,\n        "from_source": null',
]
_BEFORE_5 = b',\n  "kv_cache": null'
_BEFORE_8 = b',\n  "extras": {}'


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        (
            1,
            [b',\n    "assumed": null', b',\n  "tensorrt": null', *_BEFORE_4, _BEFORE_5, _BEFORE_8],
        ),
        (2, [b',\n  "tensorrt": null', *_BEFORE_4, _BEFORE_5, _BEFORE_8]),
        (3, [*_BEFORE_4, _BEFORE_5, _BEFORE_8]),
        (4, [_BEFORE_5, _BEFORE_8]),
        (7, [_BEFORE_8]),
    ],
)
def test_a_bundle_of_an_older_schema_still_opens(version: int, lacks: list[bytes]) -> None:
    manifest = make_manifest(schema_version=version)
    old = written_before_layers(manifest, version)
    for part in lacks:
        assert part in old
        old = old.replace(part, b"")
    found = decode_manifest(resign(old))
    assert msgspec.structs.replace(found, self_sha256=manifest.self_sha256) == manifest


def test_int8_of_a_bundle_of_schema_2_is_not_in_planes() -> None:
    linear = LinearInfo(scheme=TensorScheme(kind="int8", group_size=32), shape=(64, 8), num_bytes=1)
    manifest = make_manifest(schema_version=2)
    quantization = msgspec.structs.replace(manifest.quantization, linears={"lm_head": linear})
    data = written_before_layers(msgspec.structs.replace(manifest, quantization=quantization), 2)
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
    "name",
    [
        "../outside", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "a\n", "a\0b",
        "engines", "manifest.json", "manifest.json.tmp", "manifest.json.minisig", "a" * 201,
    ],
)  # fmt: skip
def test_names_that_leave_the_bundle_or_are_taken_are_refused(name: str) -> None:
    assert not is_file_name(name)
    with pytest.raises(BundleError, match="no name for a file"):
        decode_manifest(edit({"files": {name: {"num_bytes": 1, "sha256": "0" * 64}}}))


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "decoder.onnx.data", "chat_template.jinja", "a" * 200]
)
def test_names_of_a_bundle_are_accepted(name: str) -> None:
    assert is_file_name(name)
    assert not is_file_name(MANIFEST_NAME)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="edge-llm export") as caught:
        read_manifest(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)


def test_sha256_over_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.files._CHUNK_BYTES", 7)
    data = bytes(range(100))
    (tmp_path / "file").write_bytes(data)
    expected = FileInfo(num_bytes=100, sha256=hashlib.sha256(data).hexdigest())
    assert sha256_file(tmp_path / "file") == expected


# --- hostile manifests, correctly signed --------------------------------------------------------


def change(place: str, value: Any) -> bytes:
    """The manifest with one value replaced, ``place`` is ``model.ropes.0.theta``."""
    tree = json.loads(encode_manifest(make_manifest()))
    del tree["self_sha256"]
    *path, last = place.split(".")
    node: Any = tree
    for key in path:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value
    return resign(json.dumps({**tree, "self_sha256": ""}, indent=2).encode())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model.layers.0.count", 10**9),
        ("model.layers.0.count", 0),
        ("model.layers", [{"count": 999, "parts": [{"part": "add", "name": "x"}]}] * 2),
        ("model.layers.0.parts", []),
        ("model.layers.0.parts", [{"part": "add", "name": "x"}] * 33),
        ("model.layers.0.parts.0.part", "layer_norm"),
        ("model.layers.0.parts.0.name", "post_norm"),  # twice
        ("model.layers.0.parts.0.name", "a.b"),
        ("model.layers.0.parts.0.name", "unheard_of"),
        ("model.layers.0.parts.0.size", 65),
        ("model.layers.0.parts.0.of", "q"),  # qkv comes later
        ("model.layers.0.parts.1.width", 2**40),
        ("model.layers.0.parts.1.outputs", [["q", 64]]),
        ("model.layers.0.parts.2.dims", 15),
        ("model.layers.0.parts.2.table", 1),
        ("model.layers.0.parts.3.dim", 15),
        ("model.layers.0.parts.3.kv_heads", 3),
        ("model.layers.0.parts.3.scale", 0),
        ("model.layers.0.parts.8.activation", "relu"),
        ("model.layers.0.parts.10", {"part": "gated_mlp"}),
        ("model.layers.0.parts.0", {"part": "rope", "dims": 16}),
        ("model.layers.0.parts.3", {"part": "rope", "dims": 16}),  # the second one
        ("model.layers.0.parts.3", {"part": "norm", "name": "q_norm", "size": 16, "of": "q"}),
        ("model.vocab_size", 2**40),
        ("model.rms_norm_eps", 0),
        ("model.ropes.0.theta", 0),
        ("model.ropes.0.theta", -1),
        ("model.ropes.0.theta", 1),
        ("model.ropes.0.kind", "yarn"),  # without original_max_positions
        ("model.ropes", []),
        ("kv_capacity", 10**6),
        ("rope_positions", 0),
        ("tokens.eos", []),
        ("tokens.eos", [-5]),
        ("tokens.eos", [10**6]),
        ("tokens.bos", 300),
        ("sampling.temperature", -1),
        ("sampling.top_p", 1.5),
        ("sampling.repetition_penalty", 0),
        ("name", "\x1b[2J\x1b]0;owned\x07"),
        ("name", "abc\u202egpj.exe"),
        ("name", "a" * 2000),
        ("source.location", "a\nb"),
        ("files", {"a": {"num_bytes": -1, "sha256": "0" * 64}}),
        ("files", {"a": {"num_bytes": 1, "sha256": "z" * 64}}),
    ],
)
def test_numbers_and_names_out_of_range_are_refused(place: str, value: Any) -> None:
    with pytest.raises(BundleError):
        decode_manifest(change(place, value))
    assert decode_manifest(change("name", "R1 Distill é 你好")).name == "R1 Distill é 你好"


def test_the_ranges_of_sampling_are_those_of_requests() -> None:
    """Else a bundle opens whose every request is refused, as if the client were wrong."""
    for name in SamplingDefaults.__struct_fields__:
        if name == "assumed":
            continue
        for value in (KNOBS[name].low, KNOBS[name].high):
            number = KNOBS[name].kind(value)
            decode_manifest(change(f"sampling.{name}", number))
            for beyond in (number - 1, number + 1):
                if not KNOBS[name].low <= beyond <= KNOBS[name].high:
                    with pytest.raises(BundleError):
                        decode_manifest(change(f"sampling.{name}", beyond))


hostile_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | floats
    | st.text(max_size=8)
    | st.sampled_from([10**9, -1, 0, 2**63, 1e308, 5e-324, "../x", "a" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), hostile_values, st.booleans())
def test_any_signed_manifest_is_one_or_an_error(place: list[int], value: Any, older: bool) -> None:
    """And what is made of it when a bundle is opened takes no time."""
    manifest = make_manifest()
    tree = json.loads(written_before_layers(manifest) if older else encode_manifest(manifest))
    del tree["self_sha256"]
    node: Any = tree
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[place[0] % len(keys)]
        place = place[1:]
        if not place or not isinstance(node[key], (dict, list)):
            node[key] = value
            break
        node = node[key]
    data = resign(json.dumps({**tree, "self_sha256": ""}, indent=2).encode())
    before_s = time.process_time()
    try:
        manifest = decode_manifest(data)
    except BundleError:
        return
    finally:
        assert time.process_time() - before_s < 1
    assert len(linear_layers(manifest.model)) == 4 * manifest.model.num_layers + 1
    for rope in manifest.model.ropes:
        assert np.isfinite(inverse_frequencies(rope, 16)).all()
    assert describe_sampling(manifest.sampling).isprintable()
    assert time.process_time() - before_s < 2


def _kv_cache(**changes: Any) -> KvCache:
    calibration = Calibration("built-in", "0" * 64, 512, 512, 0)
    return msgspec.structs.replace(KvCache("int8", (0.1, 0.4), 0.25, (1,), calibration), **changes)


def test_the_layers_of_an_8_bit_cache_are_listed() -> None:
    manifest = make_manifest(kv_cache=_kv_cache())
    assert decode_manifest(encode_manifest(manifest)).int8_layers == (0,)
    assert describe_kv_cache(manifest) == "int8, layers 1 in float"
    assert describe_kv_cache(make_manifest()) == "float"
    assert make_manifest().int8_layers == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_errors": (0.1,)}, "not one of score_errors for each layer"),
        ({"float_layers": (0, 1)}, "leaves no layer in 8 bits"),
        ({"float_layers": (2,)}, "or names one that is not there"),
    ],
)
def test_an_8_bit_cache_that_contradicts_the_model_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    data = encode_manifest(make_manifest(kv_cache=_kv_cache(**changes)))
    with pytest.raises(BundleError, match=message):
        decode_manifest(data)

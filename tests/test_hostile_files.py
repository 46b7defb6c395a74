"""Whatever opens a file gives a value or an `EdgeError`, soon and without much memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.bundle.manifest import decode_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.errors import BundleError, CheckpointError, ConfigError, EdgeError
from edge.limited_child import Limits
from edge.runtime.prefix_store import PrefixStore, bundle_key
from edge_lab.measure.tasks import read_task
from export.sources import untrusted_pattern
from export.sources.gguf_file import GgufFile
from export.sources.lora_config import read_lora_config
from export.sources.safetensors_file import SafetensorsFile
from tests.makers.manifests import make_manifest
from tests.readers import DEEP, NASTY, READERS, Reader, put, resign

pytest.importorskip("gguf")
MAX_CPU_S = 2.0
names = pytest.mark.parametrize("name", READERS)
quick = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(reader: Reader, data: bytes, folder: Path) -> None:
    before_s = time.process_time()
    reader.try_bytes(data, folder)
    mended = reader.mend(data)
    if mended != data:
        reader.try_bytes(mended, folder)
    assert time.process_time() - before_s < MAX_CPU_S


@names
def test_the_seed_is_taken_and_its_hashes_are_right(name: str, tmp_path: Path):
    """Else the others would test nothing."""
    reader = READERS[name]
    assert reader.try_bytes(reader.seed, tmp_path)
    assert reader.mend(reader.seed) == reader.seed


CORPUS = sorted((Path(__file__).parent / "fuzz" / "corpus").glob("*/*"))


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_mended_faults_stay_mended(file: Path, tmp_path: Path):
    """Each of these took minutes or gigabytes, or ended in a traceback or an abort, before."""
    before_s = time.monotonic()
    is_taken = READERS[file.parent.name].try_bytes(file.read_bytes(), tmp_path)
    assert is_taken == (file.name == "empty-token")  # which is odd, and harmless
    assert time.monotonic() - before_s < 60


changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def change(data: bytes, kind: str, place: float, new: bytes) -> bytes:
    at = int(place * len(data))
    head, tail = data[:at], data[at:]
    if kind == "flip":
        return head + new + tail[len(new) :]
    if kind == "cut":
        return head + tail[len(new) ** 2 :]
    return head + (new if kind == "insert" else tail[:40] * 3) + tail


@names
@quick
@given(changes)
def test_damaged_bytes(name: str, tmp_path: Path, changes: list[tuple[str, float, bytes]]):
    reader = READERS[name]
    data = reader.seed
    for kind, place, new in changes:
        data = change(data, kind, place, new)
    check(reader, data, tmp_path)


values = st.one_of(
    st.sampled_from(NASTY),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
)


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.is_json])
@quick
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=4), values), max_size=3)
)
def test_wrong_values(name: str, tmp_path: Path, edits: list[tuple[list[int], Any]]):
    reader = READERS[name]
    tree = json.loads(reader.seed)
    for place, value in edits:
        put(tree, place, json.loads(json.dumps(value)))
    check(reader, json.dumps(tree, indent=2).encode(), tmp_path)


@names
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 1000,
        b"\xff" * 1000,
        DEEP.encode(),
        b'{"a": ' + b"9" * 5000 + b"}",
        b"a = " + b"9" * 5000,
        b'{"question": ' + DEEP.encode() + b"}",
        b'"\xed\xa0\x80"',
        b'{"eos_token": "\\ud800", "chat_template": "\\ud800"}',
        b"[]",
        b"null",
    ],
)
def test_files_without_any_structure(name: str, data: bytes, tmp_path: Path):
    reader = READERS[name]
    check(reader, data, tmp_path)


@pytest.mark.parametrize(
    "name", [n for n in READERS if n not in ("template", "onnx", "rules", "settings")]
)
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path):
    """The others are given bytes, or are files of whoever runs the service."""
    reader = READERS[name]
    os.mkfifo(tmp_path / reader.name)
    if name in ("prefix", "response"):
        reader.read(tmp_path / reader.name)  # listed as unusable
        return
    with pytest.raises(EdgeError):
        reader.read(tmp_path / reader.name)


# ------------------------------------------------------------------------------- by hand


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    "shape",
    [
        "0,4611686018427387904,4611686018427387904",
        ",".join(["1"] * 65),
        ",".join(["9" * 18] * 10**5),
    ],
)
def test_safetensors_of_impossible_shapes(shape: str, tmp_path: Path):
    header = f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}'
    before_s = time.process_time()
    with pytest.raises(CheckpointError):
        SafetensorsFile(write(tmp_path / "a.safetensors", header.encode()))
    assert time.process_time() - before_s < MAX_CPU_S


def test_safetensors_with_a_header_that_is_mostly_air(tmp_path: Path):
    with pytest.raises(CheckpointError, match="a header of 16000001 bytes does not fit"):
        SafetensorsFile(write(tmp_path / "a.safetensors", b"{" + b" " * 15_999_999 + b"}"))


def test_gguf_with_more_metadata_than_a_vocabulary(tmp_path: Path):
    count = 5_000_000
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 6, count)
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(4 * count)
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="more than 2097152 values"):
        GgufFile(tmp_path / "a.gguf")
    for counts in ((2**63, 1), (1, 2**63)):
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
        with pytest.raises(CheckpointError, match="not a valid GGUF"):
            GgufFile(tmp_path / "a.gguf")


def test_onnx_of_millions_of_nodes():
    data = b"\x0a\x00" * 3_000_000
    length = b"\x3a" + bytes([0x80 | len(data) & 127, 0x80 | len(data) >> 7 & 127])
    length += bytes([0x80 | len(data) >> 14 & 127, len(data) >> 21])
    before_s, before_kb = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match="fields in a part"):
        OnnxFile(length + data)
    assert time.process_time() - before_s < MAX_CPU_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200_000


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"]
)
def test_patterns_of_an_adapter_that_never_end(key: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(untrusted_pattern._child, "_limits", Limits(0.3, 1 << 28))
    untrusted_pattern._child.close()
    evil = r"(?:(?:\w+)+\.?)+!"
    values = json.loads(READERS["lora"].seed) | {"modules_to_save": None}
    if key in ("target_modules", "exclude_modules"):
        values |= {"layers_to_transform": None, "layers_pattern": None}
    values |= {key: {evil: 3} if key == "rank_pattern" else evil}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    config = read_lora_config(tmp_path)
    before_s = time.monotonic()
    with pytest.raises(CheckpointError, match="takes more than"):
        _ = config.targets("model.layers.0.self_attn.q_proj"), config.rank("a" * 40)
    assert time.monotonic() - before_s < 10
    untrusted_pattern._child.close()


@pytest.mark.parametrize(
    "sizes", [{"kv_heads": -2}, {"dim": 2**63}, {"dim": 2**32, "kv_heads": 2**32}, {"type": "fp1"}]
)
def test_prefixes_of_impossible_layouts_are_listed_as_unusable(sizes: Any, tmp_path: Path):
    reader = READERS["prefix"]
    head = json.loads(reader.seed[26 : reader.seed.index(b"}", reader.seed.index(b"rows_sha")) + 1])
    for rows in head["layout"]["tensors"].values():
        rows |= sizes
    header = json.dumps(head).encode()
    data = reader.seed[:18] + len(header).to_bytes(8, "little") + header + bytes(32 + 96)
    folder = tmp_path / bundle_key(make_manifest())[:16]
    folder.mkdir()
    (folder / "a.kv").write_bytes(reader.mend(data))
    (found,) = PrefixStore(tmp_path, make_manifest()).list()
    assert found.problem is not None
    assert found.problem.startswith("it is of another version")


def test_tasks_out_of_devices_and_too_long(tmp_path: Path):
    with pytest.raises(ConfigError, match="it is no plain file"):
        read_task(Path("/dev/zero"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 29)
    with pytest.raises(ConfigError, match="it is larger than 256 MiB"):
        read_task(tmp_path / "large")


def test_a_manifest_of_a_mended_hash_is_read():
    """The mutator that the fuzzer needs: else nothing behind the hash is ever reached."""
    tree = json.loads(READERS["manifest"].seed) | {"self_sha256": "", "name": "another"}
    assert decode_manifest(resign(json.dumps(tree, indent=2).encode())).name == "another"
    assert msgspec.json.decode(resign(b'{"a": 1}'))["a"] == 1

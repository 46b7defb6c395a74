"""A bundle as `LLM` opens it: damaged files, wrong options, what is found by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edge.runtime.llm
from edge import LLM, SamplingParams
from edge.backends import Backend
from edge.backends.choose import open_backend
from edge.backends.ort import session as ort_session
from edge.bundle.manifest import read_manifest
from edge.engine_config import EngineConfig
from edge.errors import BundleError, ConfigError, IntegrityError, RequestError, ResourceError
from edge.runtime import open_bundle
from edge_make.manifest_bytes import encode_manifest
from tests.conftest import Bundles
from tests.standins.scripted_backend import num_open_files


def test_a_cache_beyond_all_memory_is_a_resource_error(tiny_bundles: Bundles):
    with pytest.raises(ResourceError, match="10000000000 slots"):
        LLM(tiny_bundles("qwen2"), num_threads=1, num_slots=10**10)


def test_a_bundle_that_is_changed_while_it_is_opened_is_refused(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After its files were hashed, someone puts other weights there; the text is the hashed one."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2"), bundle)
    opened = []

    def late(directory: Path, *others: Any) -> Backend:
        weights = directory / "decoder.onnx.data"
        other = weights.with_name("other")
        other.write_bytes(weights.read_bytes())
        other.replace(weights)
        opened.append(open_backend(directory, *others))
        return opened[0]

    monkeypatch.setattr("edge.runtime.llm.open_backend", late)
    with pytest.raises(IntegrityError, match=r"decoder\.onnx\.data was changed while"):
        LLM(bundle, backend="ort-cpu")
    assert opened[0].failed == "the backend is closed"


def test_a_backup_that_links_while_a_bundle_is_opened_does_not_end_the_start(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As ``cp -al`` does it to all files, which changes a time of each and no byte."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2"), bundle)

    def late(directory: Path, *others: Any) -> Backend:
        shutil.copytree(directory, tmp_path / "backup", copy_function=os.link)
        return open_backend(directory, *others)

    monkeypatch.setattr("edge.runtime.llm.open_backend", late)
    with LLM(bundle, backend="ort-cpu", num_threads=1) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=1)).finish_reason == "length"


@pytest.fixture
def copy(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2"), tmp_path / "copy"))


FILES = (
    "decoder.onnx",
    "decoder.onnx.data",
    "decoder.cpu.onnx",
    "decoder.cpu.onnx.data",
    "embeddings.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
)


NUMBERS = ("decoder.onnx.data", "decoder.cpu.onnx.data", "embeddings.safetensors")


def test_every_file_of_a_bundle_is_tried_below(copy: Path):
    assert {path.name for path in copy.iterdir()} == {*FILES, "manifest.json"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_before_anything_is_parsed(
    name: str, damage: str, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights are hashed beside what is already known to be whole; the table is parsed after it."""
    monkeypatch.setattr(edge.runtime.llm, "EmbeddingTable", None)
    if name not in NUMBERS:
        for parser in ("Tokenizer", "ChatTemplate"):
            monkeypatch.setattr(open_bundle, parser, None)
        monkeypatch.setattr(ort_session, "OnnxFile", None)
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "flip":
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=f"{name} (is damaged|has|cannot be read)"):
        LLM(copy)


@pytest.mark.parametrize("name", NUMBERS)
def test_another_engine_than_the_cpus_is_given_nothing_that_is_damaged(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(edge.runtime.llm, "open_backend", None)
    (copy / name).write_bytes(bytes((copy / name).stat().st_size))
    for backend in ("tensorrt", "ort-cuda"):
        with pytest.raises(IntegrityError, match=f"{name} is damaged"):
            LLM(copy, backend=backend)


def test_damage_is_said_where_the_engine_stumbles_over_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    def stumble(*_: Any) -> Backend:
        raise BundleError("a scale is no number")

    monkeypatch.setattr(edge.runtime.llm, "open_backend", stumble)
    with pytest.raises(BundleError, match="a scale is no number"):
        LLM(copy, backend="ort-cpu")
    (copy / NUMBERS[0]).write_bytes(bytes((copy / NUMBERS[0]).stat().st_size))
    with pytest.raises(IntegrityError, match=f"{NUMBERS[0]} is damaged"):
        LLM(copy, backend="ort-cpu")


def test_a_damaged_manifest_is_named(copy: Path):
    path = copy / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BundleError, match=r"manifest\.json"):
            LLM(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "embeddings.safetensors", "decoder.cpu.onnx"])
def test_a_file_that_nothing_vouches_for_is_not_read(name: str, copy: Path):
    manifest = read_manifest(copy)
    files = {key: value for key, value in manifest.files.items() if key != name}
    rewrite(copy, files=files)
    with pytest.raises(IntegrityError, match=f"{name} is not listed"):
        LLM(copy)


def rewrite(bundle: Path, **changes: Any) -> None:
    manifest = msgspec.structs.replace(read_manifest(bundle), **changes)
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))


def test_a_bundle_without_a_template_takes_plain_text(copy: Path):
    files = dict(read_manifest(copy).files)
    del files["chat_template.jinja"]
    rewrite(copy, files=files)
    with LLM(copy) as llm:
        assert llm.generate("hello", SamplingParams(max_tokens=2)).stats.completion_tokens == 2
        with pytest.raises(RequestError, match="no chat template"):
            llm.generate([{"role": "user", "content": "what"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_capacity": 100_000}, "--kv-capacity 100000 is out of range"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"kv_capacty": 64}, "no option 'kv_capacty'; the nearest known one is 'kv_capacity'"),
        ({"prefix_dir": "nowhere"}, "prefix_dir nowhere is no directory; edge-llm cache build"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2")
    before = num_open_files()
    with pytest.raises(ConfigError, match=message):
        LLM(bundle, **options)
    assert num_open_files() == before


def test_options_in_a_mapping_are_refused_with_their_place(tiny_bundles: Bundles):
    options: Any = {"kv_capacity": 32}
    with pytest.raises(ConfigError, match="not dict; options go by name"):
        LLM(tiny_bundles("qwen2"), options)


def test_options_are_those_of_the_configuration_and_stronger(tiny_bundles: Bundles):
    config = EngineConfig(num_threads=1, num_slots=2, kv_capacity=48)
    with LLM(tiny_bundles("qwen2"), config, kv_capacity=32) as llm:
        assert llm.config == EngineConfig(num_threads=1, num_slots=2, kv_capacity=32)
        assert (llm.backend.num_slots, llm.kv_capacity) == (2, 32)


def test_no_bundle(tmp_path: Path):
    with pytest.raises(BundleError, match="make one with: edge-llm export"):
        LLM(tmp_path / "absent")


def test_bundles_are_found_by_name_as_on_the_command_line(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("alpha-1.5b", "beta-0.5b"):
        (tmp_path / name).symlink_to(tiny_bundles("qwen2"))
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path))
    with LLM("alpha", draft="0.5b", backend="ort-cpu", kv_capacity=64) as llm:
        assert llm.bundle.samefile(tmp_path / "alpha-1.5b")
        assert llm.config.draft is not None
        assert llm.config.draft.samefile(tmp_path / "beta-0.5b")
    with pytest.raises(BundleError, match="gamma"):
        LLM("alpha", draft="gamma")

"""Adapters as peft saves them: numbers as `export --lora` merges them, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from edge.adapters.peft_file import read_adapter
from edge.bundle.linears import linear_layers
from edge.bundle.manifest import Manifest, Source, read_manifest
from edge.errors import CheckpointError
from export.pipeline import ExportConfig, export_checkpoint
from export.sources.lora import LoraCheckpoint
from export.sources.opening import open_checkpoint
from export.sources.safetensors_file import SafetensorsFile
from tests.makers.tiny_adapters import CASES, write_adapter, write_case
from tests.makers.tiny_models import _write_safetensors, write_checkpoint

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
LINEAR_CASES = ["qwen2 all linears", "qwen2 patterns", "llama rslora, one layer"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-R1", "qwen2")


@pytest.fixture(scope="module")
def bundle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(base, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "tuned", base, TARGETS)


def export(checkpoint: Path, output: Path) -> Path:
    export_checkpoint(
        ExportConfig(source=str(checkpoint), output=output, quant="fp16", kv_capacity=32)
    )
    return output


def read_weights(adapter: Path) -> dict[str, Any]:
    file = SafetensorsFile(adapter / "adapter_model.safetensors")
    return {name: file.tensor(name).astype(np.float32) for name in file.entries}


def change_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


# ------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", LINEAR_CASES)
def test_an_adapter_adds_the_same_as_merging_it(name: str, stored: str, tmp_path: Path):
    """Per joined linear, A and B multiply to the merged weights less the base's, exactly."""
    model, adapter = write_case(tmp_path, name)
    weights = read_weights(adapter)
    _write_safetensors(adapter / "adapter_model.safetensors", weights, stored)
    manifest = read_manifest(export(model, tmp_path / "bundle"))
    found = read_adapter(adapter, "tuned", manifest, 16)
    assert found.rank == max(value.shape[0] for key, value in weights.items() if "lora_A" in key)
    with (
        open_checkpoint(str(model)) as plain,
        LoraCheckpoint(open_checkpoint(str(model)), adapter) as merged,
    ):
        touched = 0
        for linear in linear_layers(manifest.model)[:-1]:
            added = [merged.tensor(w) - plain.tensor(w).astype(np.float32) for w in linear.weights]
            expected = np.concatenate(added)
            if linear.name not in found.tensors:
                assert not expected.any()
                continue
            touched += 1
            a, b = found.tensors[linear.name]
            count = len(linear.rows) * found.rank
            assert (a.shape, b.shape) == ((count, linear.shape[0]), (linear.shape[1], count))
            np.testing.assert_array_equal(b @ a, expected)
            for place, rows in enumerate(np.split(b, np.cumsum(linear.rows)[:-1])):
                own = slice(place * found.rank, (place + 1) * found.rank)
                assert not np.delete(rows, np.arange(count)[own], axis=1).any()
        assert touched


def test_the_file_of_the_weights_alone_names_the_adapter(adapter: Path, bundle: Path):
    manifest = read_manifest(bundle)
    whole = read_adapter(adapter, "a", manifest, 8)
    alone = read_adapter(adapter / "adapter_model.safetensors", "a", manifest, 8)
    assert alone.digest == whole.digest
    half = read_adapter(adapter, "a", manifest, 8, dtype=np.float16)
    assert {each.dtype for pair in half.tensors.values() for each in pair} == {np.dtype("f2")}


def test_the_digest_is_of_config_and_weights(adapter: Path, bundle: Path):
    manifest = read_manifest(bundle)
    before = read_adapter(adapter, "a", manifest, 8).digest
    assert read_adapter(adapter, "b", manifest, 8).digest == before
    change_config(adapter, lora_alpha=16)
    assert read_adapter(adapter, "a", manifest, 8).digest != before


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "use_dora is True: not a plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\].*merge it instead"),
        ({"bias": "all"}, "bias is 'all'.*merge it instead"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"rank_pattern": {"(a+)+": 8}}, "is a regular expression of a stranger"),
        ({"alpha_pattern": {".*": 8}}, "is a regular expression of a stranger"),
        ({"r": 8}, r"q_proj.lora_A.weight has shape \[4, 64\].* ask for \[8, 64\]"),
        ({"r": 0}, "r must be at least 1"),
        ({"r": 9}, "q_proj has rank 9, .* rank 8 at most; export it with --adapters 9"),
        ({"lora_alpha": 1e60}, "a NaN or values beyond float32"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_switched_are_refused(
    adapter: Path, bundle: Path, values: dict[str, Any], message: str
):
    change_config(adapter, **values)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(adapter, "a", read_manifest(bundle), 8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_values_that_are_not_finite_are_refused(
    adapter: Path, bundle: Path, half: str, value: float
):
    weights = read_weights(adapter)
    name = next(name for name in weights if half in name)
    weights[name] = weights[name].copy()
    weights[name][-1, -1] = value
    _write_safetensors(adapter / "adapter_model.safetensors", weights, "fp32")
    with pytest.raises(CheckpointError, match="hold a NaN or values beyond"):
        read_adapter(adapter, "a", read_manifest(bundle), 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "belongs to no linear layer"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "is of a table of tokens"),
        ("base_model.model.lm_head.weight", "is of a table of tokens"),
        ("base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", "the other half"),
    ],
)
def test_every_tensor_must_be_half_of_a_pair(adapter: Path, bundle: Path, name: str, message: str):
    weights = {**read_weights(adapter), name: np.ones((4, 64), np.float32)}
    _write_safetensors(adapter / "adapter_model.safetensors", weights, "fp32")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(adapter, "a", read_manifest(bundle), 8)


def test_another_base_is_refused(bundle: Path, tmp_path: Path):
    wide = write_checkpoint(tmp_path / "wide", "qwen2", intermediate_size=192)
    adapter = write_adapter(tmp_path / "tuned", wide, TARGETS)
    with pytest.raises(CheckpointError, match="for another base model"):
        read_adapter(adapter, "a", read_manifest(bundle), 8)


@pytest.mark.parametrize(
    ("theirs", "fits"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", True),
        ("unsloth/DeepSeek-R1-Distill-Qwen-1.5B-bnb-4bit", True),
        ("Qwen/Qwen2.5-Math-1.5B", False),
        ("/home/me/checkpoints/run-3", True),
        (None, True),
    ],
)
def test_published_bases_are_compared_by_name(
    adapter: Path, bundle: Path, theirs: str | None, fits: bool
):
    location = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    manifest: Manifest = structs.replace(
        read_manifest(bundle), source=Source("hub", location, "f" * 40)
    )
    change_config(adapter, base_model_name_or_path=theirs)
    if fits:
        read_adapter(adapter, "a", manifest, 8)
        return
    with pytest.raises(CheckpointError, match=rf"trained over {theirs}, .* is of {location}"):
        read_adapter(adapter, "a", manifest, 8)


def test_a_tokenizer_beside_it_must_be_the_bundles(adapter: Path, bundle: Path):
    manifest = read_manifest(bundle)
    own = adapter / "tokenizer.json"
    value = json.loads((bundle / "tokenizer.json").read_bytes())
    value["truncation"] = {"max_length": 5}  # of no matter, and trainers leave it there
    own.write_text(json.dumps(value))
    read_adapter(adapter, "a", manifest, 8, bundle=bundle)
    first, second, *_ = value["model"]["vocab"]
    ids = value["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    own.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"another id for .* for another base model"):
        read_adapter(adapter, "a", manifest, 8, bundle=bundle)
    own.write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be compared"):
        read_adapter(adapter, "a", manifest, 8, bundle=bundle)


def test_files_that_are_not_there_or_pickled_are_refused(adapter: Path, bundle: Path):
    manifest, weights = read_manifest(bundle), adapter / "adapter_model.safetensors"
    (adapter / "adapter_config.json").rename(adapter / "config")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json beside it"):
        read_adapter(adapter, "a", manifest, 8)
    weights.unlink()
    with pytest.raises(CheckpointError, match="save_pretrained of peft wrote"):
        read_adapter(adapter, "a", manifest, 8)
    pickled = adapter / "adapter_model.bin"
    pickled.write_bytes(b"\x80\x02")
    for given in (adapter, pickled):
        with pytest.raises(CheckpointError, match="is pickled, can run code and is never opened"):
            read_adapter(given, "a", manifest, 8)


def test_a_file_too_large_to_fit_is_not_read(adapter: Path, bundle: Path):
    weights = adapter / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1 << 40)  # a hole, which takes no disk
    with pytest.raises(CheckpointError, match="it is larger than"):
        read_adapter(adapter, "a", read_manifest(bundle), 8)
    weights.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match=f"a header of {1 << 60} bytes does not fit"):
        read_adapter(adapter, "a", read_manifest(bundle), 8)


def test_all_cases_with_tables_are_refused(tmp_path: Path):
    for index, name in enumerate(sorted({*CASES} - {*LINEAR_CASES})):
        model, adapter = write_case(tmp_path / str(index), name)
        manifest = read_manifest(export(model, tmp_path / str(index) / "bundle"))
        with pytest.raises(CheckpointError, match="merge it instead"):
            read_adapter(adapter, "a", manifest, 16)

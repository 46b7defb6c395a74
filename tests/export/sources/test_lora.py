"""Adapters merged into their base: against peft's own merge, and against everything that is no
plain LoRA."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge import LLM
from edge.backends.step import all_tokens, prefill
from edge.bundle.manifest import decode_manifest, read_manifest
from edge.errors import CheckpointError
from edge_make.checkpoint_tensors import expected_tensors
from edge_make.manifest_bytes import encode_manifest
from export.cli import export as export_verb
from export.pipeline import ExportConfig, export_checkpoint
from export.sources.lora import LoraCheckpoint
from export.sources.lora_config import LoraConfig, read_lora_config
from export.sources.opening import open_checkpoint
from export.sources.safetensors_file import SafetensorsFile
from tests.makers.goldens import assert_close
from tests.makers.tiny_adapters import (
    CASES,
    GOLDEN,
    golden_ids,
    peft_logits,
    write_adapter,
    write_case,
)
from tests.makers.tiny_models import _write_safetensors, write_checkpoint
from tests.makers.tiny_pooling import write_embedder

# As for the parity tests: every weight is exact in fp16, sums are in another order.
FP32_ATOL = 1e-4
LAYER = "base_model.model.model.layers"
TARGETS = {"target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-R1", "qwen2")


# ------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_bundle_equal_pefts(name: str, tmp_path: Path):
    model, adapter = write_case(tmp_path, name)
    config = ExportConfig(
        source=str(model),
        output=tmp_path / "bundle",
        quant="fp16",
        lora=adapter,
        dialect="portable",
        kv_capacity=32,
    )
    manifest = export_checkpoint(config)
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    ids = golden_ids()
    with LLM(tmp_path / "bundle", num_threads=1, int8_activations=False) as llm:
        [(_, logits)] = prefill(llm.backend, llm.embeddings, ids, wanted=all_tokens)
    assert_close(logits, expected, atol=FP32_ATOL, what="merged logits")
    assert not manifest.model.tied_embeddings


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about tied tables
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parity
def test_golden_is_what_peft_computes(name: str, tmp_path: Path):
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module, reason="live parity needs torch, transformers and peft")
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    found = peft_logits(*write_case(tmp_path, name))
    assert_close(
        found,
        expected,
        atol=FP32_ATOL,
        what="golden logits; run python -m tests.makers.tiny_adapters",
    )


def test_tensors_without_an_adapter_are_the_bases_own(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS)
    with (
        open_checkpoint(str(base)) as plain,
        LoraCheckpoint(open_checkpoint(str(base)), adapter) as merged,
    ):
        assert merged.spec == plain.spec
        assert merged.text == plain.text
        for name in (
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.0.self_attn.q_proj.bias",
        ):
            np.testing.assert_array_equal(merged.tensor(name), plain.tensor(name))
        name = "model.layers.1.mlp.down_proj.weight"
        assert (merged.tensor(name) != plain.tensor(name)).any()
        assert merged.tensor(name).dtype == np.float32
    with pytest.raises(CheckpointError, match="closed"):
        merged.tensor(name)


def test_an_adapter_of_a_table_that_the_family_scales_is_refused(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base", "granite")
    for module in ("embed_tokens", "lm_head"):
        adapter = write_adapter(tmp_path / module, base, {"target_modules": [module]})
        with (
            open_checkpoint(str(base)) as opened,
            pytest.raises(CheckpointError, match=r"scales \(embedding_multiplier\)"),
        ):
            LoraCheckpoint(opened, adapter)
    adapter = write_adapter(tmp_path / "tuned", base, {"target_modules": ["down_proj", "q_proj"]})
    LoraCheckpoint(open_checkpoint(str(base)), adapter).close()


@pytest.mark.parametrize(
    "targets",
    [
        r"model\.(layers\.\d+\.(self_attn\.q|mlp\.down)_proj|embed_tokens)",
        ["embed_tokens", "layers.1.mlp.down_proj"],
        "all-linear",
    ],
)
def test_an_adapter_of_an_embedder_with_and_without_its_head(
    targets: str | list[str], tmp_path: Path
):
    """peft of AutoModel, as sentence-transformers trains, writes names without ``model.``."""
    source = write_embedder(tmp_path / "base", architectures=["Qwen3ForCausalLM"])
    config = {
        "target_modules": targets,
        "rank_pattern": {r"^model\.layers\.1\.mlp\.down_proj": 8},
        "modules_to_save": ["norm"],
    }
    adapter = write_adapter(tmp_path / "tuned", source, config)
    bare = tmp_path / "bare"
    bare.mkdir()
    text = (adapter / "adapter_config.json").read_text()
    (bare / "adapter_config.json").write_text(text.replace(r"model\\.", ""))
    weights = {
        name.replace("base_model.model.model.", "base_model.model."): value
        for name, value in read_weights(adapter).items()
    }
    _write_safetensors(bare / "adapter_model.safetensors", weights, "fp16")
    with (
        open_checkpoint(str(source)) as plain,
        LoraCheckpoint(open_checkpoint(str(source)), adapter) as whole,
        LoraCheckpoint(open_checkpoint(str(source)), bare) as headless,
    ):
        for name in expected_tensors(plain.spec):
            np.testing.assert_array_equal(headless.tensor(name), whole.tensor(name))
        name = "model.layers.1.mlp.down_proj.weight"
        assert (headless.tensor(name) != plain.tensor(name)).any()


def test_a_table_is_merged_in_tiles(tmp_path: Path):
    """Memory is the merged table and a tile, not a second product of its size."""
    model = write_checkpoint(tmp_path / "base", "llama", vocab_size=40_000)
    adapter = write_adapter(tmp_path / "tuned", model, {"target_modules": ["embed_tokens"]})
    with LoraCheckpoint(open_checkpoint(str(model)), adapter) as merged:
        merged.tensor("model.norm.weight")
        tracemalloc.start()
        table = merged.tensor("model.embed_tokens.weight")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1.45 * table.nbytes


def test_quantized_and_rotated_like_any_model(base: Path, tmp_path: Path):
    """int8-w8a8 rotates and smooths what the adapter gave, so the order of wrapping matters."""
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS)
    answers = {}
    for quant in ("fp16", "int8-w8a8"):
        options: dict[str, Any] = {} if quant == "fp16" else {"calibration_tokens": 512}
        config = ExportConfig(
            source=str(base),
            output=tmp_path / quant,
            quant=quant,
            lora=adapter,
            kv_capacity=32,
            dialect="portable",
            **options,
        )
        export_checkpoint(config)
        ids = golden_ids()
        with LLM(tmp_path / quant, num_threads=1, int8_activations=False) as llm:
            [(_, logits)] = prefill(llm.backend, llm.embeddings, ids, wanted=all_tokens)
            answers[quant] = np.array(logits)
    cosine = (answers["fp16"] * answers["int8-w8a8"]).sum() / np.sqrt(
        (answers["fp16"] ** 2).sum() * (answers["int8-w8a8"] ** 2).sum()
    )
    assert cosine > 0.99


# ------------------------------------------------------------------------------- the manifest


def test_the_manifest_names_the_adapter(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS)
    output = tmp_path / "bundle"
    result = CliRunner().invoke(
        export_verb, [str(base), "-o", str(output), "--lora", str(adapter), "--quant", "int8"]
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(output)
    assert manifest.name == "Tiny-R1+tuned"
    assert manifest.source.location == "Tiny-R1"
    assert manifest.source.adapter is not None
    assert manifest.source.adapter.name == "tuned"
    before = manifest.source.adapter.sha256
    assert str(tmp_path) not in (output / "manifest.json").read_text()
    # Another scale is another adapter, although the weights are the same.
    write_adapter(tmp_path / "tuned", base, TARGETS, lora_alpha=16)
    with LoraCheckpoint(open_checkpoint(str(base)), adapter) as other:
        assert other.source.adapter is not None
        assert other.source.adapter.sha256 != before


def test_a_manifest_from_before_these_fields_still_loads(base: Path, tmp_path: Path):
    manifest = export_checkpoint(
        ExportConfig(source=str(base), output=tmp_path / "bundle", quant="int8")
    )
    data = encode_manifest(manifest)
    assert b'"adapter": null' in data
    without = json.loads(data)
    del without["source"]["adapter"], without["vocabulary"], without["quantization"]["embeddings"]
    blank = json.dumps({**without, "self_sha256": "0" * 64}, indent=2) + "\n"
    digest = hashlib.sha256(blank.encode()).hexdigest()
    old = decode_manifest(blank.replace("0" * 64, digest).encode())
    assert msgspec.structs.replace(old, self_sha256="") == msgspec.structs.replace(
        manifest, self_sha256=""
    )


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"use_dora": True}, "use_dora is True: not a plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA"),
        ({"peft_type": None}, "peft_type is None, only LORA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is .*not a plain LoRA"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"target_parameters": ["x"]}, "target_parameters is"),
        ({"brand_new_trick": 3}, "brand_new_trick is 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'.*convert"),
        ({"r": 0}, "r must be at least 1"),
        ({"r": "8"}, r"Expected `int`, got `str` - at `\$.r`"),
        ({"r": None}, "missing required field `r`"),
        ({"r": 8}, r"q_proj.lora_A.weight has shape \[4, 64\].* ask for \[8, 64\]"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern 'q_proj' must be at least 1"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern: '\(' is no pattern"),
        ({"lora_alpha": "much"}, r"`\$.lora_alpha`"),
        ({"target_modules": ["q_proj"]}, "does not cover model.layers.0.mlp.down_proj"),
        (
            {"target_modules": ["q_proj", "down_proj", "o_proj"]},
            "has no .*o_proj.lora_A.weight.* incomplete or for another base",
        ),
        ({"modules_to_save": ["lm_head"]}, "no weight of lm_head, which modules_to_save"),
        (
            {"target_modules": ".*(q|down)_proj", "layers_to_transform": [0]},
            "layers_to_transform has no effect",
        ),
    ],
    ids=str,
)
def test_configs_that_are_no_plain_lora_are_refused(
    base: Path, tmp_path: Path, overrides: dict[str, Any], message: str
):
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS, **overrides)
    with pytest.raises(CheckpointError, match=message):
        LoraCheckpoint(open_checkpoint(str(base)), adapter)


@pytest.mark.parametrize(
    ("added", "overrides", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", {"bias": "all"}, "bias is 'all'"),
        (
            "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector",
            {},
            "belongs to no",
        ),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", {}, "belongs to no"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", {}, "belongs to no module"),
    ],
)
def test_every_tensor_must_be_used(
    base: Path, tmp_path: Path, added: str, overrides: dict[str, Any], message: str
):
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS, **overrides)
    weights = read_weights(adapter)
    _write_safetensors(
        adapter / "adapter_model.safetensors", {**weights, added: np.ones(64, np.float32)}, "fp16"
    )
    with pytest.raises(CheckpointError, match=message) as info:
        LoraCheckpoint(open_checkpoint(str(base)), adapter)
    assert added in str(info.value)


def test_half_a_pair_and_another_base_are_refused(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS)
    weights = read_weights(adapter)
    lost = next(name for name in weights if name.endswith("lora_B.weight"))
    rest = {name: value for name, value in weights.items() if name != lost}
    _write_safetensors(adapter / "adapter_model.safetensors", rest, "fp16")
    with pytest.raises(CheckpointError, match=f"no {re.escape(lost)}, the other half"):
        LoraCheckpoint(open_checkpoint(str(base)), adapter)
    wide = write_checkpoint(tmp_path / "wide", "qwen2", intermediate_size=192)
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS)
    with pytest.raises(CheckpointError, match="for another base model"):
        LoraCheckpoint(open_checkpoint(str(wide)), adapter)


def test_tying_that_the_weights_do_not_keep_is_refused(tmp_path: Path):
    model = write_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapter = write_adapter(tmp_path / "tuned", model, config, ensure_weight_tying=True)
    with pytest.raises(CheckpointError, match="ensure_weight_tying is true, but"):
        LoraCheckpoint(open_checkpoint(str(model)), adapter)


def test_missing_and_pickled_files_are_refused(base: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        LoraCheckpoint(open_checkpoint(str(base)), tmp_path)
    adapter = write_adapter(tmp_path / "tuned", base, TARGETS)
    weights = adapter / "adapter_model.safetensors"
    weights.unlink()
    with pytest.raises(CheckpointError, match="copy the whole adapter"):
        LoraCheckpoint(open_checkpoint(str(base)), adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        LoraCheckpoint(open_checkpoint(str(base)), adapter)


def test_loftq_and_switched_off_features_are_fine(base: Path, tmp_path: Path):
    config = {**TARGETS, "init_lora_weights": "gaussian"}
    adapter = write_adapter(
        tmp_path / "tuned",
        base,
        config,
        loftq_config={"loftq_bits": 4},
        brand_new_trick=None,
        use_qalora=False,
        megatron_core="megatron.core",
    )
    assert read_lora_config(adapter).r == 4


def test_scaling_rules():
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 9}, use_rslora=True
    )
    assert config.scaling("model.layers.0.mlp.up_proj") == 3.0
    assert config.scaling("model.layers.0.self_attn.q_proj") == 2.0
    assert config.targets("model.layers.0.mlp.up_proj")
    assert not config.targets("lm_head")


def read_weights(adapter: Path) -> dict[str, Any]:
    file = SafetensorsFile(adapter / "adapter_model.safetensors")
    return {name: file.tensor(name).astype(np.float32) for name in file.entries}

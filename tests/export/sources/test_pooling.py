"""What a checkpoint says of how it embeds, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.bundle.manifest import decode_manifest, read_manifest
from edge.errors import BundleError, CheckpointError, ConfigError
from edge_make.manifest_bytes import encode_manifest
from export.pipeline import ExportConfig, export_checkpoint
from export.sources.lora import LoraCheckpoint
from export.sources.opening import open_checkpoint
from tests.conftest import RUNNABLE, PoolingBundles
from tests.makers.tiny_adapters import write_adapter
from tests.makers.tiny_models import EOS_ID, write_checkpoint
from tests.makers.tiny_pooling import PROMPTS, write_embedder, write_judge, write_pooling


def test_an_embedder_is_recognised(tmp_path: Path):
    with open_checkpoint(str(write_embedder(tmp_path))) as opened:
        assert opened.spec.task == "embed"
        found = opened.embedding
        assert found is not None
        assert (found.append, found.normalize, found.prompts) == ((EOS_ID,), True, PROMPTS)
        assert (found.default_prompt, found.least_dimensions) == (None, 16)
        assert opened.tensor("model.norm.weight").shape == (64,)


def test_a_head_is_left_out(tmp_path: Path):
    """A checkpoint with the class that has a head embeds just as well."""
    write_embedder(tmp_path)
    write_checkpoint(tmp_path, "qwen3", tie_word_embeddings=False)
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.spec.task == "embed"
    with open_checkpoint(str(tmp_path), task="generate") as opened:
        assert opened.spec.task == "generate"
        assert opened.embedding is None


@pytest.mark.parametrize(("name", "least"), [("Qwen3-Embedding-0.6B", 32), ("some-model", None)])
def test_a_family_may_be_known_to_be_cut(name: str, least: int | None, tmp_path: Path):
    source = write_embedder(tmp_path / name, dimensions=None)
    with open_checkpoint(str(source)) as opened:
        assert opened.embedding is not None
        assert opened.embedding.least_dimensions == least


def test_a_judge_keeps_two_rows_of_its_head(tmp_path: Path):
    write_judge(tmp_path)
    with (
        open_checkpoint(str(tmp_path), task="rerank") as judge,
        open_checkpoint(str(tmp_path)) as whole,
    ):
        facts = judge.reranking
        assert facts is not None
        rows = whole.tensor("model.embed_tokens.weight")[[facts.no, facts.yes]]
        assert np.array_equal(judge.tensor("lm_head.weight"), rows)


@pytest.mark.parametrize(
    "config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_judge_takes_two_rows_of_an_adapters_head(config: dict[str, Any], tmp_path: Path):
    source = write_judge(tmp_path / "judge", tie_word_embeddings=False)
    adapter = write_adapter(tmp_path / "tuned", source, {"target_modules": ["q_proj"], **config})
    with (
        LoraCheckpoint(open_checkpoint(str(source), task="rerank"), adapter) as judge,
        LoraCheckpoint(open_checkpoint(str(source)), adapter) as whole,
    ):
        facts = judge.reranking
        assert facts is not None
        rows = whole.tensor("lm_head.weight")[[facts.no, facts.yes]]
        assert np.array_equal(judge.tensor("lm_head.weight"), rows)


def _modules(*kinds: str) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        entries = [{"type": f"a.{kind}", "path": ""} for kind in kinds]
        (directory / "modules.json").write_text(json.dumps(entries))

    return write


def _prompts(value: object) -> Callable[[Path], object]:
    path = "config_sentence_transformers.json"
    return lambda directory: (directory / path).write_text(json.dumps(value))


def _texts(value: object) -> Callable[[Path], object]:
    path = "sentence_bert_config.json"
    return lambda directory: (directory / path).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda directory: write_pooling(directory, "mean_tokens"), "pooling_mode_mean_tokens"),
        (lambda directory: write_pooling(directory, "none"), "no pooling"),
        (_modules("Transformer", "Pooling", "Dense", "Normalize"), "Dense"),
        (_modules(), "none"),
        (lambda directory: (directory / "modules.json").write_text("{}"), "no list of modules"),
        (
            lambda directory: os.truncate(directory / "modules.json", (1 << 20) + 1),
            r"cannot read .*modules\.json: it is larger than 1 MiB",
        ),
        (_prompts({"prompts": {"query": 1}}), "must be texts"),
        (_prompts({"prompts": {}, "default_prompt_name": "query"}), "none of the prompts"),
        (_prompts({"prompts": {}, "default_prompt_name": []}), "none of the prompts"),
        (_prompts({"prompts": {"a\nb": "x"}}), "prompts"),
        (_prompts({"prompts": {"a": "\ud800"}}), "surrogates"),
        (_prompts([]), "JSON object"),
        (_prompts({"truncate_dim": 32}), "truncate_dim 32 cuts .* ask for dimensions 32"),
        (_texts({"do_lower_case": True}), r"sentence_bert_config\.json: do_lower_case is true"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    change: Callable[[Path], object], reason: str, tmp_path: Path
):
    change(write_embedder(tmp_path))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(tmp_path))


def test_a_judge_needs_its_tokens(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"<\|im_start\|>, <\|im_end\|>, yes, no"):
        open_checkpoint(str(write_checkpoint(tmp_path, "qwen3")), task="rerank")


def test_a_model_without_head_is_told_how_to_be_exported(tmp_path: Path):
    write_embedder(tmp_path)
    (tmp_path / "modules.json").unlink()
    with pytest.raises(CheckpointError, match="--task embed"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quant": "int8-w8a8"}, "--no-rotate"),
        ({"quant": "int4", "method": "rtn", "verify": True}, "--verify"),
        ({"quant": "fp16", "eagle3": Path("head")}, "--eagle3"),
        ({"quant": "fp16", "vocab_keep": Path("text")}, "--vocab-keep"),
        ({"quant": "int4", "keep": (("lm_head", "int8"),)}, "matches no linear layer"),
        ({"quant": "fp16", "task": "translate"}, "--task translate"),
    ],
)
def test_options_for_generating_are_refused(
    options: dict[str, object], reason: str, tmp_path: Path
):
    source, output = write_embedder(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(ConfigError, match=reason):
        export_checkpoint(
            ExportConfig(source=str(source), output=output, dialect=RUNNABLE, **options)  # type: ignore[arg-type]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", ["int8-w8a8", "int4"])
def test_calibrated_recipes_need_no_head(quant: str, tmp_path: Path):
    manifest = export_checkpoint(
        ExportConfig(
            source=str(write_embedder(tmp_path / "source")),
            output=tmp_path / "out",
            quant=quant,  # type: ignore[arg-type]
            rotate=False,
            calibration_tokens=512,
            report=True,  # measures next tokens, so there is nothing to report here
        )
    )
    assert "lm_head" not in manifest.quantization.linears
    assert manifest.quantization.calibration is not None
    assert manifest.quality is None or "text" not in manifest.quality


def test_a_manifest_says_one_thing(pooling_bundles: PoolingBundles):
    manifest = read_manifest(pooling_bundles("embed"))
    assert decode_manifest(encode_manifest(manifest)) == manifest
    generating = msgspec.structs.replace(manifest.model, task="generate")
    embedding = manifest.embedding
    assert embedding is not None
    for changes, reason in (
        ({"model": generating}, "embedding does not fit"),
        ({"embedding": None}, "embedding does not fit"),
        ({"embedding": msgspec.structs.replace(embedding, append=(9999,))}, "is no token"),
        ({"embedding": msgspec.structs.replace(embedding, least_dimensions=65)}, "exceeds"),
        ({"embedding": msgspec.structs.replace(embedding, default_prompt="x")}, "default_prompt"),
    ):
        with pytest.raises(BundleError, match=reason):
            decode_manifest(encode_manifest(msgspec.structs.replace(manifest, **changes)))

"""``edge-llm pull``: under which name a model is made, from where, and once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.bundle.library import CATALOGUE, REVISIONS
from edge.bundle.manifest import read_manifest
from tests.command_line import Result, error_line
from tests.quantized_golden import QuantizedGolden, write_base
from tests.tiny_models import write_checkpoint

EdgeLlm = Callable[..., Result]


def test_pull_exports_under_a_name_and_once(
    edge_llm: EdgeLlm, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a directory in place of the hub, which takes the same way from there on."""
    checkpoint = tmp_path / "Tiny-Model"
    write_checkpoint(checkpoint, "qwen2")
    options = (str(checkpoint), "--quant", "int8", "--no-verify", "--kv-capacity", "48")
    result = edge_llm("pull", *options)
    assert result.code == 0, result.err
    bundle = shelf / "tiny-model-int8"
    assert read_manifest(bundle).kv_capacity == 48
    assert f"$ edge-llm export {checkpoint} -o {bundle} --quant int8 --no-verify" in result.err
    assert "edge-llm run tiny-model-int8" in result.out
    before = (bundle / "manifest.json").stat().st_mtime_ns
    assert "is there already; " in edge_llm("pull", *options[:3]).err
    for option, value in (("--kv-capacity", "64"), ("--revision", "v1"), ("--hub", "modelscope")):
        again = edge_llm("pull", *options[:3], option, value)
        assert again.code == 0
        assert f"is there already, so {option} has no effect; --force makes it anew" in again.err
        assert "edge-llm run tiny-model-int8" in again.out
    assert f"$ edge-llm build {bundle}\n" in edge_llm("pull", *options, "--build").err
    assert (bundle / "manifest.json").stat().st_mtime_ns == before
    assert edge_llm("pull", *options, "--force").code == 0
    assert (bundle / "manifest.json").stat().st_mtime_ns != before


def test_pull_keeps_the_integers_of_a_quantized_source(
    edge_llm: EdgeLlm, shelf: Path, tmp_path: Path
):
    """A float source gets INT4, and a name that says so, by the same command."""
    sources = {
        "source": QuantizedGolden.load("gptq").write(tmp_path / "GPTQ"),
        "int4": write_base(tmp_path / "Float"),
    }
    for quant, checkpoint in sources.items():
        options = () if quant == "source" else ("--method", "rtn")
        made = edge_llm("pull", checkpoint, "--no-verify", *options)
        assert made.code == 0, made.err
        assert "--quant" not in made.err.splitlines()[0]
        name = f"{checkpoint.name.lower()}-{quant}"
        assert read_manifest(shelf / name).quantization.name == quant
        assert f"edge-llm run {name} " in made.out
        assert f"{shelf / name} is there already; " in edge_llm("pull", checkpoint).err
    kept = edge_llm("pull", sources["source"], "--no-verify", "--force")
    assert kept.code == 0, kept.err
    assert sorted(path.name for path in shelf.iterdir() if not path.name.startswith(".")) == [
        "broken", "float-int4", "gptq-source", "tiny-1.5b-fp16",
    ]  # fmt: skip


def test_pull_leaves_a_bundle_of_another_recipe(edge_llm: EdgeLlm, shelf: Path, tmp_path: Path):
    checkpoint = QuantizedGolden.load("gptq").write(tmp_path / "GPTQ")
    rounded = (checkpoint, "--no-verify", "--quant", "int4", "--method", "rtn")
    assert edge_llm("pull", *rounded).code == 0
    before = (shelf / "gptq-int4" / "manifest.json").stat().st_mtime_ns
    for force in ((), ("--force",)):
        kept = edge_llm("pull", checkpoint, "--no-verify", *force)
        assert kept.code == 0, kept.err
        assert f"$ edge-llm export {checkpoint} -o {shelf / 'gptq-source'} " in kept.err
        assert read_manifest(shelf / "gptq-source").quantization.name == "source"
        assert (shelf / "gptq-int4" / "manifest.json").stat().st_mtime_ns == before
        shutil.rmtree(shelf / "gptq-source")


def test_pull_moves_no_bundle_onto_other_files(edge_llm: EdgeLlm, shelf: Path, tmp_path: Path):
    checkpoint = QuantizedGolden.load("gptq").write(tmp_path / "GPTQ")
    (shelf / "gptq-source").mkdir()
    (shelf / "gptq-source" / "notes").touch()
    for _ in range(2):
        refused = edge_llm("pull", checkpoint, "--no-verify")
        assert refused.code == 64
        assert "gptq-source holds files that are not part of a bundle (notes)" in refused.err
    assert [path.name for path in (shelf / "gptq-source").iterdir()] == ["notes"]


def test_a_recipe_of_pull_wins(edge_llm: EdgeLlm, shelf: Path, tmp_path: Path):
    checkpoint = tmp_path / "Tiny-Model"
    write_checkpoint(checkpoint, "qwen2")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('quant = "int8"\n')
    made = edge_llm("pull", checkpoint, "--no-verify", "--recipe", recipe)
    assert made.code == 0, made.err
    assert read_manifest(shelf / "tiny-model-int8").quantization.name == "int8"


@pytest.mark.parametrize("option", [("-o", "x"), ("-ox",), ("--output", "x"), ("--output=x",)])
def test_pull_names_the_bundle_itself(edge_llm: EdgeLlm, shelf: Path, option: tuple[str, ...]):
    """Or what is built and tried afterwards would be another one."""
    refused = error_line(edge_llm("pull", "deepseek-r1:1.5b", *option), 64)
    assert "pull names the bundle itself" in refused


def test_pull_knows_the_catalogue(edge_llm: EdgeLlm, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed = edge_llm("pull", "deepseek-r1:1.5b")
    assert failed.code == 65
    assert "$ edge-llm export deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in failed.err
    for name in ("1.5B", "r1-qwen-1.5b"):
        assert edge_llm("pull", name).err.splitlines()[0] == failed.err.splitlines()[0]
    wrong = error_line(edge_llm("pull", "deepseek-r1:1.6b"), 64)
    assert "neither a hub id (owner/name) nor the name of a model; did you mean deepseek" in wrong
    assert "'8b' could be deepseek-r1:8b (" in error_line(edge_llm("pull", "8b"), 64)


@pytest.mark.parametrize(("release", "target"), [("36.4.3", "jetpack6"), ("38.2", "jetpack7")])
def test_pull_on_a_jetson_exports_for_its_jetpack(
    edge_llm: EdgeLlm,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    target: str,
):
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: release)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert f"int4 --target {target}" in edge_llm("pull", "deepseek-r1:7b").err


@pytest.mark.parametrize(
    ("options", "variable", "words"),
    [
        ((), "", f"--revision {REVISIONS[CATALOGUE['deepseek-r1:7b']]}"),
        (("--revision", "main"), "", "--revision main\n"),
        (("--hub", "modelscope"), "", "int4 --hub modelscope\n"),
        (("--hub", "modelscope", "--revision", "v1"), "", "--revision v1 --hub modelscope\n"),
        ((), "modelscope", "int4\n"),
        (("--hub", "huggingface"), "modelscope", "--revision 916b56a44061"),
    ],
)
def test_pull_takes_the_commit_that_is_known(
    edge_llm: EdgeLlm,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    variable: str,
    words: str,
):
    """On the Hugging Face hub, since other hubs have commits of their own."""
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: None)
    monkeypatch.setenv("EDGE_LLM_HUB", variable)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = edge_llm("pull", "deepseek-r1:7b", *options).err.splitlines()[0] + "\n"
    assert words in line
    assert ("--revision" in words) == ("--revision" in line)

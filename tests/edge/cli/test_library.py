"""``edge-llm list``, ``rm`` and ``pull``, and bundles by name in every verb."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.bundle.library import CATALOGUE, REVISIONS
from edge.bundle.manifest import read_manifest
from edge.cli.options import BundlePath
from tests.command_line import Result, error_line
from tests.conftest import Bundles
from tests.quantized_golden import QuantizedGolden, write_base
from tests.tiny_models import write_checkpoint

EdgeLlm = Callable[..., Result]


@pytest.fixture
def root(tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of two bundles, one of them damaged."""
    root = tmp_path / "kept"
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(root))
    shutil.copytree(tiny_bundles("qwen2"), root / "tiny-1.5b-fp16")
    (root / "broken").mkdir()
    (root / "broken" / "manifest.json").write_text("{}")
    return root


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second without a locale
def test_a_name_that_is_no_utf8_is_listed(root: Path, errors: str):
    name = b"caf\xe9"
    (root / "tiny-1.5b-fp16").rename(root / os.fsdecode(name))

    def listed(*options: str) -> bytes:
        done = subprocess.run(
            [sys.executable, "-m", "edge.cli", "list", *options],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = [os.fsencode(found["name"]) for found in json.loads(listed("--json"))["bundles"]]
    assert names == [b"broken", name]
    assert (name if errors == "surrogateescape" else rb"caf\udce9") in listed()


def test_list_has_names_sizes_and_damage(edge_llm: EdgeLlm, root: Path):
    found = edge_llm("list")
    broken, tiny = found.out.splitlines()
    assert broken.startswith("broken")
    assert "damaged: " in broken
    assert tiny.split()[:2] == ["tiny-1.5b-fp16", "fp16"]
    assert "no engine" in tiny
    assert "edge-llm pull deepseek-r1:1.5b" in found.err
    listed = json.loads(edge_llm("list", "--json").out)
    assert [bundle["name"] for bundle in listed["bundles"]] == ["broken", "tiny-1.5b-fp16"]
    sizes = read_manifest(root / "tiny-1.5b-fp16").files.values()
    assert listed["bundles"][1]["num_bytes"] == sum(file.num_bytes for file in sizes)


def test_list_of_nothing(edge_llm: EdgeLlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "none"))
    assert edge_llm("list").out == f"no bundle in {tmp_path / 'none'}\n"


def test_every_verb_takes_a_name(edge_llm: EdgeLlm, root: Path):
    named = edge_llm("inspect", "1.5b", "--json")
    assert named.code == 0
    assert named.out == edge_llm("inspect", root / "tiny-1.5b-fp16", "--json").out
    for verb in ("run", "chat", "serve", "bench", "verify", "build", "check", "watch", "doctor"):
        assert "which has broken, tiny-1.5b-fp16" in error_line(edge_llm(verb, "gemma"), 65)


def test_a_file_is_no_bundle(edge_llm: EdgeLlm, root: Path):
    path = root / "tiny-1.5b-fp16" / "manifest.json"
    assert "is a file; a bundle is a directory" in edge_llm("run", path, "hello").err


def test_names_complete(root: Path):
    complete = BundlePath().shell_complete
    assert [item.value for item in complete(None, None, "ti")] == ["tiny-1.5b-fp16"]  # type: ignore[arg-type]
    (other,) = complete(None, None, "./x")  # type: ignore[arg-type]
    assert other.type == "dir"


def test_rm_removes_the_whole_bundle_and_no_other(edge_llm: EdgeLlm, root: Path):
    removed = edge_llm("rm", "1.5b", "--yes")
    assert removed.code == 0
    assert removed.out.startswith(f"removed {root / 'tiny-1.5b-fp16'}, ")
    assert [path.name for path in root.iterdir()] == ["broken"]
    assert edge_llm("rm", "broken", "--yes").code == 0
    assert list(root.iterdir()) == []


def test_rm_asks_and_touches_only_bundles(edge_llm: EdgeLlm, root: Path):
    assert "give --yes" in error_line(edge_llm("rm", "1.5b"), 64)
    (root / "notes").mkdir()
    assert "is no bundle" in error_line(edge_llm("rm", root / "notes", "--yes"), 65)
    (root / "link").symlink_to(root / "tiny-1.5b-fp16")
    assert "is a link to" in error_line(edge_llm("rm", root / "link", "--yes"), 65)
    assert (root / "notes").is_dir()
    assert (root / "tiny-1.5b-fp16" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("answer", "code", "words", "is_left"),
    [
        ("n\n", 0, "nothing was removed", True),
        ("\n", 0, "nothing was removed", True),
        ("y\n", 0, "", False),
    ],
)
def test_rm_does_what_it_is_answered(
    edge_llm: EdgeLlm,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    answer: str,
    code: int,
    words: str,
    is_left: bool,
):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    result = edge_llm("rm", "1.5b", stdin=answer)
    assert result.code == code
    assert words in result.err
    assert (root / "tiny-1.5b-fp16").is_dir() == is_left


def test_rm_says_what_it_could_not_remove(
    edge_llm: EdgeLlm, root: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", "engine.plan")

    monkeypatch.setattr("edge.cli.library.shutil.rmtree", refuse)
    error = error_line(edge_llm("rm", "1.5b", "--yes"), 64)
    assert "Permission denied (engine.plan)" in error
    [left] = [path for path in root.iterdir() if path.name.endswith(".removed")]
    assert f"what is left of it is in {left}" in error


def test_pull_exports_under_a_name_and_once(
    edge_llm: EdgeLlm, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a directory in place of the hub, which takes the same way from there on."""
    checkpoint = tmp_path / "Tiny-Model"
    write_checkpoint(checkpoint, "qwen2")
    options = (str(checkpoint), "--quant", "int8", "--no-verify", "--kv-capacity", "48")
    result = edge_llm("pull", *options)
    assert result.code == 0, result.err
    bundle = root / "tiny-model-int8"
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
    edge_llm: EdgeLlm, root: Path, tmp_path: Path
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
        assert read_manifest(root / name).quantization.name == quant
        assert f"edge-llm run {name} " in made.out
        assert f"{root / name} is there already; " in edge_llm("pull", checkpoint).err
    kept = edge_llm("pull", sources["source"], "--no-verify", "--force")
    assert kept.code == 0, kept.err
    assert sorted(path.name for path in root.iterdir() if not path.name.startswith(".")) == [
        "broken", "float-int4", "gptq-source", "tiny-1.5b-fp16",
    ]  # fmt: skip


def test_pull_leaves_a_bundle_of_another_recipe(edge_llm: EdgeLlm, root: Path, tmp_path: Path):
    checkpoint = QuantizedGolden.load("gptq").write(tmp_path / "GPTQ")
    rounded = (checkpoint, "--no-verify", "--quant", "int4", "--method", "rtn")
    assert edge_llm("pull", *rounded).code == 0
    before = (root / "gptq-int4" / "manifest.json").stat().st_mtime_ns
    for force in ((), ("--force",)):
        kept = edge_llm("pull", checkpoint, "--no-verify", *force)
        assert kept.code == 0, kept.err
        assert f"$ edge-llm export {checkpoint} -o {root / 'gptq-source'} " in kept.err
        assert read_manifest(root / "gptq-source").quantization.name == "source"
        assert (root / "gptq-int4" / "manifest.json").stat().st_mtime_ns == before
        shutil.rmtree(root / "gptq-source")


def test_pull_moves_no_bundle_onto_other_files(edge_llm: EdgeLlm, root: Path, tmp_path: Path):
    checkpoint = QuantizedGolden.load("gptq").write(tmp_path / "GPTQ")
    (root / "gptq-source").mkdir()
    (root / "gptq-source" / "notes").touch()
    for _ in range(2):
        refused = edge_llm("pull", checkpoint, "--no-verify")
        assert refused.code == 64
        assert "gptq-source holds files that are not part of a bundle (notes)" in refused.err
    assert [path.name for path in (root / "gptq-source").iterdir()] == ["notes"]


def test_a_recipe_of_pull_wins(edge_llm: EdgeLlm, root: Path, tmp_path: Path):
    checkpoint = tmp_path / "Tiny-Model"
    write_checkpoint(checkpoint, "qwen2")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('quant = "int8"\n')
    made = edge_llm("pull", checkpoint, "--no-verify", "--recipe", recipe)
    assert made.code == 0, made.err
    assert read_manifest(root / "tiny-model-int8").quantization.name == "int8"


@pytest.mark.parametrize("option", [("-o", "x"), ("-ox",), ("--output", "x"), ("--output=x",)])
def test_pull_names_the_bundle_itself(edge_llm: EdgeLlm, root: Path, option: tuple[str, ...]):
    """Or what is built and tried afterwards would be another one."""
    refused = error_line(edge_llm("pull", "deepseek-r1:1.5b", *option), 64)
    assert "pull names the bundle itself" in refused


def test_pull_knows_the_catalogue(edge_llm: EdgeLlm, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed = edge_llm("pull", "deepseek-r1:1.5b")
    assert failed.code == 65
    assert "$ edge-llm export deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in failed.err
    assert "neither a hub id (owner/name) nor one of" in error_line(edge_llm("pull", "1.5b"), 64)


@pytest.mark.parametrize(("release", "target"), [("36.4.3", "jetpack6"), ("38.2", "jetpack7")])
def test_pull_on_a_jetson_exports_for_its_jetpack(
    edge_llm: EdgeLlm, root: Path, monkeypatch: pytest.MonkeyPatch, release: str, target: str
):
    monkeypatch.setattr("edge.device.telemetry.read_l4t", lambda: release)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert f"int4 --target {target}" in edge_llm("pull", "deepseek-r1:7b").err


def test_options_take_names(edge_llm: EdgeLlm, root: Path, tmp_path: Path):
    for arguments in (
        ("run", "1.5b", "hello", "--draft", "gemma"),
        ("serve", "--model", "a=gemma"),
        ("watch", "1.5b", "--against", "gemma"),
        ("eval", "gemma"),
        ("eval", "1.5b", "--against", "gemma"),
    ):
        assert "which has broken, tiny-1.5b-fp16" in error_line(edge_llm(*arguments), 65)
    assert "which has broken, tiny-1.5b-fp16" in error_line(edge_llm("plan", "gemma"), 64)
    named = edge_llm("plan", "tiny", "--json")
    assert named.out == edge_llm("plan", root / "tiny-1.5b-fp16", "--json").out


def test_options_complete_names(root: Path):
    import edge.cli.run
    import edge_serve.cli.serve

    for command, name in ((edge_serve.cli.serve.serve, "model"), (edge.cli.run.run, "draft")):
        (option,) = [option for option in command.params if option.name == name]
        found = option.shell_complete(None, "ti")  # type: ignore[arg-type]
        assert [item.value for item in found] == ["tiny-1.5b-fp16"]


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
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    variable: str,
    words: str,
):
    """On the Hugging Face hub, since other hubs have commits of their own."""
    monkeypatch.setattr("edge.device.telemetry.read_l4t", lambda: None)
    monkeypatch.setenv("EDGE_LLM_HUB", variable)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = edge_llm("pull", "deepseek-r1:7b", *options).err.splitlines()[0] + "\n"
    assert words in line
    assert ("--revision" in words) == ("--revision" in line)

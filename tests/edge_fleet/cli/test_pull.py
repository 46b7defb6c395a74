"""``edge-llm pull``: under which name a model is made, from where, and once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest

from edge.bundle.library import CATALOGUE, find_bundle
from edge.bundle.manifest import Source, read_manifest
from edge_make.manifest_bytes import encode_manifest
from edge_make.published import PUBLISHED, REVISIONS
from tests.command_line import Result, error_line
from tests.edge_fleet.registry.live import SMALL, LiveRegistry, write_bundle
from tests.export.sources.local_server import LocalServer
from tests.export.sources.test_gguf import write_tiny
from tests.export.sources.test_hub import MAIN, Hub
from tests.makers.keys import need_minisign
from tests.makers.quantized_golden import QuantizedGolden, write_base
from tests.makers.tiny_models import write_checkpoint

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
        assert f"{shelf / name} is there already" in edge_llm("pull", checkpoint).err
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
    wrong = error_line(edge_llm("pull", "deepsek-r1:1.5b"), 64)
    assert "neither a hub id (owner/name) nor the name of a model; did you mean deepseek" in wrong
    gemma = error_line(edge_llm("pull", "gemma3:4b"), 64)
    assert "Gemma 3 needs what is missing here: " in gemma
    assert "the nearest in size is qwen3:4b: edge-llm pull qwen3:4b" in gemma
    assert "'8b' could be deepseek-r1:8b (" in error_line(edge_llm("pull", "8b"), 64)


def test_on_a_jetson_fast_builds_with_own_kernels_only(
    edge_llm: EdgeLlm, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Who has the time gets the faster of two engines, by the default of build."""
    checkpoint = tmp_path / "Tiny-Model"
    write_checkpoint(checkpoint, "qwen2")
    made = edge_llm("pull", checkpoint, "--fast")
    assert made.code == 0, made.err
    own = f"$ edge-llm build {shelf / 'tiny-model-int4'} --kernels own\n"
    plain = own.replace(" --kernels own", "")
    assert plain in edge_llm("pull", checkpoint, "--fast", "--build").err
    monkeypatch.setattr("edge_fleet.cli.pull.read_target", lambda: "jetpack7")
    assert own in edge_llm("pull", checkpoint, "--fast", "--build").err
    assert plain in edge_llm("pull", checkpoint, "--build").err


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


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a model of the catalogue, and with what others made of it."""
    root, hub, source = tmp_path_factory.mktemp("hub"), Hub(), CATALOGUE["deepseek-r1:1.5b"]
    (root / "files").mkdir()
    made = write_tiny(root / "made", "qwen2", ggml_type="Q8_0")
    made.rename(root / "files" / "Tiny-Q8_0.gguf")
    hub.snapshots = {
        (source, REVISIONS[source]): write_checkpoint(root / "float", "qwen2"),
        ("owner/Tiny-GGUF", MAIN): root / "files",
        (PUBLISHED[source], MAIN): QuantizedGolden.load("ct-w4a16").write(root / "w4a16"),
    }
    with hub:
        yield hub


def pull_from(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since the hub's client reads the environment when it is loaded."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub.requests.clear()
    return subprocess.run(
        [sys.executable, "-m", "edge.cli", "pull", *arguments],
        env={
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "EDGE_LLM_BUNDLES": str(tmp_path / "kept"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def fetched_weights(hub: Hub) -> set[str]:
    return {path for verb, path in hub.requests if verb == "GET" and "safetensors" in path}


@pytest.mark.live
def test_what_a_pull_takes_is_said_before_it_begins(hub: Hub, tmp_path: Path):
    asked = pull_from(hub, tmp_path, "deepseek-r1:1.5b", "--dry-run")
    assert asked.returncode == 0, asked.stderr
    assert not fetched_weights(hub)
    assert not (tmp_path / "kept").exists()
    first, sooner, *_ = asked.stderr.splitlines()
    assert first.startswith("$ edge-llm export deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B -o ")
    assert "edge-llm pull deepseek-r1:1.5b --fast, or --quant source, which takes RedHat" in sooner
    folder = next(iter(hub.snapshots.values()))
    size = (folder / "model.safetensors").stat().st_size / 1e6
    disk, time = asked.stdout.splitlines()
    assert disk.startswith(f"{size:.1f} MB to download to {tmp_path}/hf/hub; the bundle takes ")
    assert "of disk at the peak" in disk
    assert time == "int4, awq+gptq: expect about 5 s on two cores, measuring included"

    made = pull_from(hub, tmp_path, "deepseek-r1:1.5b", "--fast")
    assert made.returncode == 0, made.stderr
    assert len(fetched_weights(hub)) == 1
    assert f"{size:.1f} MB to download" in made.stderr
    assert made.stderr.count("int4, rtn: expect about 5 s") == 1
    bundle = tmp_path / "kept" / "deepseek-r1-distill-qwen-1.5b-int4"
    assert read_manifest(bundle).quantization.method == "rtn"
    again = pull_from(hub, tmp_path, "deepseek-r1:1.5b")
    assert (
        "is there already, rounded to nearest as by --fast; --force makes it anew" in again.stderr
    )
    cached = pull_from(hub, tmp_path, "deepseek-r1:1.5b", "--force", "--dry-run")
    assert cached.stdout.startswith("already downloaded; the bundle takes about ")


@pytest.mark.live
def test_an_address_with_a_quantization_is_pulled_and_run_by_that_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    address, name = "hf.co/owner/Tiny-GGUF:Q8_0", "tiny-gguf-q8_0-int4"
    for option in (["--hub", "modelscope"], ["--dry-run"]):
        assert pull_from(hub, tmp_path, address, *option).returncode
    monkeypatch.setenv("EDGE_LLM_HUB", "modelscope")  # an address has a hub already
    made = pull_from(hub, tmp_path, address, "--fast", "--no-verify")
    assert made.returncode == 0, made.stderr
    assert made.stderr.startswith(f"$ edge-llm export {address} -o {tmp_path / 'kept' / name} ")
    assert f"edge-llm run {name} " in made.stdout
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "kept"))
    assert find_bundle("https://huggingface.co/owner/Tiny-GGUF:q8_0").name == name
    assert read_manifest(find_bundle(address)).source.location == "Tiny-Q8_0.gguf"


@pytest.mark.slow
def test_a_short_name_means_what_others_quantized_too(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = pull_from(hub, tmp_path, "1.5b", "--quant", "source")
    assert made.returncode == 0, made.stderr
    assert made.stderr.startswith(f"$ edge-llm export {PUBLISHED[CATALOGUE['deepseek-r1:1.5b']]} ")
    assert "--revision" not in made.stderr.splitlines()[0]  # the commits known are another's
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "kept"))
    bundle = find_bundle("deepseek-r1:1.5b")
    assert bundle.name == "deepseek-r1-distill-qwen-1.5b-quantized.w4a16-source"
    manifest = read_manifest(bundle)
    assert manifest.quantization.method == "source"
    layer = manifest.quantization.linears["layers.0.qkv"]
    assert layer.from_source is not None
    assert layer.from_source.treatment == "kept"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRegistry]:
    registry = LiveRegistry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.kill()


@pytest.fixture
def team(live: LiveRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registry of this test's own, and a hub that nobody reaches."""
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    monkeypatch.delenv("EDGE_LLM_TRUSTED_KEYS", raising=False)
    monkeypatch.setattr("edge.bundle.trust.DEFAULT_KEYS", tmp_path / "no-keys")
    place = f"{live.address}/{tmp_path.name.replace('_', '-').lower()}"
    monkeypatch.setenv("EDGE_LLM_REGISTRY", place)
    return place


def export_of(target: Path, model: str, **changes: object) -> Path:
    """A bundle as `pull` would have made it of a hub, but for what an engine would open."""
    write_bundle(target, SMALL)
    source = Source(kind="hub", location=CATALOGUE.get(model, model))
    manifest = msgspec.structs.replace(read_manifest(target), source=source, **changes)
    (target / "manifest.json").write_bytes(encode_manifest(manifest))
    return target


@pytest.mark.live
def test_what_a_team_pushes_is_what_it_pulls(
    edge_llm: EdgeLlm, shelf: Path, team: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Signed, by its short name, without a look at the hub."""
    need_minisign()
    mine = export_of(tmp_path / "mine", "deepseek-r1:1.5b", tensorrt=("10.16",))
    assert edge_llm("bundle", "keygen", tmp_path / "release", "--no-password").code == 0
    assert edge_llm("bundle", "sign", mine, "--key", tmp_path / "release.key").code == 0
    pushed = edge_llm("bundle", "push", mine)
    assert pushed.out.startswith(f"{team}/deepseek-r1@sha256:"), pushed.err
    monkeypatch.setenv("EDGE_LLM_TRUSTED_KEYS", str(tmp_path / "release.pub"))

    asked = edge_llm("pull", "1.5b", "--dry-run")
    assert (asked.code, asked.out) == (0, "")
    assert f"{team}/deepseek-r1:1.5b-int4, signed with " in asked.err
    bundle = shelf / "deepseek-r1-distill-qwen-1.5b-int4"
    assert not bundle.exists()
    for options in ((), ("--force", "--fast"), ("--force", "--from", "registry")):
        pulled = edge_llm("pull", "1.5b", *options)
        assert pulled.code == 0, pulled.err
        assert "edge-llm export" not in pulled.err
        assert "edge-llm run deepseek-r1-distill-qwen-1.5b-int4" in pulled.out
    assert (bundle / "manifest.json").read_bytes() == (mine / "manifest.json").read_bytes()

    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: "38.2")
    assert "1.5b-int4, signed" in edge_llm("pull", "1.5b", "--force", "--dry-run").err
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: "36.4.3")  # TensorRT 10.3
    other = edge_llm("pull", "1.5b", "--force")
    assert f"{team} has no deepseek-r1:1.5b-int4-jetpack6; {team}/deepseek-r1:1.5b-int4 is not " \
        "for jetpack6: taking it from the hub\n$ edge-llm export" in other.err  # fmt: skip
    portable = export_of(
        tmp_path / "jp6", "deepseek-r1:1.5b", dialect="portable", tensorrt=("10.3", "10.16")
    )
    assert edge_llm("bundle", "sign", portable, "--key", tmp_path / "release.key").code == 0
    reference = f"{team}/deepseek-r1:1.5b-int4-jetpack6"  # else the place of the native one
    assert edge_llm("bundle", "push", portable, reference).code == 0
    assert "1.5b-int4-jetpack6, signed" in edge_llm("pull", "1.5b", "--force", "--dry-run").err


@pytest.mark.live
def test_what_is_not_signed_is_neither_taken_nor_exported(
    edge_llm: EdgeLlm, shelf: Path, team: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    need_minisign()
    assert edge_llm("bundle", "push", export_of(tmp_path / "a", "deepseek-r1:7b")).code == 0
    assert edge_llm("bundle", "keygen", tmp_path / "release", "--no-password").code == 0
    monkeypatch.setenv("EDGE_LLM_TRUSTED_KEYS", str(tmp_path / "release.pub"))
    assert "is not signed" in error_line(edge_llm("pull", "deepseek-r1:7b"), 65)
    exported = edge_llm("pull", "deepseek-r1:7b", "--from", "hub")
    assert "trusts keys: nothing here builds or runs the bundle until it is signed" in exported.err


@pytest.mark.live
def test_the_hub_is_next_and_a_line_says_why(
    edge_llm: EdgeLlm, shelf: Path, team: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    missing = f"{team} has no " + ", ".join(
        f"deepseek-r1:7b-int4{suffix}" for suffix in ("", "-jetpack6", "-jetpack7")
    )
    pulled = edge_llm("pull", "deepseek-r1:7b")
    assert pulled.err.startswith(f"{missing}: taking it from the hub\n$ edge-llm export")
    assert f"{missing}; push it" in error_line(edge_llm("pull", "7b", "--from", "registry"), 64)
    assert edge_llm("pull", "7b", "--from", "hub").err.startswith("$ edge-llm export")
    own = edge_llm("pull", "7b", "--kv-capacity", "64").err
    assert own.startswith("--kv-capacity is for an export, so ")
    for option in (["--kv-capacity", "64"], ["--target", "trt11"], ["--fast"]):
        refused = error_line(edge_llm("pull", "7b", *option, "--from", "registry"), 64)
        assert f"exports nothing, so {option[0]} has no effect" in refused
    other = edge_llm("pull", "7b", "--target", "trt11").err
    assert other.startswith("--target is for an export, so ")
    assert edge_llm("pull", "7b", "--target", "jetpack7").err.startswith(f"{team} has no ")
    assert f"{team} has no owner/name:int8, " in (
        edge_llm("pull", "Owner/Name", "--quant", "int8").err
    )
    monkeypatch.setenv("EDGE_LLM_REGISTRY", "http://127.0.0.1:9/team")  # where nothing listens
    monkeypatch.setattr("edge_fleet.registry.client._TRIES", 1)
    gone = edge_llm("pull", "7b").err
    assert gone.startswith("http://127.0.0.1:9 gives no answer (")
    assert ": taking it from the hub\n$ edge-llm export" in gone
    for wrong in ("ftp://127.0.0.1", "Team/Models", "https://"):
        monkeypatch.setenv("EDGE_LLM_REGISTRY", wrong)
        assert f"EDGE_LLM_REGISTRY is {wrong!r}" in error_line(edge_llm("pull", "7b"), 64)
    monkeypatch.delenv("EDGE_LLM_REGISTRY")
    assert "EDGE_LLM_REGISTRY names none" in error_line(
        edge_llm("pull", "7b", "--from", "registry"), 64
    )


@pytest.mark.live
def test_a_quantized_checkpoint_is_found_by_its_hub_id(
    edge_llm: EdgeLlm, shelf: Path, team: str, tmp_path: Path
):
    """In the precision in which it was pushed, and never in another one's directory."""
    source = PUBLISHED[CATALOGUE["deepseek-r1:7b"]]
    rounded = export_of(tmp_path / "rounded", "deepseek-r1:7b")
    assert edge_llm("bundle", "push", rounded).code == 0
    assert "taking it from the hub" in edge_llm("pull", source).err
    quantization = msgspec.structs.replace(read_manifest(rounded).quantization, name="source")
    kept = export_of(tmp_path / "as-published", source, quantization=quantization)
    assert edge_llm("bundle", "push", kept).code == 0
    bundle = shelf / "deepseek-r1-distill-qwen-7b-quantized.w4a16-source"
    for force in ((), ("--force",)):
        pulled = edge_llm("pull", source, *force)
        assert pulled.code == 0, pulled.err
        assert f"run {bundle.name} " in pulled.out
        assert (bundle / "manifest.json").read_bytes() == (kept / "manifest.json").read_bytes()
    assert "7b-source: " in edge_llm("pull", "7b", "--quant", "source", "--force").err
    assert "7b-int4: " in edge_llm("pull", CATALOGUE["deepseek-r1:7b"], "--dry-run").err

    awq = export_of(tmp_path / "awq", "owner/name-awq")
    assert edge_llm("bundle", "push", awq, f"{team}/owner/name-awq:source").code == 0
    mislabelled = edge_llm("pull", "owner/name-awq").err
    assert f"{team}/owner/name-awq:source is in int4: taking it from the hub" in mislabelled
    assert edge_llm("bundle", "push", awq).code == 0
    before = export_of(shelf / "name-awq-source", "owner/name-awq", quantization=quantization)
    assert "taking it from the hub" in edge_llm("pull", "owner/name-awq", "--force").err
    assert read_manifest(before).quantization.name == "source"


@pytest.mark.live
def test_a_registry_that_refuses_the_credentials_says_the_ways_out(
    edge_llm: EdgeLlm, shelf: Path, team: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(request: BaseHTTPRequestHandler) -> None:
        request.send_response(403)
        request.send_header("Content-Length", "0")
        request.end_headers()

    closed = LocalServer()
    monkeypatch.setattr(closed, "answer", refuse)
    with closed:
        monkeypatch.setenv("EDGE_LLM_REGISTRY", f"{closed.url}/team")
        refused = error_line(edge_llm("pull", "7b"), 64)
    assert "refuses the credentials for /v2/" in refused
    assert "docker login" in refused
    assert "--from hub does not ask it, nor does edge-llm without EDGE_LLM_REGISTRY" in refused


@pytest.mark.live
def test_a_bundle_without_a_hub_id_needs_a_name(edge_llm: EdgeLlm, team: str, tmp_path: Path):
    mine = write_bundle(tmp_path / "mine", SMALL)
    assert "was exported from tiny and not from a hub" in error_line(
        edge_llm("bundle", "push", mine), 64
    )

"""Bundles by name."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from edge.bundle.library import (
    CATALOGUE,
    LATEST,
    bundle_directories,
    checkpoint_bundle,
    find_bundle,
    find_setting,
    hub_address,
    roots,
)
from edge.bundle.manifest import Source
from edge.bundle.model_names import bundle_name, hub_id, nearest_model
from edge.cli.options import only_bundle
from edge.errors import BundleError, ConfigError
from edge_make.manifest_bytes import encode_manifest
from tests.makers.manifests import make_manifest

QWEN = "deepseek-r1-distill-qwen-1.5b"
LLAMA = "deepseek-r1-distill-llama-8b"
QWEN3 = "deepseek-r1-0528-qwen3-8b"
R1 = [short for short in CATALOGUE if short.startswith("deepseek-r1:")]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's bundles are, and nobody else's."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "kept"
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(root))
    return root


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").touch()


def test_a_name_that_no_bundle_can_have_is_one_that_is_not_there(root: Path):
    prompt = "Why is the sky blue? " * 20  # where the bundle before it was forgotten
    for find in (find_bundle, lambda name: find_setting(name, Path())):
        with pytest.raises(BundleError, match="no directory Why is"):
            find(prompt)


def test_a_directory_that_is_closed_hides_no_other(root: Path, monkeypatch: pytest.MonkeyPatch):
    make(root, "closed", "mine")
    plain = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if root / "closed" in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert list(bundle_directories()) == [find_bundle("mine")]
    with pytest.raises(BundleError, match="which has mine"):
        find_bundle("closed")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        (f"{QWEN}-int4", f"{QWEN}-int4"),
        ("1.5b", f"{QWEN}-int4"),
        ("1.5B", f"{QWEN}-int4"),
        ("qwen:1.5b", f"{QWEN}-int4"),
        ("deepseek-r1:1.5b", f"{QWEN}-int4"),
        ("deepseek-r1:1.5b-int4", f"{QWEN}-int4"),
        ("deepseek-r1:8b", f"{LLAMA}-int8"),
        ("deepseek-r1:8b-0528", f"{QWEN3}-int4"),
        ("deepseek-r1:8b-0528-int4", f"{QWEN3}-int4"),
        ("llama", f"{LLAMA}-int8"),
        ("r1-llama-8b", f"{LLAMA}-int8"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", f"{QWEN}-int4"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B-INT4", f"{QWEN}-int4"),
        ("mine", "mine"),
        ("llama3.2", "llama-3.2-3b-instruct-int4"),
        ("llama3.2:latest", "llama-3.2-3b-instruct-int4"),
        ("llama3.2:3b-int4", "llama-3.2-3b-instruct-int4"),
        ("Llama-3.2-3B-Instruct", "llama-3.2-3b-instruct-int4"),
        ("qwen3:4b", "qwen3-4b-int4"),
        ("qwen3:4b-instruct", "qwen3-4b-instruct-2507-int4"),
    ],
)
def test_a_name_stands_for_one_bundle(root: Path, name: str, meant: str):
    make(root, f"{QWEN}-int4", f"{LLAMA}-int8", f"{QWEN3}-int4", "mine", "mine-too")
    if name != "llama":
        others = "llama-3.2-3b-instruct-int4", "qwen3-4b-int4", "qwen3-4b-instruct-2507-int4"
        make(root, *others)
    assert find_bundle(name) == root / meant


def test_a_family_alone_means_any_size_that_is_here_before_it_means_its_own(root: Path):
    make(root, "qwen3-4b-int4")
    assert find_bundle("qwen3") == root / "qwen3-4b-int4"
    with pytest.raises(BundleError, match=r"get it with: edge-llm pull qwen3:8b$"):
        find_bundle("qwen3:latest")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf.co/owner/name", "hf.co/owner/name"),
        ("https://huggingface.co/owner/name/", "hf.co/owner/name"),
        ("http://www.huggingface.co/o/n/tree/main", "hf.co/o/n"),
        ("hf.co/o/n-GGUF:Q4_K_M", "hf.co/o/n-GGUF:Q4_K_M"),
        ("owner/name", None),
        ("hf.co/owner", None),
        ("https://huggingface.co/o/n/blob/main/x.gguf", None),
        ("https://example.com/o/n", None),
    ],
)
def test_an_address_of_the_hub(text: str, address: str | None):
    assert hub_address(text) == address


def test_an_address_stands_for_the_bundle_that_a_pull_made_of_it(root: Path):
    names = [bundle_name(f"hf.co/O/N-GGUF:{tag}", "int4") for tag in ("Q8_0", "BF16")]
    assert names == ["n-gguf-q8_0-int4", "n-gguf-bf16-int4"]
    make(root, *names, f"{QWEN}-int4", "n-ggufs-int4")
    for find in (find_bundle, lambda name: find_setting(name, Path())):
        assert find("hf.co/O/N-GGUF:Q8_0") == root / "n-gguf-q8_0-int4"
        assert find("https://huggingface.co/O/N-GGUF:bf16") == root / "n-gguf-bf16-int4"
        assert find(f"hf.co/{CATALOGUE['deepseek-r1:1.5b']}") == root / f"{QWEN}-int4"
        for absent in ("hf.co/O/N", "hf.co/O/N-GGUF:Q4_0"):
            with pytest.raises(BundleError, match=f"get it with: edge-llm pull {absent}$"):
                find(absent)


def test_a_directory_is_itself_whatever_is_kept(root: Path):
    make(root, "mine")
    (here := Path("mine")).mkdir()
    assert find_bundle("mine") == here
    assert find_bundle(str(root / "mine")) == root / "mine"


def test_the_first_root_wins(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tmp_path / "other"
    monkeypatch.setenv("EDGE_LLM_BUNDLES", f"{root}{os.pathsep}{other}")
    make(root, "both")
    make(other, "both", "second")
    assert list(bundle_directories()) == [root / "both", other / "second"]
    assert find_bundle("both") == root / "both"


def test_without_the_variable_here_and_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("EDGE_LLM_BUNDLES", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert roots() == [Path("bundles"), tmp_path / "edge-llm" / "bundles"]


@pytest.mark.usefixtures("homeless")
def test_without_a_home_only_the_working_directory_has_bundles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)  # the checkout has a bundle after scripts/quickstart
    monkeypatch.delenv("EDGE_LLM_BUNDLES", raising=False)
    assert roots() == [Path("bundles")]
    with pytest.raises(BundleError, match="no bundle in bundles; get it with: edge-llm pull"):
        find_bundle("1.5b")


def test_a_name_of_two_shows_both(root: Path):
    make(root, f"{QWEN}-int4", f"{QWEN}-int8")
    with pytest.raises(BundleError, match=r"'1\.5b' fits 2 bundles: .*-int4, .*-int8; give more"):
        find_bundle("1.5b")
    assert find_bundle("1.5b-int8") == root / f"{QWEN}-int8"


@pytest.mark.parametrize("model", ["deepseek-r1:1.5b", "r1-qwen-1.5b", "1.5b"])
def test_the_last_word_tells_int8_from_int8_w8a8(root: Path, model: str):
    make(root, f"{QWEN}-int8", f"{QWEN}-int8-w8a8")
    for quant in ("int8", "int8-w8a8"):
        assert find_bundle(f"{model}-{quant}") == root / f"{QWEN}-{quant}"
    with pytest.raises(BundleError, match="fits 2 bundles"):
        find_bundle(model)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("deepseek-r1:1.5b", "deepseek-r1:1.5b"),
        ("1.5B", "deepseek-r1:1.5b"),
        ("r1-qwen-1.5b", "deepseek-r1:1.5b"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-r1:1.5b"),
        ("deepseek-ai/deepseek-r1-distill-qwen-1.5b", "deepseek-r1:1.5b"),
        ("7b", "deepseek-r1:7b"),
        ("deepseek_r1 7b", "deepseek-r1:7b"),
        ("deepseek-r1:8b", "deepseek-r1:8b"),
        ("r1-llama-8b", "deepseek-r1:8b"),
        ("r1-qwen3-8b", "deepseek-r1:8b-0528"),
        ("r1-0528", "deepseek-r1:8b-0528"),
        ("14b", "deepseek-r1:14b"),
        ("qwen3:4b", "qwen3:4b"),
        ("Qwen3-4B", "qwen3:4b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3:4b-instruct"),
        ("Llama3.2", "llama3.2:3b"),
        ("llama3.2:latest", "llama3.2:3b"),
        ("smollm2", "smollm2:1.7b"),
        # None of these is a model by name.
        *((name, None) for name in ("", "b", "qwen-7b", "llama", "70b", "deepseek", "gemma-7b")),
        *((name, None) for name in ("3b", "4b", "qwen3:5b", "Qwen/qwen3:4b")),
        *(
            (name, None)
            for name in ("deepseek-ai/DeepSeek-R1", "acme/r1-qwen-7b", "r1-qwen-7b-int4")
        ),
    ],
)
def test_a_model_has_many_names(name: str, meant: str | None):
    assert hub_id(name) == (None if meant is None else CATALOGUE[meant])


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("8b", ["deepseek-r1:8b", "deepseek-r1:8b-0528"]),
        ("R1-8B", ["deepseek-r1:8b", "deepseek-r1:8b-0528"]),
        ("r1-qwen", ["deepseek-r1:1.5b", "deepseek-r1:7b", "deepseek-r1:14b", "deepseek-r1:32b"]),
        ("deepseek-r1", R1),
    ],
)
def test_a_name_of_several_models_lists_them(name: str, models: list[str]):
    with pytest.raises(ConfigError, match="could be") as caught:
        hub_id(name)
    listed = re.findall(r"(?<= )(deepseek-r1:\S+) \(([^)]+)\)", str(caught.value))
    assert [short for short, _ in listed] == models
    for short, full in listed:
        assert hub_id(short) == hub_id(full) == CATALOGUE[short]


def test_a_wrong_name_says_the_nearest():
    assert nearest_model("deepsek-r1:1.5B") == "did you mean deepseek-r1:1.5b?"
    assert nearest_model("qwen3:4") == "did you mean qwen3:4b?"
    known = nearest_model("gemma")
    assert known.startswith("known: deepseek-r1:1.5b, :7b, :8b, :8b-0528, :14b, :32b; qwen3:0.6b, ")
    for name in ("deepseek-r1:70b", "gemma3:1b"):  # a model of another size is none
        assert nearest_model(name) == known


def test_what_a_family_alone_means_is_in_the_catalogue():
    families = {short.partition(":")[0] for short in CATALOGUE} - {"deepseek-r1"}
    assert families == LATEST.keys()
    for family, size in LATEST.items():
        assert hub_id(family) == CATALOGUE[f"{family}:{size}"]


def test_a_gguf_file_is_a_checkpoint(root: Path):
    path = Path("My Model.Q8_0.gguf")
    path.touch()
    for find in (find_bundle, lambda name: find_setting(f"./{name}", Path())):
        with pytest.raises(BundleError) as caught:
            find(str(path))
        assert str(caught.value) == (
            f"{path} is a checkpoint: edge-llm export '{path}' -o '{root}/my model.q8_0' --fast, "
            "then edge-llm run 'my model.q8_0'"
        )
    write_bundle(root / "my model.q8_0", path.name)
    with pytest.raises(BundleError, match="with that name is there: edge-llm run 'my model"):
        find_bundle(str(path))
    assert find_bundle("my model.q8_0") == root / "my model.q8_0"


def write_bundle(bundle: Path, location: str) -> None:
    """A manifest that says of what it was made."""
    bundle.mkdir(parents=True, exist_ok=True)
    manifest = make_manifest(source=Source(kind="hub", location=location))
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))


def write_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").touch()
    return directory


def test_the_bundle_of_a_checkpoint_is_never_around_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or an export would replace what it reads."""
    mine = write_checkpoint(root / "mine")
    assert checkpoint_bundle(mine) == root / "mine-int4"
    (mine / "Mine.gguf").touch()
    assert checkpoint_bundle(mine / "Mine.gguf") == root / "mine-int4"
    other = write_checkpoint(tmp_path / "Other")
    (other / "sub").mkdir()
    for here in (other, other / "sub"):
        monkeypatch.chdir(here)
        assert checkpoint_bundle(Path("." if here == other else "..")) == root / "other"


def test_a_checkpoint_is_not_said_to_have_the_bundle_of_another(root: Path):
    path = write_checkpoint(Path("qwen"))
    write_bundle(root / "qwen", "Qwen/Qwen3-8B")
    with pytest.raises(BundleError) as caught:
        find_bundle(str(path))
    assert str(caught.value) == (
        f"qwen is a checkpoint, and {root / 'qwen'} was made of Qwen/Qwen3-8B; "
        "export it with another -o"
    )


def test_the_command_for_a_checkpoint_here_names_its_bundle_by_the_path(root: Path):
    """Its bare name would be that of the checkpoint again."""
    path = write_checkpoint(Path("qwen"))
    for tell in (f"-o {root / 'qwen'} --fast, then", "with that name is there:"):
        with pytest.raises(BundleError) as caught:
            find_bundle(str(path))
        assert str(caught.value).endswith(f"{tell} edge-llm run {root / 'qwen'}")
        write_bundle(root / "qwen", "owner/qwen")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("7b", "edge-llm pull deepseek-r1:7b"),
        ("deepseek-r1:8b", "edge-llm pull deepseek-r1:8b"),
        ("qwen3", "edge-llm pull qwen3:8b"),
        ("qwen3:4b", "edge-llm pull qwen3:4b"),
        ("llama3.2", "edge-llm pull llama3.2:3b"),
        ("gemma", "edge-llm export makes one"),
        ("", "edge-llm export makes one"),
        ("-:", "edge-llm export makes one"),
    ],
)
def test_an_unknown_name_says_what_is_there_and_how_to_get_it(root: Path, name: str, remedy: str):
    make(root, "mine")
    with pytest.raises(BundleError) as caught:
        find_bundle(name)
    assert f"{root}, which has mine" in str(caught.value)
    assert remedy in str(caught.value)


def test_other_files_and_directories_are_no_bundles(root: Path):
    make(root, ".mine.edge-llm-staging")
    (root / "notes").mkdir()
    (root / "file").touch()
    assert list(bundle_directories()) == []
    with pytest.raises(BundleError, match="no bundle in"):
        find_bundle("notes")


def test_every_name_of_the_catalogue_finds_what_pull_writes(root: Path):
    for name, source in CATALOGUE.items():
        assert hub_id(name.upper()) == source
        make(root, bundle_name(source, "int4"))
    for name, source in CATALOGUE.items():
        assert find_bundle(name) == root / bundle_name(source, "int4")
    assert hub_id("mine") is None


def test_a_setting_names_a_bundle_or_a_path(root: Path, tmp_path: Path):
    make(root, f"{QWEN}-int4", "here")
    make(tmp_path / "etc", "here")
    base = tmp_path / "etc"
    assert find_setting("1.5b", base) == root / f"{QWEN}-int4"
    assert find_setting("here", base) == base / "here"  # a directory beside the file wins
    assert find_setting("here", tmp_path) == root / "here"
    assert find_setting("not/yet", base) == base / "not/yet"
    assert find_setting(CATALOGUE["deepseek-r1:1.5b"], base) == root / f"{QWEN}-int4"
    assert find_setting("~/not-yet", base) == Path("~/not-yet").expanduser()
    with pytest.raises(BundleError, match=r"has .*edge-llm export makes one"):
        find_setting("gemma", base)


def test_a_name_is_absolute_in_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Or the configuration that is printed would mean something else in another directory."""
    monkeypatch.delenv("EDGE_LLM_BUNDLES", raising=False)
    monkeypatch.chdir(tmp_path)
    make(Path("bundles"), "mine")
    assert find_setting("mine", Path("/etc/edge-llm")) == tmp_path / "bundles" / "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smolm2", "mine, qwen2-int4, smollm2-135m-int8; did you mean smollm2-135m-int8?"),
        ("SmolLM-135m-int8", "did you mean smollm2-135m-int8?"),
        ("smollm2-135m-int4", "did you mean smollm2-135m-int8?"),
        ("smollm2-360m-int8", "get it with: edge-llm pull smollm2:360m"),
        ("smollm2-500m-int8", "edge-llm export makes one of any checkpoint"),
        ("deepseek-r1:1.5b-int4", "get it with: edge-llm pull deepseek-r1:1.5b"),
        ("qwen3", "get it with: edge-llm pull qwen3:8b"),  # no slip of qwen2
        ("deepseek-r1:1.5b", "get it with: edge-llm pull deepseek-r1:1.5b"),
    ],
)
def test_a_name_with_a_slip_says_the_right_one(root: Path, name: str, said: str):
    make(root, "smollm2-135m-int8", "mine", "qwen2-int4")
    for find in (find_bundle, lambda name: find_setting(name, Path())):
        with pytest.raises(BundleError, match=f"{re.escape(said)}$"):
            find(name)


def test_the_only_bundle_is_meant_where_none_is_named(root: Path):
    with pytest.raises(ConfigError, match=r"give a bundle: there is none in .*; edge-llm pull"):
        only_bundle()
    make(root, "one")
    assert only_bundle() == root / "one"
    make(root, "two")
    with pytest.raises(ConfigError, match=r"of which there are 2: one, two$"):
        only_bundle()

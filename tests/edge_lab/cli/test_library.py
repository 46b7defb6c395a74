"""``edge-llm list`` and ``rm``, and bundles by name in every verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.bundle.manifest import read_manifest
from edge.cli.options import BundlePath
from tests.command_line import Result, error_line

EdgeLlm = Callable[..., Result]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second without a locale
def test_a_name_that_is_no_utf8_is_listed(shelf: Path, errors: str):
    name = b"caf\xe9"
    (shelf / "tiny-1.5b-fp16").rename(shelf / os.fsdecode(name))

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


def test_list_has_names_sizes_and_damage(edge_llm: EdgeLlm, shelf: Path):
    found = edge_llm("list")
    broken, tiny = found.out.splitlines()
    assert broken.startswith("broken")
    assert "damaged: " in broken
    assert tiny.split()[:2] == ["tiny-1.5b-fp16", "fp16"]
    assert "no engine" in tiny
    assert "edge-llm pull NAME, of deepseek-r1:1.5b, :7b," in found.err
    listed = json.loads(edge_llm("list", "--json").out)
    assert [bundle["name"] for bundle in listed["bundles"]] == ["broken", "tiny-1.5b-fp16"]
    sizes = read_manifest(shelf / "tiny-1.5b-fp16").files.values()
    assert listed["bundles"][1]["num_bytes"] == sum(file.num_bytes for file in sizes)


def test_list_of_nothing(edge_llm: EdgeLlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "none"))
    assert edge_llm("list").out == f"no bundle in {tmp_path / 'none'}\n"


def test_every_verb_takes_a_name(edge_llm: EdgeLlm, shelf: Path):
    named = edge_llm("inspect", "1.5b", "--json")
    assert named.code == 0
    assert named.out == edge_llm("inspect", shelf / "tiny-1.5b-fp16", "--json").out
    for verb in ("run", "chat", "serve", "bench", "verify", "build", "check", "watch", "doctor"):
        assert "which has broken, tiny-1.5b-fp16" in error_line(edge_llm(verb, "gemma"), 65)


def test_a_file_is_no_bundle(edge_llm: EdgeLlm, shelf: Path):
    path = shelf / "tiny-1.5b-fp16" / "manifest.json"
    assert "is a file; a bundle is a directory" in edge_llm("run", path, "hello").err


def test_names_complete(shelf: Path):
    complete = BundlePath().shell_complete
    assert [item.value for item in complete(None, None, "ti")] == ["tiny-1.5b-fp16"]  # type: ignore[arg-type]
    (other,) = complete(None, None, "./x")  # type: ignore[arg-type]
    assert other.type == "dir"


def test_rm_removes_the_whole_bundle_and_no_other(edge_llm: EdgeLlm, shelf: Path):
    removed = edge_llm("rm", "1.5b", "--yes")
    assert removed.code == 0
    assert removed.out.startswith(f"removed {shelf / 'tiny-1.5b-fp16'}, ")
    assert [path.name for path in shelf.iterdir()] == ["broken"]
    assert edge_llm("rm", "broken", "--yes").code == 0
    assert list(shelf.iterdir()) == []


def test_rm_takes_the_adapters_along(edge_llm: EdgeLlm, shelf: Path, tmp_path: Path):
    """And none of what a link among them leads to."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_bytes(b"x")
    for bundle in ("tiny-1.5b-fp16", "broken"):
        (shelf / f"{bundle}.adapters" / "legal").mkdir(parents=True)
        (shelf / f"{bundle}.adapters" / "legal" / "weights").write_bytes(bytes(5_000_000))
        (shelf / f"{bundle}.adapters" / "linked").symlink_to(tmp_path / "outside")
    asked = error_line(edge_llm("rm", "1.5b"), 64)
    assert f"tiny-1.5b-fp16 and {shelf / 'tiny-1.5b-fp16.adapters'} needs --yes" in asked
    removed = edge_llm("rm", "1.5b", "--yes")
    assert int(removed.out.split(", ")[1].split()[0]) >= 5
    assert sorted(path.name for path in shelf.iterdir()) == ["broken", "broken.adapters"]
    assert (tmp_path / "outside" / "kept").is_file()
    (shelf / "broken.adapters").rename(tmp_path / "moved")
    (shelf / "broken.adapters").symlink_to(tmp_path / "moved")
    assert edge_llm("rm", "broken", "--yes").code == 0
    assert list(shelf.iterdir()) == []
    assert (tmp_path / "moved" / "legal" / "weights").is_file()


def test_rm_asks_and_touches_only_bundles(edge_llm: EdgeLlm, shelf: Path):
    assert "needs --yes where" in error_line(edge_llm("rm", "1.5b"), 64)
    (shelf / "notes").mkdir()
    assert "is no bundle" in error_line(edge_llm("rm", shelf / "notes", "--yes"), 65)
    (shelf / "link").symlink_to(shelf / "tiny-1.5b-fp16")
    assert "is a link to" in error_line(edge_llm("rm", shelf / "link", "--yes"), 65)
    assert (shelf / "notes").is_dir()
    assert (shelf / "tiny-1.5b-fp16" / "manifest.json").is_file()


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
    shelf: Path,
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
    assert (shelf / "tiny-1.5b-fp16").is_dir() == is_left


def test_rm_says_what_it_could_not_remove(
    edge_llm: EdgeLlm, shelf: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", "engine.plan")

    monkeypatch.setattr("edge_lab.cli.library.shutil.rmtree", refuse)
    error = error_line(edge_llm("rm", "1.5b", "--yes"), 64)
    assert "Permission denied (engine.plan)" in error
    [left] = [path for path in shelf.iterdir() if path.name.endswith(".removed")]
    assert f"what is left of it is in {left}" in error


def test_options_take_names(edge_llm: EdgeLlm, shelf: Path, tmp_path: Path):
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
    assert named.out == edge_llm("plan", shelf / "tiny-1.5b-fp16", "--json").out


def test_options_complete_names(shelf: Path):
    import edge.cli.run
    import edge_serve.cli.serve

    for command, name in ((edge_serve.cli.serve.serve, "model"), (edge.cli.run.run, "draft")):
        (option,) = [option for option in command.params if option.name == name]
        found = option.shell_complete(None, "ti")  # type: ignore[arg-type]
        assert [item.value for item in found] == ["tiny-1.5b-fp16"]

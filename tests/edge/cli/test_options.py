"""What verbs share: a bundle by its name, and a GGUF file in place of one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.bundle.manifest import read_manifest
from tests.command_line import Result, error_line
from tests.export.sources.test_gguf import write_tiny
from tests.tiny_models import write_checkpoint

EdgeLlm = Callable[..., Result]


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "kept"))
    return write_tiny(tmp_path, "qwen2")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody sits at standard input."""
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)


def bundle_of(gguf: Path, tmp_path: Path) -> Path:
    return tmp_path / "kept" / gguf.stem.lower()


def line_of(gguf: Path, tmp_path: Path) -> str:
    bundle = bundle_of(gguf, tmp_path)
    return f"edge-llm export {gguf} -o {bundle} --fast, then edge-llm run {bundle.name}"


@pytest.mark.parametrize("verb", ["run", "chat", "serve", "bench", "inspect"])
def test_a_gguf_file_says_how_it_becomes_a_bundle(
    edge_llm: EdgeLlm, gguf: Path, tmp_path: Path, verb: str
):
    line = error_line(edge_llm(verb, gguf), 65)
    assert line.endswith(f"{gguf} is a checkpoint: {line_of(gguf, tmp_path)}")


@pytest.mark.parametrize("verb", ["run", "serve"])
def test_a_directory_of_safetensors_says_it_too(edge_llm: EdgeLlm, tmp_path: Path, verb: str):
    directory = write_checkpoint(tmp_path / "Tiny-R1", "qwen2")
    line = error_line(edge_llm(verb, directory), 65)
    assert f"{directory} is a checkpoint: edge-llm export {directory} -o " in line
    assert line.endswith("tiny-r1 --fast, then edge-llm run tiny-r1")


@pytest.mark.usefixtures("terminal")
def test_who_says_no_gets_the_line_and_no_bundle(edge_llm: EdgeLlm, gguf: Path, tmp_path: Path):
    for verb in ("run", "chat", "serve"):
        refused = edge_llm(verb, gguf, stdin="n\n")
        assert (refused.code, refused.out) == (65, "")
        assert "int4, rtn: expect about 5 s on two cores\n" in refused.err
        assert f"Export it to {bundle_of(gguf, tmp_path)} now? [Y/n]" in refused.err
        assert line_of(gguf, tmp_path) in refused.err
    asked = edge_llm("bench", gguf, stdin="y\n")  # which measures what is there
    assert "[Y/n]" not in asked.err
    assert not (tmp_path / "kept").exists()


@pytest.mark.usefixtures("terminal")
def test_who_says_yes_gets_an_answer(
    edge_llm: EdgeLlm, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: "36.4.3")
    answered = edge_llm("run", gguf, "hello", "--max-tokens", "4", "--json", stdin="\n")
    assert answered.code == 0, answered.err
    assert set(json.loads(answered.out)) == {"text", "reasoning", "finish_reason", "stats"}
    bundle = bundle_of(gguf, tmp_path)
    assert "10.3" in (read_manifest(bundle).tensorrt or ())
    assert read_manifest(bundle).quantization.method == "rtn"
    again = edge_llm("run", gguf, "hello", stdin="y\n")
    assert error_line(again, 65).endswith(f"its bundle is there: edge-llm run {bundle.name}")
    command = again.err.rpartition(": ")[2]
    assert edge_llm(*shlex.split(command)[1:], "hello", "--max-tokens", "4").code == 0

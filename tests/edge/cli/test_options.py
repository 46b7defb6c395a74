"""What verbs share: a bundle by its name, and a GGUF file in place of one."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.bundle.manifest import read_manifest
from tests.command_line import Result, error_line
from tests.export.sources.test_gguf import write_tiny

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
    return f"edge-llm export {gguf} -o {bundle}, then edge-llm run {bundle.name}"


@pytest.mark.parametrize("verb", ["run", "chat", "serve", "bench", "inspect"])
def test_a_gguf_file_says_how_it_becomes_a_bundle(
    edge_llm: EdgeLlm, gguf: Path, tmp_path: Path, verb: str
):
    line = error_line(edge_llm(verb, gguf), 65)
    assert line.endswith(f"{gguf} is a checkpoint: {line_of(gguf, tmp_path)}")


@pytest.mark.usefixtures("terminal")
def test_nobody_is_asked_by_serve_or_answers_no(edge_llm: EdgeLlm, gguf: Path, tmp_path: Path):
    served = edge_llm("serve", gguf, stdin="y\n")
    assert "[y/N]" not in served.err
    assert served.err.endswith(line_of(gguf, tmp_path) + "\n")
    for verb in ("run", "chat"):
        for answer in ("\n", "n\n"):
            refused = edge_llm(verb, gguf, stdin=answer)
            assert refused.code == 65
            assert f"Export it to {bundle_of(gguf, tmp_path)} now? [y/N]" in refused.err
            assert line_of(gguf, tmp_path) in refused.err
    assert not (tmp_path / "kept").exists()


@pytest.mark.usefixtures("terminal")
def test_who_says_yes_gets_an_answer(
    edge_llm: EdgeLlm, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: "36.4.3")
    answered = edge_llm("run", gguf, "hello", "--max-tokens", "4", stdin="y\n")
    assert answered.code == 0, answered.err
    bundle = bundle_of(gguf, tmp_path)
    assert "10.3" in (read_manifest(bundle).tensorrt or ())
    again = edge_llm("run", gguf, "hello", stdin="y\n")
    assert error_line(again, 65).endswith(f"its bundle is there: edge-llm run {bundle.name}")
    command = again.err.rpartition(": ")[2]
    assert edge_llm(*shlex.split(command)[1:], "hello", "--max-tokens", "4").code == 0

"""What verbs share: a bundle by its name, and a GGUF file in place of one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from edge.bundle.manifest import read_manifest
from edge.cli import cli
from edge_serve.settings import ServerSettings
from tests.command_line import Result, error_line
from tests.conftest import Bundles
from tests.export.sources.test_gguf import write_tiny
from tests.makers.tiny_models import write_checkpoint

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
    assert error_line(again, 65).endswith(f"with that name is there: edge-llm run {bundle.name}")
    command = again.err.rpartition(": ")[2]
    assert edge_llm(*shlex.split(command)[1:], "hello", "--max-tokens", "4").code == 0


def kept(tmp_path: Path, bundle: Path, *names: str) -> None:
    for name in names:
        (tmp_path / "kept" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "kept" / name).symlink_to(bundle)


def test_the_only_bundle_need_not_be_named(
    edge_llm: EdgeLlm,
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "kept"))
    nothing = f"give a bundle: there is none in {tmp_path / 'kept'}; edge-llm pull"
    for verb in ("run", "chat", "serve"):
        assert nothing in error_line(edge_llm(verb, stdin="hello"), 64)
    kept(tmp_path, tiny_bundles("qwen2"), "first")
    for verb in ("run", "chat"):
        answered = edge_llm(verb, "--max-tokens", "4", stdin="hello\n")
        assert answered.code == 0, answered.err
        said = "edge-llm: first, the only bundle here\n"
        assert answered.err.startswith(said)
        assert edge_llm(verb, "first", "--max-tokens", "4", stdin="hello\n").err.find(said) == -1
    kept(tmp_path, tiny_bundles("qwen2"), "second")
    for verb in ("run", "chat", "serve"):
        line = error_line(edge_llm(verb, stdin="hello"), 64)
        assert line.endswith("give the name of a bundle, of which there are 2: first, second")


def test_a_question_alone_is_for_the_only_bundle(
    edge_llm: EdgeLlm, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "kept"))
    options = ("--max-tokens", "4", "--temperature", "0", "--json")
    kept(tmp_path, tiny_bundles("qwen2"), "my first")
    for question in ("hello world", "hello?", "why is that in /etc or a/b here", "\u4f60\u597d"):
        answered = edge_llm("run", question, *options)
        assert answered.err.startswith("edge-llm: my first, the only bundle here\n")
        named = edge_llm("run", "my first", question, *options)
        assert (answered.code, named.code) == (0, 0)
        assert text_of(answered) == text_of(named)
    for name in ("hello", "qwen3:8b", "./my model", "~/models/my model"):
        line = error_line(edge_llm("run", name, *options), 65)
        assert f"no directory {name} and no bundle" in line
        assert line.endswith("(for a prompt of one word: edge-llm run 'my first' \"...\")")
    (tmp_path / "a file").touch()
    assert "is a file" in error_line(edge_llm("run", tmp_path / "a file"), 65)
    kept(tmp_path, tiny_bundles("qwen2"), "second")
    assert "no directory hello world and no" in error_line(edge_llm("run", "hello world"), 65)


def text_of(answered: Result) -> str:
    found: dict[str, str] = json.loads(answered.out)
    return found["reasoning"] + found["text"]


@pytest.mark.parametrize("verb", ["run", "chat", "serve", "bench"])
def test_the_shell_completes_the_names_of_bundles(
    verb: str, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "kept"))
    complete = ShellComplete(cli, {}, "edge-llm", "_EDGE_LLM_COMPLETE").get_completions
    assert [(item.value, item.type) for item in complete([verb], "fi")] == [("fi", "dir")]
    kept(tmp_path, tiny_bundles("qwen2"), "first", "second")
    assert [item.value for item in complete([verb], "fi")] == ["first"]


def test_serve_takes_the_only_bundle_unless_a_file_names_one(
    edge_llm: EdgeLlm,
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    served: list[ServerSettings] = []
    monkeypatch.setattr("edge_serve.run.serve", lambda settings, reread: served.append(reread()))
    monkeypatch.setattr("edge_serve.observe.logs.configure_logging", lambda *_: None)
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "kept"))
    kept(tmp_path, tiny_bundles("qwen2"), "first")
    assert "first, the only bundle here" in edge_llm("serve").err
    (tmp_path / "serve.toml").write_text(f'model = {{mine = "{tmp_path / "kept" / "first"}"}}\n')
    assert edge_llm("serve", "--config", tmp_path / "serve.toml").err == ""
    bundle = tiny_bundles("qwen2")
    assert [list(each.model) for each in served] == [[bundle.name], ["mine"]]
    assert served[0].default_model == bundle.name


def test_a_bundle_that_loads_is_shown_on_terminals_only(
    edge_llm: EdgeLlm, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    ask = ("run", tiny_bundles("qwen2"), "hello", "--max-tokens", "4", "--no-stats")
    assert "loading" not in edge_llm(*ask).err
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert "loading" not in edge_llm(*ask).err
    monkeypatch.setenv("TERM", "xterm")
    shown = edge_llm(*ask)
    assert f"checking and loading {tiny_bundles('qwen2').name}" in shown.err
    assert "loading" not in shown.out

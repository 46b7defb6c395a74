"""The help: what it shows, in which order, and what it loads for that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import get_args

import click
import pytest
from click.testing import CliRunner

import edge.cli
from edge.cli import COMMAND_GROUP, cli
from edge.cli.sections import SectionCommand, SectionOption
from edge.cli.verbs import GROUPS
from edge.engine_config import EngineConfig
from edge.runtime.sampling_params import KNOBS, SamplingParams
from edge.settings_fields import Section, field_sections

ENTRIES = {entry.name: entry for entry in entry_points(group=COMMAND_GROUP)}
HEAVY = {
    "numpy", "rich", "starlette", "onnxruntime", "uvicorn", "h11", "tensorrt",
    "tokenizers", "onnx", "safetensors", "huggingface_hub", "prometheus_client", "cryptography",
}  # fmt: skip
# Runs the command with each list of arguments, and prints what was loaded after all of them.
_CHILD = """
import contextlib, io, json, sys
from edge.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["edge-llm", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            assert end.code == 0, (arguments, end.code)
    assert "Usage: edge-llm" in out.getvalue()
print(json.dumps(sorted(sys.modules)))
"""


def loaded(*commands: list[str]) -> set[str]:
    """The modules of a new process after these commands."""
    child = [sys.executable, "-c", _CHILD, json.dumps(commands)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


Verb = tuple[tuple[str, ...], click.Command]


def walk(path: tuple[str, ...], command: click.Command) -> Iterator[Verb]:
    """A verb and all below it."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from walk((*path, name), below)


def verbs() -> list[Verb]:
    """Every verb and what is below it."""
    return [each for name in ENTRIES for each in walk((name,), ENTRIES[name].load())]


def test_every_verb_has_a_line_in_a_group():
    shown = [name for lines in GROUPS.values() for name in lines]
    assert sorted(shown) == sorted(ENTRIES)  # each once
    assert list(GROUPS) == [
        "Get a model", "Use it", "Serve it", "Measure it", "Ship it", "Get help",
    ]  # fmt: skip
    for lines in GROUPS.values():
        for line in lines.values():
            assert 0 < len(line) <= 60
            assert line[0].isupper()
            assert line[-1] != "."


def test_the_help_shows_the_groups_and_loads_no_verb():
    text = CliRunner().invoke(cli, ["--help"]).output
    at = [text.index(f"\n{title}:\n") for title in GROUPS]
    assert at == sorted(at)
    for lines in GROUPS.values():
        for name, line in lines.items():
            assert any(row.split(maxsplit=1) == [name, line] for row in text.splitlines())
    assert "Other:" not in text
    modules = {entry.module for entry in ENTRIES.values()}
    assert loaded(["--help"]) & modules == set()


def test_a_verb_of_another_package_is_shown_with_its_own_help(monkeypatch: pytest.MonkeyPatch):
    plug_in = EntryPoint("frob", f"{__name__}:frob", COMMAND_GROUP)
    known = list(ENTRIES.values())

    def found(*, group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == COMMAND_GROUP
        return [each for each in [*known, plug_in] if name in (None, each.name)]

    monkeypatch.setattr(edge.cli, "entry_points", found)
    text = CliRunner().invoke(cli, ["--help"]).output
    others = text.partition("\nOther:\n")[2].split("\n\n")[0].splitlines()
    assert [line.split(maxsplit=1) for line in others] == [["frob", "Frobnicate bundles."]]


@click.command()
def frob() -> None:
    """Frobnicate bundles."""


@pytest.mark.parametrize("name", ENTRIES)
def test_no_help_loads_what_only_the_work_needs(name: str):
    commands = []
    for path, command in walk((name,), ENTRIES[name].load()):
        commands.append([*path, "--help"])
        if isinstance(command, SectionCommand):
            commands.append([*path, "--help-all"])
    tops = {module.partition(".")[0] for module in loaded(*commands)}
    assert tops & HEAVY == set()


def test_no_line_of_a_list_of_commands_is_cut():
    for path, command in verbs():
        if isinstance(command, click.Group):
            text = show(*path, "--help")
            assert set(command.commands) <= set(re.findall(r"^  ([a-z]+) ", text, re.MULTILINE))
            assert "..." not in text.partition("\nCommands:\n")[2]


# --------------------------------------------------------------------------- sections


def show(*arguments: str) -> str:
    """What the command prints."""
    return CliRunner().invoke(cli, arguments, prog_name="edge-llm").output


def titles(text: str) -> list[str]:
    """The headings of a help."""
    return [line[:-1] for line in text.splitlines() if line[:1].isalpha() and line[-1] == ":"]


@pytest.mark.parametrize(
    ("path", "command"),
    [each for each in verbs() if isinstance(each[1], SectionCommand)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_shows_most_and_help_all_everything(path: tuple[str, ...], command: click.Command):
    options = [each for each in command.params if isinstance(each, click.Option)]
    assert all(isinstance(each, SectionOption) for each in options), "each option has a section"
    short, whole = (show(*path, flag) for flag in ("--help", "--help-all"))
    of_experts = 0
    for each in options:
        assert isinstance(each, SectionOption)
        name = re.compile(rf"^  {re.escape(each.opts[0])}(?![\w-])", re.MULTILINE)
        assert name.search(whole)
        assert bool(name.search(short)) == (each.section != "Expert")
        of_experts += each.section == "Expert"
    left = f"\n{of_experts} more options: edge-llm {' '.join(path)} --help-all\n"
    assert (left in short) == (of_experts > 0)
    order = [title for title in get_args(Section) if title in titles(whole)]
    assert titles(whole) == order
    assert titles(short) == [title for title in order if title != "Expert"]


@pytest.mark.parametrize(
    "name",
    ["run", "chat", "embed", "batch", "serve", "export", "build", "check", "bench", "eval",
     "verify", "plan", "recommend", "watch"],
)  # fmt: skip
def test_long_verbs_have_sections(name: str):
    assert isinstance(ENTRIES[name].load(), SectionCommand)


def test_every_option_of_the_engine_and_of_sampling_has_one_section():
    """A field of the engine without one would be no option of any verb."""
    engine = [field.name for field in fields(EngineConfig)]
    for cls, names in ((EngineConfig, engine), (SamplingParams, [*KNOBS, "stop"])):
        listed = [name for section in cls.SECTIONS.values() for name in section]
        assert sorted(listed) == sorted(names)
        assert field_sections(cls).keys() == set(names)

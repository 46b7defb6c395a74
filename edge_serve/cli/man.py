"""``edge-llm man``: the manual page, made from the verbs' own help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import click

import edge
from edge.bundle.engine_records import BUILDERS_VARIABLE, RECORDS_VARIABLE
from edge.bundle.library import BUNDLES_VARIABLE
from edge.bundle.trust import KEYS_VARIABLE
from edge.cli import COMMAND_GROUP, cli
from edge.cli.settings_options import default_text, option_texts
from edge.errors import EXIT_GATE_MISSED, EdgeError
from edge_serve.config_file import DEFAULT_FILE, ENV_PREFIX
from edge_serve.settings import ServerSettings, keys_without_option

_ENVIRONMENT = {
    BUNDLES_VARIABLE: "Directories of bundles, separated as in PATH.",
    f"{ENV_PREFIX}*": "Settings of the service, by their keys in capitals.",
    KEYS_VARIABLE: "File of public keys; a bundle that none of them has signed is not opened.",
    RECORDS_VARIABLE: "Directory where build records its engines; see docs/bundles.md.",
    BUILDERS_VARIABLE: "Users whose records of engines count, besides root's and one's own.",
    "EDGE_LLM_HUB": "huggingface or modelscope: where pull and export download from.",
    "EDGE_LLM_REGISTRY": "Registry where pull looks for bundles first; see docs/bundles.md.",
    "HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE": "As for the Hugging Face hub's own client.",
    "MODELSCOPE_DOMAIN": "Another host of ModelScope.",
    "EDGE_LLM_TRACEBACK": "If set, an error shows its traceback.",
    "NO_COLOR": "If set, chat shows answers as plain text.",
}
_SETTINGS = (
    "The options of edge-llm serve are keys of its file of settings, too, with _ for -. "
    "These keys have no option:"
)
_ALL_CODES = {
    0: "Success.",
    EXIT_GATE_MISSED: "A threshold or wish was missed.",
    130: "Interrupted.",
}


@click.command()
def man() -> None:
    """Print the manual page, for man -l -."""
    click.echo(man_page(), nl=False)


def man_page() -> str:
    """Write the page in roff's man macros.

    It does not depend on the machine or on click's own layout, so that two builds of
    a release have the same page.
    """
    lines = [
        f'.TH EDGE\\-LLM 1 "" "edge\\-llm {edge.__version__}" "User Commands"',
        ".SH NAME",
        f"edge\\-llm \\- {_escaped(_lower_first(cli.help or ''))}",
        ".SH SYNOPSIS",
        ".B edge\\-llm",
        ".I COMMAND",
        "[OPTION...] [ARGUMENT...]",
        ".SH DESCRIPTION",
        *_paragraphs(cli.help or ""),
        ".PP",
        *_paragraphs(cli.epilog or ""),
        ".SH COMMANDS",
    ]
    for entry in sorted(entry_points(group=COMMAND_GROUP), key=lambda entry: entry.name):
        lines += _command(entry.name, entry.load())
    texts = option_texts(ServerSettings)
    lines += [".SH SETTINGS", *_paragraphs(_SETTINGS)]
    fields = ServerSettings.__dataclass_fields__
    keys = keys_without_option()
    lines += _list({key: f"{texts[key]}{default_text(fields[key])}" for key in keys})
    lines += [".SH ENVIRONMENT", *_list(_ENVIRONMENT), ".SH FILES"]
    lines += _list({str(DEFAULT_FILE): "Settings of the service."})
    lines += [".SH EXIT STATUS", *_list({str(code): text for code, text in _exit_codes().items()})]
    return "\n".join(lines) + "\n"


def _exit_codes() -> dict[int, str]:
    """Collect exit codes with their meanings, for errors from the docstrings of their classes."""
    codes = {code: [text] for code, text in _ALL_CODES.items()}
    for error in EdgeError.__subclasses__():
        summary = (inspect.getdoc(error) or "").partition("\n")[0]
        codes.setdefault(error.exit_code, []).append(summary)
    return {code: " ".join(texts) for code, texts in sorted(codes.items())}


def _command(name: str, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        for verb, each in sorted(command.commands.items()):
            yield from _command(f"{name} {verb}", each)
        return
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([name, "[OPTION...]", *map(_argument, arguments)])
    yield f".SS {_escaped(usage)}"
    yield from _paragraphs(command.help or "")
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            yield ".TP"
            yield f".B {_escaped(_option(option))}"
            text = option.help or ""
            if option.show_default and isinstance(option.default, str | int | float):
                text += f" [default: {option.default}]"
            yield from _paragraphs(text)


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    if argument.nargs == -1 and "..." not in name:
        name += "..."
    return name if argument.required else f"[{name}]"


def _option(option: click.Option) -> str:
    names = ", ".join(option.opts)
    if option.secondary_opts:
        return f"{names}, {', '.join(option.secondary_opts)}"
    if option.is_flag or option.count:
        return names
    return f"{names} {option.metavar or _kind(option.type)}"


def _kind(kind: Any) -> str:
    if isinstance(kind, click.Choice):
        return "|".join(map(str, kind.choices))
    return str(kind.name).upper().partition(" ")[0]


def _list(entries: dict[str, str]) -> Iterator[str]:
    for name, text in entries.items():
        yield ".TP"
        yield f".B {_escaped(name)}"
        yield from _paragraphs(text)


def _paragraphs(text: str) -> Iterator[str]:
    """Write text as lines of roff, with a macro between its paragraphs."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(text.replace("\b", "")).strip())
    for number, part in enumerate(parts):
        if number:
            yield ".PP"
        line = _escaped(" ".join(part.split()))
        yield f"\\&{line}" if line.startswith((".", "'")) else line


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
